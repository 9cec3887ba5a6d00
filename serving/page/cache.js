// The cache of keys and values: what a new token adds, and what stays.

import { element, heading, large, slider, token } from "./dom.js";
import { attentionOf } from "./attention.js";
import { heatmap } from "./heatmap.js";

const chosen = { position: null };

function draw(state) {
  const { data, head } = state, { k, v } = attentionOf(data), n = data.tokens.length;
  const { n_layer, n_embd, n_ctx } = data.sizes, width = data.dtype === "float64" ? 8 : 4;
  if (chosen.position === null || chosen.position >= n) chosen.position = n - 1;
  const maps = element("div", { class: "two even" }), text = element("p", { "aria-live": "polite" });
  const keys = k.values[head], values = v.values[head], numbers = (k.shown[2] || [...keys[0].keys()]).map(String);
  const show = (position) => {
    chosen.position = position;
    const columns = data.tokens.map((word, i) => (i === position ? `${word} new` : i < position ? word : "free"));
    maps.replaceChildren(
      element("div", {}, element("h3", {}, "Keys, a column for each token"), heatmap({
        title: "Keys", values: numbers.map((_, row) => keys.map((key) => key[row])), rows: numbers, columns,
        rowName: "number", columnName: "token", hide: (row, column) => column > position })),
      element("div", {}, element("h3", {}, "Values, a row for each token"), heatmap({
        title: "Values", values, rows: columns, columns: numbers, rowName: "token", columnName: "number",
        hide: (row) => row > position })));
    text.replaceChildren("The token ", token(data.tokens[position]), ` at position ${position} adds one column and one row in each ` +
      `head of each block: 2 · ${n_layer} blocks · ${n_embd} numbers = ${large(2 * n_layer * n_embd * width)}B. ` +
      (position ? `The ${position} before it ${position === 1 ? "stays as it is and is" : "stay as they are and are"} not computed again.` : "It is the first."));
  };
  show(chosen.position);
  const without = (n * (n + 1)) / 2;
  return element("div", {},
    heading(`The cache of block ${data.block}, head ${head}`,
      "To choose the next token, only the new token has to go through the model. It needs the earlier tokens in one " +
      "place alone: attention reads their keys and values. These never change, because the mask hides later tokens " +
      "from earlier ones. So inference/kv_cache.py stores them: the cache."),
    slider({ label: "newest token", min: 0, max: n - 1, step: 1, value: chosen.position, show: (i) => data.tokens[i], oninput: show }),
    text, maps,
    element("p", {}, `Token by token without a cache, 1 + 2 + … + ${n} = ${without} rows go through the model for these ${n} tokens; ` +
      `with a cache ${n}. The cache of all ${n_ctx} positions takes ${large(2 * n_layer * n_embd * width * n_ctx)}B.`));
}

export const cache = { draw };
