// The page: chat with pictures in and out, draw, edit. Plain script, no library, no build step.
//
// It speaks the server's own OpenAI-compatible API and asks no other host. Texts and settings of the history are kept
// in localStorage, pictures in IndexedDB, an API key in sessionStorage. Everything that comes from the server or the
// user reaches the document as text or as a picture, never as HTML.
"use strict";

const MODES = {
  chat: { placeholder: "Write a message", send: "Send" },
  generate: { placeholder: "Describe a picture", send: "Generate" },
  edit: { placeholder: "Say what should change", send: "Edit" },
};
const NUMBERS = ["seed", "count", "steps", "width", "height", "guidance", "temperature", "maxTokens"];
const MAX_COUNT = 10; // pictures of one request, as the API has it
const MAX_ENTRIES = 100; // of the history; the oldest go
const BIG_FILE = 20 * 2 ** 20; // bytes, above which a server may refuse a picture
const NUM_PARTIAL = 2; // previews asked for on the way to a picture
const MODELS_RETRY_S = 5;

// ---------------------------------------------------------------------------------------------------- small storage

function recall(area, name, otherwise) {
  try {
    const text = window[area].getItem(`nexusgen.${name}`);
    return text === null ? otherwise : JSON.parse(text);
  } catch {
    return otherwise; // storage is forbidden, or holds something else
  }
}

function remember(area, name, value) {
  try {
    window[area].setItem(`nexusgen.${name}`, JSON.stringify(value));
    return true;
  } catch {
    return false;
  }
}

// Before anything is painted: the script stands in the head, so that a dark page doesn't flash light.
function showTheme(theme) {
  if (theme) document.documentElement.dataset.theme = theme;
}
showTheme(recall("localStorage", "theme", null));

/** Pictures by id: in memory, and in IndexedDB where the browser lets us. */
const pictures = {
  blobs: new Map(),
  urls: new Map(),
  database: null,

  async open() {
    try {
      const request = indexedDB.open("nexusgen", 1);
      request.onupgradeneeded = () => request.result.createObjectStore("pictures");
      this.database = await settled(request);
    } catch {
      this.database = null; // pictures then live as long as the tab
    }
  },
  table(access) {
    return this.database.transaction("pictures", access).objectStore("pictures");
  },
  add(blob) {
    const id = crypto.getRandomValues(new Uint32Array(3)).join("-");
    this.blobs.set(id, blob);
    return id;
  },
  async keep(id) {
    if (!this.database) return;
    try {
      await settled(this.table("readwrite").put(this.blobs.get(id), id));
    } catch {
      setStatus("The browser has no room to keep this picture after the tab is closed.");
    }
  },
  async get(id) {
    if (!this.blobs.has(id) && this.database) {
      const blob = await settled(this.table("readonly").get(id)).catch(() => undefined);
      if (blob) this.blobs.set(id, blob);
    }
    return this.blobs.get(id);
  },
  async url(id) {
    if (!this.urls.has(id)) {
      const blob = await this.get(id);
      if (!blob) return null;
      this.urls.set(id, URL.createObjectURL(blob));
    }
    return this.urls.get(id);
  },
  /** Forget all pictures but these. */
  async keepOnly(ids) {
    for (const [id, url] of this.urls) {
      if (ids.has(id)) continue;
      URL.revokeObjectURL(url);
      this.urls.delete(id);
    }
    for (const id of [...this.blobs.keys()]) if (!ids.has(id)) this.blobs.delete(id);
    if (!this.database) return;
    const stored = await settled(this.table("readonly").getAllKeys()).catch(() => []);
    for (const id of stored) if (!ids.has(id)) this.table("readwrite").delete(id);
  },
};

function settled(request) {
  return new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}

// ---------------------------------------------------------------------------------------------------------- the API

class ApiError extends Error {
  constructor(message, { status = null, code = null, retryAfter = null } = {}) {
    super(message);
    this.status = status;
    this.code = code;
    this.retryAfter = retryAfter;
  }
}

async function call(path, { body, signal } = {}) {
  const headers = {};
  const key = recall("sessionStorage", "key", null);
  if (key) headers.Authorization = `Bearer ${key}`;
  const options = { headers, signal, method: body === undefined ? "GET" : "POST", cache: "no-store" };
  if (body instanceof FormData) {
    options.body = body;
  } else if (body !== undefined) {
    headers["Content-Type"] = "application/json";
    options.body = JSON.stringify(body);
  }
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The server can't be reached. Is it running, and the network up?");
  }
  if (!response.ok) throw await errorOf(response);
  return response;
}

