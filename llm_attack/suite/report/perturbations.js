// perturbations.html: a question, its choices before and after, and each token that was perturbed.
// What is shown follows from the controls; the address keeps them. Questions are loaded a file at a
// time, when one of them is shown. Text reaches the page through textContent alone.

"use strict";
const $ = (id) => document.getElementById(id);
const pieces = new Map(); // number -> promise of its questions
const waiting = new Map(); // number -> what is told of them
let data; // tasks, index, folder
let listed = []; // places in the index of the questions that can be chosen
let asked = 0; // which question was asked for last

async function unpack(base64) {
  const bytes = Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return JSON.parse(await new Response(stream).text());
}

/** Called by the files of questions. */
globalThis.perturbations = (number, base64) => waiting.get(number)?.(unpack(base64));

function load(number) {
  if (!pieces.has(number)) {
    const piece = new Promise((found, failed) => {
      waiting.set(number, found);
      const script = element("script", { src: `${data.folder}/${number}.js` });
      script.addEventListener("error", () => failed(new Error(`${script.src} cannot be read`)));
      document.head.append(script);
    });
    pieces.set(number, piece);
    piece.catch(() => pieces.delete(number));
  }
  return pieces.get(number);
}

function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

const letter = (choice) => (choice < 26 ? String.fromCharCode(65 + choice) : `${choice + 1}`);
const minus = (text) => text.replace("-", "−");
const known = (value) => value !== null && value !== undefined;
const digits = (value, n = 3) => (known(value) ? minus(value.toFixed(n)) : "–");
const signed = (value, n = 3) => (known(value) ? (value > 0 ? "+" : "") + digits(value, n) : "–");
const precise = (value) => (known(value) ? minus(String(Number(value.toPrecision(3)))) : "–");

// ---- which questions there are

/** The questions of the task that changed as the filter says. */
function list(wanted) {
  const task = data.tasks.indexOf($("task").value);
  const [condition, change] = [$("condition").value, $("change").value];
  listed = [];
  data.index.forEach(([of, , , , right], i) => {
    if (of === task && (!change || `${right.none ?? ""}${right[condition] ?? ""}` === change)) listed.push(i);
  });
  const options = listed.map((i) => {
    const [, id, text] = data.index[i];
    return element("option", { value: i }, `${id}: ${text}`);
  });
  $("number").replaceChildren(...options);
  const place = listed.findIndex((i) => String(data.index[i][1]) === String(wanted));
  $("number").selectedIndex = Math.max(0, place);
}

async function show() {
  const turn = ++asked;
  const place = $("number").selectedIndex;
  const of = listed.length === 1 ? "question" : "questions";
  $("previous").setAttribute("aria-disabled", place <= 0);
  $("next").setAttribute("aria-disabled", place >= listed.length - 1);
  $("question").hidden = !listed.length;
  if (!listed.length) return ($("status").textContent = "0 questions");
  const [task, id, , number] = data.index[listed[place]];
  const name = data.tasks[task];
  const address = new URLSearchParams({ task: name, condition: $("condition").value, question: id });
  for (const key of ["change", "order"]) if ($(key).value) address.set(key, $(key).value);
  history.replaceState(null, "", `#${address}`);
  try {
    const piece = await load(number);
    if (turn !== asked) return;
    render(piece[`${name}/${id}`]);
    $("status").textContent = `Question ${place + 1} of ${listed.length} ${of}`;
  } catch (error) {
    $("question").hidden = true;
    $("status").textContent = `The question cannot be shown: ${error.message}`;
  }
}

// ---- one question

function render(question) {
  const condition = $("condition").value;
  $("heading").textContent = `${question.task}, question ${question.id}, under ${condition}`;
  $("text").textContent = question.question;
  answers(question, condition);
  const found = question.conditions[condition];
  const after = question.answers[condition]?.[0];
  const units = question.units.map((sections, u) =>
    unit(question, found, sections, u, question.units.length === 1 || isOf(sections, [after, ...question.gold])),
  );
  $("units").replaceChildren(...(found ? units : [element("p", {}, "Nothing was perturbed.")]));
}

const isOf = (sections, choices) => sections.some(([of]) => of.some((choice) => choices.includes(choice)));

function answers(question, condition) {
  const names = ["none", condition].filter((name) => question.answers[name]);
  const heading = ["Choice", "Text", "Marks", ...names.map((name) => `Log-likelihood, ${name}`), "Change"];
  const rows = question.choices.map((text, choice) => {
    const values = names.map((name) => question.answers[name][1][choice]);
    const marks = names.filter((name) => question.answers[name][0] === choice).map((name) => `predicted, ${name}`);
    if (question.gold.includes(choice)) marks.unshift("gold");
    const change = values.length === 2 && values.every(known) ? values[1] - values[0] : null;
    const row = cells(heading, [letter(choice), text, "", ...values.map((value) => digits(value)), signed(change)]);
    row.children[1].className = "choice";
    row.children[2].className = "marks";
    row.children[2].replaceChildren(...marks.map((mark) => element("span", { class: "mark" }, mark)));
    if (question.gold.includes(choice)) row.className = "gold";
    return row;
  });
  fill($("answers"), heading, rows);
}

function cells(heading, values) {
  const row = element("tr", { role: "row" });
  values.forEach((value, i) => {
    const cell = i
      ? element("td", { role: "cell", "data-label": heading[i] }, value)
      : element("th", { scope: "row", role: "rowheader" }, value);
    row.append(cell);
  });
  return row;
}

