// The options of a job. Ranges and defaults come from the worker; the words are here, one line an option.
import { by, call, emit, icon, make, on } from "./base.js";
import { labels } from "./words.js";

// A parameter without a line here appears among the advanced ones, under its own name.
//   only: the model that it has an effect with;  when: other options that it needs;  max: more than that is of no use
const WORDS = {
  extra_margin: { label: "Chin room", unit: "px", max: 60, say: "How far below the chin is redrawn. More lets the jaw drop further." },
  parsing_mode: { label: "What is redrawn", kind: "pictures", say: "The part of the face that may change.",
    names: { raw: "Mouth and skin", jaw: "Jaw", neck: "Jaw and neck" } },
  silence: { label: "Pauses", say: "The mouth while nobody speaks.",
    names: { generate: "Follow the sound", closed: "Mouth shut", source: "As in the source" } },
  loop_mode: { label: "When the speech is longer", say: "What is shown after the end of the face's clip.",
    names: { ping_pong: "Back and forth", loop: "From the start", hold: "Stay on the last picture", trim: "End with the clip" } },
  box_smoothing: { label: "Steadiness", unit: "frames", max: 10, step: 0.5, say: "Steadies a mouth that trembles. Too much lags behind a head that moves." },
  detail: { label: "Sharpness", percent: true, say: "Gives the skin around the mouth its texture back." },
  restore: { label: "Restoration", percent: true, say: "Redraws the mouth with a second network. Sharper, but less like the person." },
  left_cheek_width: { label: "Left cheek", advanced: true, when: { parsing_mode: "jaw" }, say: "Width of the cheek, seen from the left edge, that stays as it is." },
  right_cheek_width: { label: "Right cheek", advanced: true, when: { parsing_mode: "jaw" }, say: "The same on the right." },
  max_gap_frames: { label: "Missing faces", unit: "frames", advanced: true, max: 100, none: "half a second", say: "Gaps without a face up to this length are filled in." },
  bbox_shift: { label: "Box shift", unit: "px", advanced: true, only: "v1", max: 30, min: -30, say: "Moves the redrawn box down or up." },
  background: { label: "Background", advanced: true, kind: "colour", say: "Shown behind a photo with transparent parts." },
  batch_size: { label: "Frames at once", advanced: true, max: 64, say: "More is faster on a large GPU, and changes nothing in the picture." },
  face_box: { label: "Face box", advanced: true, kind: "box", none: "found in each frame", say: "The face's place in the picture, in pixels: left, top, right, bottom. Fixed for the whole clip." },
};
const MAIN = ["extra_margin", "parsing_mode", "silence", "loop_mode", "box_smoothing", "detail", "restore"];

const values = {};
let schemas = {};
let model = null;

export function params() { return { ...values }; }
export function valueOf(name) { return name in values ? values[name] : schemas[name] && schemas[name].default; }

export function setParams(given) {
  for (const name of Object.keys(values)) delete values[name];
  for (const [name, value] of Object.entries(given || {})) {
    if (schemas[name] && value !== null && JSON.stringify(value) !== JSON.stringify(schemas[name].default)) values[name] = value;
  }
  draw();
  changed();
}

export function setParam(name, value) {
  if (value === null || value === undefined) delete values[name]; else values[name] = value;
  refresh(name);
  changed();
}

function changed() {
  const count = Object.keys(values).length;
  by("n-changed").textContent = count ? ` (${count})` : "";
  for (const name of Object.keys(schemas)) {
    const row = by(`row-${name}`);
    if (row) { row.hidden = !isUseful(name); row.classList.toggle("changed", name in values); }
  }
  emit("options", params());
}

function isUseful(name) {
  const words = WORDS[name] || {};
  if (words.only && model && words.only !== model) return false;
  return Object.entries(words.when || {}).every(([other, wanted]) => valueOf(other) === wanted);
}