async function errorOf(response) {
  const told = await response.json().catch(() => null);
  const error = told && told.error;
  const message = (error && error.message) || `The server answered ${response.status} ${response.statusText}`.trim();
  const seconds = secondsOf(response.headers.get("Retry-After"));
  return new ApiError(message, { status: response.status, code: error && error.code, retryAfter: seconds });
}

/** Retry-After is a number of seconds or a date. */
function secondsOf(header) {
  if (!header) return null;
  const seconds = /^\d+$/.test(header.trim()) ? Number(header) : (Date.parse(header) - Date.now()) / 1000;
  return Number.isFinite(seconds) ? Math.max(0, Math.ceil(seconds)) : null;
}

/** The JSON of each server-sent event, until the stream or `[DONE]` ends it. */
async function* eventsOf(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  for (;;) {
    const { done, value } = await reader.read();
    buffer = (buffer + (done ? "\n\n" : value)).replaceAll("\r\n", "\n");
    const blocks = buffer.split("\n\n");
    buffer = blocks.pop();
    for (const block of blocks) {
      const lines = block.split("\n").filter((line) => line.startsWith("data:"));
      const text = lines.map((line) => line.slice(5).trimStart()).join("\n");
      if (text === "[DONE]") return;
      if (text) yield checked(JSON.parse(text));
    }
    if (done) return;
  }
}

function checked(event) {
  if (event.error) throw new ApiError(event.error.message || "The server failed.", { code: event.error.code });
  return event;
}

/** One picture from `/v1/images/...`: previews go to `onPartial`, the PNG is returned. */
async function drawOne(path, body, signal, onPartial) {
  const response = await call(path, { body, signal });
  if (!(response.headers.get("Content-Type") || "").startsWith("text/event-stream")) {
    const answer = await response.json();
    return bytesOf(answer.data[0].b64_json);
  }
  for await (const event of eventsOf(response)) {
    if (event.type.endsWith(".partial_image")) onPartial(event.b64_json, event.partial_image_index);
    if (event.type.endsWith(".completed")) return bytesOf(event.b64_json);
  }
  throw new ApiError("The server ended the answer before the picture was done.");
}

/** The fields that all three ways of asking share; what isn't set is the model's to choose. */
function pictureFields(settings) {
  const fields = {};
  if (settings.model) fields.model = settings.model;
  if (settings.steps) fields.steps = settings.steps;
  if (settings.width) fields.size = `${settings.width}x${settings.height}`;
  if (settings.guidance !== null) fields.guidance_scale = settings.guidance;
  return fields;
}

async function drawRequest(entry, seed) {
  const fields = { prompt: entry.prompt, ...pictureFields(entry.settings), n: 1, seed };
  Object.assign(fields, { stream: true, partial_images: NUM_PARTIAL });
  if (entry.mode === "generate") return ["/v1/images/generations", fields];
  const form = new FormData();
  for (const input of entry.inputs) form.append("image[]", await pictures.get(input.id), input.name);
  for (const [name, value] of Object.entries(fields)) form.append(name, String(value));
  return ["/v1/images/edits", form];
}

async function chatRequest(entry) {
  const { answer, seed, temperature, maxTokens } = entry.settings;
  const body = { messages: await messagesFor(entry), modalities: answer.split(","), stream: true };
  Object.assign(body, answer === "text" ? {} : pictureFields(entry.settings));
  if (entry.settings.model) body.model = entry.settings.model;
  if (seed !== null) body.seed = seed;
  if (temperature !== null) body.temperature = temperature;
  if (maxTokens) body.max_tokens = maxTokens;
  return body;
}

