"use strict";
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0];
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => head.addEventListener("click", () => {
    const cells = [...body.rows].map((row) => row.cells[column]);
    const isNumber = "value" in cells[0].dataset;
    const wasUp = head.getAttribute("aria-sort") === "ascending";
    const isNew = !head.hasAttribute("aria-sort");
    const up = isNew ? !isNumber : !wasUp; // numbers begin with the largest, words with A
    const order = (a, b) => isNumber ? a.dataset.value - b.dataset.value : a.textContent.localeCompare(b.textContent);
    cells.sort((a, b) => (up ? 1 : -1) * order(a, b));
    heads.forEach((other) => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    body.append(...cells.map((cell) => cell.parentElement));
  }));
}