function fill(table, heading, rows) {
  const head = element("tr", { role: "row" });
  for (const name of heading) head.append(element("th", { scope: "col", role: "columnheader" }, name));
  table.tHead.replaceChildren(head);
  table.tBodies[0].replaceChildren(...rows);
}

/** The tokens that a perturbation changed: one table, filled when it is opened. */
function unit(question, found, sections, u, open) {
  const choices = [...new Set(sections.flatMap(([of]) => of))];
  const of = choices.length === question.choices.length && choices.length > 1 ? "all choices" : `choice ${choices.map(letter).join(", ")}`;
  const label = choices.length ? of : "a request beside the choices";
  const [before, after] = found.loss[u];
  const change = known(before) && known(after) ? after - before : null;
  const rows = sections.flatMap(([, of]) => of);
  const shares = rows.map((row) => found.share[row]);
  const sum = shares.every(known) ? shares.reduce((a, b) => a + b, 0) : null;
  const rest = known(sum) && known(change) ? `; not accounted for: ${signed(change - sum)}` : "";
  const words = `loss ${digits(before)} → ${digits(after)} (${signed(change)}${rest})`;
  const made = element("details", { class: "unit" }, element("summary", {}, `Tokens of ${label}: ${words}`));
  const draw = () => {
    if (made.open && made.children.length === 1) made.append(tokens(question, found, sections, u, label, change));
  };
  made.addEventListener("toggle", draw);
  made.open = open;
  draw();
  return made;
}

const HEADING = ["Place", "Token", "Norm of its change", "Nearest other token", "Distance of that", "Share of the loss", "Of the change, %"];

function tokens(question, found, sections, u, label, change) {
  const table = element(
    "table",
    { role: "table", class: "numbers c8" },
    element("caption", { id: `caption-${u}` }, `Tokens of ${label}`),
    element("thead", { role: "rowgroup" }),
    element("tbody", { role: "rowgroup" }),
  );
  const all = sections.flatMap(([, of]) => of);
  const largest = Math.max(...all.map((row) => Math.abs(found.share[row] ?? 0)));
  const place = new Map(all.map((row, i) => [row, i + 1]));
  const several = sections.length > 1;
  const shown = [];
  const ordered = [...all].sort((a, b) => (found[$("order").value]?.[b] ?? 0) - (found[$("order").value]?.[a] ?? 0));
  for (const [of, rows] of $("order").value ? [[null, ordered]] : sections) {
    if (several && of) {
      const text = `Tokens of ${of.length > 1 ? "choices" : "choice"} ${of.map(letter).join(", ")}`;
      shown.push(element("tr", { role: "row", class: "section" }, element("th", { scope: "rowgroup", role: "rowheader", colspan: HEADING.length }, text)));
    }
    for (const row of rows) shown.push(token(question, found, row, place.get(row), change, largest));
  }
  fill(table, HEADING, shown);
  return element("div", { class: "scroll", role: "region", tabindex: "0", "aria-labelledby": `caption-${u}` }, table);
}

function token(question, found, row, place, change, largest) {
  const text = (id) => (id < 0 ? "–" : visible(question.texts[id]) || `(token ${id})`);
  const [share, norm, distance] = [found.share[row], found.norm[row], found.distance[row]];
  const nearer = known(distance) && distance < norm;
  const part = known(share) && change ? (100 * share) / change : null;
  const made = cells(HEADING, [
    String(place),
    text(question.tokens[row]),
    precise(norm),
    text(found.nearest[row]),
    `${precise(distance)}${nearer ? " ● nearer than its own" : ""}`,
    signed(share),
    digits(part, 1),
  ]);
  for (const i of [1, 3]) made.children[i].classList.add("token");
  if (known(share) && largest) {
    const bar = element("span", { class: share < 0 ? "bar below" : "bar" });
    bar.style.width = `${(100 * Math.abs(share)) / largest}%`;
    made.children[5].append(bar);
  }
  return made;
}

/** A token whose blanks can be seen. */
const visible = (text) => text.replaceAll("\n", "↵").replaceAll("\t", "⇥").replace(/^ | $/g, "␣");

// ---- controls and address

function step(by) {
  const place = $("number").selectedIndex + by;
  if (place < 0 || place >= listed.length) return;
  $("number").selectedIndex = place;
  show();
}

const shown = () => data.index[listed[$("number").selectedIndex]]?.[1];

function follow() {
  const address = new URLSearchParams(location.hash.slice(1));
  for (const key of ["task", "condition", "change", "order"]) {
    const given = [...$(key).options].find((option) => option.value === address.get(key));
    if (given) $(key).value = given.value;
  }
  list(address.get("question"));
  show();
}

unpack($("data").textContent).then(
  (found) => {
    data = found;
    for (const key of ["task", "change"]) $(key).addEventListener("change", () => (list(shown()), show()));
    $("condition").addEventListener("change", () => (list(shown()), show()));
    for (const key of ["number", "order"]) $(key).addEventListener("change", show);
    $("previous").addEventListener("click", () => step(-1));
    $("next").addEventListener("click", () => step(1));
    $("controls").addEventListener("submit", (event) => event.preventDefault());
    addEventListener("hashchange", () => location.hash.includes("=") && follow());
    $("controls").hidden = false;
    follow();
  },
  (error) => ($("status").textContent = `The questions cannot be shown: ${error.message}`),
);