/** The conversation so far, and `entry` as its last message. Turns that got no answer are left out. */
async function messagesFor(entry) {
  const messages = [];
  for (const turn of entries.filter((other) => other.mode === "chat")) {
    if (turn !== entry && !turn.text && !turn.pictures.some(Boolean)) continue;
    const parts = [];
    for (const input of turn.inputs) {
      const blob = await pictures.get(input.id);
      if (blob) parts.push({ type: "image_url", image_url: { url: await dataUriOf(blob) } });
    }
    parts.push({ type: "text", text: turn.prompt });
    messages.push({ role: "user", content: parts.length > 1 ? parts : turn.prompt });
    if (turn === entry) break;
    // That the model drew something, and where in its text; only pictures that a user gives are sent as pictures.
    const drawn = turn.pictures.filter(Boolean).map(({ offset }) => ({ type: "image_url", offset }));
    messages.push({ role: "assistant", content: turn.text, ...(drawn.length ? { images: drawn } : {}) });
  }
  return messages;
}

function bytesOf(base64) {
  return Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));
}

function dataUriOf(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(new ApiError("A picture could not be read; was its file moved or changed?"));
    reader.readAsDataURL(blob);
  });
}

/** What a PNG of nexusgen says about its making (model, seed, settings), from its text chunks; {} if it says nothing. */
function madeFrom(bytes) {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  const latin = (from, to) => String.fromCharCode(...bytes.subarray(from, to));
  if (bytes.length < 8 || latin(1, 4) !== "PNG") return {};
  for (let at = 8; at + 12 <= bytes.length; ) {
    const length = view.getUint32(at);
    const start = at + 8;
    if (latin(at + 4, start) === "tEXt" && latin(start, start + 9) === "nexusgen\0") {
      try {
        return JSON.parse(latin(start + 9, start + length));
      } catch {
        return {};
      }
    }
    at = start + length + 4;
  }
  return {};
}

// ------------------------------------------------------------------------------------------------------- the history

// Entry: {id, mode, prompt, inputs: [{id, name}], settings, text, pictures: [{id, made, offset} or null], state, error, seconds}
// with state running, done, stopped or failed.
let entries = [];
let attachments = []; // {id, name, size}
let running = null; // {entry, controller} while a request is under way
let models = [];
const views = new Map(); // entry id -> its elements

function saveEntries() {
  while (entries.length > MAX_ENTRIES) {
    const [oldest] = entries.splice(0, 1);
    views.get(oldest.id).root.remove();
    views.delete(oldest.id);
  }
  if (!remember("localStorage", "entries", entries)) setStatus("The browser has no room to keep the history.");
}

function idsInUse() {
  const ids = new Set(attachments.map((attachment) => attachment.id));
  for (const entry of entries) {
    for (const picture of [...entry.inputs, ...entry.pictures]) if (picture) ids.add(picture.id);
  }
  return ids;
}

async function restoreEntries() {
  entries = recall("localStorage", "entries", []);
  for (const entry of entries) {
    if (entry.state === "running") entry.state = "stopped"; // the tab was closed in between
    await showEntry(entry);
  }
  await pictures.keepOnly(idsInUse());
}

async function clearMode() {
  const gone = entries.filter((entry) => entry.mode === mode());
  const dialog = $("confirm");
  $("confirm-text").textContent = `Clear ${gone.length === 1 ? "this entry" : `these ${gone.length} entries`} for good?`;
  dialog.returnValue = "no";
  dialog.showModal();
  await new Promise((resolve) => dialog.addEventListener("close", resolve, { once: true }));
  if (dialog.returnValue !== "yes") return;
  if (running && gone.includes(running.entry)) running.controller.abort();
  for (const entry of gone) {
    views.get(entry.id).root.remove();
    views.delete(entry.id);
  }
  entries = entries.filter((entry) => !gone.includes(entry));
  saveEntries();
  await pictures.keepOnly(idsInUse());
  showMode(mode());
  setStatus("Cleared.");
  $("prompt").focus();
}

// ---------------------------------------------------------------------------------------------------------- requests

async function send() {
  const prompt = $("prompt").value.trim();
  if (running) return;
  const settings = readSettings();
  const inputs = mode() === "generate" ? [] : attachments.map(({ id, name }) => ({ id, name }));
  const problem = problemWith(prompt, settings, inputs);
  setNotice(problem);
  if (problem) return;
  // The pictures of one request are drawn from seed, seed + 1, ...: chosen here, so that it can be shown and reused.
  if (mode() !== "chat") settings.seed ??= crypto.getRandomValues(new Uint32Array(1))[0] % 1e6;
  const id = `${Date.now()}-${crypto.getRandomValues(new Uint32Array(1))[0]}`;
  const entry = { id, mode: mode(), prompt, inputs, settings, text: "", pictures: [], state: "running" };
  Object.assign(entry, { error: null, seconds: null });
  if (entry.mode !== "chat") entry.pictures = Array(settings.count).fill(null);
  entries.push(entry);
  $("prompt").value = "";
  if (entry.mode === "chat") attachments = []; // an edit is often tried again on the same picture
  showAttachments();
  for (const input of inputs) await pictures.keep(input.id);
  await showEntry(entry);
  await run(entry);
}

