// The speech: its waveform, play, trim handles, and the microphone. Trimmed and recorded sound becomes a WAV file.
import { announce, blobUrl, by, emit, setIcon, show } from "./base.js";
import { seconds } from "./words.js";

const RATE = 44100;
const LEAST_S = 0.2;
let buffer = null;
let wave = [];
let frame = 0;

export const part = { start: 0, end: 0, whole: 0 };
export const isTrimmed = () => buffer !== null && (part.start > 0.005 || part.end < part.whole - 0.005);

export async function showSound(file) {
  stop();
  const player = by("audio-player");
  player.src = blobUrl("audio", file);
  show("audio-empty", false);
  show("audio-sound");
  buffer = null;
  wave = [];
  try {
    // An offline context decodes without a click of the person, which a live one waits for.
    buffer = await new OfflineAudioContext(1, 1, RATE).decodeAudioData(await file.arrayBuffer());
  } catch { buffer = null; }
  const known = buffer !== null;
  by("wave-area").classList.toggle("unknown", !known);
  by("audio-note").textContent = known ? "" : "This browser cannot show the sound; the worker reads it all the same.";
  by("trim-start").disabled = by("trim-end").disabled = !known;
  Object.assign(part, { start: 0, end: known ? buffer.duration : 0, whole: known ? buffer.duration : 0 });
  for (const id of ["trim-start", "trim-end"]) by(id).max = part.whole || 1;
  by("trim-start").value = 0;
  by("trim-end").value = part.whole || 1;
  if (known) wave = peaks(buffer, 240);
  draw();
}

function peaks(sound, count) {
  const samples = sound.getChannelData(0);
  const size = Math.max(1, Math.floor(samples.length / count));
  const found = [];
  for (let index = 0; index < count; index += 1) {
    let high = 0;
    const end = Math.min(samples.length, (index + 1) * size);
    // Every fourth sample shows the same shape and leaves a long speech quick.
    for (let place = index * size; place < end; place += 4) high = Math.max(high, Math.abs(samples[place]));
    found.push(high);
  }
  const loudest = Math.max(...found, 0.02);
  return found.map((value) => value / loudest);
}

function colour(name) { return getComputedStyle(document.documentElement).getPropertyValue(name).trim(); }

function draw(levels = wave) {
  const canvas = by("wave");
  const scale = window.devicePixelRatio || 1;
  const width = canvas.clientWidth;
  const height = canvas.clientHeight;
  if (!width) return;
  canvas.width = width * scale;
  canvas.height = height * scale;
  const context = canvas.getContext("2d");
  context.scale(scale, scale);
  const n = Math.floor(width / 4);
  const [inside, outside] = [colour("--accent"), colour("--line")];
  for (let index = 0; index < n; index += 1) {
    const place = index / n;
    const level = levels.length ? levels[Math.floor(place * levels.length)] : 0;
    const time = place * part.whole;
    context.fillStyle = !buffer || (time >= part.start && time <= part.end) ? inside : outside;
    const tall = Math.max(2, level * (height - 8));
    context.fillRect(index * 4 + 1, (height - tall) / 2, 2, tall);
  }
  const kept = part.end - part.start;
  by("trim-text").textContent = !buffer ? "" : isTrimmed() ? `${seconds(kept)} of ${seconds(part.whole)}` : seconds(part.whole);
  for (const [id, value] of [["trim-start", part.start], ["trim-end", part.end]]) by(id).setAttribute("aria-valuetext", seconds(value));
}
window.addEventListener("resize", () => draw());
window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => draw());

let settle = 0;
function trim(id) {
  const input = by(id);
  if (id === "trim-start") {
    part.start = Math.min(Number(input.value), part.end - LEAST_S);
    if (part.start < 0.005) part.start = 0;
    input.value = part.start;
  } else {
    part.end = Math.max(Number(input.value), part.start + LEAST_S);
    if (part.end > part.whole - 0.015) part.end = part.whole;
    input.value = part.end;
  }
  draw();
  clearTimeout(settle);
  settle = setTimeout(() => emit("trimmed"), 350);
}
for (const id of ["trim-start", "trim-end"]) by(id).addEventListener("input", () => trim(id));

// -- play --

