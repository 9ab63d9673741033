// A job: start, progress, cancel, outcome. The worker's state is asked for once a second at most; it also shows jobs
// that another tab or program began, and finds the own one again after a reload.
import { announce, by, call, emit, key, local, on, pause, show } from "./base.js";
import { clearMarks, loadOptions, markOption, params } from "./options.js";
import { fileName, firstPicture, forgetUploads, has, isSample, jobName, problem, sampleUrl, urlOf } from "./files.js";
import { allowPreviews, picture, previewsEnded, stopPreviews } from "./preview.js";
import { explain, plain, seconds, sentence, slug, STAGES, STEPS } from "./words.js";

// The job on the screen: id, files' names, its parameters; and whether this page sent it.
let job = null;
let isSending = false;
const handled = new Set();
let lastSeen = { state: "", job: null };
const rates = [];
let wasReady = false;
let resultsStamp = null;
export const isBusy = () => job !== null;
// "busy" without a job is a preview, mostly our own.
const isFree = () => job === null && !lastSeen.job && ["ready", "busy"].includes(lastSeen.state);
allowPreviews(isFree);

// -- start --

function missing() {
  const none = ["source", "audio"].filter((kind) => !has(kind));
  problem("source", none.includes("source") ? "Choose a face first, or click a sample." : "");
  problem("audio", none.includes("audio") ? "Choose a speech first, or click a sample." : "");
  if (none.length) by(none[0]).focus();
  return none.length > 0;
}

by("form").addEventListener("submit", async (event) => {
  event.preventDefault();
  if (job) return;
  hideFailure();
  clearMarks();
  if (missing()) return;
  const stamp = new Date().toISOString().slice(5, 19).replace(/\D/g, "");
  const id = `${jobName()}-${stamp}-${Math.random().toString(36).slice(2, 6)}`;
  job = { id, name: jobName(), params: params(), curl: curlParts(), isOwn: true };
  stopPreviews();
  showProgress("sending", 0, 0, 0);
  isSending = true;
  await start();
  isSending = false;
});

function curlParts() {
  return ["source", "audio"].map((kind) => ({ kind, url: isSample(kind) ? sampleUrl(kind) : null, file: fileName(kind) }));
}

async function start() {
  const mine = job;
  for (let tries = 0; tries < 2; tries += 1) {
    let body;
    try {
      body = { musetalk_job_id: mine.id, video_url: await urlOf("source"), audio_url: await urlOf("audio"), params: mine.params };
    } catch (failure) {
      if (failure.status === undefined) throw failure;
      ended(mine.id, failure.status, failure.body);
      return;
    }
    if (job !== mine) return;
    // A preview that is still drawn holds the worker for a moment.
    await previewsEnded();
    local("job", JSON.stringify(mine));
    wake();
    let { status, body: answer, response } = await call("/generate", { method: "POST", json: body });
    for (let again = 0; again < 4 && status === 503 && /busy/.test(answer.error_message) && !lastSeen.job && job === mine; again += 1) {
      await pause(700);
      ({ status, body: answer, response } = await call("/generate", { method: "POST", json: body }));
    }
    if (status === 0 && (isLeaving || await isKnown(mine.id))) return;
    if (status === 422 && /no longer here/.test(answer.error_message) && tries === 0) { forgetUploads(); continue; }
    if (job === mine || status === 200) ended(mine.id, status, answer, response && Number(response.headers.get("Retry-After")));
    return;
  }
}

// A reload ends the request, not the job; and a proxy may cut a long one. The job is then followed by its state.
let isLeaving = false;
for (const event of ["beforeunload", "pagehide"]) window.addEventListener(event, () => { isLeaving = true; });
async function isKnown(id) {
  await pause(400);
  const { status, body } = await call(`/playground/status?job=${encodeURIComponent(id)}`);
  return status === 200 && (body.outcome !== null || (body.job !== null && body.job.musetalk_job_id === id));
}

// -- the end --

