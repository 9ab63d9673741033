// The two inputs: drop, choose, paste of samples; each becomes an address that a job can name.
import { announce, blobUrl, by, emit, headers, make, on, send, session, show } from "./base.js";
import { forgetBox } from "./face.js";
import { setParam } from "./options.js";
import { isTrimmed, part, partAsFile, showSound } from "./sound.js";
import { explain, megabytes, slug } from "./words.js";

// name, file; url: what a job names (`sample:`, `upload:`); local: what the browser shows
const chosen = { source: null, audio: null };
export const nameOf = (kind) => (chosen[kind] ? chosen[kind].name : "");
export const has = (kind) => chosen[kind] !== null;
export const isStill = () => has("source") && chosen.source.file.type.startsWith("image/");
// The source of a job with this name, if it is the one that is chosen here.
export const jobName = () => `${slug(nameOf("source"))}-${slug(nameOf("audio"))}`;
export const localSource = (name) => (has("source") && has("audio") && name === jobName() ? { url: chosen.source.local, isStill: isStill() } : null);
export const isSample = (kind) => has(kind) && String(chosen[kind].url || "").startsWith("sample:") && !(kind === "audio" && isTrimmed());
export const sampleUrl = (kind) => chosen[kind].url;
export const fileName = (kind) => (kind === "audio" && isTrimmed() ? `${nameOf(kind).replace(/\.\w+$/, "")}-part.wav` : nameOf(kind));

export async function choose(kind, file, url = null, title = null) {
  if (!file) return;
  problem(kind, "");
  chosen[kind] = { name: title || file.name, file, url, local: blobUrl(`${kind}-file`, file) };
  by(`${kind}-name`).textContent = url && url.startsWith("sample:") ? `${title}, a sample` : `${file.name}, ${megabytes(file.size)}`;
  by(`${kind}-card`).classList.add("full");
  by(`${kind}-choose`).textContent = "Change";
  for (const button of by(`${kind}-samples`).querySelectorAll("button")) {
    button.setAttribute("aria-pressed", String(button.dataset.url === url));
  }
  announce(`${kind === "source" ? "Face" : "Speech"} chosen: ${chosen[kind].name}`);
  if (kind === "source") {
    forgetBox();
    setParam("face_box", null);
    showSource();
  } else {
    await showSound(file);
  }
  remember();
  emit("chosen", kind);
}

function showSource() {
  show("source-empty", false);
  show("source-frame");
  const still = isStill();
  const [shown, other] = still ? ["source-still", "source-video"] : ["source-video", "source-still"];
  show(other, false);
  by(other).removeAttribute("src");
  show(shown);
  by(shown).src = chosen.source.local;
  by("source-note").textContent = "Looking for the face…";
}
// The worker's own first picture also shows what this browser cannot decode.
export function showFirstPicture(blob) {
  show("source-empty", false);
  show("source-frame");
  by("source-still").src = blobUrl("first", blob);
  show("source-still");
  show("source-video", false);
}
// A file that the browser cannot show; the worker may still read it.
for (const id of ["source-video", "source-still"]) {
  by(id).addEventListener("error", () => { show("source-frame", false); show("source-empty"); });
}
export function firstPicture() {
  const still = by("source-still");
  if (still.getAttribute("src")) return still.src;
  const video = by("source-video");
  if (!has("source") || video.readyState < 2) return "";
  const canvas = make("canvas", { width: video.videoWidth, height: video.videoHeight });
  canvas.getContext("2d").drawImage(video, 0, 0);
  return canvas.toDataURL("image/jpeg", 0.7);
}
by("source-frame").addEventListener("mouseenter", () => {
  if (isStill() || !has("source") || by("source-frame").classList.contains("drawing")) return;
  const video = by("source-video");
  if (video.readyState < 2) { video.src = chosen.source.local; }
  video.play().then(() => { show("source-still", false); show("source-video"); }).catch(() => {});
});
by("source-frame").addEventListener("mouseleave", () => {
  by("source-video").pause();
  if (by("source-still").src) { show("source-still"); show("source-video", false); }
});

export function problem(kind, text) {
  by(`${kind}-problem`).textContent = text;
  by(`${kind}-card`).classList.toggle("wrong", Boolean(text));
  if (text) by(kind).setAttribute("aria-invalid", "true"); else by(kind).removeAttribute("aria-invalid");
}

// -- addresses: a file is uploaded once, and again when the worker no longer has it --

const uploads = { source: null, audio: null };