export function stop() {
  by("audio-player").pause();
  show("playhead", false);
  cancelAnimationFrame(frame);
  setIcon(by("audio-play"), "play");
  by("audio-play").setAttribute("aria-label", "Play the speech");
}
function follow() {
  const player = by("audio-player");
  const whole = part.whole || player.duration || 1;
  if (player.paused || player.ended || (part.end && player.currentTime >= part.end)) { stop(); return; }
  by("playhead").style.left = `${(100 * player.currentTime) / whole}%`;
  frame = requestAnimationFrame(follow);
}
by("audio-play").addEventListener("click", async () => {
  const player = by("audio-player");
  if (!player.paused) { stop(); return; }
  player.currentTime = part.start;
  try { await player.play(); } catch { return; }
  setIcon(by("audio-play"), "pause");
  by("audio-play").setAttribute("aria-label", "Stop the speech");
  show("playhead");
  follow();
});

// -- files of parts --

export function partAsFile(name) {
  const first = Math.floor(part.start * buffer.sampleRate);
  const count = Math.floor((part.end - part.start) * buffer.sampleRate);
  return new File([wav(buffer, first, count)], name, { type: "audio/wav" });
}

function wav(sound, first, count) {
  const channels = sound.numberOfChannels;
  const bytes = count * channels * 2;
  const view = new DataView(new ArrayBuffer(44 + bytes));
  const text = (place, letters) => [...letters].forEach((letter, index) => view.setUint8(place + index, letter.charCodeAt(0)));
  text(0, "RIFF"); view.setUint32(4, 36 + bytes, true); text(8, "WAVEfmt ");
  view.setUint32(16, 16, true); view.setUint16(20, 1, true); view.setUint16(22, channels, true);
  view.setUint32(24, sound.sampleRate, true); view.setUint32(28, sound.sampleRate * channels * 2, true);
  view.setUint16(32, channels * 2, true); view.setUint16(34, 16, true); text(36, "data"); view.setUint32(40, bytes, true);
  const data = Array.from({ length: channels }, (_none, index) => sound.getChannelData(index));
  let place = 44;
  for (let index = first; index < first + count; index += 1) {
    for (const samples of data) {
      view.setInt16(place, Math.round(32767 * Math.max(-1, Math.min(1, samples[index] || 0))), true);
      place += 2;
    }
  }
  return view;
}

// -- the microphone --

let recorder = null;

async function record() {
  stop();
  let stream;
  try {
    stream = await navigator.mediaDevices.getUserMedia({ audio: true });
  } catch (problem) {
    by("audio-problem").textContent = problem.name === "NotAllowedError"
      ? "The browser may not use the microphone. Allow it in the address bar, then try again."
      : "No microphone was found. Connect one, or choose a file.";
    return;
  }
  by("audio-problem").textContent = "";
  const blocks = [];
  recorder = new MediaRecorder(stream);
  recorder.addEventListener("dataavailable", (event) => blocks.push(event.data));
  recorder.addEventListener("stop", () => finish(stream, new Blob(blocks, { type: recorder.mimeType })));
  recorder.start(250);
  const began = Date.now();
  watch(stream, () => (Date.now() - began) / 1000);
  by("record").classList.add("on");
  setIcon(by("record"), "stop");
  announce("Recording");
}

// The level of the last seconds runs through the waveform.
function watch(stream, elapsed) {
  const context = new AudioContext();
  const analyser = context.createAnalyser();
  context.createMediaStreamSource(stream).connect(analyser);
  const samples = new Float32Array(analyser.fftSize);
  const levels = new Array(90).fill(0);
  show("audio-empty", false);
  show("audio-sound");
  buffer = null;
  const step = () => {
    if (!recorder || recorder.state !== "recording") { context.close(); return; }
    analyser.getFloatTimeDomainData(samples);
    levels.push(Math.min(1, 4 * Math.sqrt(samples.reduce((sum, value) => sum + value * value, 0) / samples.length)));
    levels.shift();
    draw(levels);
    by("record-text").textContent = `Stop (${elapsed().toFixed(0)} s)`;
    setTimeout(step, 60);
  };
  step();
}

async function finish(stream, blob) {
  for (const track of stream.getTracks()) track.stop();
  by("record").classList.remove("on");
  setIcon(by("record"), "mic");
  by("record-text").textContent = "Record";
  recorder = null;
  let file = new File([blob], "recording.webm", { type: blob.type });
  try {
    const sound = await new OfflineAudioContext(1, 1, RATE).decodeAudioData(await blob.arrayBuffer());
    file = new File([wav(sound, 0, sound.length)], "recording.wav", { type: "audio/wav" });
  } catch { /* the worker reads WebM as well */ }
  announce("Recording finished");
  emit("recorded", file);
}

by("record").addEventListener("click", () => {
  if (recorder) recorder.stop(); else record();
});
if (!navigator.mediaDevices || !window.MediaRecorder) {
  show("record", false);
  by("audio-note").textContent = "Recording needs https, or localhost.";
}
