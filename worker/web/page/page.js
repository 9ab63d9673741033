// The playground: sends two files to the worker, shows how far it is, and the video beside its source.
"use strict";

const by = (id) => document.getElementById(id);
const chosen = { source: null, audio: null };
const kindOf = { source: "video", audio: "audio" };
const stages = {
  upload_here: "Sending the files", download: "Fetching the files", validation: "Checking the files",
  preprocessing: "Finding the face", inference: "Drawing the mouth",
  postprocessing: "Finishing the video", upload: "Storing the video",
};
let running = null;
const urls = {};

function show(id, visible = true) { by(id).hidden = !visible; }
function key() { return sessionStorage.getItem("key") || ""; }
function headers() { return key() ? { "X-Internal-API-Key": key() } : {}; }
function url(name, blob) {
  if (urls[name]) URL.revokeObjectURL(urls[name]);
  urls[name] = URL.createObjectURL(blob);
  return urls[name];
}

function choose(name, file) {
  if (!file) return;
  chosen[name] = file;
  // What was dropped or fetched shows in the field, too.
  const holder = new DataTransfer();
  holder.items.add(file);
  by(name).files = holder.files;
  by(`${name}-name`).textContent = `${file.name}, ${(file.size / 1e6).toFixed(1)} MB`;
  by(`${name}-drop`).classList.add("full");
  const address = url(name, file);
  if (name === "audio") {
    by("audio-view").src = address;
    show("audio-view");
    return;
  }
  const still = file.type.startsWith("image/");
  show("source-view", !still);
  show("source-still", still);
  by(still ? "source-still" : "source-view").src = address;
}

for (const name of ["source", "audio"]) {
  by(name).addEventListener("change", (event) => choose(name, event.target.files[0]));
  const drop = by(`${name}-drop`);
  drop.addEventListener("dragover", (event) => { event.preventDefault(); drop.classList.add("over"); });
  drop.addEventListener("dragleave", () => drop.classList.remove("over"));
  drop.addEventListener("drop", (event) => {
    event.preventDefault();
    drop.classList.remove("over");
    choose(name, event.dataTransfer.files[0]);
  });
}

by("use-demo").addEventListener("click", async () => {
  try {
    for (const [name, file] of [["source", "avatar.mp4"], ["audio", "speech.flac"]]) {
      const answer = await fetch(`/playground/demo/${file}`);
      if (!answer.ok) throw new Error(answer.statusText);
      choose(name, new File([await answer.blob()], file, { type: answer.headers.get("Content-Type") }));
    }
  } catch { failed("The demo pair could not be loaded", "The worker did not answer.", "Is it still running?"); }
});

// -- options: a field for each parameter of the API's own document --

async function buildOptions() {
  const answer = await fetch("/openapi.json", { headers: headers() });
  if (answer.status === 401) { show("key-row"); return; }
  const params = (await answer.json()).components.schemas.Job.properties.params.properties;
  by("options").replaceChildren(...Object.entries(params).map(([name, schema]) => field(name, schema)));
}

function field(name, schema) {
  const row = document.createElement("div");
  const label = document.createElement("label");
  label.htmlFor = `param-${name}`;
  label.textContent = name.replaceAll("_", " ");
  const input = document.createElement(schema.enum ? "select" : "input");
  input.id = `param-${name}`;
  input.dataset.param = name;
  if (schema.enum) {
    input.append(new Option("default", ""), ...schema.enum.filter(Boolean).map((value) => new Option(value, value)));
  } else if (schema.type.includes("array")) {
    input.placeholder = "x0, y0, x1, y1";
    input.dataset.list = "1";
  } else {
    Object.assign(input, { type: "number", placeholder: "default", min: schema.minimum, max: schema.maximum });
    input.step = schema.type.includes("integer") ? 1 : "any";
  }
  const hint = document.createElement("span");
  hint.className = "hint";
  hint.id = `hint-${name}`;
  hint.textContent = schema.description;
  input.setAttribute("aria-describedby", hint.id);
  row.append(label, input, hint);
  return row;
}

function params() {
  const given = {};
  for (const input of document.querySelectorAll("[data-param]")) {
    const text = input.value.trim();
    if (!text) continue;
    if (input.dataset.list) given[input.dataset.param] = text.split(/[\s,]+/).map(Number);
    else given[input.dataset.param] = input.type === "number" ? Number(text) : text;
  }
  return given;
}

// -- a job --

by("form").addEventListener("submit", (event) => {
  event.preventDefault();
  if (running) return;
  if (by("key").value) sessionStorage.setItem("key", by("key").value);
  show("failure", false);
  show("result", false);
  const missing = ["source", "audio"].filter((name) => !chosen[name]);
  if (missing.length) {
    failed(missing.length === 2 ? "Two files are needed" : "One file is missing",
      `Choose ${missing.map((name) => (name === "source" ? "a face" : "a speech")).join(" and ")}, or use the demo pair.`, "");
    by(missing[0]).focus();
    return;
  }
  start();
});

function start() {
  const id = `playground-${crypto.randomUUID ? crypto.randomUUID() : Math.random().toString(16).slice(2)}`;
  const body = new FormData();
  body.append("musetalk_job_id", id);
  body.append("params", JSON.stringify(params()));
  body.append("source", chosen.source);
  body.append("audio", chosen.audio);
  const request = new XMLHttpRequest();
  request.open("POST", "/generate");
  for (const [name, value] of Object.entries(headers())) request.setRequestHeader(name, value);
  request.upload.addEventListener("progress", (event) => showProgress("upload_here", event.loaded, event.total));
  request.addEventListener("load", () => ended(request));
  request.addEventListener("error", () => {
    stop();
    failed("The worker cannot be reached", "The connection broke before an answer came.",
      "Is the worker still running? It also closes the connection when files are too large.");
  });
  running = { id, request, timer: setInterval(() => poll(id), 400) };
  show("progress");
  show("cancel");
  by("go").disabled = by("use-demo").disabled = by("cancel").disabled = false;
  by("go").disabled = true;
  showProgress("upload_here", 0, 1);
  request.send(body);
}

