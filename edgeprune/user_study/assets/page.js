// The rater's page. An answer is kept in this browser until the server has it; the server counts it once.
"use strict";

const byId = (id) => document.getElementById(id);
const WAIT_MS = { first: 1000, most: 15000, reply: 20000 };
const QUESTIONS = {
  mos: [
    { name: "quality", title: "Quality of the image", choices: [[1, "Bad"], [2, "Poor"], [3, "Fair"], [4, "Good"], [5, "Excellent"]] },
    { name: "alignment", title: "Match with the text", choices: [[1, "None"], [2, "Little"], [3, "Partly"], [4, "Mostly"], [5, "Fully"]] },
  ],
  pairs: [
    { name: "quality", title: "Which one looks better?", choices: [[-1, "Left"], [0, "Same"], [1, "Right"]] },
    { name: "alignment", title: "Which one matches the text better?", choices: [[-1, "Left"], [0, "Same"], [1, "Right"]] },
  ],
};
const KEYS = {
  mos: { 1: 1, 2: 2, 3: 3, 4: 4, 5: 5 },
  pairs: { 1: -1, 2: 0, 3: 1, ArrowLeft: -1, ArrowDown: 0, ArrowRight: 1 },
};

// What this browser remembers; without a storage (private windows), only as long as the page is open.
const memory = {
  read(key) {
    try { return JSON.parse(localStorage.getItem(key)); } catch { return null; }
  },
  write(key, value) {
    try { localStorage.setItem(key, JSON.stringify(value)); } catch { /* the page itself still has it */ }
  },
};

let rater, study; // of this page; study as /api/r/TOKEN gives it
let answered = new Set(); // indices of trials that the server has
let waiting = []; // answers that it may not have yet
let trial = -1; // the one on the screen
let current = 0; // the question that keys answer
let shownAt = null; // when its images were there; null before

async function ask(path, data) {
  const options = { signal: AbortSignal.timeout(WAIT_MS.reply), cache: "no-store" };
  if (data) Object.assign(options, { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(data) });
  const reply = await fetch(path, options);
  const found = await reply.json();
  if (!reply.ok) throw Object.assign(new Error(found.error), { status: reply.status });
  return found;
}

function show(id) {
  for (const main of document.querySelectorAll("main")) main.hidden = main.id !== id;
}

// ------------------------------------------------------------------------------------------- begin

async function begin() {
  const query = location.search;
  show("begin");
  let found;
  try {
    found = await ask(`/api/study${query}`);
  } catch (error) {
    byId("begin").querySelector("h1").textContent = "This study is closed";
    for (const part of byId("begin").querySelectorAll("ul, p:not([role])")) part.hidden = true;
    byId("begin-error").textContent = error.status ? error.message : "There is no connection. Please load the page again.";
    return;
  }
  document.title = found.title;
  byId("begin").querySelector("h1").textContent = found.title;
  const what = found.mode === "mos" ? "images, one at a time. Give each two grades" : "pairs of images. For each, say twice which one you prefer";
  byId("begin-what").textContent = `You will see ${found.trials} ${what}:`;
  const known = memory.read(`study ${found.id}`), start = byId("start");
  if (known) {
    byId("go-on").hidden = false;
    byId("go-on").onclick = () => location.assign(`/r/${known}`);
    start.textContent = "Start as another person";
    start.classList.add("second");
  }
  start.onclick = async () => {
    start.disabled = true;
    byId("begin-error").textContent = "";
    try {
      const { rater: made } = await ask(`/api/raters${query}`, {});
      memory.write(`study ${found.id}`, made);
      history.replaceState(null, "", `/r/${made}`);
      go();
    } catch (error) {
      start.disabled = false;
      byId("begin-error").textContent = error.status ? error.message : "There is no connection. Please try again.";
    }
  };
}

// ------------------------------------------------------------------------------------------- rate

