// The finished video: source and result in one frame and in step, download, times, warnings; and the last results.
import { announce, blobUrl, by, call, emit, headers, icon, key, make, on, setIcon, show } from "./base.js";
import { localSource } from "./files.js";
import { openPanel, setParams } from "./options.js";
import { clock, megabytes, plain, seconds, sentence, slug, STAGES } from "./words.js";

let now = null;
const after = by("after");
const before = by("before");

async function addressOf(path, name) {
  // A video element cannot send the key.
  if (!key() || !path.startsWith("/outputs/")) return path;
  const answer = await fetch(path, { headers: headers() });
  if (!answer.ok) throw new Error(String(answer.status));
  return blobUrl(name, await answer.blob());
}

function localPath(url) {
  const stored = new URL(url, location.href);
  // What this worker serves is reachable where the page is, whatever PUBLIC_BASE_URL says.
  return stored.pathname.startsWith("/outputs/") ? stored.pathname : stored.href;
}

on("finished", (result) => {
  const times = result.metrics.stage_times;
  present({
    path: localPath(result.output_url), name: result.name, params: result.params, curl: result.curl, times,
    total: result.metrics.total_time, video: result.video || {}, warnings: result.warnings || [], model: result.model,
    source: localSource(result.name),
  }, true);
});
on("finished-before", (result) => presentStored(result, localSource(result.jobName)));

function presentStored(result, source = null) {
  const times = result.stage_times || {};
  present({
    path: result.path, name: result.name.replace(/\.mp4$/, ""), params: result.params, curl: result.curl || null, times,
    total: Object.values(times).reduce((sum, value) => sum + value, 0), video: { bytes: result.size_bytes, ...result.video },
    warnings: result.warnings || [], model: result.model, source, id: result.musetalk_job_id,
  }, true);
}

async function present(result, plays) {
  now = result;
  emit("presented");
  show("result");
  let address;
  try { address = await addressOf(result.path, "result"); } catch {
    by("facts").textContent = "The video is stored, but it could not be fetched.";
    return;
  }
  after.src = address;
  by("download").href = address;
  by("download").download = `${slug(result.name)}.mp4`;
  showSource(result.source);
  const { video } = result;
  const model = { v15: "MuseTalk 1.5", v1: "MuseTalk 1.0", demo: "the demo model" }[result.model] || result.model;
  by("facts").textContent = [
    `${video.width} × ${video.height}`, `${seconds(video.duration_sec)} at ${Number(video.fps).toFixed(2).replace(/\.?0+$/, "")} frames a second`,
    ...(video.bytes ? [megabytes(video.bytes)] : []), `made in ${seconds(result.total)} with ${model}`,
  ].join(" · ");
  by("warnings").replaceChildren(...result.warnings.map((text) => make("li", {}, sentence(plain(text)))));
  show("warnings", result.warnings.length > 0);
  drawTimes(result.times);
  show("copy-curl", Boolean(result.curl));
  by("copied").textContent = "";
  if (plays) {
    after.play().catch(() => { after.muted = true; soundState(); after.play().catch(() => {}); });
    if (window.innerWidth < 900) by("result").scrollIntoView({ block: "start" });
    by("result-title").focus({ preventScroll: true });
  }
}

function showSource(source) {
  const has = Boolean(source);
  for (const id of ["compare", "divider", "before-side", "tag-source"]) show(id, has);
  before.pause();
  if (!has) { before.removeAttribute("src"); return; }
  show("before", !source.isStill);
  show("before-still", source.isStill);
  by(source.isStill ? "before-still" : "before").src = source.url;
  by("compare").value = 12;
  compare();
}

// -- the slider between source and result --

function compare() {
  const place = Number(by("compare").value);
  by("before-side").style.clipPath = `inset(0 ${100 - place}% 0 0)`;
  by("divider").style.left = `${place}%`;
  by("compare").setAttribute("aria-valuetext", `${place} % source`);
  by("tag-source").style.opacity = place > 16 ? 1 : 0;
}
by("compare").addEventListener("input", compare);

// Where the source is when the result is at `time`: a short one plays back and forth, again, or stays.
function sourceTime(time) {
  const { duration } = before;
  const mode = (now && now.params && now.params.loop_mode) || "ping_pong";
  if (!duration || time < duration) return { time, isForward: true };
  if (mode === "loop") return { time: time % duration, isForward: true };
  if (mode !== "ping_pong") return { time: duration - 0.03, isForward: false };
  const place = time % (2 * duration);
  return place < duration ? { time: place, isForward: true } : { time: 2 * duration - place, isForward: false };
}
function follow() {
  if (!before.hidden && before.readyState >= 1) {
    const wanted = sourceTime(after.currentTime);
    const isOff = Math.abs(before.currentTime - wanted.time) > (after.paused ? 0.01 : 0.12);
    if (after.paused || !wanted.isForward) {
      before.pause();
      if (isOff && !before.seeking) before.currentTime = wanted.time;
    } else {
      if (isOff && !before.seeking) before.currentTime = wanted.time;
      if (before.paused) before.play().catch(() => {});
    }
  }
  by("seek").value = after.currentTime;
  by("clock").textContent = `${clock(after.currentTime)} / ${clock(after.duration)}`;
  if (!after.paused) requestAnimationFrame(follow);
}
for (const event of ["play", "pause", "seeked", "loadedmetadata", "timeupdate"]) after.addEventListener(event, follow);
before.addEventListener("loadedmetadata", follow);
after.addEventListener("loadedmetadata", () => {
  by("seek").max = after.duration;
  by("screen").style.aspectRatio = `${after.videoWidth} / ${after.videoHeight}`;
});

