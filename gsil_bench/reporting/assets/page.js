"use strict";
// The page's script: colours, sortable tables, the choice of a curve, and the item browser.
// Texts of users and models are set with textContent only; nothing here makes HTML of a string.

const $ = (id) => document.getElementById(id);

function element(name, properties = {}, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

// Colours

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  for (const button of document.querySelectorAll("[data-set-theme]")) {
    button.setAttribute("aria-pressed", String(button.dataset.setTheme === theme));
  }
}
for (const button of document.querySelectorAll("[data-set-theme]")) {
  button.addEventListener("click", () => setTheme(button.dataset.setTheme));
}

// Tables: a click sorts, a second one turns the order round. Cells without a value stay at the end.

function compareKeys(a, b) {
  const numbers = [Number(a), Number(b)];
  return numbers.some(Number.isNaN) ? a.localeCompare(b, "en", { numeric: true }) : numbers[0] - numbers[1];
}

function sortTable(table, column, direction) {
  const body = table.tBodies[0];
  const keyed = [...body.rows].map((row) => ({ row, key: row.cells[column].dataset.sort }));
  keyed.sort((a, b) => {
    if (a.key === "" || b.key === "") return (a.key === "") - (b.key === "");
    return direction * compareKeys(a.key, b.key);
  });
  body.append(...keyed.map((each) => each.row));
}

for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    head.querySelector("button").addEventListener("click", () => {
      const first = column === 0 ? "ascending" : "descending"; // names from A, numbers from the largest
      const other = first === "ascending" ? "descending" : "ascending";
      const order = head.getAttribute("aria-sort") === first ? other : first;
      for (const each of heads) each.setAttribute("aria-sort", each === head ? order : "none");
      sortTable(table, column, order === "ascending" ? 1 : -1);
    });
  });
}

// Curves: one of the others at a time

if ($("quantity")) {
  const choose = () => {
    for (const figure of $("chosen").querySelectorAll("figure")) figure.hidden = figure.id !== $("quantity").value;
  };
  $("quantity").addEventListener("change", choose);
  choose(); // a browser may remember the choice of the last visit
}

// Items

const PAGE = 50; // items in the list at once
const LONG = 700; // characters of a text that is shown whole
const HIDDEN_SIGNS = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u00ad\u061c\u200b\u200e\u200f\u202a-\u202e\u2060-\u2069\ufeff\ufff9-\ufffb\ufffe\uffff\ud800-\udfff]/gu;

const data = JSON.parse($("data").textContent);
const state = { task: null, shown: [], page: 0, selected: 0, lower: new Map() };

function textOf(number) {
  return data.texts[number];
}

/** A text as nodes; signs that cannot be seen, or that turn the order of others, are named in a small box. */
function visible(text) {
  const nodes = [];
  let end = 0;
  for (const found of text.matchAll(HIDDEN_SIGNS)) {
    nodes.push(text.slice(end, found.index));
    const code = found[0].codePointAt(0).toString(16).toUpperCase().padStart(4, "0");
    nodes.push(element("span", { className: "sign", textContent: `U+${code}` }));
    end = found.index + found[0].length;
  }
  nodes.push(text.slice(end));
  return nodes;
}

function lowered(number) {
  if (!state.lower.has(number)) state.lower.set(number, textOf(number).toLowerCase());
  return state.lower.get(number);
}

function textsOfItem(task, item) {
  const numbers = [...task.prompts[item].map((part) => part[1]), task.groups[item]];
  for (const cell of task.cells) {
    numbers.push(cell.reasons[item]);
    for (const turns of cell.answers[item]) numbers.push(...turns);
  }
  return numbers;
}

function matches(task, item, words) {
  if (!words) return true;
  if (task.ids[item].toLowerCase().includes(words)) return true;
  return textsOfItem(task, item).some((number) => lowered(number).includes(words));
}

/** Whether one cell's score is better than another's; of one alone, whether it is the best possible, or is not. */
function isWin(task, item, better, worse) {
  const a = better && better.scores[item], b = worse && worse.scores[item];
  if ((better && a === null) || (worse && b === null)) return false;
  if (better && worse) return task.higher ? a > b : a < b;
  return (!better || a === task.best) && (!worse || b !== task.best);
}