function problemWith(prompt, settings, inputs) {
  if (mode() === "edit" && inputs.length === 0) return "Add the picture to edit first: drop, paste or choose one.";
  if (!prompt) return mode() === "chat" ? "Write something first." : "Say first what the picture should show.";
  if ((settings.width === null) !== (settings.height === null)) return "Give both width and height, or neither.";
  return null;
}

async function run(entry) {
  const controller = new AbortController();
  running = { entry, controller };
  entry.state = "running";
  entry.error = null;
  showState(entry);
  showRunning();
  saveEntries();
  scrollToEnd(true);
  const started = performance.now();
  try {
    if (entry.mode === "chat") await chat(entry, controller.signal);
    else await draw(entry, controller.signal);
    entry.state = "done";
  } catch (error) {
    if (controller.signal.aborted) {
      entry.state = "stopped";
    } else {
      entry.state = "failed";
      const { message, status = null, code = null, retryAfter = null } = error;
      entry.error = { message, status, code, retryAfter };
    }
  }
  entry.seconds = (performance.now() - started) / 1000;
  running = null;
  showRunning();
  if (!entries.includes(entry)) return; // it was cleared meanwhile
  const atEnd = isAtEnd();
  showState(entry, true);
  saveEntries();
  announce(entry);
  if (atEnd) scrollToEnd();
  if (entry.error && entry.error.status === 401) askForKey();
  const made = entry.pictures.find((picture) => picture && picture.made.version);
  if (made && !models.some((model) => String(model.version) === String(made.made.version))) showModels();
}

/** Each picture is a request of its own: they share the server's batches, and come, stop and fail one by one. */
async function draw(entry, signal) {
  const missing = entry.pictures.flatMap((picture, index) => (picture ? [] : [index]));
  const results = await Promise.allSettled(
    missing.map(async (index) => {
      const slot = views.get(entry.id).slots[index];
      slot.show("waiting");
      const [path, body] = await drawRequest(entry, entry.settings.seed + index);
      const bytes = await drawOne(path, body, signal, (base64, number) => slot.preview(base64, number));
      await keepPicture(entry, index, bytes);
    }),
  );
  const failed = results.find((result) => result.status === "rejected");
  if (failed) throw failed.reason;
}

async function chat(entry, signal) {
  entry.text = "";
  entry.pictures = [];
  showAnswer(entry);
  const response = await call("/v1/chat/completions", { body: await chatRequest(entry), signal });
  let finished = false;
  for await (const event of eventsOf(response)) {
    const choice = event.choices && event.choices[0];
    if (!choice) continue;
    const atEnd = isAtEnd();
    const delta = choice.delta || {};
    if (delta.content) {
      entry.text += delta.content;
      showText(entry);
    }
    for (const image of delta.images || []) {
      const [, base64] = image.image_url.url.split(",", 2);
      const offset = image.offset ?? entry.text.length;
      await keepPicture(entry, image.index ?? entry.pictures.length, bytesOf(base64), { offset });
    }
    if (choice.finish_reason) finished = true;
    if (choice.finish_reason === "length") entry.cut = true;
    if (atEnd) scrollToEnd();
  }
  if (!finished) throw new ApiError("The server ended the answer before it was done.");
}

async function keepPicture(entry, index, bytes, more = {}) {
  const id = pictures.add(new Blob([bytes], { type: "image/png" }));
  const made = { seed: entry.mode === "chat" ? entry.settings.seed : entry.settings.seed + index, ...madeFrom(bytes) };
  await pictures.keep(id);
  entry.pictures[index] = { id, made, ...more };
  const view = views.get(entry.id);
  if (!view) return;
  const atEnd = isAtEnd();
  const slot = slotAt(view, index);
  await slot.finish(entry.pictures[index]);
  if (atEnd) scrollToEnd();
}

