// The script of every page. The pages work without it; it adds four things:
//
//   times     relative times stay true while the page is open
//   updates   the page follows the stream of ticks: it shows the overview's new numbers, or loads
//             its own <main> again and patches what differs
//   forms     a form is sent once, and asks first if it has data-confirm
//   uploads   several files, with a progress bar for each, also dropped on the page
"use strict";

// Times

const UNITS = [["d", 86400], ["h", 3600], ["min", 60], ["s", 1]];

// The same texts as `relative` in app/api/page_texts.py.
function relative(seconds) {
  const distance = Math.abs(seconds);
  if (distance < 1) return "now";
  const [name, length] = UNITS.find((unit) => distance >= unit[1]);
  const rounded = `${Math.floor(distance / length).toLocaleString("en")} ${name}`;
  return seconds > 0 ? `in ${rounded}` : `${rounded} ago`;
}

// The server's clock less this one, in milliseconds. Each tick tells the server's time, so a wrong
// clock here makes no wrong times.
let clockOffset = 0;

function compareClocks(seconds) {
  const offset = seconds * 1000 - Date.now();
  clockOffset = Math.abs(offset) < 2000 ? 0 : offset;
}

function freshenTimes() {
  const now = Date.now() + clockOffset;
  for (const element of document.querySelectorAll("time[datetime]")) {
    const text = relative((Date.parse(element.dateTime) - now) / 1000);
    if (element.textContent !== text) element.textContent = text;
  }
}

setInterval(() => document.hidden || freshenTimes(), 1000);

// Updates

// Make `element` like `wanted`, and leave alone what is the same. So focus, open details, scroll
// positions and loaded pictures stay. Elements with an id are matched by it, others by position. So
// each part that may come or go has an id: otherwise "Cancel" could take the place, and the focus,
// of "Run now" just before a person presses Enter.
function patch(element, wanted) {
  if (element.hasAttribute("data-keep")) return;
  const keeps = (name) => name === "open" && element.nodeName === "DETAILS";
  for (const { name } of [...element.attributes]) {
    if (!wanted.hasAttribute(name) && !keeps(name)) element.removeAttribute(name);
  }
  for (const { name, value } of wanted.attributes) {
    if (element.getAttribute(name) !== value && !keeps(name)) element.setAttribute(name, value);
  }
  patchChildren(element, wanted);
}

const isText = (node) => node.nodeType === Node.TEXT_NODE;

function patchChildren(element, wanted) {
  const ids = new Set([...wanted.children].map((child) => child.id).filter(Boolean));
  let here = element.firstChild; // everything before it is done
  const removeHere = () => {
    const next = here.nextSibling;
    here.remove();
    here = next;
  };
  const isGone = (node) => node.id && !ids.has(node.id);
  for (const child of wanted.childNodes) {
    // A part that has gone, and the space before it, must not change the positions of the rest.
    while (here && (isGone(here) || (isText(here) && !isText(child)))) removeHere();
    let same = here;
    if (child.id) {
      same = [...element.children].find((candidate) => candidate.id === child.id);
      // Remove what stands before it, rather than move it: a moved element loses its focus.
      while (same && here && here !== same && !ids.has(here.id)) removeHere();
    }
    if (same?.nodeName !== child.nodeName || (same.id ?? "") !== (child.id ?? "")) {
      element.insertBefore(document.importNode(child, true), here);
      continue;
    }
    if (same === here) here = here.nextSibling;
    else element.insertBefore(same, here);
    if (child.nodeType === Node.ELEMENT_NODE) {
      if (!same.isEqualNode(child)) patch(same, child);
    } else if (same.nodeValue !== child.nodeValue) same.nodeValue = child.nodeValue;
  }
  while (here) removeHere();
}

const main = document.getElementById("main");
const address = main.dataset.live;

// Nothing moves while a person fills in a form or has selected some text.
function isInUse(part = main) {
  const active = document.activeElement;
  const types = part.contains(active) && active.matches("input, select, textarea");
  const selection = getSelection();
  const selects = !selection.isCollapsed && part.contains(selection.anchorNode);
  const fields = [...part.querySelectorAll("input, select, textarea")];
  return types || selects || fields.some(isChanged);
}

// Whether a field has another value than the page gave it. A copy of the field is reset to that
// value, because the browser may write it in another way: "10:00:00" becomes "10:00".
function isChanged(field) {
  const form = document.createElement("form");
  const fresh = form.appendChild(field.cloneNode(true));
  form.reset();
  return field.value !== fresh.value || field.checked !== fresh.checked;
}