function pick(select) {
  return select.value === "" ? null : state.task.cells[Number(select.value)];
}

function filterItems() {
  const task = state.task;
  const words = $("search").value.trim().toLowerCase();
  const better = pick($("better")), worse = pick($("worse"));
  state.shown = [];
  for (let item = 0; item < task.ids.length; item++) {
    if (isWin(task, item, better, worse) && matches(task, item, words)) state.shown.push(item);
  }
  state.selected = 0;
  $("count").replaceChildren(countText(better, worse));
  showList();
}

function countText(better, worse) {
  const parts = [`${state.shown.length} of ${state.task.ids.length} items`];
  if (better && worse) parts.push(`that ${better.method} answers better than ${worse.method}`);
  else if (better) parts.push(`that ${better.method} has right`);
  else if (worse) parts.push(`that ${worse.method} has wrong`);
  return parts.join(" ");
}

function scoreText(score) {
  if (score === null) return "unscored";
  return Number.isInteger(score) ? String(score) : score.toFixed(3);
}

function startOf(task, item) {
  const turns = task.prompts[item].filter((part) => !textOf(part[0]).startsWith("shot"));
  return turns.length ? textOf(turns[0][1]).slice(0, 160) : "";
}

function listEntry(item, place) {
  const task = state.task;
  const entry = element("li", { id: `item-${place}` });
  entry.setAttribute("role", "option");
  entry.setAttribute("aria-selected", String(place === state.selected));
  const group = textOf(task.groups[item]);
  entry.append(element("span", { className: "id" }, ...visible(task.ids[item] + (group ? ` · ${group}` : ""))));
  entry.append(element("span", { className: "start" }, ...visible(startOf(task, item))));
  entry.addEventListener("click", () => select(place));
  return entry;
}

function showList() {
  state.page = Math.floor(state.selected / PAGE);
  const from = state.page * PAGE;
  const entries = state.shown.slice(from, from + PAGE).map((item, at) => listEntry(item, from + at));
  $("list").replaceChildren(...entries);
  const pages = Math.max(1, Math.ceil(state.shown.length / PAGE));
  $("page").textContent = `page ${state.page + 1} of ${pages}`;
  $("previous").disabled = state.page === 0;
  $("next").disabled = state.page >= pages - 1;
  mark();
  showDetail();
}

function mark() {
  for (const entry of $("list").children) {
    entry.setAttribute("aria-selected", String(entry.id === `item-${state.selected}`));
  }
  const chosen = $(`item-${state.selected}`);
  if (chosen) {
    $("list").setAttribute("aria-activedescendant", chosen.id);
    const list = $("list"), top = chosen.offsetTop - list.offsetTop;
    if (top < list.scrollTop) list.scrollTop = top;
    else if (top + chosen.offsetHeight > list.scrollTop + list.clientHeight) {
      list.scrollTop = top + chosen.offsetHeight - list.clientHeight;
    }
  } else $("list").removeAttribute("aria-activedescendant");
}

function select(place) {
  if (!state.shown.length) return;
  state.selected = Math.min(Math.max(place, 0), state.shown.length - 1);
  if (Math.floor(state.selected / PAGE) !== state.page) return showList();
  mark();
  showDetail();
}

/** A text, or its beginning and a switch for the rest. */
function block(text) {
  if (text.length <= LONG) return element("pre", {}, ...visible(text || "(empty)"));
  const details = element("details");
  const summary = element("summary", {}, `${text.length.toLocaleString("en")} characters: `, ...visible(text.slice(0, 160)), " …");
  details.append(summary);
  details.addEventListener("toggle", () => {
    if (details.open && details.children.length === 1) details.append(element("pre", {}, ...visible(text)));
  });
  return details;
}

