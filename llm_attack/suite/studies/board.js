"use strict";
// Sorting and filtering; without this script the page shows everything, the best first.

for (const table of document.querySelectorAll("table")) {
  for (const [column, head] of [...table.tHead.rows[0].cells].entries()) {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = head.textContent;
    head.replaceChildren(button);
    button.addEventListener("click", () => sort(table, column, head));
  }
}

function sort(table, column, head) {
  const text = head.dataset.kind === "text";
  const first = text ? "ascending" : "descending";
  const other = text ? "descending" : "ascending";
  const order = head.getAttribute("aria-sort") === first ? other : first;
  for (const cell of table.tHead.rows[0].cells) cell.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", order);
  const sign = order === "ascending" ? 1 : -1;
  const value = (row) => row.cells[column].dataset.value;
  const rows = [...table.tBodies[0].rows];
  rows.sort((a, b) => sign * (text ? value(a).localeCompare(value(b)) : value(a) - value(b)));
  table.tBodies[0].append(...rows);
}

const form = document.getElementById("filter");
const [name, family, most] = ["name", "family", "most"].map((id) => document.getElementById(id));

function filter() {
  let shown = 0;
  for (const part of document.querySelectorAll("[data-name]")) {
    const known = part.dataset;
    const small = most.value === "" || (known.parameters !== "" && known.parameters <= 1e6 * most.value);
    const named = known.name.toLowerCase().includes(name.value.trim().toLowerCase());
    const fits = small && named && (family.value === "" || known.family === family.value);
    part.toggleAttribute("hidden", !fits);
    if (fits && part.tagName === "TR") shown += 1;
  }
  document.getElementById("count").textContent = `${shown} shown`;
}

form.hidden = false;
form.addEventListener("submit", (event) => event.preventDefault());
form.addEventListener("input", filter);
filter();
