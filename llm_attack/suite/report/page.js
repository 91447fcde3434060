// The table of questions in report.html. What is shown follows from `view` (filters, order, page)
// and `open` (rows that show their choices); the address keeps what differs from the first view.
// Text reaches the page through textContent alone, so that no question can be taken for markup.

const $ = (id) => document.getElementById(id);

// ---- folds, copies and figures, which need no questions

const fold = $("questions").querySelector("details");
const isView = () => location.hash.includes("=");

/** Opens what the address points to. */
function unfold() {
  const target = isView() ? $("questions") : $(location.hash.slice(1));
  const inside = target?.querySelector(":scope > details");
  if (inside) inside.open = true;
}

async function copy(button, text) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    const area = element("textarea", { "aria-label": "Text to copy" });
    area.value = text;
    button.after(area);
    area.select();
    document.execCommand("copy");
    area.remove();
    button.focus();
  }
  const label = button.firstChild.data;
  button.firstChild.data = "Copied";
  setTimeout(() => (button.firstChild.data = label), 1500);
}

/** What is copied of a table: rows in lines, cells between tabs, as spreadsheets take them. */
function plain(source) {
  if (source.tagName !== "TABLE") return source.textContent;
  const cell = (of) => of.textContent.trim().replace(/\s+/g, " ");
  return [...source.rows].map((row) => [...row.cells].map(cell).join("\t")).join("\n") + "\n";
}

function enlarge(image, button) {
  button.focus(); // which has it again when the dialog is closed
  const large = image.cloneNode();
  $("enlarged").querySelector("img")?.remove();
  $("enlarged").append(large);
  $("enlarged").showModal();
}

for (const button of document.querySelectorAll(".copy")) {
  button.hidden = false;
  button.addEventListener("click", () => copy(button, plain($(button.dataset.copy))));
}
for (const button of document.querySelectorAll(".enlarge")) {
  const image = button.closest("figure").querySelector("img");
  button.hidden = false;
  image.classList.add("can-enlarge");
  for (const from of [button, image]) from.addEventListener("click", () => enlarge(image, button));
}
$("close").addEventListener("click", () => $("enlarged").close());
addEventListener("hashchange", unfold);
// a link to where the address already points changes nothing in it
document.addEventListener("click", ({ target }) => target.closest?.("a") && setTimeout(unfold));
let folded = [];
addEventListener("beforeprint", () => {
  folded = [...document.querySelectorAll("details:not([open])")].filter((each) => each !== fold);
  for (const each of folded) each.open = true;
});
addEventListener("afterprint", () => folded.forEach((each) => (each.open = false)));
unfold();

// ---- the questions, from when they are first looked at

if (!fold.open) await new Promise((go) => fold.addEventListener("toggle", go, { once: true }));
const data = await unpack($("data").textContent).catch((error) => {
  $("status").textContent = `The questions cannot be shown: ${error.message}`;
  throw error;
});
const CLEAN = data.conditions.indexOf("none");
const every = data.id.map((_, i) => i);
const headers = [...document.querySelectorAll("#table th")];
const controls = ["task", "condition", "change", "search", "size"].map($).filter(Boolean);
const first = { task: "", condition: $("condition").value, change: "", search: "", size: "50" };
Object.assign(first, { sort: "", order: "ascending", page: 1, question: "" });

let view = { ...first };
const open = new Set();

// ---- data

async function unpack(base64) {
  const bytes = atob(base64);
  const packed = new Uint8Array(bytes.length);
  for (let i = 0; i < bytes.length; i++) packed[i] = bytes.charCodeAt(i);
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  return JSON.parse(await new Response(stream).text()); // .json() takes twice as long
}

/** Log-likelihood of the gold choice less that of the best other one; null where it has none. */
function margin(i, condition) {
  const values = data.log_likelihoods[condition]?.[i];
  if (!values || values.includes(null)) return null;
  const best = (isGold) =>
    Math.max(...values.filter((_, choice) => data.gold[i].includes(choice) === isGold));
  const difference = best(true) - best(false);
  return Number.isFinite(difference) ? difference : null;
}

