"use strict";
// Sorts a table by the column whose head is pressed: ascending, descending, back as it was.
// Fields without a figure stay last.
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0];
  const original = [...body.rows];
  const heads = [...table.tHead.rows[0].cells];
  const key = (row, index) => {
    const cell = row.cells[index];
    return "value" in cell.dataset ? Number(cell.dataset.value || NaN) : cell.textContent.trim();
  };
  const compare = (a, b) => {
    if (typeof a === "string") return a.localeCompare(b, "en", { numeric: true });
    return a - b;
  };
  const sort = (index, direction) => {
    const missing = (row) => Number.isNaN(key(row, index));
    const rows = direction === "none" ? original : [...original].sort((a, b) => {
      if (missing(a) || missing(b)) return missing(a) - missing(b);
      return compare(key(a, index), key(b, index)) * (direction === "ascending" ? 1 : -1);
    });
    body.append(...rows);
  };
  heads.forEach((head, index) => {
    const name = head.querySelector(".head");
    const button = document.createElement("button");
    button.type = "button";
    button.title = "Sort by this column";
    button.append(...name.childNodes);
    name.append(button);
    head.setAttribute("aria-sort", "none");
    button.addEventListener("click", () => {
      const next = { none: "ascending", ascending: "descending", descending: "none" };
      const direction = next[head.getAttribute("aria-sort")];
      for (const other of heads) other.setAttribute("aria-sort", "none");
      head.setAttribute("aria-sort", direction);
      sort(index, direction);
    });
  });
}