function promptParts(task, item) {
  const parts = task.prompts[item];
  if (!parts.length) {
    return [element("p", { className: "role" }, ...visible(`The prompt cannot be shown: ${task.why || "the task has none"}`))];
  }
  const isShot = (part) => textOf(part[0]).startsWith("shot");
  const nodes = [];
  const shots = parts.filter(isShot);
  if (shots.length) {
    const details = element("details", {}, element("summary", { textContent: `${shots.length / 2} shots` }));
    for (const part of shots) details.append(element("p", { className: "role", textContent: textOf(part[0]) }), block(textOf(part[1])));
    nodes.push(details);
  }
  for (const part of parts.filter((each) => !isShot(each))) {
    nodes.push(element("p", { className: "role", textContent: textOf(part[0]) }), block(textOf(part[1])));
  }
  const gold = task.golds[item];
  if (gold.length) {
    const details = element("details", {}, element("summary", { textContent: "A right answer" }));
    details.append(...gold.map((number) => element("pre", {}, ...visible(textOf(number)))));
    nodes.push(details);
  }
  return nodes;
}

function answerParts(task, cell, item) {
  const seed = cell.seed === 0 ? "" : `, seed ${cell.seed}`;
  const head = element("h4", {}, element("span", {}, ...visible(cell.method + seed)));
  head.append(element("span", { className: "points", textContent: `${task.metric} ${scoreText(cell.scores[item])}` }));
  const article = element("article", {}, head);
  article.append(element("p", { className: "reason" }, ...visible(textOf(cell.reasons[item]) || "no reason given")));
  const samples = cell.answers[item];
  if (!samples.length) {
    article.append(element("p", { className: "role" }, ...visible(`No answer can be shown${cell.why ? `: ${cell.why}` : ""}`)));
  }
  samples.forEach((turns, sample) => {
    turns.forEach((number, turn) => {
      const names = [];
      if (samples.length > 1) names.push(`sample ${sample + 1}`);
      if (turns.length > 1) names.push(`turn ${turn + 1}`);
      if (names.length) article.append(element("p", { className: "role", textContent: names.join(", ") }));
      article.append(block(textOf(number)));
    });
  });
  return article;
}

function showDetail() {
  const task = state.task, item = state.shown[state.selected];
  if (item === undefined) {
    $("detail").replaceChildren(element("p", { textContent: "No item fits these filters." }));
    return;
  }
  const title = element("h3", {}, ...visible(`${task.name}: ${task.ids[item]}`));
  $("detail").replaceChildren(title, ...promptParts(task, item), ...task.cells.map((cell) => answerParts(task, cell, item)));
  $("detail").scrollTop = 0;
}

function setTask(number) {
  state.task = data.tasks[number];
  for (const [id, words] of [["better", "any method"], ["worse", "any method"]]) {
    const before = $(id).selectedIndex > 0 ? $(id).selectedOptions[0].textContent : "";
    const options = state.task.cells.map((cell, at) => element("option", { value: String(at), textContent: cell.method }));
    $(id).replaceChildren(element("option", { value: "", textContent: words }), ...options);
    for (const option of options) if (option.textContent === before) option.selected = true;
  }
  filterItems();
}

const KEYS = {
  ArrowDown: () => state.selected + 1,
  ArrowUp: () => state.selected - 1,
  PageDown: () => state.selected + 10,
  PageUp: () => state.selected - 10,
  Home: () => 0,
  End: () => state.shown.length - 1,
};

function startBrowser() {
  $("task").append(...data.tasks.map((task, at) => element("option", { value: String(at), textContent: task.name })));
  $("task").addEventListener("change", () => setTask(Number($("task").value)));
  $("filters").addEventListener("submit", (event) => event.preventDefault());
  $("better").addEventListener("change", filterItems);
  $("worse").addEventListener("change", filterItems);
  let waiting = 0;
  $("search").addEventListener("input", () => {
    clearTimeout(waiting);
    waiting = setTimeout(filterItems, 150);
  });
  $("list").addEventListener("keydown", (event) => {
    if (!KEYS[event.key]) return;
    event.preventDefault();
    select(KEYS[event.key]());
  });
  $("previous").addEventListener("click", () => select((state.page - 1) * PAGE));
  $("next").addEventListener("click", () => select((state.page + 1) * PAGE));
  setTask(0);
}

if ($("list") && data.tasks.length) startBrowser();
