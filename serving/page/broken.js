// Switches that change one thing in the model and run it again, beside the right one.

import { get, Problem } from "./api.js";
import { $, candidateTable, element, format, heading } from "./dom.js";

const chosen = { name: "mask", block: 0, head: 0 };

function draw(state) {
  const { changes } = state.about, { n_layer, n_head } = state.data.sizes;
  const results = element("div", { class: "results", "aria-live": "polite" });
  const radios = changes.map(({ name, label }) => element("label", { class: "choice" },
    element("input", { type: "radio", name: "change", value: name, checked: name === chosen.name, onchange: () => { chosen.name = name; update(); } }),
    ` ${label}`));
  const number = (name, n) => {
    const select = element("select", { onchange: () => { chosen[name] = Number(select.value); update(); } },
      [...Array(n).keys()].map((i) => element("option", { value: i }, String(i))));
    select.value = chosen[name] = Math.min(chosen[name], n - 1);
    return element("label", {}, `${name === "block" ? "in block" : "head"} `, select);
  };
  const where = element("span", { class: "row" }, number("block", n_layer), number("head", n_head));
  const update = async () => {
    where.hidden = chosen.name !== "head";
    results.classList.add("waiting");
    state.busy(1);
    try {
      const wanted = { prompt: $("prompt").value, change: chosen.name, block: chosen.block, head: chosen.head };
      const found = await get("/broken", wanted);
      results.replaceChildren(...resultParts(changes.find(({ name }) => name === wanted.change), found));
    } catch (error) {
      if (!(error instanceof Problem)) throw error;
      results.replaceChildren(element("p", { class: "note", role: "alert" }, error.message));
    }
    results.classList.remove("waiting");
    state.busy(-1);
  };
  update();
  return element("div", {},
    heading("Break it", "Change one thing in a copy of gpt2.py and run it on the same prompt and the same weights. The copy is " +
      "only used here: the model that answers stays as it is."),
    element("fieldset", { class: "choices" }, element("legend", {}, "What to change"), radios, where), results);
}

function resultParts(change, { right, changed }) {
  return [
    change.lines.length ? element("pre", { class: "difference" }, change.lines.flatMap(([line, before, after]) => [
      element("span", { class: "minus" }, `${line} - ${before}\n`), element("span", { class: "plus" }, `${line} + ${after}\n`)])) : null,
    element("div", { class: "two even" }, side("As it is", right), side("Changed", changed)),
    element("p", { class: "shows" }, change.shows),
  ].filter(Boolean);
}

function side(title, found) {
  return element("section", { class: "side" },
    element("h3", {}, title),
    element("p", {}, "mean loss of the prompt ", element("b", { class: "number" }, found.loss === null ? "none" : format(found.loss))),
    candidateTable("The next token", found.candidates),
    element("p", { class: "continued" }, "It goes on: ", element("q", {}, found.text)));
}

export const broken = { draw };
