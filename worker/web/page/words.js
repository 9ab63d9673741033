// Everything the page says about stages, problems and numbers.

export const STAGES = {
  sending: "Sending the files",
  waiting: "Waiting for the worker",
  download: "Fetching the files",
  validation: "Checking the files",
  preprocessing: "Finding the face",
  inference: "Drawing the mouth",
  postprocessing: "Finishing the video",
  upload: "Storing the video",
};
export const STEPS = ["download", "validation", "preprocessing", "inference", "postprocessing", "upload"];

// Set by the options module; here, so that an error can say the label of an option.
export const labels = {};
const FIELDS = {
  source: "the face file", video_url: "the face file", audio: "the speech file", audio_url: "the speech file",
  musetalk_job_id: "the name of the job", time_s: "the time of the preview", preview_s: "the time of the preview",
  body: "the request",
};

export function sentence(text) {
  const clean = String(text || "").trim();
  if (!clean) return "";
  const first = clean[0].toUpperCase() + clean.slice(1);
  return /[.!?…]$/.test(first) ? first : `${first}.`;
}

// Names of the API never reach a person: an option has its label, a field its name.
export function plain(text) {
  return String(text || "")
    .replace(/\bparams\.(\w+)/g, (_all, name) => `“${labels[name] || name.replaceAll("_", " ")}”`)
    .replace(/\b(video_url|audio_url|musetalk_job_id|time_s|preview_s)\b/g, (name) => FIELDS[name])
    .replace("must have x1 > x0 and y1 > y0", "needs its right edge to the right of the left one, and its bottom below its top")
    .replace(/\bparams\b/g, "the options")
    .replace(/^the (source|video)\b/i, "the face file").replace(/^the audio\b/i, "the speech file");
}

// Where a problem is: "source", "audio", "option:<name>" or "".
function placeOf(body) {
  const field = String((body.details || {}).field || "");
  if (field.startsWith("params.")) return `option:${field.slice(7)}`;
  if (field === "source" || field === "video_url") return "source";
  if (field === "audio" || field === "audio_url") return "audio";
  if (field) return "";
  const text = String(body.error_message || "");
  if (/\b(audio|sound|speech|speak)/i.test(text)) return "audio";
  if (/\b(face|source|video|picture|still|frame)/i.test(text) && body.stage !== "inference") return "source";
  return "";
}

function advice(place, body) {
  const text = String(body.error_message || "");
  if (place.startsWith("option:")) return "Change the marked option, or set it back to its default.";
  if (/no frame of the source shows a face/.test(text)) {
    return "Choose a clip or photo in which the face is seen from the front, or draw a box around the face.";
  }
  if (/no longer here/.test(text)) return "Choose the file again.";
  if (place === "source") return "Choose another video or photo: MP4, MOV, WebM, JPEG or PNG.";
  if (place === "audio") return "Choose another file with sound: WAV, MP3, M4A, Ogg, FLAC or a video.";
  return "Change the files or the options, and try again.";
}

export function explain(status, body, retryAfter) {
  const text = sentence(plain(body.error_message));
  const place = placeOf(body);
  if (status === 0) {
    return { title: "The worker cannot be reached", text: "The connection broke before an answer came.",
      advice: "Look whether the worker still runs, then try again.", place: "" };
  }
  if (status === 401) return { title: "This worker needs its key", text: "Enter it at the top of the page.", advice: "", place: "key" };
  if (status === 409) return { title: "Cancelled", text: "The job was stopped. Nothing was stored.", advice: "", place: "" };
  if (status === 413) {
    return { title: "A file is too large", text, advice: "Choose a smaller file, or raise MAX_VIDEO_BYTES or MAX_AUDIO_BYTES on the worker.", place };
  }
  if (status === 503) {
    const pause = retryAfter ? `Try again in ${retryAfter} seconds.` : "Try again in a moment.";
    return { title: "The worker cannot take the job now", text, advice: pause, place: "" };
  }
  if (status === 422) {
    const title = place.startsWith("option:") ? `“${labels[place.slice(7)] || place.slice(7).replaceAll("_", " ")}” cannot be used`
      : place === "source" ? "The face cannot be used" : place === "audio" ? "The speech cannot be used" : "The job cannot be made";
    return { title, text, advice: advice(place, body), place };
  }
  const where = STAGES[body.stage] ? ` It happened while: ${STAGES[body.stage].toLowerCase()}.` : "";
  return { title: "The job failed", text: (text || `The worker answered with status ${status}.`) + where,
    advice: body.retryable ? "Try again; this may pass." : "The worker's log says more.", place: "" };
}

export function seconds(value) {
  if (value < 9.95) return `${value.toFixed(1)} s`;
  if (value < 90) return `${Math.round(value)} s`;
  const minutes = Math.floor(value / 60);
  return `${minutes} min ${Math.round(value - 60 * minutes)} s`;
}
export function clock(value) {
  const whole = Math.max(0, Math.floor(value || 0));
  return `${Math.floor(whole / 60)}:${String(whole % 60).padStart(2, "0")}`;
}
export function megabytes(bytes) {
  return bytes < 1e5 ? `${Math.max(1, Math.round(bytes / 1e3))} KB` : `${(bytes / 1e6).toFixed(1)} MB`;
}
export function slug(text) {
  return text.replace(/\.[a-z0-9]{1,5}$/i, "").normalize("NFKD").replace(/[^A-Za-z0-9]+/g, "-").replace(/^-+|-+$/g, "").toLowerCase().slice(0, 40) || "video";
}
