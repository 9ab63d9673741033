// The page: which part of the stage is shown, the sample, the key; the rest is in the modules.
import { by, emit, key, on, session, setIcon, show } from "./base.js";
import { has, restore } from "./files.js";
import { isBusy, wake } from "./job.js";
import { loadOptions } from "./options.js";
import { stop as stopSpeech } from "./sound.js";
import "./face.js";
import "./preview.js";
import "./result.js";

const PARTS = ["sample", "preview", "progress", "result"];
function stage(part) {
  for (const name of PARTS) show(name, name === part);
  const video = by("sample-video");
  if (part === "sample" && !matchMedia("(prefers-reduced-motion: reduce)").matches) video.play().catch(() => {});
  else video.pause();
  if (part !== "result") by("after").pause();
}

on("working", () => { stopSpeech(); stage("progress"); });
on("presented", () => { by("failure").hidden = true; stage("result"); });
on("previewed", () => { if (!isBusy()) stage("preview"); });
on("stopped", () => stage(has("source") && has("audio") && by("preview-picture").src ? "preview" : "sample"));
on("chosen", () => {
  const ready = has("source") && has("audio");
  by("go-note").textContent = ready ? "" : has("source") ? "Now choose a speech." : "Now choose a face.";
  by("go").classList.toggle("set", ready);
});

on("model", ({ model }) => show("demo-note", model === "demo"));

// -- the sample --

by("sample-sound").addEventListener("click", () => {
  const video = by("sample-video");
  video.muted = !video.muted;
  if (!video.muted) { video.currentTime = 0; video.play().catch(() => {}); }
  by("sample-sound").setAttribute("aria-pressed", String(!video.muted));
  by("sample-sound").querySelector("span").textContent = video.muted ? "Sound on" : "Sound off";
  setIcon(by("sample-sound"), video.muted ? "mute" : "sound");
});

// -- the key --

on("key-needed", () => {
  show("key-row");
  if (!key()) return;
  by("key-problem").textContent = "This key is wrong.";
  session("key", null);
});
by("key-row").addEventListener("submit", async (event) => {
  event.preventDefault();
  by("key-problem").textContent = "";
  session("key", by("key").value.trim());
  show("key-row", false);
  await begin();
  emit("key-given");
});

async function begin() {
  if (await loadOptions()) await restore();
}

stage("sample");
wake();
begin();