function stop() {
  if (running) running.controller.abort();
}

async function showModels() {
  try {
    models = (await (await call("/v1/models")).json()).data;
  } catch (error) {
    $("model").textContent = error.status === 401 ? "key needed" : "not ready";
    $("model").title = error.message;
    if (error.status === 401) askForKey();
    else setTimeout(showModels, (error.retryAfter || MODELS_RETRY_S) * 1000);
    return;
  }
  const [first] = models;
  $("model").textContent = first ? nameOf(first) : "no model";
  $("model").title = first && first.fingerprint ? `fingerprint ${first.fingerprint}` : "";
  if (first && first.steps) field("steps").placeholder = first.steps;
  if (first && first.size) [field("width").placeholder, field("height").placeholder] = first.size.split("x");
  // The choice is worth showing only where there is one.
  const select = field("model");
  const chosen = select.value || recall("localStorage", "settings", {}).model || "";
  select.replaceChildren(...models.map((model) => new Option(model.id, model.id)));
  select.value = models.some((model) => model.id === chosen) ? chosen : (first && first.id) || "";
  $("model-field").classList.toggle("single", models.length < 2);
  showSettings();
}

function nameOf(model) {
  const version = model.version ? `version ${model.version}` : `model ${(model.fingerprint || "").slice(0, 8)}`;
  return model.id === "nexusgen" ? version : `${model.id}, ${version}`; // our own name stands beside it already
}

function askForKey() {
  $("key").hidden = false;
  $("key-input").focus();
}

async function useKey() {
  const key = $("key-input").value.trim();
  if (!key) return;
  remember("sessionStorage", "key", key);
  $("key-input").value = "";
  $("key").hidden = true;
  $("prompt").focus();
  await showModels();
  const waiting = entries.findLast((entry) => entry.error && entry.error.status === 401);
  if (waiting && !running && $("key").hidden) await run(waiting);
}

// ------------------------------------------------------------------------------------------------ attached pictures

function attach(files) {
  const images = files.filter((file) => file.type.startsWith("image/"));
  const others = files.filter((file) => !file.type.startsWith("image/"));
  for (const file of images) attachments.push({ id: pictures.add(file), name: file.name, size: file.size });
  if (images.length && mode() === "generate") showMode("edit"); // only words go into a new picture
  showAttachments();
  const names = others.map((file) => file.name).join(", ");
  const big = images.filter((file) => file.size > BIG_FILE).map((file) => file.name);
  if (others.length) setNotice(`${names}: not a picture, so left out.`);
  else if (big.length) setNotice(`${big.join(", ")}: above 20 MiB; the server may refuse it. It is sent as it is.`);
  else setNotice(null);
  if (images.length) setStatus(`${images.length === 1 ? "One picture" : `${images.length} pictures`} added.`);
}

async function useAsInput(picture, target) {
  if (target === "edit") attachments = [];
  attachments.push({ id: picture.id, name: fileName(picture), size: (await pictures.get(picture.id)).size });
  showMode(target);
  setNotice(null);
  setStatus("The picture was added to your request.");
  $("prompt").focus();
}

function showAttachments() {
  const list = $("attachments");
  list.hidden = mode() === "generate" || attachments.length === 0;
  list.replaceChildren(
    ...attachments.map((attachment) => {
      const remove = document.createElement("button");
      remove.type = "button";
      remove.textContent = "×";
      remove.setAttribute("aria-label", `Remove ${attachment.name}`);
      remove.addEventListener("click", () => {
        attachments = attachments.filter((other) => other !== attachment);
        showAttachments();
        $("prompt").focus();
      });
      return thumbnail(attachment, remove);
    }),
  );
}

function thumbnail(picture, ...more) {
  const item = document.createElement("li");
  const image = document.createElement("img");
  image.alt = picture.name;
  image.title = picture.name;
  pictures.url(picture.id).then((url) => {
    if (url) image.src = url;
    else image.replaceWith(picture.name);
  });
  image.addEventListener("error", () => image.replaceWith(picture.name)); // a format that browsers don't show
  item.append(image, ...more);
  return item;
}

function fileName({ made }) {
  return made.seed === undefined || made.seed === null ? "nexusgen.png" : `nexusgen-seed-${made.seed}.png`;
}

