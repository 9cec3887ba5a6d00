// The source beside what each line of it computed.

import { element, heading } from "./dom.js";
import { arrayMap } from "./heatmap.js";

// The views that show more of what a function computes.
const MORE = {
  embed: [["tokens", "how the text became ids"]],
  attention_scores: [["attention", "queries, keys and scores of a head"]],
  softmax: [["attention", "the weights of a head as arcs"]],
  attention: [["attention", "the weights of a head as arcs"]],
  mha: [["attention", "the weights of a head as arcs"], ["cache", "why keys and values are kept"]],
  linear: [["cost", "where the operations are"]],
  transformer_block: [["lens", "what x stands for after each block"]],
  gpt2: [["lens", "what x stands for after each block"]],
  layer_norm: [["lens", "how long the vectors are"]],
  unembed: [["loss", "how likely each token of the prompt was"]],
  generate: [["sampling", "other ways to choose"]],
  ffn: [["cost", "where the operations are"]],
  gelu: [["cost", "where the operations are"]],
};

const chosen = { place: 0 };
let parts = null;

function draw(state) {
  const { data } = state;
  chosen.place = Math.min(chosen.place, data.records.length - 1);
  const panel = element("section", { class: "panel", "aria-label": "What this line computed" });
  const list = source(data, (line) => goToLine(state, line));
  parts = { panel, list, key: state.key };
  list.addEventListener("keydown", (event) => {
    const step = { ArrowDown: 1, ArrowUp: -1, ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step) return;
    event.preventDefault();
    go(state, chosen.place + step);
  });
  const all = element("div", {},
    heading("Walkthrough", `Each line of ${data.source.file}, and what it computed for your prompt. Choose a line, or go ` +
      "through the lines in the order in which they ran. All blocks run the same lines, each with its own numbers: the " +
      "block and the head are chosen above."),
    element("div", { class: "two" }, list, panel));
  update(state, false);
  return all;
}

