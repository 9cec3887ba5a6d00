// How the text became tokens: pieces, bytes, and the merges of each piece step by step.

import { element, heading, slider, token } from "./dom.js";

const chosen = { piece: 1 };

function draw(state) {
  const { data } = state;
  chosen.piece = Math.min(chosen.piece, Math.max(0, data.pieces.length - 1));
  const detail = element("div", { class: "detail" });
  const buttons = data.pieces.map((piece, i) => element("button", {
    type: "button", class: "piece", onclick: () => show(i), "aria-pressed": "false",
  }, token(piece.text, i)));
  const show = (i) => {
    chosen.piece = i;
    buttons.forEach((made, place) => made.setAttribute("aria-pressed", String(place === i)));
    if (data.pieces.length) detail.replaceChildren(...pieceParts(data.pieces[i]));
  };
  show(chosen.piece);
  const ids = data.ids.map((id, i) => element("span", { class: "id-token" }, token(data.tokens[i], i), element("span", { class: "muted number" }, String(id))));
  return element("div", {},
    heading("From text to token ids",
      "The model computes with numbers. The text is cut into pieces (words, numbers, signs, each with the space before " +
      "it). Each piece is written as bytes, and neighbours are merged, the pair that was most frequent in training first, " +
      "until no pair is in the list of merges. What is left are the tokens. ␣ is a space, ⏎ a new line."),
    element("h3", {}, `${data.ids.length} tokens and their ids`), element("div", { class: "ids" }, ids),
    element("h3", {}, "One piece, merge by merge"),
    data.pieces.length ? element("div", { class: "ids" }, buttons) : element("p", { class: "note" }, "The prompt is empty, so the model starts from the token that begins a text."),
    detail);
}

function pieceParts(piece) {
  const symbols = element("div");
  const last = piece.steps.length - 1;
  const text = element("p", { "aria-live": "polite" });
  const show = (step) => {
    symbols.replaceChildren(...piece.steps.slice(0, step + 1).map((found) =>
      element("div", { class: "symbols" }, found.map((symbol, i) => element("span", { class: `token symbol tint${i % 4}` }, symbol)))));
    text.textContent = step === 0 ? `${piece.bytes.length} bytes, one symbol each`
      : `after merge ${step} of ${last}: ${difference(piece.steps[step - 1], piece.steps[step])}`;
  };
  show(last);
  return [
    element("p", {}, "Its bytes in UTF-8: ", element("code", {}, piece.bytes.join(" "))),
    last ? slider({ label: "merges made", min: 0, max: last, step: 1, value: last, show: String, oninput: show }) : null,
    text, symbols,
    element("p", {}, `${piece.ids.length === 1 ? "Its id" : "Their ids"}: `, element("code", {}, piece.ids.join(" "))),
    element("p", { class: "muted small" }, "Ġ is how the vocabulary writes a space: each byte has a printable character."),
  ].filter(Boolean);
}

function difference(before, after) {
  const i = after.findIndex((symbol, place) => symbol !== before[place]);
  return `${before[i]} and ${before[i + 1]} became ${after[i]}`;
}

export const tokens = { draw };
