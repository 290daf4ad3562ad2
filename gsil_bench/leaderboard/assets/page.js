"use strict";
(() => {
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];
  const tables = all(".task table");
  const form = document.querySelector(".tools");
  const field = (name) => form.elements.namedItem(name);
  const words = () => field("search").value.toLowerCase().split(/\s+/).filter(Boolean);
  const chosen = (name, value) => !field(name).value || field(name).value === value;
  const fits = (text, wanted) => wanted.every((word) => text.includes(word));

  function filter() {
    const wanted = words();
    let rows = 0, shownTables = 0;
    for (const board of all(".board")) {
      let shown = 0;
      for (const task of all(".task", board)) {
        const open = chosen("model", board.dataset.model) && chosen("task", task.dataset.task)
          && chosen("protocol", task.dataset.protocol);
        let visible = 0;
        for (const row of all("tbody tr", task)) {
          row.hidden = !(open && chosen("method", row.dataset.method) && fits(row.dataset.text, wanted));
          visible += row.hidden ? 0 : 1;
        }
        task.hidden = visible === 0;
        shown += visible;
        shownTables += visible ? 1 : 0;
      }
      board.hidden = shown === 0;
      rows += shown;
    }
    for (const card of all(".card")) {
      card.hidden = !(chosen("method", card.dataset.method) && fits(card.dataset.text, wanted));
    }
    document.querySelector("#nothing").hidden = rows > 0;
    form.querySelector("output").value = `${rows} ${rows === 1 ? "row" : "rows"} in ${shownTables} ${shownTables === 1 ? "table" : "tables"}`;
  }

  // Rows without a value stay last in both directions; equal ones keep the order in which they were ranked.
  function compare(one, other, sign) {
    if (one === "" || other === "") return (one === "") - (other === "");
    const a = Number(one), b = Number(other);
    return sign * (Number.isNaN(a) || Number.isNaN(b) ? one.localeCompare(other) : a - b);
  }

  function sort(table, column, direction) {
    const body = table.tBodies[0], sign = direction === "descending" ? -1 : 1;
    const rows = [...body.rows].sort((a, b) => Number(a.dataset.rank) - Number(b.dataset.rank));
    const key = (row) => row.cells[column].dataset.sort;
    rows.sort((a, b) => compare(key(a), key(b), sign));
    body.append(...rows);
    [...table.tHead.rows[0].cells].forEach((cell, index) => {
      if (index === column) cell.setAttribute("aria-sort", direction);
      else cell.removeAttribute("aria-sort");
    });
  }

  for (const table of tables) {
    [...table.tHead.rows[0].cells].forEach((cell, column) => {
      cell.querySelector("button").addEventListener("click", () => {
        const first = cell.dataset.first, other = first === "ascending" ? "descending" : "ascending";
        sort(table, column, cell.getAttribute("aria-sort") === first ? other : first);
      });
    });
  }

  function sortAll() {
    const name = field("sort").value;
    for (const table of tables) {
      const cells = [...table.tHead.rows[0].cells];
      const column = cells.findIndex((cell) => cell.dataset.key === name);
      sort(table, column, cells[column].dataset.first);
    }
  }

  // A link to a card must not lead to one that a filter hides.
  function reveal() {
    const card = location.hash && document.getElementById(location.hash.slice(1));
    if (card && card.hidden) { form.reset(); filter(); card.scrollIntoView(); }
  }

  form.addEventListener("input", (event) => (event.target.name === "sort" ? sortAll() : filter()));
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("reset", () => setTimeout(() => { sortAll(); filter(); }));
  document.addEventListener("keydown", (event) => {
    if (event.key === "/" && !/^(INPUT|SELECT|TEXTAREA)$/.test(document.activeElement.tagName)) {
      event.preventDefault();
      field("search").focus();
    }
  });
  window.addEventListener("hashchange", reveal);
  form.hidden = false;
  sortAll();
  filter();
  reveal();
})();