// An element that is moved loses its focus, so give it back.
function keepFocus(change) {
  const active = document.activeElement;
  change();
  if (active !== document.activeElement && active.isConnected) active.focus({ preventScroll: true });
}

function show(html) {
  const page = new DOMParser().parseFromString(html, "text/html");
  keepFocus(() => patch(main, page.getElementById("main")));
  freshenTimes();
}

// The states of a page, and their texts. `reload` and `showNumbers` return a state.
const TEXTS = {
  live: "Live",
  paused: "Paused: in use",
  lost: "Cannot be loaded", // at present
  gone: "Cannot be loaded", // for example because the task was removed
};

// The shortest pause between two loads, in milliseconds: RELOAD_SECONDS in app/board/ticks.py.
const RELOAD = 5000;

let loading = Promise.resolve();

// Load the page again. Loads follow one another, so that the last one is the newest.
function reload() {
  loading = loading.then(load).catch(() => "lost");
  return loading;
}

async function load() {
  if (isInUse()) return "paused";
  const response = await fetch(location.href, { headers: { Accept: "text/html" } });
  if (response.redirected) location.assign(response.url); // to the page to sign in
  if (response.redirected || !response.ok) return response.status < 500 ? "gone" : "lost";
  const html = await response.text();
  if (isInUse()) return "paused";
  show(html);
  return "live";
}

function showNumbers(html) {
  const numbers = document.getElementById("numbers");
  if (isInUse(numbers)) return "paused";
  const page = new DOMParser().parseFromString(html, "text/html");
  keepFocus(() => patchChildren(numbers, page.body));
  freshenTimes();
  return "live";
}

// Follows the stream while the page is visible and not paused.
class Live {
  constructor(box) {
    this.box = box;
    this.state = box.querySelector(".live-state");
    this.button = box.querySelector("button");
    this.source = null;
    this.tick = null; // the newest that is not shown yet
    this.timer = null; // of the next update, or of the next try to connect
    this.updating = false;
    this.updatedAt = Date.now();
    this.paused = readSetting("paused") === "yes";
    this.button.addEventListener("click", () => this.setPaused(!this.paused));
    document.addEventListener("visibilitychange", () => this.follow());
    addEventListener("pagehide", () => this.disconnect());
    addEventListener("pageshow", () => this.follow());
    box.hidden = false;
    this.follow();
  }

  setPaused(paused) {
    this.paused = paused;
    writeSetting("paused", paused ? "yes" : "no");
    this.follow();
  }

  follow() {
    this.button.textContent = this.paused ? "Resume" : "Pause";
    if (this.paused || document.hidden) {
      this.disconnect();
      this.tell("paused", "Paused");
    } else if (!this.source) {
      this.connect();
    }
  }

  connect() {
    this.tell("lost", "Connecting");
    this.source = new EventSource(address);
    this.source.addEventListener("open", () => this.tell("live", "Live"));
    this.source.addEventListener("tick", (event) => this.receive(JSON.parse(event.data)));
    this.source.addEventListener("error", () => this.fail());
  }

  disconnect() {
    this.source?.close();
    this.source = null;
    this.dropTick();
  }

  dropTick() {
    this.tick = null;
    clearTimeout(this.timer);
    this.timer = null;
  }

  // The browser connects again by itself, unless the server has refused.
  fail() {
    this.tell("lost", "Connection lost");
    if (this.source?.readyState !== EventSource.CLOSED) return;
    this.disconnect();
    this.timer = setTimeout(() => {
      this.timer = null;
      reload().then(() => this.follow());
    }, 5000 + 5000 * Math.random());
  }

  receive(tick) {
    compareClocks(tick.now);
    if (tick.problem) {
      this.dropTick();
      this.tell("lost", tick.problem);
    } else {
      this.tick = tick;
      this.plan(tick.html ? 0 : this.untilReload(tick.every * 1000));
    }
  }

  // The milliseconds until the page may load itself again. If the server asks for long pauses,
  // because many pages are open, they do not all come at the same moment.
  untilReload(every) {
    const wait = Math.max(0, this.updatedAt + every - Date.now());
    return wait + Math.random() * (every - RELOAD);
  }

  plan(wait) {
    if (this.timer || this.updating) return;
    this.timer = setTimeout(() => this.update(), wait);
  }