// -- the player --

function playState() {
  setIcon(by("play"), after.paused ? "play" : "pause");
  by("play").setAttribute("aria-label", after.paused ? "Play" : "Pause");
}
const toggle = () => { if (after.paused) after.play().catch(() => {}); else after.pause(); };
by("play").addEventListener("click", toggle);
after.addEventListener("click", toggle);
for (const event of ["play", "pause", "ended"]) after.addEventListener(event, playState);
by("seek").addEventListener("input", () => { after.currentTime = Number(by("seek").value); });
function soundState() {
  setIcon(by("mute"), after.muted ? "mute" : "sound");
  by("mute").setAttribute("aria-pressed", String(!after.muted));
}
by("mute").addEventListener("click", () => { after.muted = !after.muted; soundState(); });
by("full").addEventListener("click", () => {
  if (document.fullscreenElement) document.exitFullscreen(); else by("screen").requestFullscreen().catch(() => {});
});

// -- times by stage --

function drawTimes(times) {
  const rows = Object.entries(times).filter(([, value]) => value >= 0.05);
  const total = rows.reduce((sum, [, value]) => sum + value, 0) || 1;
  by("times").replaceChildren(...rows.map(([stage, value]) => make("i", { data: { stage }, style: "" })));
  rows.forEach(([, value], index) => { by("times").children[index].style.flexGrow = value / total; });
  by("times").setAttribute("aria-label", `Time by stage: ${rows.map(([stage, value]) => `${STAGES[stage] || stage} ${seconds(value)}`).join(", ")}`);
  by("times-key").replaceChildren(...rows.map(([stage, value]) => make("li", { data: { stage } }, `${STAGES[stage] || stage} `, make("b", {}, seconds(value)))));
}

// -- actions --

by("again").addEventListener("click", () => {
  setParams(now.params || {});
  openPanel(true);
  by("options-panel").scrollIntoView({ block: "nearest", behavior: "smooth" });
  const first = by("options").querySelector("input");
  if (first) first.focus({ preventScroll: true });
});

export function curlCommand({ curl, params }, origin) {
  const quote = (text) => `'${text.replaceAll("'", "'\\''")}'`;
  const lines = [`curl ${origin}/generate`];
  if (key()) lines.push("-H \"X-Internal-API-Key: $INTERNAL_API_KEY\"");
  const [source, audio] = curl;
  if (source.url && audio.url) {
    const body = { musetalk_job_id: "job-1", video_url: source.url, audio_url: audio.url, params };
    lines.push(`-H 'Content-Type: application/json' -d ${quote(JSON.stringify(body))}`);
  } else {
    lines.push(`-F ${quote(`source=@${source.file}`)} -F ${quote(`audio=@${audio.file}`)}`);
    if (Object.keys(params).length) lines.push(`-F ${quote(`params=${JSON.stringify(params)}`)}`);
  }
  return lines.join(" \\\n  ");
}
by("copy-curl").addEventListener("click", async () => {
  const text = curlCommand(now, location.origin);
  try {
    await navigator.clipboard.writeText(text);
    by("copied").textContent = "Copied";
  } catch {
    // Without https the clipboard is closed to pages: the text is shown to be copied by hand.
    by("copied").textContent = text;
  }
});

// -- the last results --

on("results-changed", async () => {
  const { status, body } = await call("/results");
  if (status !== 200) return;
  show("history", body.results.length > 0);
  by("results").replaceChildren(...body.results.map(entry));
});

function entry(result) {
  const title = result.name.replace(/\.mp4$/, "").replace(/-\d{10}-\w{4}$/, "");
  const image = make("img", { alt: "", width: 160, height: 160, loading: "lazy" });
  const open = make("button", { type: "button", class: "open", "aria-label": `Show ${title}` }, image,
    make("span", { class: "what" }, title), make("span", { class: "when" }, when(result.create_time_utc, result.video)));
  open.addEventListener("click", () => { presentStored(result); by("screen").scrollIntoView({ block: "nearest" }); });
  const remove = make("button", { type: "button", class: "remove", title: "Delete", "aria-label": `Delete ${title}` }, icon("trash"));
  const item = make("li", {}, open, remove);
  remove.addEventListener("click", () => confirmDelete(item, result, title, remove));
  thumbnail(result.name, image);
  return item;
}

async function thumbnail(name, image) {
  const answer = await fetch(`/results/${encodeURIComponent(name)}/thumbnail`, { headers: headers() }).catch(() => null);
  if (answer && answer.ok) image.src = URL.createObjectURL(await answer.blob());
}

// The first click asks, the second deletes.
function confirmDelete(item, result, title, remove) {
  if (remove.dataset.sure) {
    call(`/results/${encodeURIComponent(result.name)}`, { method: "DELETE" }).then(({ status }) => {
      if (status !== 200 && status !== 404) return;
      const next = item.nextElementSibling || item.previousElementSibling;
      item.remove();
      if (next) next.querySelector(".open").focus(); else show("history", false);
      announce(`${title} was deleted`);
    });
    return;
  }
  remove.dataset.sure = "1";
  remove.replaceChildren("Delete?");
  const calm = () => { delete remove.dataset.sure; remove.replaceChildren(icon("trash")); };
  remove.addEventListener("blur", calm, { once: true });
}

function when(text, video) {
  const time = new Date(text);
  const isToday = time.toDateString() === new Date().toDateString();
  const day = isToday ? "today" : time.toLocaleDateString([], { day: "numeric", month: "short" });
  return `${day} ${time.toLocaleTimeString([], { hour: "2-digit", minute: "2-digit" })} · ${seconds(video.duration_sec || 0)}`;
}