export async function loadOptions() {
  const { status, body } = await call("/playground/options");
  if (status !== 200) return false;
  schemas = body.params;
  model = body.model;
  for (const name of Object.keys(schemas)) labels[name] = (WORDS[name] || {}).label || name.replaceAll("_", " ").replace(/^./, (c) => c.toUpperCase());
  emit("samples", body.samples);
  draw();
  changed();
  return true;
}

function draw() {
  const names = Object.keys(schemas);
  const main = MAIN.filter((name) => names.includes(name));
  by("options").replaceChildren(...main.map(row));
  by("advanced-options").replaceChildren(...names.filter((name) => !main.includes(name)).map(row));
}

// -- one option: its label, its value, a sentence, and a control by the kind of its schema --

function kindOf(schema, words) {
  if (words.kind) return words.kind;
  if (schema.enum) return "choice";
  const types = [].concat(schema.type);
  if (types.includes("array")) return "box";
  return types.includes("integer") || types.includes("number") ? "range" : "text";
}

function row(name) {
  const schema = schemas[name];
  const words = WORDS[name] || { say: schema.description };
  const kind = kindOf(schema, words);
  const isGroup = kind === "choice" || kind === "pictures" || kind === "box";
  const outer = make(isGroup ? "fieldset" : "div", { class: "option", id: `row-${name}`, data: { kind } });
  const value = make("output", { id: `value-${name}` });
  const title = isGroup ? make("legend", {}, labels[name]) : make("label", { htmlFor: `param-${name}` }, labels[name]);
  const reset = make("button", { type: "button", class: "reset", id: `reset-${name}`, title: "Back to the default", "aria-label": `${labels[name]}: back to the default` }, "↺");
  reset.addEventListener("click", () => { setParam(name, null); });
  const say = make("p", { class: "say", id: `say-${name}` }, words.say);
  const problem = make("p", { class: "problem", id: `problem-${name}` });
  const head = make("div", { class: "head" }, value, reset);
  if (isGroup) outer.append(title, head); else { head.prepend(title); outer.append(head); }
  outer.append(CONTROLS[kind](name, schema, words), say, problem);
  queueMicrotask(() => refresh(name));
  return outer;
}

const describe = (name) => ({ "aria-describedby": `say-${name} problem-${name}` });

const CONTROLS = {
  range(name, schema, words) {
    const isWhole = [].concat(schema.type).includes("integer");
    const low = words.min ?? schema.minimum;
    const high = Math.min(schema.maximum, words.max ?? schema.maximum);
    const input = make("input", { type: "range", id: `param-${name}`, min: low, max: high,
      step: words.step || (isWhole ? 1 : (high - low) / 20), ...describe(name) });
    input.addEventListener("input", () => setParam(name, Number(input.value)));
    return input;
  },
  choice: (name, schema, words) => choices(name, schema, words, (value) => [make("span", {}, (words.names || {})[value] || value)]),
  pictures: (name, schema, words) => choices(name, schema, words, (value) => [drawing(value), make("span", {}, (words.names || {})[value] || value)]),
  colour(name) {
    const input = make("input", { type: "color", id: `param-${name}`, ...describe(name) });
    input.addEventListener("input", () => setParam(name, input.value));
    return input;
  },
  text(name) {
    const input = make("input", { type: "text", id: `param-${name}`, ...describe(name) });
    input.addEventListener("change", () => setParam(name, input.value.trim() || null));
    return input;
  },
  box(name) {
    const edges = ["Left", "Top", "Right", "Bottom"];
    const inputs = edges.map((edge, index) => make("input", { type: "number", id: index ? `param-${name}-${index}` : `param-${name}`, step: 1, "aria-label": `${labels[name]}: ${edge.toLowerCase()}`, placeholder: edge, ...describe(name) }));
    const read = () => {
      const given = inputs.map((input) => input.value.trim());
      if (given.every((text) => !text)) setParam(name, null);
      else if (given.every(Boolean)) setParam(name, given.map(Number));
    };
    for (const input of inputs) input.addEventListener("change", read);
    return make("div", { class: "four" }, ...inputs);
  },
};

