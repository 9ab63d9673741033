// One picture of the video before it is made: at any time, with the options as they are now.
import { blobUrl, by, emit, headers, on, show } from "./base.js";
import { followParam, showFound } from "./face.js";
import { forgetUploads, has, problem, showFirstPicture, showUploadProblem, urlOf } from "./files.js";
import { markOption, params } from "./options.js";
import { part } from "./sound.js";
import { explain, seconds } from "./words.js";

let isAllowed = () => true;
let needsFace = false;
let wantsVideo = false;
let isRunning = false;
let abort = null;
let isShown = false;
let hadBox = false;
// The worker was busy: what is wanted is asked for again when it is free.
let isWaiting = false;
let duration = 0;
export function allowPreviews(test) { isAllowed = test; }
export const picture = () => (isShown ? by("preview-picture").src : "");

// The face of a source that was just chosen; then the video, of which the newest wish counts. One at a time.
function ask(kind) {
  if (kind === "face") needsFace = true; else wantsVideo = true;
  if (!isRunning) run();
}
export function stopPreviews() {
  wantsVideo = false;
  if (abort) abort.abort();
}
export async function previewsEnded() {
  while (isRunning) await new Promise((resolve) => { setTimeout(resolve, 30); });
}

async function run() {
  isRunning = true;
  while ((needsFace || wantsVideo) && isAllowed() && !isWaiting) {
    const kind = needsFace ? "face" : "video";
    // Several quick changes make one picture.
    if (kind === "video") await new Promise((resolve) => { setTimeout(resolve, 200); });
    if (!isAllowed()) break;
    if (kind === "face") needsFace = false; else wantsVideo = false;
    await draw(kind);
  }
  isRunning = false;
}

async function draw(kind) {
  const isVideo = kind === "video" && has("source") && has("audio");
  show("preview-wait", isVideo);
  for (let tries = 0; tries < 2; tries += 1) {
    let where = "source";
    try {
      const body = { musetalk_job_id: "preview", video_url: await urlOf("source"), params: given(isVideo) };
      if (isVideo) {
        where = "audio";
        body.audio_url = await urlOf("audio");
        fitTime();
        body.time_s = Number(by("preview-time").value);
      }
      if (!isAllowed()) break;
      abort = new AbortController();
      const answer = await fetch("/preview", { method: "POST", signal: abort.signal, headers: headers({ "Content-Type": "application/json" }), body: JSON.stringify(body) });
      if (answer.ok) { await shown(answer, isVideo); break; }
      const failure = await answer.json();
      if (/no longer here/.test(failure.error_message) && tries === 0) { forgetUploads(); continue; }
      if (answer.status === 401) { emit("key-needed"); break; }
      failed(answer.status, failure, isVideo);
      break;
    } catch (stopped) {
      if (stopped.status !== undefined) showUploadProblem(where, stopped);
      else if (stopped.name !== "AbortError") by("preview-caption").textContent = "The worker does not answer.";
      break;
    }
  }
  show("preview-wait", false);
}

// No time after the end of the speech; one that this browser cannot read begins at its start.
function fitTime() {
  const spoken = part.end - part.start;
  by("preview-time").max = Math.max(0.04, (spoken || duration || 0.04) - 0.02);
}

// The face's picture needs no options of the mouth; a wrong one is reported beside itself.
function given(isVideo) {
  if (isVideo) return params();
  const box = params().face_box;
  return box ? { face_box: box } : {};
}

async function shown(answer, isVideo) {
  const stats = JSON.parse(answer.headers.get("X-Preview"));
  const blob = await answer.blob();
  by("source-note").textContent = "";
  problem("source", "");
  if (!isVideo) {
    showFirstPicture(blob);
    showFound(stats.face_box, stats.source_width, stats.source_height);
    by("source-note").textContent = stats.face_box ? "" : "No face in the first picture. One that comes later is found all the same.";
    return;
  }
  const image = by("preview-picture");
  image.src = blobUrl("preview", blob);
  image.alt = `Preview of the video at ${stats.time_s.toFixed(1)} seconds`;
  duration = stats.duration_sec;
  by("preview-time").max = Math.max(0.04, duration - 0.02);
  by("preview-time").value = stats.time_s;
  by("preview-at").textContent = `${stats.time_s.toFixed(1)} of ${seconds(duration)}`;
  by("preview-caption").textContent = stats.warnings.length ? stats.warnings.map((text) => `${text[0].toUpperCase()}${text.slice(1)}.`).join(" ")
    : "One picture of the video, before it is made. Options change it at once.";
  isShown = true;
  emit("previewed");
}

function failed(status, body, isVideo) {
  const why = explain(status, body);
  by("source-note").textContent = "";
  if (status === 503) {
    by("preview-caption").textContent = "The worker is busy. The preview comes when it is free.";
    if (isVideo) wantsVideo = true; else needsFace = true;
    isWaiting = true;
    if (!isVideo) by("source-note").textContent = "The worker is busy; the face is looked for later.";
  } else if (why.place === "source" || why.place === "audio") {
    problem(why.place, `${why.text} ${why.advice}`);
    if (why.place === "source" && body.details) showFound(null, by("source-still").naturalWidth || by("source-video").videoWidth, by("source-still").naturalHeight || by("source-video").videoHeight);
  } else if (why.place.startsWith("option:")) {
    markOption(why.place.slice(7), why.text);
  } else {
    by("preview-caption").textContent = `${why.text} ${why.advice}`;
  }
}

on("chosen", (kind) => {
  if (kind === "source") {
    if (!isAllowed()) by("source-note").textContent = "The worker is busy; the face is looked for later.";
    ask("face");
  }
  if (has("source") && has("audio")) {
    if (kind === "audio") {
      fitTime();
      by("preview-time").value = Math.min(0.6, Number(by("preview-time").max) / 2);
    }
    ask("video");
  }
});
on("options", (now) => {
  const isBack = hadBox && !now.face_box;
  hadBox = Boolean(now.face_box);
  followParam(now.face_box ?? null);
  if (isBack && has("source")) ask("face");
  if (has("source") && has("audio")) ask("video");
});
on("trimmed", () => { if (has("source")) ask("video"); });
on("free", () => {
  isWaiting = false;
  if (!isRunning && has("source") && (needsFace || wantsVideo)) run();
});
// A picture of the video is not wanted any more where the video is.
on("presented", () => { wantsVideo = false; });
by("preview-time").addEventListener("input", () => {
  by("preview-at").textContent = `${Number(by("preview-time").value).toFixed(1)} of ${seconds(duration)}`;
  ask("video");
});
