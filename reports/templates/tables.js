"use strict";
// Tables that sort, search and filter, and jumps to their rows. Without this script they only
// stand there, whole.

const SEARCHED_FROM = 9; // rows from which a table is worth a search box

function made(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

// The figure of a field in the unit of its column: its attribute, or else its text; NaN is none.
function figureOf(field) {
  if ("value" in field.dataset) return Number(field.dataset.value || NaN);
  const found = field.textContent.match(/^\s*([+-]?[\d,]*\.?\d+(?:e[+-]?\d+)?)/);
  return found ? Number(found[1].replaceAll(",", "")) : NaN;
}

function labelOf(row) {
  return (row.querySelector(".label") ?? row.cells[0]).textContent.trim();
}

function announceRows(table) {
  table.dispatchEvent(new CustomEvent("rowschange"));
}

// Sorting: ascending, descending, back as it was. Fields without a figure stay last.
function makeSortable(table) {
  const body = table.tBodies[0];
  const original = [...body.rows];
  const heads = [...table.tHead.rows[0].cells];
  const sorted = (index, direction) => {
    if (direction === "none") return original;
    const numeric = heads[index].classList.contains("num");
    const keyed = original.map((row) => {
      const field = row.cells[index];
      const key = numeric || "value" in field.dataset ? figureOf(field) : field.textContent.trim();
      return [key, row];
    });
    const sign = direction === "ascending" ? 1 : -1;
    keyed.sort(([a], [b]) => {
      const missing = Number.isNaN(a) - Number.isNaN(b);
      if (missing || Number.isNaN(a)) return missing;
      if (a === b) return 0;
      if (typeof a === "string") return sign * a.localeCompare(b, "en", { numeric: true });
      return sign * (a < b ? -1 : 1);
    });
    return keyed.map(([, row]) => row);
  };
  heads.forEach((head, index) => {
    const name = head.querySelector(".head");
    const button = made("button", { type: "button", title: "Sort by this column" });
    button.append(...name.childNodes);
    name.append(button);
    head.setAttribute("aria-sort", "none");
    button.addEventListener("click", () => {
      const next = { none: "ascending", ascending: "descending", descending: "none" };
      const direction = next[head.getAttribute("aria-sort")];
      for (const other of heads) other.setAttribute("aria-sort", "none");
      head.setAttribute("aria-sort", direction);
      body.append(...sorted(index, direction));
    });
  });
}

// A choice among the values that rows have, or nothing where all have the same one.
function makeChoice(name, title, rows, valueOf, write = (value) => value) {
  const values = [...new Set(rows.map(valueOf))];
  if (values.length < 2) return [];
  values.sort((a, b) => a.localeCompare(b, "en", { numeric: true }));
  const select = made("select", { name }, made("option", { value: "" }, "all"));
  for (const value of values) select.append(made("option", { value: `=${value}` }, write(value)));
  return [made("label", {}, title, select)];
}

function makeLimit(head, index) {
  const unit = head.querySelector(".unit")?.textContent;
  const title = `${head.querySelector(".head").textContent} ${head.dataset.limit}`;
  const input = made("input", { type: "number", step: "any", name: `limit-${index}` });
  input.dataset.metric = head.dataset.metric;
  return made("label", {}, unit ? `${title} (${unit})` : title, input);
}

// On a narrow screen the fields are folded behind a button, which a wide one does not show.
function makeFold(fields) {
  const fold = made("button",
    { type: "button", class: "fold", "aria-expanded": "false", "aria-controls": fields.id },
    "More filters");
  fold.addEventListener("click", () => {
    const open = fields.classList.toggle("open");
    fold.setAttribute("aria-expanded", `${open}`);
  });
  return fold;
}

const CHOICES = {
  method: ["Method", (row) => row.dataset.method ?? ""],
  bits: ["Bits", (row) => row.dataset.bits ?? "", (bits) => bits || "no single width"],
  group: ["Group size", (row) => row.dataset.group ?? "",
    (size) => ({ "": "no groups", "-1": "per channel" })[size] ?? size],
  execution: ["Execution", (row) => row.cells[1].firstChild.nodeValue.trim()],
  status: ["Status", (row) => row.dataset.status ?? "ok"],
};

// What a form asks of a row, as a list of tests.
function testsOf(form, heads) {
  const tests = [];
  const words = form.elements.search.value.toLowerCase().split(/\s+/).filter(Boolean);
  if (words.length) {
    tests.push((row) => {
      const text = row.searched ??= (row.dataset.method === undefined
        ? row.textContent
        : `${row.cells[0].textContent} ${row.cells[1].textContent} ${row.dataset.method}`
      ).toLowerCase();
      return words.every((word) => text.includes(word));
    });
  }
  for (const [name, [, valueOf]] of Object.entries(CHOICES)) {
    const wanted = form.elements[name]?.value;
    if (wanted) tests.push((row) => `=${valueOf(row)}` === wanted);
  }
  for (const [index, head] of heads.entries()) {
    const input = form.elements[`limit-${index}`];
    if (!input || input.value === "") continue;
    const limit = Number(input.value);
    // A row without the figure meets no limit: NaN compares as false.
    tests.push(head.dataset.limit === "at least"
      ? (row) => figureOf(row.cells[index]) >= limit
      : (row) => figureOf(row.cells[index]) <= limit);
  }
  return tests;
}

// The state of a filter stands in the address: #group?search=rtn&bits=%3D4
function writeAddress(form, slug) {
  const state = new URLSearchParams();
  for (const [name, value] of new FormData(form)) if (value) state.set(name, value);
  const text = `${state}`;
  history.replaceState(null, "", text ? `#${slug}?${text}` : `#${slug}`);
}

function readAddress(form, slug) {
  const [place, text] = location.hash.slice(1).split("?", 2);
  if (place !== slug || !text) return false;
  for (const [name, value] of new URLSearchParams(text)) {
    if (form.elements[name]) form.elements[name].value = value;
  }
  return true;
}

// A bar above a table: words to search for, choices and limits, how many rows are left, a reset.
function makeBar(table) {
  const rows = [...table.tBodies[0].rows];
  const heads = [...table.tHead.rows[0].cells];
  const slug = table.dataset.filter;
  const title = table.caption?.textContent ?? table.parentElement.getAttribute("aria-label") ?? "table";
  const form = made("form", { class: slug ? "bar" : "bar short", role: "search", "aria-label": `Filter: ${title}` });
  const search = made("input", { type: "search", name: "search", autocomplete: "off" });
  form.append(made("label", {}, slug ? "Search label, kernel, method" : "Search", search));
  if (slug) {
    form.id = `${slug}--filter`;
    const fields = made("div", { class: "fields", id: `${slug}--fields` });
    for (const [name, choice] of Object.entries(CHOICES)) {
      fields.append(...makeChoice(name, choice[0], rows, ...choice.slice(1)));
    }
    heads.forEach((head, index) => head.dataset.limit && fields.append(makeLimit(head, index)));
    form.append(makeFold(fields), fields);
  }
  const count = made("output", { role: "status", "aria-live": "polite" });
  form.append(made("button", { type: "reset" }, "Reset"), count);
  const apply = () => {
    const tests = testsOf(form, heads);
    let left = 0;
    for (const row of rows) {
      row.hidden = !tests.every((test) => test(row));
      left += !row.hidden;
    }
    count.textContent = `${left} of ${rows.length} rows`;
    announceRows(table);
  };
  form.addEventListener("input", () => {
    apply();
    if (slug) writeAddress(form, slug);
  });
  // The fields are empty only after the event.
  form.addEventListener("reset", () => setTimeout(() => {
    apply();
    if (slug) writeAddress(form, slug);
  }));
  form.addEventListener("submit", (event) => event.preventDefault());
  table.parentElement.before(form);
  const restored = Boolean(slug) && readAddress(form, slug);
  apply();
  if (restored) form.scrollIntoView();
}

// Goes to a row, or whatever an address names: unfolds what it is folded in, and lights it up.
function goTo(target) {
  for (let above = target.closest("details"); above; above = above.parentElement.closest("details")) {
    above.open = true;
  }
  if (target.hidden) target.closest(".scroll").previousElementSibling.reset();
  if (location.hash !== `#${target.id}`) location.hash = target.id;
  target.tabIndex = -1;
  target.focus({ preventScroll: true });
  target.scrollIntoView({ block: "center", inline: "nearest" });
}

for (const table of document.querySelectorAll("table.sortable")) {
  if (table.tBodies[0].rows.length >= SEARCHED_FROM || table.dataset.filter) makeBar(table);
  makeSortable(table);
}

// An address that names a row, or something folded away, is gone to as a click would.
function followAddress() {
  const target = document.getElementById(decodeURIComponent(location.hash.slice(1)));
  if (target && (target.matches("tr") || target.closest("details:not([open])"))) goTo(target);
}
window.addEventListener("hashchange", followAddress);
followAddress();
