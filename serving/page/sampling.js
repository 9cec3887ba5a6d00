// How the next token is chosen: temperature, top-k, top-p, min-p and the coin, on the logits of the last position. The
// same steps in the same order as inference/sampling.py.

import { bar, element, heading, percent, slider, token } from "./dom.js";

const settings = { temperature: 1, top_k: 0, top_p: 1, min_p: 0, coin: 0.5 };

export function softmax(logits) {
  const most = logits.reduce((a, b) => Math.max(a, b), -Infinity);
  const exps = logits.map((logit) => Math.exp(logit - most)), sum = exps.reduce((a, b) => a + b, 0);
  return exps.map((value) => value / sum);
}

// order: the ids, the likeliest first. Returns the probability of each id after the four steps: 0 for what is out.
export function choose(logits, order, { temperature, top_k, top_p, min_p }) {
  let kept = temperature === 0 ? order.slice(0, 1) : order.slice(0, top_k || order.length);
  const share = () => softmax(kept.map((id) => logits[id] / (temperature || 1)));
  let probabilities = share();
  if (top_p < 1) {
    let before = 0, n = 0;
    while (n < kept.length && before < top_p) before += probabilities[n++];
    kept = kept.slice(0, Math.max(1, n));
    probabilities = share();
  }
  if (min_p > 0) {
    kept = kept.slice(0, probabilities.filter((p) => p >= min_p * probabilities[0]).length);
    probabilities = share();
  }
  const found = new Float64Array(logits.length);
  kept.forEach((id, i) => { found[id] = probabilities[i]; });
  return { probabilities: found, n: kept.length };
}

// The first id at which the sum of the probabilities exceeds the coin.
export function toss(probabilities, coin) {
  let end = 0, chosen = 0;
  for (const [id, probability] of probabilities.entries()) {
    if (probability === 0) continue;
    end += probability;
    chosen = id;
    if (end > coin) break;
  }
  return chosen;
}

function draw(state) {
  const { logits, texts } = state.data.last;
  const order = [...logits.keys()].sort((a, b) => logits[b] - logits[a] || a - b), whole = softmax(logits);
  const name = (id) => texts[id] || `id ${id}`;
  const table = element("tbody"), strip = element("div", { class: "strip", "aria-hidden": "true" });
  const result = element("p", { class: "result", "aria-live": "polite" });
  const rows = order.slice(0, 12).map((id) => {
    const cells = { now: element("td", { class: "number" }), bar: element("td", { class: "wide" }) };
    table.append(element("tr", {}, element("td", {}, token(name(id))), element("td", { class: "number" }, percent(whole[id])), cells.bar, cells.now));
    return { id, cells };
  });
  const update = () => {
    const { probabilities, n } = choose(logits, order, settings), chosen = toss(probabilities, settings.coin);
    for (const { id, cells } of rows) {
      cells.now.textContent = probabilities[id] ? percent(probabilities[id]) : "out";
      cells.bar.replaceChildren(bar(probabilities[id], id === chosen ? "strong" : ""));
    }
    drawStrip(strip, probabilities, chosen, name);
    result.replaceChildren("The coin ", element("b", { class: "number" }, settings.coin.toFixed(3)), " chooses ", token(name(chosen)),
      ` with probability ${percent(probabilities[chosen])}. ${n === 1 ? "1 token is left." : `${n} tokens are left.`}`);
  };
  const control = (label, key, min, max, step) =>
    slider({ label, min, max, step, value: settings[key], oninput: (value) => { settings[key] = value; update(); } });
  update();
  return element("div", {},
    heading(`Sampling the token after ${state.data.tokens.at(-1)}`,
      "The model gives each token a probability; these steps decide which one is taken. They are applied in this order. " +
      "Each slider changes nothing at its neutral value: temperature 1, top-k 0, top-p 1, min-p 0."),
    element("div", { class: "sliders" },
      control("temperature", "temperature", 0, 3, 0.05), control("top-k", "top_k", 0, 50, 1),
      control("top-p", "top_p", 0.05, 1, 0.01), control("min-p", "min_p", 0, 1, 0.01)),
    element("h3", {}, "The coin"),
    element("p", {}, "The line from 0 to 1 is divided into a piece for each token that is left, as long as its " +
      "probability, in the order of ids. The coin is a random number; drag it: the token whose piece it hits is next."),
    element("div", { class: "coin" }, strip, control("coin", "coin", 0, 0.999, 0.001)), result,
    element("div", { class: "scroll" }, element("table", { class: "candidates" }, element("caption", {}, "The twelve likeliest"),
      element("thead", {}, element("tr", {}, ["token", "by the model", "", "after the sliders"].map((text) => element(text ? "th" : "td", text ? { scope: "col" } : {}, text)))), table)));
}

// The line from 0 to 1. A piece that is too narrow to be seen is left out.
function drawStrip(strip, probabilities, chosen, name) {
  const pieces = [];
  probabilities.forEach((probability, id) => {
    if (probability <= 0.002 && id !== chosen) return;
    const part = element("span", { class: `part ${id === chosen ? "chosen" : `tint${pieces.length % 4}`}` }, probability > 0.06 ? name(id) : "");
    part.style.flexGrow = probability;
    pieces.push(part);
  });
  strip.replaceChildren(...pieces);
}

export const sampling = { draw };