export function ended(id, status, body, retryAfter = 0) {
  if (handled.has(id)) return;
  handled.add(id);
  const mine = job && job.id === id ? job : JSON.parse(local("job") || "{}");
  job = null;
  local("job", null);
  rates.length = 0;
  document.title = "MuseTalk worker";
  show("progress", false);
  by("go").disabled = false;
  by("go").textContent = "Make the video";
  if (status === 200) {
    announce("The video is finished");
    emit("finished", { ...body, name: mine.name || slug(id), params: mine.params || {}, curl: mine.curl || null, isOwn: mine.isOwn });
  } else {
    fail(status, body, retryAfter);
    emit("stopped");
  }
  wake();
}

export function fail(status, body, retryAfter) {
  const { title, text, advice, place } = explain(status, body, retryAfter);
  by("failure-title").textContent = title;
  by("failure-text").textContent = text;
  by("failure-advice").textContent = advice;
  show("failure");
  by("failure").dataset.kind = status === 409 ? "quiet" : "bad";
  if (place === "source" || place === "audio") problem(place, `${text} ${advice}`);
  let target = by("failure");
  if (place.startsWith("option:")) target = markOption(place.slice(7), text) || target;
  if (place === "key") target = by("key");
  target.focus({ preventScroll: true });
  if (window.innerWidth < 900) by("failure").scrollIntoView({ block: "center" });
}
function hideFailure() { show("failure", false); }
by("failure-close").addEventListener("click", () => { hideFailure(); by("go").focus(); });

by("cancel").addEventListener("click", async () => {
  by("cancel").disabled = true;
  by("progress-note").textContent = "Stopping…";
  const mine = job;
  if (!mine) return;
  const { status } = await call(`/generate/${encodeURIComponent(mine.id)}`, { method: "DELETE" });
  // Not begun yet: the files are still on their way.
  if (status === 404 && job === mine && isSending) ended(mine.id, 409, {});
});

// -- progress --

function showProgress(stage, done, total, elapsed) {
  const isNew = by("progress").hidden;
  if (isNew) {
    hideFailure();
    show("progress");
    by("cancel").disabled = false;
    by("progress-note").textContent = "";
    by("progress-title").textContent = job.isOwn ? "Making your video" : "Another job is running";
    const behind = job.isOwn ? picture() || firstPicture() : "";
    show("progress-picture", Boolean(behind));
    if (behind) by("progress-picture").src = behind;
    by("steps").replaceChildren(...STEPS.map((name) => Object.assign(document.createElement("li"), { textContent: STAGES[name], id: `step-${name}` })));
    by("go").disabled = true;
    by("go").textContent = "Making the video…";
    emit("working");
    if (window.innerWidth < 992) by("progress").scrollIntoView({ block: "start" });
  }
  const at = STEPS.indexOf(stage);
  STEPS.forEach((name, index) => {
    by(`step-${name}`).className = index < at ? "done" : index === at ? "now" : "";
    if (index === at) by(`step-${name}`).setAttribute("aria-current", "step"); else by(`step-${name}`).removeAttribute("aria-current");
  });
  const percent = overall(stage, done, total);
  by("percent").textContent = Math.round(percent);
  by("bar").value = percent;
  document.title = `${Math.round(percent)} % – MuseTalk worker`;
  const line = STAGES[stage] || stage;
  if (by("stage").textContent !== line) by("stage").textContent = line;
  by("rate").textContent = stage === "inference" && total ? pace(done, total) : elapsed > 1 ? `${seconds(elapsed)} so far` : "";
}

// Drawing takes nearly all of the time, so it has most of the bar.
function overall(stage, done, total) {
  const starts = { sending: 0, waiting: 0, download: 1, validation: 3, preprocessing: 5, inference: 12, postprocessing: 97, upload: 98 };
  const start = starts[stage] ?? 0;
  return stage === "inference" && total ? start + (85 * done) / total : start;
}

function pace(done, total) {
  const now = performance.now() / 1000;
  if (!rates.length || rates[rates.length - 1].done > done) rates.length = 0;
  if (!rates.length || rates[rates.length - 1].done < done) rates.push({ now, done });
  while (rates.length > 8) rates.shift();
  const first = rates[0];
  const last = rates[rates.length - 1];
  const parts = [`Frame ${done} of ${total}`];
  if (last.now - first.now > 0.8) {
    const rate = (last.done - first.done) / (last.now - first.now);
    parts.push(`${rate < 10 ? rate.toFixed(1) : Math.round(rate)} frames a second`, `about ${seconds(Math.max(0, (total - done) / rate - (now - last.now)))} left`);
  }
  return parts.join(" · ");
}

