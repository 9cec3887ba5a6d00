// A table of numbers as a picture: words on the axes, the value of a cell on hover and by the arrow keys.

import { element, format } from "./dom.js";

const FONT = 11;

// rows, columns: the words on the axes. hide(row, column): cells
// without a number. onMove(row, column): the cell that is read out. Returns a <figure>.
export function heatmap({ title, values, rows, columns, rowName, columnName, hide = () => false,
                          onMove = () => {} }) {
  const canvas = element("canvas", { tabindex: "0", role: "img" });
  canvas.setAttribute("aria-label", `${title}: ${rows.length} rows (${rowName}), ${columns.length} columns ` +
    `(${columnName}). The arrow keys read the values.`);
  const readout = element("output", { class: "readout", "aria-live": "polite" }, `${rowName} down, ${columnName} across`);
  const box = element("div", { class: "canvas" }, canvas);
  const map = { canvas, values, rows, columns, hide, row: -1, column: -1 };
  const move = (row, column) => {
    if (row < 0 || column < 0 || row >= rows.length || column >= columns.length) return;
    Object.assign(map, { row, column });
    const value = hide(row, column) ? "masked" : format(values[row][column]);
    readout.textContent = `${rowName} ${rows[row]}, ${columnName} ${columns[column]}: ${value}`;
    paint(map);
    onMove(row, column);
  };
  canvas.addEventListener("pointermove", (event) => move(...cellAt(map, event)));
  canvas.addEventListener("pointerdown", (event) => move(...cellAt(map, event)));
  canvas.addEventListener("keydown", (event) => {
    const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
    if (!step) return;
    event.preventDefault();
    move(Math.max(0, map.row + step[0]), Math.max(0, map.column + step[1]));
  });
  new ResizeObserver(() => fit(map, box.clientWidth)).observe(box);
  fit(map, Math.min(560, document.documentElement.clientWidth - 40));
  const figure = element("figure", { class: "heatmap" }, box, readout);
  figure.move = move;
  return figure;
}

// Chooses the size of a cell, so that the picture is as wide as its place, and draws it.
function fit(map, width) {
  if (!width || map.width === width) return;
  map.width = width;
  const pen = map.canvas.getContext("2d");
  pen.font = `${FONT}px sans-serif`;
  map.left = 8 + Math.min(110, Math.max(...map.rows.map((word) => pen.measureText(word).width)));
  map.isWords = map.columns.some((word) => Number.isNaN(Number(word)));
  map.top = map.isWords ? 8 + Math.min(90, Math.max(...map.columns.map((word) => pen.measureText(word).width))) : 18;
  const limit = map.rows.length === map.columns.length ? 34 : 26;
  map.cell = Math.max(2, Math.min(limit, (width - map.left - 2) / map.columns.length));
  map.height = Math.max(map.rows.length > 40 ? 9 : 13, Math.min(map.cell, 34, 420 / map.rows.length));
  const [w, h] = [map.left + map.cell * map.columns.length + 2, map.top + map.height * map.rows.length + 2];
  const scale = window.devicePixelRatio || 1;
  Object.assign(map.canvas, { width: Math.ceil(w * scale), height: Math.ceil(h * scale) });
  map.canvas.style.width = `${w}px`;
  map.canvas.style.height = `${h}px`;
  paint(map);
}

function paint(map) {
  const pen = map.canvas.getContext("2d"), scale = window.devicePixelRatio || 1;
  const colours = palette(), largest = extent(map);
  pen.setTransform(scale, 0, 0, scale, 0, 0);
  pen.clearRect(0, 0, map.canvas.width, map.canvas.height);
  map.values.forEach((line, row) => line.forEach((value, column) => {
    pen.fillStyle = map.hide(row, column) ? colours.hidden : mix(colours, value, largest);
    pen.fillRect(map.left + column * map.cell, map.top + row * map.height, map.cell - (map.cell > 6), map.height - 1);
  }));
  words(map, pen, colours);
  if (map.row >= 0) {
    pen.strokeStyle = colours.text;
    pen.lineWidth = 2;
    pen.strokeRect(map.left + map.column * map.cell, map.top + map.row * map.height, map.cell - 1, map.height - 1);
  }
}

function words(map, pen, colours) {
  pen.font = `${FONT}px sans-serif`;
  pen.fillStyle = colours.muted;
  pen.textBaseline = "middle";
  pen.textAlign = "right";
  const everyRow = Math.ceil(11 / map.height);
  map.rows.forEach((word, row) => {
    if (row % everyRow === 0) pen.fillText(word, map.left - 5, map.top + (row + 0.5) * map.height, map.left - 8);
  });
  const every = map.isWords ? Math.ceil(11 / map.cell) : Math.ceil(28 / map.cell);
  map.columns.forEach((word, column) => {
    if (column % every !== 0) return;
    pen.save();
    pen.translate(map.left + (column + 0.5) * map.cell, map.top - 5);
    if (map.isWords) pen.rotate(-Math.PI / 2);
    pen.textAlign = map.isWords ? "left" : "center";
    pen.fillText(word, 0, map.isWords ? 0 : -3, map.isWords ? map.top - 6 : undefined);
    pen.restore();
  });
}

function cellAt(map, event) {
  const place = map.canvas.getBoundingClientRect();
  return [Math.floor((event.clientY - place.top - map.top) / map.height),
          Math.floor((event.clientX - place.left - map.left) / map.cell)];
}

function extent(map) {
  let largest = 0;
  map.values.forEach((line, row) => line.forEach((value, column) => {
    if (!map.hide(row, column)) largest = Math.max(largest, Math.abs(value || 0));
  }));
  return largest || 1;
}

function palette() {
  const style = getComputedStyle(document.documentElement);
  const read = (name) => style.getPropertyValue(name).trim();
  const numbers = (name) => read(name).split(" ").map(Number);
  return { zero: numbers("--cell-zero"), plus: numbers("--cell-plus"), minus: numbers("--cell-minus"),
           hidden: read("--cell-hidden"), text: read("--text"), muted: read("--muted") };
}

function mix(colours, value, largest) {
  if (value === null) return colours.hidden;
  const share = Math.min(1, Math.abs(value) / largest) ** 0.7, end = value < 0 ? colours.minus : colours.plus;
  return `rgb(${colours.zero.map((zero, i) => Math.round(zero + share * (end[i] - zero))).join(" ")})`;
}

// ---- An array of a recording, as the server sends it ----

// The words of an axis of an array: tokens, or numbers.
export function axisWords(axis, n, shown, tokens, texts = {}) {
  const places = shown || [...Array(n).keys()];
  if (axis === "n_vocab") return places.map((i) => texts[i] || `id ${i}`);
  if (["n_seq", "n_query", "n_key"].includes(axis)) return places.map((i) => tokens[i] ?? "new");
  return places.map(String);
}

// The rows of an array as a table: of one with heads, those of one head.
export function table(array, head) {
  const values = array.shape.length === 3 ? array.values[head] : array.values;
  return array.shape.length === 1 ? [values] : values;
}

export function arrayMap(title, array, tokens, head, texts = {}) {
  const n = array.shape.length, axes = array.axes;
  const words = (place) => axisWords(axes[place], array.shape[place], array.shown[place], tokens, texts);
  return heatmap({
    title, values: table(array, head), rows: n === 1 ? [""] : words(n - 2), columns: words(n - 1),
    rowName: n === 1 ? "" : spoken(axes[n - 2]), columnName: spoken(axes[n - 1]),
  });
}

function spoken(axis) {
  return { n_seq: "token", n_query: "query", n_key: "key", n_vocab: "candidate" }[axis] || axis;
}