// ------------------------------------------------------------------------------------------------------------- views

const $ = (id) => document.getElementById(id);
const field = (name) => $("settings").querySelector(`[name="${name}"]`);
const mode = () => document.querySelector('input[name="mode"]:checked').value;

function showMode(name) {
  document.querySelector(`input[name="mode"][value="${name}"]`).checked = true;
  document.body.dataset.mode = name;
  for (const feed of document.querySelectorAll(".feed")) {
    feed.hidden = feed.dataset.mode !== name;
    feed.querySelector(".empty").hidden = feed.querySelector(".entry") !== null;
  }
  $("prompt").placeholder = MODES[name].placeholder;
  $("send").querySelector("span").textContent = MODES[name].send;
  $("attach").hidden = name === "generate";
  $("clear").hidden = !entries.some((entry) => entry.mode === name);
  showAttachments();
  showSettings();
  remember("localStorage", "mode", name);
}

/** The settings that this mode has, as numbers; null where the field is empty. */
function readSettings() {
  const settings = { model: models.length > 1 ? field("model").value : "", answer: field("answer").value };
  for (const name of NUMBERS) settings[name] = field(name).value === "" ? null : field(name).valueAsNumber;
  settings.count = Math.min(MAX_COUNT, Math.max(1, Math.round(settings.count ?? 1)));
  return settings;
}

function writeSettings(settings) {
  for (const name of NUMBERS) field(name).value = settings[name] ?? "";
  if (settings.count === 1) field("count").value = "";
  if (settings.answer) field("answer").value = settings.answer;
  if (settings.model) field("model").value = settings.model;
  showSettings();
}

function showSettings() {
  for (const label of $("settings").querySelectorAll("label")) {
    const isOfMode = label.dataset.for === "all" || label.dataset.for.includes(mode());
    label.hidden = !isOfMode || label.classList.contains("single");
  }
  const { seed, count, steps, width, height, guidance, temperature, answer } = readSettings();
  const parts = [];
  if (mode() === "chat" && answer !== "text,image") parts.push(field("answer").selectedOptions[0].textContent);
  if (mode() !== "chat" && count > 1) parts.push(`${count} pictures`);
  if (seed !== null) parts.push(`seed ${seed}`);
  if (steps) parts.push(`${steps} steps`);
  if (width && height) parts.push(`${width} × ${height}`);
  if (guidance !== null) parts.push(`guidance ${guidance}`);
  if (mode() === "chat" && temperature !== null) parts.push(`temperature ${temperature}`);
  $("summary").textContent = $("settings").hidden ? parts.join(" · ") : "";
}

function toggleSettings(open) {
  $("settings").hidden = !open;
  $("settings-toggle").setAttribute("aria-expanded", String(open));
  remember("localStorage", "settings-open", open);
  showSettings();
}

async function showEntry(entry) {
  const root = $("entry-template").content.cloneNode(true).querySelector(".entry");
  const view = { root, slots: [], entry, timer: null };
  views.set(entry.id, view);
  root.dataset.mode = entry.mode;
  root.querySelector(".prompt").textContent = entry.prompt;
  const inputs = root.querySelector(".inputs");
  inputs.hidden = entry.inputs.length === 0;
  inputs.append(...entry.inputs.map((input) => thumbnail(input)));
  root.querySelector(".reuse").addEventListener("click", () => reuse(entry));
  root.querySelector(".again").addEventListener("click", () => {
    if (running) return;
    $("prompt").focus(); // the button goes away
    run(entry);
  });
  $(`feed-${entry.mode}`).append(root);
  showAnswer(entry);
  for (const [index, picture] of entry.pictures.entries()) {
    if (picture) await slotAt(view, index).finish(picture);
  }
  showState(entry);
  showMode(mode());
}

function reuse(entry) {
  showMode(entry.mode);
  writeSettings(entry.settings);
  remember("localStorage", "settings", readSettings());
  $("prompt").value = entry.prompt;
  attachments = entry.inputs.map((input) => ({ ...input, size: 0 }));
  showAttachments();
  $("prompt").focus();
}

function showAnswer(entry) {
  const view = views.get(entry.id);
  view.slots = [];
  view.root.querySelector(".pictures").replaceChildren();
  view.root.querySelector(".pictures").hidden = true;
  for (const index of entry.pictures.keys()) slotAt(view, index);
  showText(entry);
}