async function go() {
  rater = location.pathname.split("/")[2];
  for (let wait = WAIT_MS.first; ; wait = Math.min(2 * wait, WAIT_MS.most)) {
    try {
      study = await ask(`/api/r/${rater}`);
      break;
    } catch (error) {
      show("end");
      byId("end").querySelector("h1").textContent = "Please wait";
      byId("end-what").textContent = error.status ? error.message : "There is no connection. Trying again.";
      if (error.status === 404) return;
      await new Promise((resolve) => setTimeout(resolve, wait));
    }
  }
  document.title = study.title;
  answered = new Set(study.answered);
  waiting = memory.read(`waiting ${rater}`) ?? [];
  makeQuestions();
  next();
  send();
}

function makeQuestions() {
  byId("questions").replaceChildren(...QUESTIONS[study.mode].map((question, index) => {
    const field = document.createElement("fieldset"), choices = document.createElement("div");
    const legend = document.createElement("legend");
    legend.textContent = question.title;
    choices.className = "choices";
    for (const [value, word] of question.choices) {
      const label = document.createElement("label"), input = document.createElement("input");
      Object.assign(input, { type: "radio", name: question.name, value: String(value) });
      const small = document.createElement(study.mode === "mos" ? "small" : "b");
      small.textContent = word;
      if (study.mode === "mos") {
        const number = document.createElement("b");
        number.textContent = value;
        label.append(input, number, small);
      } else label.append(input, small);
      input.onchange = () => focusOn(index + 1);
      choices.append(label);
    }
    field.append(legend, choices);
    return field;
  }));
  const keys = study.mode === "mos" ? "1 2 3 4 5" : "← ↓ →";
  byId("keys").replaceChildren(...`Keys: ${keys} answer, ⌫ undoes, Enter continues, Z enlarges`.split(" ").map((word) => {
    const key = /^([1-5←↓→⌫Z]|Enter)$/.test(word) ? document.createElement("kbd") : document.createElement("span");
    key.textContent = word;
    return key;
  }).flatMap((node) => [node, " "]));
}

function focusOn(index) {
  const fields = [...document.querySelectorAll("fieldset")];
  current = Math.min(index, fields.length - 1);
  fields.forEach((field, i) => field.classList.toggle("current", i === current));
  byId("next").disabled = shownAt === null || !answers();
}

function answers() {
  const found = {};
  for (const { name } of QUESTIONS[study.mode]) {
    const chosen = document.querySelector(`input[name=${name}]:checked`);
    if (!chosen) return null;
    found[name] = Number(chosen.value);
  }
  return found;
}

function isOpen(index) {
  return !answered.has(index) && !waiting.some((answer) => answer.trial === index);
}

function imagePath(index, side) {
  return `/api/r/${rater}/image/${index}/${side}`;
}

function next() {
  trial = study.trials.findIndex((_, index) => isOpen(index));
  status();
  if (trial < 0) return finish();
  show("rate");
  const { text, asked, images } = study.trials[trial];
  const word = QUESTIONS[study.mode][0].choices.find(([value]) => value === asked)?.[1];
  byId("text").textContent = asked === null ? text : `Attention check: please answer both questions with “${study.mode === "mos" ? asked : word}”, whatever the image shows.`;
  byId("text").classList.toggle("asked", asked !== null);
  byId("form").reset();
  shownAt = null;
  focusOn(0);
  if (document.activeElement instanceof HTMLElement) document.activeElement.blur();
  load(trial, images);
  window.scrollTo(0, 0);
}

async function load(index, count) {
  const box = byId("images"), sides = [];
  box.className = "wait";
  for (const field of document.querySelectorAll("fieldset")) field.disabled = true;
  for (let side = 0; side < count; side++) {
    const button = document.createElement("button"), img = document.createElement("img");
    button.type = "button";
    button.tabIndex = -1;
    img.alt = count === 1 ? "The image to rate" : side ? "The right image" : "The left image";
    button.append(img);
    if (count > 1) {
      const label = document.createElement("span");
      label.className = "side";
      label.textContent = side ? "Right" : "Left";
      button.append(label);
    }
    button.onclick = () => enlarge(img);
    sides.push({ button, img });
  }
  box.replaceChildren(...sides.map(({ button }) => button));
  await Promise.all(sides.map(({ img }, side) => fetchImage(img, imagePath(index, side), () => index === trial)));
  if (index !== trial) return;
  box.className = "";
  shownAt = performance.now();
  for (const field of document.querySelectorAll("fieldset")) field.disabled = false;
  focusOn(0);
  const after = study.trials.findIndex((_, later) => later > index && isOpen(later));
  if (after >= 0) for (let side = 0; side < study.trials[after].images; side++) new Image().src = imagePath(after, side);
}

