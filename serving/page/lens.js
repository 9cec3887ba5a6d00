// What x stands for after each block (the logit lens), how long its vectors are, and the loss of each token.

import { bar, candidateTable, element, format, heading, percent, token } from "./dom.js";
import { heatmap } from "./heatmap.js";

const chosen = { position: null };

function stageNames(data) {
  return data.stages.map((_, i) => (i === 0 ? "embed" : `block ${i - 1}`));
}

export const lens = {
  draw(state) {
    const { data } = state, n = data.tokens.length, names = stageNames(data);
    if (chosen.position === null || chosen.position >= n) chosen.position = n - 1;
    const tables = element("div", { class: "stages" });
    const show = (position) => {
      chosen.position = position;
      const final = data.stages.at(-1)[position][0].id;
      tables.replaceChildren(...names.map((name, i) =>
        candidateTable(`after ${name}`, data.stages[i][position].slice(0, 3), final)));
      for (const made of grid.querySelectorAll("button")) {
        made.setAttribute("aria-pressed", String(Number(made.value) === position));
      }
    };
    const grid = lensGrid(data, names, show);
    const map = heatmap({ title: "Length of each vector", values: data.norms, rows: names, columns: data.tokens,
                          rowName: "stage", columnName: "token" });
    show(chosen.position);
    return element("div", {},
      heading("The next token, if the model stopped after each block",
        "Between the blocks there is only x, a vector for each token. Here the last two steps of the model, ln_f and " +
        "unembed, are applied to x after each block, as if no more blocks came (the logit lens). The last row is the " +
        "output of the model."),
      element("h3", {}, "The likeliest next token at each position"),
      element("p", { class: "muted small" }, "Choose a column. In the first row x is only the token and its position, so " +
        "the likeliest token is often the token itself."),
      element("div", { class: "scroll", tabindex: "0", role: "group", "aria-label": "Likeliest tokens by block and position" }, grid),
      element("h3", {}, "The candidates at the chosen position"), tables,
      element("h3", {}, "How long the vectors are"),
      element("p", {}, "Each block adds to x, so its vectors grow. Each layer norm gives the next layer a copy with " +
        "mean 0 and variance 1."), map);
  },
};

function lensGrid(data, names, show) {
  const head = element("tr", {}, element("th", { scope: "col" }, "after"), data.tokens.map((text, i) =>
    element("th", { scope: "col" }, element("button", { type: "button", value: i, "aria-pressed": "false", onclick: () => show(i) }, text))));
  const rows = names.map((name, stage) => element("tr", {}, element("th", { scope: "row" }, name),
    data.stages[stage].map((candidates, position) => {
      const { token: text, probability } = candidates[0];
      const made = element("td", { onclick: () => show(position), title: percent(probability) }, text);
      made.style.setProperty("--share", probability ?? 0);
      return made;
    })));
  return element("table", { class: "grid" }, element("thead", {}, head), element("tbody", {}, rows));
}

export const loss = {
  draw(state) {
    const { data } = state, most = Math.max(0.1, ...data.losses.map((found) => found.loss ?? 0));
    const rows = data.losses.map((found, i) => element("tr", {},
      element("td", {}, token(data.tokens[i + 1], i + 1)),
      element("td", { class: "number" }, percent(found.probability)),
      element("td", { class: "number" }, String(found.rank)),
      element("td", { class: "number" }, format(found.loss)),
      element("td", { class: "wide" }, bar((found.loss ?? most) / most)),
      element("td", { class: "preferred" }, found.candidates.flatMap((other, j) => [j ? ", " : "", other.token, ` ${percent(other.probability)}`]))));
    const mean = data.losses.reduce((sum, found) => sum + found.loss, 0) / data.losses.length;
    const columns = ["token", "probability", "rank", "loss", "", "the likeliest there"];
    return element("div", {},
      heading("The loss of each token",
        "The model predicts every token of the prompt from the tokens before it. The loss of a token is minus the natural " +
        "logarithm of the probability that the model gave to it: 0 if it was certain, and the larger the less likely it " +
        "was. Training makes the mean of these numbers small."),
      data.losses.length ? element("p", {}, "Mean loss ", element("b", { class: "number" }, format(mean)), " nats, which is a perplexity of ",
        element("b", { class: "number" }, format(Math.exp(mean))), ": as unsure as a choice among so many tokens of the same probability.") :
        element("p", { class: "note" }, "A prompt of one token has no loss: nothing predicts the first token."),
      element("div", { class: "scroll", tabindex: "0", role: "group", "aria-label": "Losses" },
        element("table", { class: "losses" }, element("thead", {}, element("tr", {}, columns.map((name) => element(name ? "th" : "td", name ? { scope: "col" } : {}, name)))),
          element("tbody", {}, element("tr", {}, element("td", {}, token(data.tokens[0], 0)),
            element("td", { colspan: "5", class: "muted" }, "nothing predicts the first token")), rows))));
  },
};