function source(data, onclick) {
  const recorded = new Set(data.records.map((found) => found.line));
  const list = element("div", { class: "source", tabindex: "0", role: "listbox", "aria-label": data.source.file });
  let isDoc = false;
  data.source.lines.forEach(({ text }, i) => {
    const marks = (text.match(/"""/g) || []).length;
    const isProse = isDoc || marks > 0;
    if (marks % 2) isDoc = !isDoc;
    const at = text.search(/(^|  )#/);
    const code = at < 0 || isProse ? text : text.slice(0, at), comment = at < 0 || isProse ? "" : text.slice(at);
    const isRecorded = recorded.has(i + 1);
    list.append(element("div", {
      class: `line ${isProse ? "prose" : ""} ${isRecorded ? "recorded" : ""}`, role: "option", id: `line-${i + 1}`,
      "aria-selected": "false", "aria-disabled": isRecorded ? null : "true",
      "aria-label": text.trim() ? null : "empty line", onclick: isRecorded ? () => onclick(i + 1) : null,
    },
    element("span", { class: "lineno", "aria-hidden": "true" }, String(i + 1)),
    element("code", {}, code, comment ? element("span", { class: "comment" }, comment) : null)));
  });
  return list;
}

function goToLine(state, line) {
  const runs = runsOf(state.data, line);
  go(state, runs.find((place) => place >= chosen.place) ?? runs[0]);
}

function runsOf(data, line) {
  return [...data.records.keys()].filter((place) => data.records[place].line === line);
}

function go(state, place) {
  if (place < 0 || place >= state.data.records.length) return;
  chosen.place = place;
  update(state, true);
}

function update(state, hasMoved) {
  const { data } = state, found = data.records[chosen.place], { list, panel } = parts;
  list.querySelector("[aria-selected=true]")?.setAttribute("aria-selected", "false");
  const line = list.querySelector(`#line-${found.line}`);
  line.setAttribute("aria-selected", "true");
  list.setAttribute("aria-activedescendant", line.id);
  if (hasMoved) reveal(list, line);
  panel.replaceChildren(...panelParts(state, found));
}

// Scrolls the list, not the page.
function reveal(list, line) {
  const top = line.getBoundingClientRect().top - list.getBoundingClientRect().top + list.scrollTop, room = list.clientHeight;
  if (top < list.scrollTop + 30 || top > list.scrollTop + 0.4 * room) list.scrollTop = top - room / 5;
}

function drawn() {
  const line = parts.list.querySelector("[aria-selected=true]");
  if (line) reveal(parts.list, line);
}

function panelParts(state, found) {
  const { data } = state, call = data.calls[found.call], about = data.source.lines[found.line - 1];
  const isArguments = data.source.functions[call.function] === found.line;
  return [
    steps(state),
    path(state, found),
    element("pre", { class: "current" }, element("code", {}, about.text.trim())),
    element("p", { class: "why" }, about.why),
    runs(state, found, call),
    element("h3", {}, isArguments ? `The arguments of ${call.function}` : "What this line made"),
    ...Object.entries(found.values).map(([name, value]) => valueParts(state, name, value)),
    Object.keys(found.values).length ? null : element("p", {}, "It assigned nothing: no error was raised."),
    links(state, found, call, about),
  ].filter(Boolean);
}

function steps(state) {
  const n = state.data.records.length;
  const button = (text, step, isOff) =>
    element("button", { type: "button", disabled: isOff, onclick: () => {
      go(state, chosen.place + step);
      [...parts.panel.querySelectorAll(".steps button")].find((made) => made.textContent === text && !made.disabled)?.focus();
    } }, text);
  return element("div", { class: "row steps" },
    button("◂ Back", -1, chosen.place === 0), button("Next ▸", 1, chosen.place === n - 1),
    element("span", { class: "muted number" }, `step ${chosen.place + 1} of ${n}`));
}

// The calls that lead to a line, from generate on.
function path(state, found) {
  const { data } = state, made = [];
  for (let i = found.call; i !== null; i = data.calls[i].parent) {
    const call = data.calls[i], block = call.function === "transformer_block" ? ` of block ${call.block}` : "";
    made.unshift(element("button", { type: "button", class: "crumb", title: call.text || null,
      onclick: () => go(state, data.records.findIndex((entry) => entry.call === i)) }, `${call.function}${block}`));
  }
  return element("div", { class: "path", role: "group", "aria-label": "The calls that lead here" },
    made.flatMap((crumb, i) => (i ? [" › ", crumb] : [crumb])));
}

// If a line ran several times: which run is shown.
function runs(state, found, call) {
  const { data } = state, places = runsOf(data, found.line);
  if (places.length < 2) return null;
  const select = element("select", { onchange: () => go(state, Number(select.value)) }, places.map((place, i) => {
    const { text, parent } = data.calls[data.records[place].call];
    const from = parent === null || !text ? "" : ` from ${text}`;
    return element("option", { value: place }, `${i + 1} of ${places.length}${from}`);
  }));
  select.value = chosen.place;
  return element("label", { class: "run" }, "Run of this line ", select);
}

function valueParts(state, name, value) {
  const { data } = state, title = element("h4", {}, element("code", {}, name));
  if ("text" in value) {
    title.append(" = ", element("code", {}, value.text));
    return element("div", { class: "value" }, title);
  }
  if ("tree" in value) {
    const leaves = value.tree.slice(0, 12).map(([path, shape]) => `${path} [${shape.join(", ")}]`);
    const more = value.tree.length > 12 ? `, and ${value.tree.length - 12} more` : "";
    title.append(element("span", { class: "muted" }, " a tree of params"));
    return element("div", { class: "value" }, title, element("p", { class: "leaves" }, leaves.join(", ") + more));
  }
  const array = data.arrays[value.array];
  title.append(" ", element("span", { class: "muted" }, describe(array)));
  const hasHeads = array.shape.length === 3;
  const about = [hasHeads ? `head ${state.head} of ${array.shape[0]}` : "", ...reductions(array)].filter(Boolean).join("; ");
  return element("div", { class: "value" }, title, element("p", { class: "muted small" }, about),
    arrayMap(name, array, data.tokens, state.head, data.last.texts));
}

function describe(array) {
  const kind = array.is_list ? "list of ids" : array.dtype;
  return `[${array.axes.map((axis, i) => (axis && axis !== String(array.shape[i]) ? `${axis} ${array.shape[i]}` : array.shape[i])).join(", ")}] ${kind}`;
}

// What is said of axes of which only a part is shown.
function reductions(array) {
  return array.shown.map((shown, place) => {
    if (!shown || shown.length === array.shape[place]) return "";
    const axis = array.axes[place], n = array.shape[place];
    if (axis === "n_vocab" && place === array.shape.length - 1) return `the ${shown.length} likeliest of ${n} tokens are shown`;
    if (axis === "n_vocab") return `the rows of the prompt's tokens, of ${n}, are shown`;
    if (axis === "n_ctx") return `the first ${shown.length} of ${n} positions are shown`;
    return `${shown.length} of ${n} along ${axis || "this axis"} are shown, every ${shown[1] - shown[0]}th`.replace("2th", "2nd").replace("3th", "3rd");
  }).filter(Boolean);
}

function links(state, found, call, about) {
  const made = (MORE[call.function] || []).map(([name, text]) => element("a", { href: `#${name}` }, text));
  for (const change of state.about.changes) {
    if (change.lines.some(([line]) => line === found.line)) made.push(element("a", { href: "#broken" }, `break it: ${change.label}`));
  }
  const section = about.section ? element("span", {}, `docs/tutorial.md, section ${about.section}`) : null;
  const all = [...made, section].filter(Boolean);
  return all.length ? element("p", { class: "more" }, "See also: ", all.flatMap((part, i) => (i ? [" · ", part] : [part]))) : null;
}

export const walkthrough = { draw, drawn };