function choices(name, schema, words, inside) {
  const order = Object.keys(words.names || {});
  const all = schema.enum.filter(Boolean).sort((a, b) => order.indexOf(a) - order.indexOf(b));
  return make("div", { class: "choices" }, ...all.map((value, index) => {
    const input = make("input", { type: "radio", name: `param-${name}`, value, id: index ? `param-${name}-${value}` : `param-${name}`, ...describe(name) });
    input.addEventListener("change", () => setParam(name, value === schemas[name].default ? null : value));
    return make("label", {}, input, ...inside(value));
  }));
}

// A head with the part that is redrawn.
function drawing(value) {
  const parts = {
    raw: "M13 22c-2 8 4 19 11 19s13-11 11-19c-4 3-7 4-11 4s-7-1-11-4Z",
    jaw: "M17 25c-1 6 2 12 7 12s8-6 7-12c-4 2-10 2-14 0Z",
    neck: "M17 25c-1 5 0 9 2 11l-2 10h14l-2-10c2-2 3-6 2-11-4 2-10 2-14 0Z",
  };
  const head = icon("head");
  const part = document.createElementNS("http://www.w3.org/2000/svg", "path");
  part.setAttribute("d", parts[value] || parts.raw);
  part.setAttribute("class", "part");
  head.prepend(part);
  head.classList.add("head-drawing");
  return head;
}

function refresh(name) {
  const schema = schemas[name];
  const control = by(`param-${name}`);
  if (!schema || !control) return;
  const words = WORDS[name] || {};
  const value = valueOf(name);
  const kind = by(`row-${name}`).dataset.kind;
  if (kind === "range") {
    const none = words.none ? 0 : control.min;
    control.value = value ?? none;
    control.setAttribute("aria-valuetext", text(name, value));
    control.style.setProperty("--full", `${(100 * (control.value - control.min)) / (control.max - control.min)}%`);
  } else if (kind === "choice" || kind === "pictures") {
    for (const input of document.getElementsByName(`param-${name}`)) input.checked = input.value === value;
  } else if (kind === "box") {
    const inputs = by(`row-${name}`).querySelectorAll("input");
    inputs.forEach((input, index) => { input.value = Array.isArray(value) ? value[index] : ""; });
  } else {
    control.value = value ?? "";
  }
  by(`value-${name}`).textContent = kind === "choice" || kind === "pictures" ? "" : text(name, value);
  by(`reset-${name}`).hidden = !(name in values);
}

function text(name, value) {
  const words = WORDS[name] || {};
  if (value === null || value === undefined) return words.none || "automatic";
  if (Array.isArray(value)) return value.join(", ");
  if (words.percent) return `${Math.round(100 * value)} %`;
  if (typeof value !== "number") return String(value);
  if (name === "extra_margin" && !(name in values) && model === "demo") return "by the face's size";
  if (value === 0 && name === "box_smoothing") return "off";
  return words.unit ? `${value} ${words.unit}` : String(value);
}

// -- problems beside their option --

export function markOption(name, message) {
  clearMarks();
  const holder = by(`row-${name}`);
  if (!holder) return null;
  openPanel(true);
  if (holder.closest("details")) by("advanced").open = true;
  holder.hidden = false;
  holder.classList.add("wrong");
  by(`problem-${name}`).textContent = message;
  for (const input of holder.querySelectorAll("input")) input.setAttribute("aria-invalid", "true");
  return by(`param-${name}`);
}
export function clearMarks() {
  for (const holder of document.querySelectorAll(".option.wrong")) {
    holder.classList.remove("wrong");
    holder.querySelector(".problem").textContent = "";
    for (const input of holder.querySelectorAll("input")) input.removeAttribute("aria-invalid");
  }
}

export function openPanel(isOpen) {
  by("options-panel").hidden = !isOpen;
  by("show-options").setAttribute("aria-expanded", String(isOpen));
}
by("show-options").addEventListener("click", () => openPanel(by("options-panel").hidden));
by("reset-options").addEventListener("click", () => setParams({}));
on("options", clearMarks);