/** What was generated for question i under a condition; null where nothing was. */
const generated = (i, condition) => data.text?.[condition]?.[i] ?? null;

/** Whether a generated text is right; null where its score is not 0 or 1. */
function isRight(i, condition) {
  const value = data.value[condition]?.[i] ?? null;
  return value === 0 || value === 1 ? value === 1 : null;
}

/** How the text of question i changes: a value of the filter "Flipped"; null if unknown. */
function textChange(i, after) {
  const [was, is] = [isRight(i, CLEAN), isRight(i, after)];
  if (generated(i, CLEAN) === generated(i, after)) return "same";
  if (was === null || is === null) return null;
  if (was !== is) return was ? "lost" : "gained";
  return was ? "swapped" : "moved";
}

/** How the prediction of question i changes: a value of the filter "Flipped"; null if unknown. */
function change(i, after) {
  if (generated(i, after) !== null && generated(i, CLEAN) !== null) return textChange(i, after);
  const predictions = [data.prediction[CLEAN]?.[i] ?? null, data.prediction[after][i]];
  if (predictions.includes(null)) return null;
  const [was, is] = predictions.map((choice) => data.gold[i].includes(choice));
  if (was !== is) return was ? "lost" : "gained";
  if (predictions[0] === predictions[1]) return "same";
  return was ? "swapped" : "moved";
}

const CHANGES = Object.fromEntries(
  [...($("change")?.options ?? [])].map((option, rank) => [option.value, { rank, name: option.text }]),
);

/** For each column, its values under the condition that is shown, by question. */
let columns;
let compared;

/** What a question is called in an address. */
const key = (i) => `${data.tasks[data.task[i]]}/${data.id[i]}`;

function compare() {
  if (compared === view.condition) return;
  compared = view.condition;
  const after = data.conditions.indexOf(compared);
  const before = every.map((i) => margin(i, CLEAN));
  const now = every.map((i) => margin(i, after));
  columns = {
    task: data.task.map((t) => data.tasks[t]),
    id: data.id,
    question: data.question,
    gold: data.gold.map((gold, i) => data.target?.[i] ?? gold[0]),
    before: every.map((i) => generated(i, CLEAN) ?? data.prediction[CLEAN]?.[i] ?? null),
    after: every.map((i) => generated(i, after) ?? data.prediction[after][i]),
    change: every.map((i) => change(i, after)),
    value_before: data.value?.[CLEAN] ?? [],
    value_after: data.value?.[after] ?? [],
    margin_before: before,
    margin_after: now,
    margin_change: every.map((i) =>
      before[i] === null || now[i] === null ? null : now[i] - before[i],
    ),
  };
}

let texts; // what is searched, made when it is first needed
const text = (i) => {
  texts ??= every.map((j) =>
    [data.question[j], ...data.choices[j], data.target?.[j] ?? ""].join("\n").toLowerCase(),
  );
  return texts[i];
};

/** The questions that pass the filters, in the chosen order; those without a value come last. */
function select() {
  const sought = view.search.toLowerCase();
  const rows = every.filter(
    (i) =>
      (!view.task || columns.task[i] === view.task) &&
      (!view.change ||
        columns.change[i] === view.change ||
        (view.change === "any" && ![null, "same"].includes(columns.change[i]))) &&
      (!sought || text(i).includes(sought)),
  );
  if (!view.sort) return rows;
  const values = columns[view.sort];
  const keys = view.sort === "change" ? values.map((kind) => CHANGES[kind]?.rank ?? null) : values;
  const sign = view.order === "descending" ? -1 : 1;
  return rows.sort((i, j) => {
    const [a, b] = [keys[i] ?? null, keys[j] ?? null];
    if (a === b) return 0;
    if (a === null || b === null) return a === null ? 1 : -1;
    return a < b ? -sign : sign;
  });
}

// ---- page