export async function urlOf(kind) {
  const now = chosen[kind];
  const trimmed = kind === "audio" && isTrimmed();
  if (now.url && !trimmed) return now.url;
  const mark = trimmed ? `${part.start}-${part.end}` : "whole";
  if (!uploads[kind] || uploads[kind].of !== now || uploads[kind].mark !== mark) {
    uploads[kind] = { of: now, mark, url: upload(kind, trimmed ? partAsFile(fileName(kind)) : now.file) };
  }
  const url = await uploads[kind].url;
  if (!trimmed && url) { now.url = url; remember(); }
  return url;
}
export function forgetUploads() {
  for (const kind of ["source", "audio"]) {
    uploads[kind] = null;
    if (chosen[kind] && String(chosen[kind].url).startsWith("upload:")) chosen[kind].url = null;
  }
}

async function upload(kind, file) {
  const form = new FormData();
  form.append(kind, file);
  for (let tries = 0; ; tries += 1) {
    const { status, body } = await send("/uploads", form, (share) => {
      by(`${kind}-note`).textContent = share < 1 ? `Sending the file: ${Math.round(100 * share)} %` : "";
    });
    by(`${kind}-note`).textContent = "";
    if (status === 201) return body[kind === "source" ? "video_url" : "audio_url"];
    if (status === 503 && tries < 5) {
      await new Promise((resolve) => { setTimeout(resolve, 2000); });
      continue;
    }
    uploads[kind] = null;
    throw Object.assign(new Error("upload"), { status, body });
  }
}

// -- what was chosen survives a reload, as long as the worker has the file --

function remember() {
  const kept = {};
  for (const kind of ["source", "audio"]) {
    if (has(kind) && chosen[kind].url) kept[kind] = { url: chosen[kind].url, name: chosen[kind].name, type: chosen[kind].file.type };
  }
  session("files", JSON.stringify(kept));
}
export async function restore() {
  const kept = JSON.parse(session("files") || "{}");
  for (const [kind, { url, name, type }] of Object.entries(kept)) {
    if (url.startsWith("sample:")) await chooseSample(kind, url);
    else {
      const answer = await fetch(`/uploads/${url.slice(7)}`, { headers: headers() }).catch(() => null);
      if (answer && answer.ok) await choose(kind, new File([await answer.blob()], name, { type }), url);
    }
  }
}

// -- samples --

let samples = [];
on("samples", (given) => {
  if (samples.length) return;
  samples = given;
  for (const [kind, wanted] of [["source", "video"], ["audio", "audio"]]) {
    by(`${kind}-samples`).replaceChildren(...samples.filter((sample) => sample.kind === wanted).map((sample) => {
      const button = make("button", { type: "button", "aria-pressed": "false", data: { url: `sample:${sample.name}` } },
        make("img", { src: `/playground/demo/${sample.picture}`, alt: "" }), make("span", {}, sample.title));
      button.addEventListener("click", () => chooseSample(kind, `sample:${sample.name}`));
      return button;
    }));
  }
});
async function chooseSample(kind, url) {
  const sample = samples.find((each) => `sample:${each.name}` === url);
  if (!sample) return;
  try {
    const answer = await fetch(`/playground/demo/${sample.file}`);
    if (!answer.ok) throw new Error();
    const blob = await answer.blob();
    await choose(kind, new File([blob], sample.file.split("/").pop(), { type: blob.type || answer.headers.get("Content-Type") }), url, sample.title);
  } catch { problem(kind, "The sample could not be fetched. Look whether the worker still runs."); }
}

// -- drop and choose --

for (const kind of ["source", "audio"]) {
  by(kind).addEventListener("change", (event) => {
    choose(kind, event.target.files[0]);
    // The same file again is a new choice.
    event.target.value = "";
  });
}
const isFile = (event) => [...(event.dataTransfer ? event.dataTransfer.types : [])].includes("Files");
const cardAt = (event) => event.target.closest && event.target.closest(".card[id$='-card']");
document.addEventListener("dragover", (event) => {
  if (!isFile(event)) return;
  event.preventDefault();
  document.body.classList.add("dragging");
  const card = cardAt(event);
  for (const kind of ["source", "audio"]) by(`${kind}-card`).classList.toggle("over", card === by(`${kind}-card`));
});
const endDrag = () => {
  document.body.classList.remove("dragging");
  for (const kind of ["source", "audio"]) by(`${kind}-card`).classList.remove("over");
};
document.addEventListener("dragleave", (event) => { if (!event.relatedTarget) endDrag(); });
document.addEventListener("drop", (event) => {
  if (!isFile(event)) return;
  event.preventDefault();
  endDrag();
  const card = cardAt(event);
  for (const file of event.dataTransfer.files) {
    // Beside the cards the kind of file decides; on a card the person does.
    const kind = card && event.dataTransfer.files.length === 1 ? card.id.replace("-card", "") : file.type.startsWith("audio/") ? "audio" : "source";
    choose(kind, file);
  }
});
on("recorded", (file) => choose("audio", file));

export function showUploadProblem(kind, failure) {
  problem(kind, `${explain(failure.status, failure.body).text} ${explain(failure.status, failure.body).advice}`.trim());
}
