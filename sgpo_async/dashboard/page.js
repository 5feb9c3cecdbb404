// Asks the server for fragments of HTML, which it has escaped, and puts them in their places.
"use strict";

const EVERY_MS = 2000;
const LATE_MS = 5000;
const place = (id) => document.getElementById(id);
const shown = {}; // the HTML in each place
let answered = performance.now(); // when the server has answered last
let age = 0; // seconds: how old its data was then; null: the run has no hub
let step = -2; // of the newest line in the curves
let all = false;

async function get(path) {
  const response = await fetch(path, { cache: "no-store", signal: AbortSignal.timeout(10000) });
  if (!response.ok) throw new Error(response.status === 401 ? "the token is missing or wrong" : `status ${response.status}`);
  return response.json();
}

function put(id, html) {
  const target = place(id);
  // A pointer may be reading a tooltip or a completion: it is left alone.
  if (html === shown[id] || (id in shown && target.matches(":hover"))) return html === shown[id];
  const open = new Map([...target.querySelectorAll("details[data-name]")].map((one) => [one.dataset.name, one.open]));
  target.innerHTML = html;
  for (const one of target.querySelectorAll("details[data-name]"))
    if (open.has(one.dataset.name)) one.open = open.get(one.dataset.name);
  shown[id] = html;
  return true;
}

async function update() {
  const status = await get("api/status");
  answered = performance.now();
  age = status.live ? status.age_s : null;
  document.title = `${status.step}/${status.steps} ${status.state} - ${status.name}`;
  for (const [id, html] of Object.entries(status.html)) put(id, html);
  const curves = await get(`api/curves?since=${step}&all=${all ? 1 : 0}`);
  if (curves.html !== null && put("curves", curves.html)) step = curves.step;
  const filter = new URLSearchParams({ outcome: place("outcome").value, problem: place("problem").value });
  put("samples", (await get(`api/samples?${filter}`)).html);
}

function showAge(error) {
  const silent = performance.now() - answered;
  const old = silent > LATE_MS || error;
  const seconds = Math.round((age ?? 0) + silent / 1000);
  place("age").className = old || (age ?? 0) * 1000 + silent > LATE_MS ? "old" : "";
  if (old) place("age").textContent = `The dashboard does not answer${error ? ` (${error})` : ""}: this is ${seconds} s old.`;
  else if (age === null) place("age").textContent = ""; // there is no hub, as the headline says
  else if (age * 1000 > LATE_MS) place("age").textContent = `The hub does not answer: this is ${seconds} s old.`;
  else place("age").textContent = `The hub answered ${seconds} s ago.`;
}

let failure = "";
let timer = 0;
let busy = false;

async function loop() {
  if (busy) return;
  busy = true;
  clearTimeout(timer);
  try {
    await update();
    failure = "";
  } catch (error) {
    failure = error.message;
  }
  showAge(failure);
  busy = false;
  timer = setTimeout(loop, EVERY_MS);
}

place("more").addEventListener("toggle", () => { all = place("more").open; step = -2; delete shown.curves; loop(); });
for (const id of ["outcome", "problem"]) place(id).addEventListener("input", () => { delete shown.samples; loop(); });
setInterval(() => showAge(failure), 1000);
loop();