/** An element with attributes and children, which are elements or text. */
function element(name, attributes, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

/** Text from outside: a language and a direction of its own. */
const foreign = (name, text, attributes = {}) =>
  element(name, { dir: "auto", lang: "", ...attributes }, text);

/** 0 as A, 25 as Z, 26 as AA. */
const letter = (i) =>
  (i > 25 ? letter(Math.floor(i / 26) - 1) : "") + String.fromCharCode(65 + (i % 26));

const signed = (x, plus = "") =>
  x === null || x === undefined ? "–" : (x > 0 ? plus : "") + x.toFixed(3).replace("-", "−");

function verdict(right) {
  const mark = element("span", { class: right ? "right" : "wrong", "aria-hidden": "true" });
  mark.textContent = right ? "✓" : "✗";
  return [" ", mark, element("span", { class: "spoken" }, right ? " right" : " wrong")];
}

function prediction(i, choice, condition) {
  if (generated(i, condition) !== null) {
    const right = isRight(i, condition);
    const shown = foreign("span", choice.length > 60 ? `${choice.slice(0, 60)}…` : choice);
    return element("td", {}, shown, ...(right === null ? [] : verdict(right)));
  }
  if (choice === null || choice === undefined) return element("td", {}, "–");
  return element("td", {}, letter(choice), ...verdict(data.gold[i].includes(choice)));
}

const CELLS = {
  task: (i) => element("td", {}, columns.task[i]),
  id: (i) => {
    const attributes = { type: "button", "aria-expanded": open.has(i), "data-row": i };
    if (open.has(i)) attributes["aria-controls"] = `choices-${i}`;
    const spoken = element("span", { class: "spoken" }, "Question ");
    const button = element("button", attributes, spoken, String(data.id[i]));
    return element("th", { scope: "row", class: "number" }, button);
  },
  question: (i) =>
    element("td", { class: "question" }, foreign("div", data.question[i] || "(in the choices)")),
  gold: (i) =>
    data.target?.[i] ? foreign("td", data.target[i]) : element("td", {}, data.gold[i].map(letter).join(", ")),
  before: (i) => prediction(i, columns.before[i], CLEAN),
  after: (i) => prediction(i, columns.after[i], data.conditions.indexOf(view.condition)),
  change: (i) => element("td", { class: "change" }, CHANGES[columns.change[i]]?.name ?? "–"),
  value_before: (i) => element("td", { class: "number" }, signed(columns.value_before[i])),
  value_after: (i) => element("td", { class: "number" }, signed(columns.value_after[i])),
  margin_before: (i) => element("td", { class: "number" }, signed(columns.margin_before[i])),
  margin_after: (i) => element("td", { class: "number" }, signed(columns.margin_after[i])),
  margin_change: (i) => element("td", { class: "number" }, signed(columns.margin_change[i], "+")),
};

/** A row of cells that know the names of their columns, for where they stand in a block. */
function labelled(row, names) {
  row.setAttribute("role", "row");
  [...row.cells].forEach((cell, i) => {
    cell.setAttribute("role", cell.tagName === "TH" ? "rowheader" : "cell");
    cell.dataset.label = names[i];
  });
  return row;
}

const NAMES = headers.map((header) => header.textContent);
const row = (i) =>
  labelled(element("tr", {}, ...headers.map((header) => CELLS[header.dataset.key](i))), NAMES);

/** A generated text, in which the first token that differs is marked. */
function marked(text, start, token) {
  const letters = [...text]; // as Python counts them, not halves of surrogate pairs
  const shown = foreign("p", letters.slice(0, start).join(""), { class: "text" });
  const spoken = element("span", { class: "spoken" }, token ? " first difference: " : " ends here");
  shown.append(spoken, foreign("mark", token || "∎"), letters.slice(start + [...token].length).join(""));
  return shown;
}

/** The texts of question i, before and after. */
function textsOf(i, conditions) {
  const [at, start, before, after] = data.parts[conditions.at(-1)][i] ?? [];
  const blocks = conditions.flatMap((condition, n) => {
    const text = generated(i, condition);
    const token = conditions.length > 1 && n === 0 ? before : after;
    const shown =
      at === undefined || conditions.length < 2 ? foreign("p", text, { class: "text" }) : marked(text, start, token);
    return [element("h3", {}, data.conditions[condition]), shown];
  });
  const said =
    conditions.length < 2 ? [] : [at === undefined ? "The texts are equal." : `The texts part at token ${at + 1}.`];
  return element(
    "div",
    { class: "texts" },
    element("h3", {}, "Prompt"),
    foreign("p", data.question[i], { class: "text" }),
    ...blocks,
    ...said.map((text) => element("p", {}, text)),
  );
}

/** The row under question i: its texts, or its choices with log-likelihoods and what was chosen. */
function details(i) {
  const after = data.conditions.indexOf(view.condition);
  const conditions = CLEAN < 0 || CLEAN === after ? [after] : [CLEAN, after];
  const cell = element("td", { colspan: headers.length, role: "cell" });
  cell.append(generated(i, after) === null ? choicesOf(i, conditions) : textsOf(i, conditions));
  const cosine = data.cosine[i];
  if (cosine !== null)
    cell.append(element("p", {}, `Cosine of embeddings and gradient: ${signed(cosine)}`));
  const link = element("button", { type: "button", class: "copy" }, "Copy a link to this question");
  link.addEventListener("click", () => {
    const to = new URLSearchParams({ condition: view.condition, question: key(i) });
    copy(link, `${location.href.split("#")[0]}#${to}`);
  });
  cell.append(element("div", {}, link));
  return element("tr", { class: "details", id: `choices-${i}`, role: "row" }, cell);
}

/** The choices of question i, with log-likelihoods and what was chosen. */
function choicesOf(i, conditions) {
  const values = conditions.map((c) => data.log_likelihoods[c][i] ?? []);
  const names = conditions.map((c) => `Log-likelihood, ${data.conditions[c]}`);
  const columnNames = ["Choice", "Text", "Marks", ...names, ...(values.length > 1 ? ["Change"] : [])];
  const head = columnNames.map((name, column) =>
    element("th", { scope: "col", role: "columnheader", ...(column > 2 && { class: "number" }) }, name),
  );
  // a text that is scored as a whole has one log-likelihood and no choices
  const choices = data.choices[i].length ? data.choices[i] : [data.question[i]];
  const body = choices.map((text, choice) => {
    const marks = conditions
      .filter((c) => data.prediction[c][i] === choice)
      .map((c) => `predicted, ${data.conditions[c]}`);
    if (data.gold[i].includes(choice)) marks.unshift("gold");
    const found = values.map((of) => of[choice] ?? null);
    const shown = found.map((x) => signed(x));
    if (found.length > 1)
      shown.push(signed(found.includes(null) ? null : found[1] - found[0], "+"));
    const made = element(
      "tr",
      marks[0] === "gold" ? { class: "gold" } : {},
      element("th", { scope: "row" }, letter(choice)),
      foreign("td", text, { class: "choice" }),
      element("td", { class: "marks" }, ...marks.flatMap((mark) => [element("span", { class: "mark" }, mark), " "])),
      ...shown.map((x) => element("td", { class: "number" }, x)),
    );
    return labelled(made, columnNames);
  });
  const name = `Choices of ${columns.task[i]} ${data.id[i]}`;
  return element(
    "table",
    { role: "table", class: "c8" },
    element("caption", {}, name),
    element("thead", { role: "rowgroup" }, element("tr", { role: "row" }, ...head)),
    element("tbody", { role: "rowgroup" }, ...body),
  );
}

let rows;
let pages;

function draw() {
  compare();
  rows = select();
  for (const control of controls) if (control.value !== view[control.id]) control.value = view[control.id];
  for (const header of headers) {
    if (header.dataset.key === view.sort) header.setAttribute("aria-sort", view.order);
    else header.removeAttribute("aria-sort");
  }
  $("caption").textContent =
    CLEAN < 0 ? `Questions under ${view.condition}` : `Questions before (none) and after (${view.condition})`;
  drawPage();
}

/** The question of the address is opened, on its page; filters that hide it are left out. */
function drawLinked() {
  const i = every.find((of) => key(of) === view.question);
  if (i !== undefined) {
    open.add(i);
    compare();
    if (!select().includes(i)) Object.assign(view, { task: "", change: "", search: "" });
    view.page = Math.floor(select().indexOf(i) / Number(view.size)) + 1;
  }
  draw();
  if (i !== undefined) document.querySelector(`[data-row="${i}"]`).closest("tr").scrollIntoView();
  else $("questions").scrollIntoView();
}

function drawPage() {
  const size = Number(view.size);
  pages = Math.max(1, Math.ceil(rows.length / size));
  view.page = Math.min(Math.max(1, Math.trunc(view.page) || 1), pages);
  const shown = rows.slice((view.page - 1) * size, view.page * size);
  $("table").tBodies[0].replaceChildren(
    ...shown.flatMap((i) => (open.has(i) ? [row(i), details(i)] : [row(i)])),
  );
  const count = (n) => n.toLocaleString("en");
  $("status").textContent =
    `${count(rows.length)} of ${count(every.length)} questions` +
    (pages > 1 ? `, page ${count(view.page)} of ${count(pages)}` : "");
  $("page").value = view.page;
  $("page").max = pages;
  $("last-page").textContent = count(pages);
  for (const id of ["first", "previous"]) $(id).setAttribute("aria-disabled", view.page === 1);
  for (const id of ["next", "last"]) $(id).setAttribute("aria-disabled", view.page === pages);
}

// ---- address

function write() {
  const changed = Object.entries(view).filter(([key, value]) => value !== first[key]);
  const address = location.href.split("#")[0];
  history.replaceState(null, "", `${address}#${new URLSearchParams(changed)}`);
}

/** Takes the view from the address, if one is there; what does not exist is passed over. */
function read() {
  if (!isView()) return false;
  const found = Object.fromEntries(new URLSearchParams(location.hash.slice(1)));
  const allowed = (name, value) => {
    if (name === "search" || name === "page") return true;
    if (name === "order") return ["ascending", "descending"].includes(value);
    if (name === "sort") return headers.some((header) => header.dataset.key === value);
    if (name === "question") return every.some((i) => key(i) === value);
    return [...($(name)?.options ?? [])].some((option) => option.value === value);
  };
  const known = Object.entries(found).filter(([name, of]) => name in first && allowed(name, of));
  view = { ...first, ...Object.fromEntries(known) };
  return true;
}

// ---- what the reader does

function update(changes) {
  view = { ...view, page: 1, question: "", ...changes };
  draw();
  write();
}

function turn(page) {
  view.page = page;
  view.question = "";
  drawPage();
  write();
  if ($("region").getBoundingClientRect().top < 0) $("region").scrollIntoView();
}

let typing;
for (const control of controls) {
  const take = () => {
    clearTimeout(typing);
    update({ [control.id]: control.value });
  };
  control.addEventListener("change", take);
  if (control.id !== "search") continue;
  control.addEventListener("input", () => {
    clearTimeout(typing);
    typing = setTimeout(take, 150);
  });
}
$("controls").addEventListener("submit", (event) => event.preventDefault());
$("controls").addEventListener("reset", (event) => {
  event.preventDefault();
  open.clear();
  update(first);
});
for (const header of headers) {
  header.firstChild.addEventListener("click", () => {
    const again = view.sort === header.dataset.key && view.order === "ascending";
    update({ sort: header.dataset.key, order: again ? "descending" : "ascending" });
  });
}
$("table").tBodies[0].addEventListener("click", ({ target }) => {
  const button = target.closest("[aria-expanded]");
  if (!button) return;
  const i = Number(button.dataset.row);
  const shown = open.delete(i);
  if (!shown) open.add(i);
  button.setAttribute("aria-expanded", !shown);
  if (shown) {
    $(`choices-${i}`).remove();
    button.removeAttribute("aria-controls");
  } else {
    button.closest("tr").after(details(i));
    button.setAttribute("aria-controls", `choices-${i}`);
  }
  view.question = shown ? "" : key(i);
  write();
});
$("first").addEventListener("click", () => turn(1));
$("previous").addEventListener("click", () => turn(view.page - 1));
$("next").addEventListener("click", () => turn(view.page + 1));
$("last").addEventListener("click", () => turn(pages));
$("page").addEventListener("change", () => turn(Number($("page").value)));
addEventListener("hashchange", () => read() && drawLinked());

for (const id of ["controls", "shown"]) $(id).hidden = false;
if (read()) drawLinked();
else draw();