// -- the worker's state --

let timer = 0;
let isAsking = false;
export function wake() { clearTimeout(timer); timer = setTimeout(look, 0); }

function nextPause() {
  if (job) return document.hidden ? 2000 : 500;
  if (lastSeen.state !== "ready") return 1500;
  return document.hidden ? 20000 : 3000;
}

async function look() {
  if (isAsking) return;
  isAsking = true;
  clearTimeout(timer);
  const watched = job ? job.id : (JSON.parse(local("job") || "null") || {}).id || "";
  const { status, body } = await call(`/playground/status?job=${encodeURIComponent(watched)}`);
  isAsking = false;
  if (status === 200) await follow(body, watched);
  else if (status === 0) {
    lastSeen = { state: "", job: null };
    chip("failed", "The worker does not answer");
  } else if (status === 401) {
    chip("starting", key() ? "The key is wrong" : "Enter the key");
  }
  clearTimeout(timer);
  timer = setTimeout(look, nextPause());
}
document.addEventListener("visibilitychange", () => { if (!document.hidden) wake(); });
on("key-given", wake);
// The same job in another tab.
window.addEventListener("storage", (event) => { if (event.key === "job") wake(); });

async function follow(body, watched) {
  lastSeen = body;
  const running = body.job;
  if (running && (!job || job.id !== running.musetalk_job_id) && !isSending && !handled.has(running.musetalk_job_id)) {
    const stored = JSON.parse(local("job") || "null");
    job = stored && stored.id === running.musetalk_job_id ? stored : { id: running.musetalk_job_id, name: slug(running.musetalk_job_id), params: null, isOwn: false };
    stopPreviews();
  }
  if (running && job && job.id === running.musetalk_job_id) showProgress(running.stage || "download", running.done || 0, running.total || 0, running.elapsed_sec);
  else if (job && isSending && job.isOwn) showProgress(body.state === "starting" ? "waiting" : "sending", 0, 0, 0);
  if (body.outcome && watched) ended(watched, body.outcome.status_code, body.outcome.body || {});
  else if (!running && job && !isSending) await vanished(job.id);
  else if (!running && !job && watched) await vanished(watched);
  chipOf(body);
  if (!wasReady && body.model) { wasReady = true; emit("model", body); await loadOptions(); }
  if (body.state === "ready" && !running) emit("free");
  if (body.results !== resultsStamp) { resultsStamp = body.results; emit("results-changed"); }
}

// Neither running nor known: the worker was restarted, or another program's job ended.
async function vanished(id) {
  if (handled.has(id)) return;
  const { status, body } = await call("/results");
  const found = status === 200 && body.results.find((result) => result.musetalk_job_id === id);
  if (found) {
    const mine = job && job.id === id ? job : JSON.parse(local("job") || "{}");
    handled.add(id);
    job = null;
    local("job", null);
    finishQuietly();
    emit("finished-before", { ...found, jobName: mine.name, curl: mine.curl });
  } else if (job && !job.isOwn) {
    handled.add(id);
    job = null;
    finishQuietly();
    emit("stopped");
  } else {
    ended(id, 500, { error_message: "The worker restarted during the job, so its outcome is unknown", retryable: true });
  }
}
function finishQuietly() {
  show("progress", false);
  document.title = "MuseTalk worker";
  by("go").disabled = false;
  by("go").textContent = "Make the video";
}

function chip(state, text) {
  by("worker").dataset.state = state;
  if (by("worker").textContent !== text) by("worker").textContent = text;
}
function chipOf({ state, model, reason }) {
  const name = { v15: "MuseTalk 1.5", v1: "MuseTalk 1.0", demo: "demo model" }[model] || model;
  if (job || lastSeen.job) chip("busy", `Busy · ${name}`);
  else if (isFree()) chip("ready", `Ready · ${name}`);
  else chip(state, sentence(plain(reason || state)).replace(/\.$/, ""));
}