async function fetchImage(img, path, stillWanted) {
  for (let wait = WAIT_MS.first; stillWanted(); wait = Math.min(2 * wait, WAIT_MS.most)) {
    img.src = path;
    try {
      await img.decode();
      img.classList.toggle("small", Math.max(img.naturalWidth, img.naturalHeight) <= 256);
      return;
    } catch {
      status("No connection: waiting for the image");
      img.removeAttribute("src");
      await new Promise((resolve) => setTimeout(resolve, wait));
      status();
    }
  }
}

function submit(event) {
  event?.preventDefault();
  const given = answers();
  if (shownAt === null || !given || !isOpen(trial)) return;
  waiting.push({ trial, ...given, seconds: Math.min((performance.now() - shownAt) / 1000, 86400) });
  memory.write(`waiting ${rater}`, waiting);
  next();
  send();
}

let sending = false, again = WAIT_MS.first, timer;
async function send() {
  clearTimeout(timer);
  if (sending) return;
  sending = true;
  while (waiting.length) {
    try {
      const reply = await ask(`/api/r/${rater}/answers`, waiting[0]);
      answered = new Set(reply.answered);
      again = WAIT_MS.first;
    } catch (error) {
      if (error.status !== 400) { // the server rejected this answer, so do not send it again; any other may be taken later
        status();
        timer = setTimeout(send, again);
        again = Math.min(2 * again, WAIT_MS.most);
        break;
      }
    }
    waiting.shift();
    memory.write(`waiting ${rater}`, waiting);
  }
  sending = false;
  status();
  if (trial < 0) finish();
}

function status(text) {
  const total = study.trials.length, done = study.trials.filter((_, index) => !isOpen(index)).length;
  byId("count").textContent = `${Math.min(done + 1, total)} of ${total}`;
  Object.assign(byId("progress"), { max: total, value: done });
  const late = again > WAIT_MS.first && waiting.length > 0;
  byId("saved").textContent = text ?? (late ? `No connection: ${waiting.length} kept here` : waiting.length || !done ? "" : "Saved");
  byId("saved").classList.toggle("bad", Boolean(text) || late);
}

function finish() {
  show("end");
  byId("end").querySelector("h1").textContent = waiting.length ? "Nearly done" : "Thank you";
  byId("end-what").textContent = waiting.length
    ? `Please leave this page open: ${waiting.length === 1 ? "one answer is" : `${waiting.length} answers are`} still to be sent.`
    : `All ${study.trials.length} answers are stored. You can close this page.`;
}

function enlarge(img) {
  const dialog = byId("zoom"), large = dialog.querySelector("img");
  if (shownAt === null) return;
  large.src = img.src;
  large.className = img.className;
  dialog.showModal();
}

function onKey(event) {
  if (byId("rate").hidden || event.repeat || event.ctrlKey || event.metaKey || event.altKey || shownAt === null) return;
  if (byId("zoom").open) {
    if (event.key.toLowerCase() === "z") byId("zoom").close();
    return;
  }
  const value = KEYS[study.mode][event.key];
  if (value !== undefined) {
    const { name } = QUESTIONS[study.mode][current];
    document.querySelector(`input[name=${name}][value="${value}"]`).checked = true;
    focusOn(current + 1);
  } else if (event.key === "Backspace") {
    byId("form").reset();
    focusOn(0);
  } else if (event.key === "Enter") submit();
  else if (event.key.toLowerCase() === "z") enlarge(document.querySelector("#images img"));
  else return;
  event.preventDefault();
}

document.addEventListener("keydown", onKey);
byId("form").addEventListener("submit", submit);
byId("zoom").addEventListener("click", () => byId("zoom").close());
window.addEventListener("online", () => rater && send());
window.addEventListener("beforeunload", (event) => { if (waiting.length) event.preventDefault(); });
if (location.pathname.startsWith("/r/")) go();
else begin();