function showText(entry) {
  const text = views.get(entry.id).root.querySelector(".text");
  text.hidden = entry.text === "";
  text.textContent = entry.text;
}

function showState(entry, isNew = false) {
  const view = views.get(entry.id);
  view.root.dataset.state = entry.state;
  view.root.setAttribute("aria-busy", String(entry.state === "running"));
  const words = { running: entry.mode === "chat" ? "answering" : "drawing", stopped: "stopped", failed: "", done: "" };
  const parts = [words[entry.state]];
  if (entry.cut) parts.push("cut at the longest answer allowed");
  if (entry.state !== "running" && entry.seconds >= 0.1) parts.push(`${entry.seconds.toFixed(1)} s`);
  view.root.querySelector(".state").textContent = parts.filter(Boolean).join(" · ");
  view.root.querySelector(".reuse").hidden = entry.state === "running";
  for (const slot of view.slots) if (entry.state !== "running") slot.end();
  view.root.querySelector(".failure").hidden = !entry.error;
  if (entry.error) showFailure(entry, view, isNew);
}

function showFailure(entry, view, isNew) {
  const button = view.root.querySelector(".again");
  view.root.querySelector(".failure-text").textContent = entry.error.message;
  clearInterval(view.timer);
  let left = isNew ? entry.error.retryAfter || 0 : 0;
  const tick = () => {
    button.disabled = left > 0;
    button.textContent = left > 0 ? `Try again in ${left} s` : "Try again";
    if (left-- <= 0) clearInterval(view.timer);
  };
  view.timer = setInterval(tick, 1000);
  tick();
}

/** The place of one picture of an answer, made when it is first asked for. */
function slotAt(view, index) {
  while (view.slots.length <= index) view.slots.push(makeSlot(view));
  return view.slots[index];
}

function makeSlot(view) {
  const root = $("picture-template").content.cloneNode(true).querySelector(".picture");
  const [frame, image, progress] = [".frame", "img", ".progress"].map((selector) => root.querySelector(selector));
  const { entry } = view;
  let picture = null;
  view.root.querySelector(".pictures").append(root);
  view.root.querySelector(".pictures").hidden = false;
  root.querySelector(".edit").addEventListener("click", () => useAsInput(picture, "edit"));
  root.querySelector(".discuss").addEventListener("click", () => useAsInput(picture, "chat"));
  image.addEventListener("load", () => image.classList.toggle("tiny", image.naturalWidth < 200));

  return {
    show(state) {
      frame.dataset.state = state;
      progress.hidden = state === "done";
      if (state !== "preview") progress.textContent = state;
    },
    preview(base64, number) {
      image.src = `data:image/png;base64,${base64}`;
      image.alt = `Preview of: ${entry.prompt}`;
      image.hidden = false;
      progress.textContent = `preview ${(number ?? 0) + 1}`;
      this.show("preview");
    },
    async finish(done) {
      picture = done;
      const url = await pictures.url(done.id);
      this.show(url ? "done" : "no longer kept");
      root.querySelector("figcaption").textContent = captionOf(done.made);
      if (!url) return;
      image.src = url;
      image.alt = `Drawn: ${entry.prompt}`;
      image.hidden = false;
      const download = root.querySelector(".download");
      download.href = url;
      download.download = fileName(done);
      root.querySelector(".actions").hidden = false;
      await image.decode().catch(() => {}); // then it has its height, and the page can be scrolled to its end
    },
    /** The request ended: what isn't done won't come. */
    end() {
      if (!picture) this.show(entry.state === "failed" ? "failed" : "stopped");
    },
  };
}

/** What made a picture, for people. */
function captionOf(made) {
  const guidance = made.guidance ?? made.guidance_scale;
  const parts = [];
  if (made.version) parts.push(`version ${made.version}`);
  else if (made.fingerprint) parts.push(`model ${made.fingerprint.slice(0, 8)}`);
  if (made.seed !== undefined && made.seed !== null) parts.push(`seed ${made.seed}`);
  if (made.steps) parts.push(`${made.steps} ${made.steps === 1 ? "step" : "steps"}`);
  if (made.width) parts.push(`${made.width} × ${made.height}`);
  if (guidance && guidance !== 1) parts.push(`guidance ${guidance}`); // 1 is none
  return parts.map((part) => part.replaceAll(" ", "\u00a0")).join(" · "); // lines break between the parts
}

