// Sorts tables by their columns, and fits the height of inner pages to their content.
"use strict";
(() => {
  // "0.725 [0.575, 0.850]", "−0.1", "3.2e-05" and "1,200" are numbers. Empty cells come last in either order.
  const number = (text) => {
    const match = text.replace(/−/g, "-").match(/^\s*[-+]?\d[\d,]*(\.\d+)?(e[-+]?\d+)?/i);
    return match ? Number(match[0].replace(/,/g, "")) : NaN;
  };
  const empty = (text) => ["", "-", "–"].includes(text.trim());
  const sort = (table, place, heading) => {
    const body = table.tBodies[0];
    const rows = [...body.rows];
    const texts = new Map(rows.map((row) => [row, row.cells[place].textContent]));
    const numeric = rows.every((row) => empty(texts.get(row)) || !Number.isNaN(number(texts.get(row))));
    const compare = (a, b) => {
      const [first, second] = [texts.get(a), texts.get(b)];
      if (empty(first) || empty(second)) return Number(empty(first)) - Number(empty(second));
      const order = numeric
        ? number(first) - number(second)
        : first.localeCompare(second, undefined, { numeric: true, sensitivity: "base" });
      return down ? -order : order;
    };
    const now = heading.getAttribute("aria-sort");
    const down = now ? now === "ascending" : numeric;
    for (const other of heading.parentElement.cells) other.removeAttribute("aria-sort");
    heading.setAttribute("aria-sort", down ? "descending" : "ascending");
    body.append(...rows.sort(compare));
  };
  for (const table of document.querySelectorAll("table")) {
    if (!table.tHead || !table.tBodies[0] || table.tBodies[0].rows.length < 2) continue;
    [...table.tHead.rows[0].cells].forEach((heading, place) => {
      const button = document.createElement("button");
      button.type = "button";
      button.append(...heading.childNodes);
      button.title = "Sort by this column";
      button.addEventListener("click", () => sort(table, place, heading));
      heading.append(button);
    });
  }
  addEventListener("message", (event) => {
    const height = Number(event.data?.focuslensHeight);
    if (!(height > 0 && height < 20000)) return;
    for (const frame of document.querySelectorAll("iframe")) {
      if (frame.contentWindow === event.source) frame.style.height = `${height}px`;
    }
  });
})();