  // Show the newest tick. If the page is in use, or cannot be loaded at present, try again.
  async update() {
    const tick = this.tick;
    this.timer = this.tick = null;
    this.updating = true;
    const state = tick.html ? showNumbers(tick.html) : await reload();
    this.updating = false;
    if (!this.source) return;
    this.tell(state, TEXTS[state]);
    if (state !== "paused") this.updatedAt = Date.now();
    if (state === "paused" || state === "lost") this.tick ??= tick;
    if (this.tick) this.plan(state === "paused" ? 1000 : this.untilReload(this.tick.every * 1000));
  }

  tell(state, text) {
    if (this.state.textContent !== text) this.state.textContent = text;
    this.state.dataset.state = state;
  }
}

// The storage may be forbidden. Then a setting lasts as long as the page.
function readSetting(name) {
  try {
    return localStorage.getItem(`afterward-${name}`);
  } catch {
    return null;
  }
}

function writeSetting(name, value) {
  try {
    localStorage.setItem(`afterward-${name}`, value);
  } catch {
    // nothing to do
  }
}

// Forms

document.addEventListener("submit", (event) => {
  const form = event.target;
  if (form.dataset.confirm && !confirm(form.dataset.confirm)) {
    event.preventDefault();
    return;
  }
  // Later, because a disabled button would not be sent.
  if (!event.defaultPrevented) setTimeout(() => setButtons(form, true));
});

// A page that comes back from the browser's history can be sent again.
addEventListener("pageshow", () => {
  for (const form of document.forms) setButtons(form, false);
});

function setButtons(form, disabled) {
  for (const button of form.querySelectorAll("button")) button.disabled = disabled;
}

// Uploads

const drop = document.getElementById("drop");

function prepareUploads() {
  const input = drop.querySelector("input[type=file]");
  input.multiple = true;
  drop.querySelector(".with-script").hidden = false;
  drop.addEventListener("submit", (event) => {
    event.preventDefault();
    sendAll([...input.files]);
    input.value = "";
  });
  for (const name of ["dragenter", "dragover"]) {
    drop.addEventListener(name, (event) => {
      event.preventDefault();
      drop.classList.add("over");
    });
  }
  for (const name of ["dragleave", "drop"]) {
    drop.addEventListener(name, () => drop.classList.remove("over"));
  }
  drop.addEventListener("drop", (event) => {
    event.preventDefault();
    sendAll([...event.dataTransfer.files]);
  });
}

let sending = Promise.resolve();

// Send the files one after another, after those that are being sent already.
function sendAll(files) {
  for (const file of files) {
    const line = addLine(file);
    sending = sending.then(() => send(file, line));
  }
}

function addLine(file) {
  const line = document.createElement("li");
  const [name, state, bar] = ["bdi", "span", "progress"].map((tag) => document.createElement(tag));
  name.textContent = file.name;
  state.textContent = "waiting";
  bar.max = 1;
  bar.value = 0;
  bar.setAttribute("aria-label", `Progress of ${file.name}`);
  line.append(name, state, bar);
  drop.querySelector(".sending").append(line);
  return { state, bar };
}

function send(file, { state, bar }) {
  return new Promise((resolve) => {
    const request = new XMLHttpRequest();
    const end = (text, kind) => {
      state.textContent = text;
      bar.className = kind;
      bar.value = 1;
      drop.querySelector("[role=status]").textContent = `${file.name}: ${text}`;
      resolve();
    };
    request.upload.addEventListener("progress", (event) => {
      bar.value = event.loaded / event.total;
      state.textContent = event.loaded < event.total ? `${Math.floor(100 * bar.value)}%` : "storing";
    });
    request.addEventListener("load", () => {
      if (request.status === 202) end("uploaded", "done");
      else end(problemOf(request), "bad");
      if (address) reload();
    });
    request.addEventListener("error", () => end("The connection was lost. Try again.", "bad"));
    const form = new FormData();
    form.append("file", file, file.name);
    request.open("POST", drop.dataset.upload);
    request.send(form);
  });
}

// The text of an error (RFC 9457).
function problemOf(request) {
  try {
    const problem = JSON.parse(request.responseText);
    const details = (problem.errors ?? []).map((error) => error.detail);
    return [problem.detail, ...details].join(" ");
  } catch {
    return `The upload failed with status ${request.status}.`;
  }
}

// On a narrow screen the navigation scrolls: show where this page is in it.
document.querySelector("[aria-current]")?.scrollIntoView({ block: "nearest", inline: "center" });

if (drop) prepareUploads();
if (address) new Live(document.querySelector(".live"));