function announce(entry) {
  const drawn = entry.pictures.filter(Boolean).length;
  const what = drawn === 1 ? "One picture is done." : drawn ? `${drawn} pictures are done.` : "";
  if (entry.state === "failed") setStatus(`Failed: ${entry.error.message}`);
  else if (entry.state === "stopped") setStatus("Stopped.");
  else setStatus([entry.text, what].filter(Boolean).join(" "));
}

function showRunning() {
  $("send").hidden = running !== null;
  $("stop").hidden = running === null;
  if (running) setStatus(running.entry.mode === "chat" ? "Answering." : "Drawing.");
}

function setStatus(text) {
  $("status").textContent = text;
}

function setNotice(text) {
  $("notice").hidden = !text;
  $("notice").textContent = text || "";
}

function isAtEnd() {
  const page = document.documentElement;
  return page.scrollHeight - window.innerHeight - window.scrollY < 120;
}

function scrollToEnd() {
  window.scrollTo({ top: document.documentElement.scrollHeight });
}

function isDark() {
  const { theme } = document.documentElement.dataset;
  return theme ? theme === "dark" : window.matchMedia("(prefers-color-scheme: dark)").matches;
}

function showThemeButton() {
  document.documentElement.classList.toggle("dark", isDark());
  $("theme").setAttribute("aria-label", isDark() ? "Switch to light colours" : "Switch to dark colours");
}

// ------------------------------------------------------------------------------------------------------------ wiring

function isFileDrag(event) {
  return event.dataTransfer && [...event.dataTransfer.types].includes("Files");
}

function wire() {
  $("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    send();
  });
  $("prompt").addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    send();
  });
  $("stop").addEventListener("click", () => {
    stop();
    $("prompt").focus();
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && !$("confirm").open) stop();
  });

  $("modes").addEventListener("change", () => {
    showMode(mode());
    setNotice(null);
    scrollToEnd();
  });
  $("settings").addEventListener("input", () => {
    remember("localStorage", "settings", readSettings());
    showSettings();
  });
  $("settings-toggle").addEventListener("click", () => toggleSettings($("settings").hidden));
  $("clear").addEventListener("click", clearMode);
  $("theme").addEventListener("click", () => {
    const theme = isDark() ? "light" : "dark";
    remember("localStorage", "theme", theme);
    showTheme(theme);
    showThemeButton();
  });
  window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", showThemeButton);
  for (const example of document.querySelectorAll(".examples button")) {
    example.addEventListener("click", () => {
      $("prompt").value = example.textContent;
      $("prompt").focus();
    });
  }

  $("attach").addEventListener("click", () => $("files").click());
  $("files").addEventListener("change", () => {
    attach([...$("files").files]);
    $("files").value = "";
    $("prompt").focus();
  });
  document.addEventListener("paste", (event) => {
    const files = [...event.clipboardData.files];
    if (files.length === 0) return;
    event.preventDefault();
    attach(files);
  });
  document.addEventListener("dragover", (event) => {
    if (!isFileDrag(event)) return;
    event.preventDefault(); // or the browser would leave the page for the file
    $("drop").hidden = false;
  });
  document.addEventListener("dragleave", (event) => {
    if (event.relatedTarget === null) $("drop").hidden = true;
  });
  document.addEventListener("drop", (event) => {
    if (!isFileDrag(event)) return;
    event.preventDefault();
    $("drop").hidden = true;
    attach([...event.dataTransfer.files]);
    $("prompt").focus();
  });

  $("key-save").addEventListener("click", useKey);
  $("key-input").addEventListener("keydown", (event) => {
    if (event.key !== "Enter") return;
    event.preventDefault();
    useKey();
  });
}

document.addEventListener("DOMContentLoaded", async () => {
  wire();
  showThemeButton();
  writeSettings(recall("localStorage", "settings", {}));
  toggleSettings(recall("localStorage", "settings-open", window.innerWidth >= 720));
  showMode(recall("localStorage", "mode", "chat"));
  $("prompt").focus();
  await pictures.open();
  showModels();
  await restoreEntries();
  scrollToEnd();
});