function stop() {
  clearInterval(running.timer);
  running = null;
  show("progress", false);
  show("cancel", false);
  by("go").disabled = false;
}

async function poll(id) {
  try {
    const answer = await fetch(`/generate/${id}`, { headers: headers() });
    if (!answer.ok || !running || running.id !== id) return;
    const now = await answer.json();
    if (running && running.id === id) showProgress(now.stage, now.done, now.total);
  } catch { /* The request of the job itself reports when the worker is gone. */ }
}

function showProgress(stage, done, total) {
  const text = stages[stage] || stage;
  const counted = stage === "inference" || stage === "upload_here";
  if (counted && total) by("bar").value = 100 * done / total; else by("bar").removeAttribute("value");
  const detail = stage === "inference" ? `, frame ${done} of ${total}` : "";
  const line = `${text}${detail}`;
  if (by("stage").textContent !== line) by("stage").textContent = line;
}

by("cancel").addEventListener("click", () => {
  by("cancel").disabled = true;
  by("stage").textContent = "Cancelling…";
  const { id, request } = running;
  fetch(`/generate/${id}`, { method: "DELETE", headers: headers() }).then((answer) => {
    // Not begun yet: the files are still on their way.
    if (answer.status === 404 && running && running.id === id) {
      request.abort();
      stop();
      failed("Cancelled", "The upload was stopped; nothing was stored.", "");
    }
  }).catch(() => {});
});

async function ended(request) {
  let body = {};
  try { body = JSON.parse(request.responseText); } catch { /* reported below by its status */ }
  stop();
  if (request.status === 200) await succeeded(body); else explain(request, body);
}

function explain(request, body) {
  const again = Number(request.getResponseHeader("Retry-After"));
  if (request.status === 401) {
    show("key-row");
    by("key").focus();
    return failed("This worker needs its key", "Enter it above and try again.", "");
  }
  if (request.status === 409) return failed("Cancelled", "The job was stopped; nothing was stored.", "");
  if (request.status === 503) {
    return failed("The worker cannot take the job now", body.error_message || "",
      again ? `Try again in ${again} seconds.` : "Try again in a moment.");
  }
  const where = body.stage && body.stage !== "unknown" ? ` (while ${(stages[body.stage] || body.stage).toLowerCase()})` : "";
  const title = request.status === 422 || request.status === 413 ? "These files cannot be used" : "The job failed";
  const advice = body.retryable ? "A retry may help." : "The same request would fail again.";
  return failed(title, (body.error_message || `The worker answered with status ${request.status}.`) + where, advice);
}

function failed(title, text, advice) {
  by("failure-title").textContent = title;
  by("failure-text").textContent = text;
  by("failure-advice").textContent = advice;
  show("failure");
}

async function succeeded(result) {
  const stored = new URL(result.output_url, location.href);
  let address = stored.href;
  // What this worker serves itself may need the key, which a video element cannot send.
  if (stored.pathname.startsWith("/outputs/")) {
    const answer = await fetch(stored.pathname, { headers: headers() });
    if (!answer.ok) return failed("The video cannot be shown", `Fetching it gave status ${answer.status}.`, "");
    address = url("after", await answer.blob());
  }
  by("after").src = address;
  by("download").href = address;
  by("download").download = `${result.musetalk_job_id}.mp4`;
  const still = chosen.source.type.startsWith("image/");
  show("before", !still);
  show("before-still", still);
  by(still ? "before-still" : "before").src = urls.source;
  const video = result.video || {};
  const seconds = result.metrics.total_time;
  by("facts").textContent = `${video.frames} frames, ${video.width} × ${video.height}, ${video.fps} fps, ` +
    `${video.duration_sec.toFixed(2)} s of video in ${seconds.toFixed(1)} s, made with the ${result.model} model.`;
  const rows = Object.entries(result.metrics.stage_times).map(([stage, time]) => {
    const row = document.createElement("tr");
    for (const text of [stage, time.toFixed(2)]) row.append(Object.assign(document.createElement("td"), { textContent: text }));
    return row;
  });
  by("times").tBodies[0].replaceChildren(...rows);
  by("warnings").replaceChildren(...(result.warnings || []).map(
    (text) => Object.assign(document.createElement("li"), { textContent: text })));
  show("warnings", (result.warnings || []).length > 0);
  show("result");
  by("result").scrollIntoView({ block: "start" });
}

// The source follows the result; a short source plays back and forth there, so beyond its end it stays on its last frame.
for (const event of ["play", "pause", "seeked"]) {
  by("after").addEventListener(event, () => {
    const before = by("before");
    if (before.hidden || !before.duration) return;
    before.currentTime = Math.min(by("after").currentTime, before.duration);
    if (event === "play") before.play().catch(() => {}); else if (event === "pause") before.pause();
  });
}

async function lookAtWorker() {
  try {
    const body = await (await fetch("/hc")).json();
    const ready = body.status === "ok";
    by("worker").textContent = ready ? `${body.busy ? "Busy" : "Ready"}, model ${body.model}` : `Not ready: ${body.reason}`;
    show("demo-note", body.model === "demo");
    if (!ready) setTimeout(lookAtWorker, 1000);
  } catch {
    by("worker").textContent = "The worker does not answer";
    setTimeout(lookAtWorker, 3000);
  }
}

lookAtWorker();
buildOptions().catch(() => {});
