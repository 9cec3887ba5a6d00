// The attention of one head: as arcs from a query to its keys, and as a triangle with query, key, score and weight.

import { element, format, heading, percent, svg, token } from "./dom.js";
import { heatmap } from "./heatmap.js";

const chosen = { query: null };

// What the function attention has recorded: {q, k, scores, weights}, each [n_head, ...].
export function attentionOf(data) {
  const found = {};
  for (const { call, values } of data.records) {
    if (data.calls[call].function !== "attention") continue;
    for (const [name, value] of Object.entries(values)) if ("array" in value) found[name] = data.arrays[value.array];
  }
  return found;
}

function draw(state) {
  const { data, head } = state, found = attentionOf(data), n = data.tokens.length;
  if (chosen.query === null || chosen.query >= n) chosen.query = n - 1;
  const weights = found.weights.values[head], scores = found.scores.values[head];
  const arcs = element("div", { class: "arcs" }), pair = element("div", { class: "pair" });
  const show = (query, key) => {
    chosen.query = query;
    arcs.replaceChildren(arcsOf(data.tokens, weights[query], query, (i) => show(i, null)));
    pair.replaceChildren(...pairParts(data, found, head, query, key ?? best(weights[query])));
  };
  const triangle = heatmap({
    title: "The weights of this head", values: weights, rows: data.tokens, columns: data.tokens, rowName: "query",
    columnName: "key", hide: (row, column) => column > row, onMove: (row, column) => show(row, Math.min(row, column)),
  });
  show(chosen.query, null);
  return element("div", {},
    heading(`Attention of block ${data.block}, head ${head}`,
      "Each token has a query, and it and each earlier token have a key. The score of a query and a key is their dot " +
      "product, divided by √d_head: the more similar they are, the higher. Softmax turns the scores of a query into " +
      "weights with sum 1. The result is the mean of the values with these weights."),
    element("h3", {}, "From one query to its keys"),
    element("p", { class: "muted small" }, "Choose a token. The wider an arc, the larger the weight."),
    arcs,
    element("div", { class: "two even" },
      element("div", {}, element("h3", {}, "All weights"),
        element("p", { class: "muted small" }, "Each row has sum 1. The mask hides the later tokens, so it is a triangle."), triangle),
      pair),
    element("p", { class: "note" }, "In many heads of trained models the first token has most of the weight. The weights " +
      "of a query must have sum 1, so where no token is useful they go to one whose value changes little."));
}

function best(row) {
  return row.indexOf(Math.max(...row));
}

function arcsOf(tokens, weights, query, onchoose) {
  const width = 66, height = 120, total = tokens.length * width;
  const lines = weights.slice(0, query + 1).map((weight, key) => {
    const from = (query + 0.5) * width, to = (key + 0.5) * width, rise = Math.min(height, 24 + Math.abs(from - to) * 0.35);
    const shape = key === query ? `M ${from - 9} ${height} c -8 -34 26 -34 18 0` : `M ${from} ${height} C ${from} ${height - rise} ${to} ${height - rise} ${to} ${height}`;
    return svg("path", { d: shape, class: "arc", "stroke-width": Math.max(0.8, 14 * weight), opacity: 0.45 + 0.55 * weight });
  });
  const picture = svg("svg", { viewBox: `0 0 ${total} ${height}`, width: total, height, "aria-hidden": "true" }, lines);
  const names = tokens.map((text, i) => element("button", {
    type: "button", class: `arc-token ${i === query ? "chosen" : ""}`, onclick: () => onchoose(i), "aria-pressed": String(i === query),
  }, element("span", {}, text), element("span", { class: "muted number" }, i <= query ? percent(weights[i]) : " ")));
  const row = element("div", { class: "arc-row" }, names);
  row.style.width = `${total}px`;
  return element("div", { class: "scroll", tabindex: "0", role: "group", "aria-label": "Weights of the chosen query" }, picture, row);
}

function pairParts(data, found, head, query, key) {
  const q = found.q.values[head][query], k = found.k.values[head][key], score = found.scores.values[head][query][key];
  const columns = (found.q.shown[2] || [...q.keys()]).map(String);
  return [
    element("h3", {}, "One query and one key"),
    element("p", { class: "pair-words" }, "query ", token(data.tokens[query], 0), " key ", token(data.tokens[key], 1)),
    element("p", {}, "score ", element("b", { class: "number" }, format(score)), " (their dot product, divided by ",
      `√d_head = ${format(Math.sqrt(data.sizes.d_head))}), weight `,
      element("b", { class: "number" }, percent(found.weights.values[head][query][key]))),
    heatmap({ title: "Query and key", values: [q, k], rows: ["query", "key"], columns, rowName: "vector", columnName: "number" }),
    element("p", { class: "muted small" }, "Where both are strong with the same colour they add to the score; with " +
      "different colours they take from it."),
  ];
}

// Scrolls the arcs so that the chosen token can be seen.
function drawn() {
  const scroll = document.querySelector(".arcs .scroll"), button = scroll.querySelector(".chosen");
  scroll.scrollLeft = button.offsetLeft - scroll.offsetLeft - scroll.clientWidth + button.clientWidth + 20;
}

export const attention = { draw, drawn };
