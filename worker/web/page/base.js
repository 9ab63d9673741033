// Small helpers that every part of the page uses: elements, the key, requests, events between the parts.

export const by = (id) => document.getElementById(id);
export const show = (id, visible = true) => { by(id).hidden = !visible; };

export function make(tag, given = {}, ...inside) {
  const { class: name, data, ...rest } = given;
  const element = document.createElement(tag);
  if (name) element.className = name;
  for (const [key, value] of Object.entries(data || {})) element.dataset[key] = value;
  for (const [key, value] of Object.entries(rest)) {
    if (key in element && !key.startsWith("aria")) element[key] = value; else element.setAttribute(key, value);
  }
  element.append(...inside);
  return element;
}
export function icon(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("viewBox", name === "head" ? "0 0 48 56" : "0 0 24 24");
  svg.setAttribute("aria-hidden", "true");
  const use = document.createElementNS("http://www.w3.org/2000/svg", "use");
  use.setAttribute("href", `#i-${name}`);
  svg.append(use);
  return svg;
}
export const setIcon = (element, name) => element.querySelector("use").setAttribute("href", `#i-${name}`);

// -- the key --

const memory = {};
function stored(area, name, value) {
  // Browsers that forbid storage still get a page that works.
  try {
    if (value === undefined) return area.getItem(name);
    if (value === null) area.removeItem(name); else area.setItem(name, value);
  } catch {
    if (value === undefined) return memory[name] ?? null;
    memory[name] = value;
  }
  return value;
}
export const session = (name, value) => stored(sessionStorage, name, value);
export const local = (name, value) => stored(localStorage, name, value);
export const key = () => session("key") || "";
export const headers = (more = {}) => (key() ? { "X-Internal-API-Key": key(), ...more } : more);

// -- requests: each answer is {status, body, response}; status 0 when there is none --

export async function call(path, { method = "GET", json, signal } = {}) {
  try {
    const response = await fetch(path, {
      method, signal,
      headers: headers(json === undefined ? {} : { "Content-Type": "application/json" }),
      body: json === undefined ? undefined : JSON.stringify(json),
    });
    const isJson = (response.headers.get("Content-Type") || "").includes("json");
    const body = isJson ? await response.json() : {};
    if (response.status === 401) emit("key-needed");
    return { status: response.status, body, response };
  } catch (problem) {
    return { status: 0, body: {}, aborted: problem.name === "AbortError" };
  }
}

// A file as multipart, with its progress, which fetch does not report.
export function send(path, form, onProgress = () => {}) {
  return new Promise((resolve) => {
    const request = new XMLHttpRequest();
    request.open("POST", path);
    for (const [name, value] of Object.entries(headers())) request.setRequestHeader(name, value);
    request.upload.addEventListener("progress", (event) => onProgress(event.loaded / Math.max(1, event.total)));
    const end = () => {
      let body = {};
      try { body = JSON.parse(request.responseText); } catch { /* its status says enough */ }
      if (request.status === 401) emit("key-needed");
      resolve({ status: request.status, body });
    };
    request.addEventListener("load", end);
    request.addEventListener("error", end);
    request.send(form);
  });
}

// -- events between the parts --

const bus = new EventTarget();
export const emit = (name, detail) => bus.dispatchEvent(new CustomEvent(name, { detail }));
export const on = (name, react) => bus.addEventListener(name, (event) => react(event.detail));

const urls = {};
export function blobUrl(name, blob) {
  if (urls[name]) URL.revokeObjectURL(urls[name]);
  urls[name] = URL.createObjectURL(blob);
  return urls[name];
}
export const pause = (ms) => new Promise((resolve) => { setTimeout(resolve, ms); });
export function announce(text) { by("announce").textContent = text; }
