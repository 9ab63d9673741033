// The face's first picture: the face that was found, or a box that a person draws with the mouse or the keys.
import { by, show } from "./base.js";
import { setParam } from "./options.js";

let size = { width: 0, height: 0 };
let box = null;
let isOwn = false;
let drag = null;

export const hasOwnBox = () => isOwn;

export function showFound(found, width, height) {
  size = { width, height };
  if (!isOwn) box = found;
  place();
}
export function forgetBox() {
  box = null;
  isOwn = false;
  setDrawing(false);
  place();
}
// From the number fields of the advanced options.
export function followParam(value) {
  if (Array.isArray(value)) {
    if (JSON.stringify(value) === JSON.stringify(box) && isOwn) return;
    box = value;
    isOwn = true;
  } else if (isOwn) {
    box = null;
    isOwn = false;
  }
  place();
}

function place() {
  const button = by("face-box");
  show("draw-box", size.width > 0);
  by("draw-box").textContent = isOwn ? "Find the face again" : isDrawing() ? "Stop drawing" : "Draw the face box";
  button.hidden = !box || !size.width;
  if (button.hidden) return;
  const [x0, y0, x1, y1] = box;
  const percent = (value, whole) => `${(100 * value) / whole}%`;
  Object.assign(button.style, {
    left: percent(x0, size.width), top: percent(y0, size.height),
    width: percent(x1 - x0, size.width), height: percent(y1 - y0, size.height),
  });
  button.classList.toggle("own", isOwn);
  by("face-box-label").textContent = isOwn ? "Your box" : "Face found";
  button.setAttribute("aria-label", `${isOwn ? "Your box" : "Face found"}, ${x0}, ${y0} to ${x1}, ${y1}. ` +
    "Arrow keys move it, with Shift they change its size.");
}

const isDrawing = () => by("draw-box").getAttribute("aria-pressed") === "true";
function setDrawing(drawing) {
  by("draw-box").setAttribute("aria-pressed", String(drawing));
  by("source-frame").classList.toggle("drawing", drawing);
}

by("draw-box").addEventListener("click", () => {
  if (isOwn) {
    forgetBox();
    setParam("face_box", null);
    return;
  }
  setDrawing(!isDrawing());
  if (isDrawing() && !box) {
    // Something to begin with for the keys: the middle of the picture.
    const { width, height } = size;
    box = [width * 0.3, height * 0.2, width * 0.7, height * 0.75].map(Math.round);
  }
  place();
  if (isDrawing()) by("face-box").focus();
});

function accept() {
  isOwn = true;
  setParam("face_box", [...box]);
  place();
}

function limited([x0, y0, x1, y1]) {
  const [left, right] = [Math.min(x0, x1), Math.max(x0, x1)];
  const [top, bottom] = [Math.min(y0, y1), Math.max(y0, y1)];
  const clip = (value, whole) => Math.round(Math.max(0, Math.min(whole, value)));
  return [clip(left, size.width), clip(top, size.height), clip(right, size.width), clip(bottom, size.height)];
}

// -- the mouse and fingers --

function pointOf(event) {
  const rect = by("box-layer").getBoundingClientRect();
  return [((event.clientX - rect.left) * size.width) / rect.width, ((event.clientY - rect.top) * size.height) / rect.height];
}

by("box-layer").addEventListener("pointerdown", (event) => {
  if (!size.width || (!isDrawing() && !isOwn)) return;
  event.preventDefault();
  const from = pointOf(event);
  const onCorner = event.target.tagName === "I";
  const onBox = event.target.closest("#face-box");
  drag = { from, begin: box ? [...box] : null, kind: onCorner ? "size" : onBox && isOwn ? "move" : "draw" };
  by("box-layer").setPointerCapture(event.pointerId);
});
by("box-layer").addEventListener("pointermove", (event) => {
  if (!drag) return;
  const [x, y] = pointOf(event);
  const [dx, dy] = [x - drag.from[0], y - drag.from[1]];
  if (drag.kind === "draw") box = limited([drag.from[0], drag.from[1], x, y]);
  else {
    const [x0, y0, x1, y1] = drag.begin;
    box = drag.kind === "size" ? limited([x0, y0, Math.max(x0 + 8, x1 + dx), Math.max(y0 + 8, y1 + dy)]) : moved(drag.begin, dx, dy);
  }
  drag.changed = true;
  place();
});
function drop() {
  if (!drag) return;
  const { changed, begin } = drag;
  drag = null;
  const isLarge = box && box[2] - box[0] >= 16 && box[3] - box[1] >= 16;
  if (changed && isLarge) accept();
  else { box = begin; place(); }
}
by("box-layer").addEventListener("pointerup", drop);
by("box-layer").addEventListener("pointercancel", drop);

function moved([x0, y0, x1, y1], dx, dy) {
  const [width, height] = [x1 - x0, y1 - y0];
  const left = Math.round(Math.max(0, Math.min(size.width - width, x0 + dx)));
  const top = Math.round(Math.max(0, Math.min(size.height - height, y0 + dy)));
  return [left, top, left + width, top + height];
}

// -- the keys --

let settle = 0;
by("face-box").addEventListener("keydown", (event) => {
  const steps = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
  const step = steps[event.key];
  if (!step || !box) return;
  event.preventDefault();
  const far = Math.max(2, Math.round(size.width / 100));
  const [dx, dy] = [step[0] * far, step[1] * far];
  const [x0, y0, x1, y1] = box;
  box = event.shiftKey ? limited([x0, y0, Math.max(x0 + 16, x1 + dx), Math.max(y0 + 16, y1 + dy)]) : moved(box, dx, dy);
  isOwn = true;
  place();
  clearTimeout(settle);
  settle = setTimeout(accept, 300);
});
