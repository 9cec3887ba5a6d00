// Text from the model, as it comes: all parameters, the tokens as coloured pieces, the candidates of each on hover.

import { post, readJson, readStream } from "./api.js";
import { $, bar, element, heading, percent, token as piece } from "./dom.js";
import { asCurl, asPython, controls, initial, requestOf } from "./request.js";

const settings = initial(), turns = [];
let texts = [], useChat = true, parts = null;

function draw(state) {
  const curl = element("pre", {}, element("code")), code = element("pre", {}, element("code"));
  const output = element("div", { class: "texts" }), detail = element("div", { class: "detail", id: "detail", "aria-live": "polite" });
  const conversation = element("div", { class: "turns" });
  parts = { output, detail, conversation, curl, code };
  const update = () => {
    const made = requestOf(state.about || { names: [""] }, settings, $("prompt").value, messagesOf(state));
    curl.firstChild.textContent = asCurl(made);
    code.firstChild.textContent = asPython(made);
  };
  const all = element("div", {},
    element("h2", { class: "hidden" }, "Playground"),
    state.about?.is_chat ? chatSwitch(state, update) : null,
    conversation, output, detail,
    element("h3", {}, "Parameters"), controls(settings, state.about?.names || [], update),
    element("details", { ontoggle: update }, element("summary", {}, "The same request as curl and as Python"),
      copyable("curl", curl), copyable("Python", code)));
  drawTurns();
  drawTexts();
  update();
  return all;
}

function chatSwitch(state, update) {
  const input = element("input", { type: "checkbox", checked: useChat, onchange: () => { useChat = input.checked; update(); } });
  const clear = element("button", { type: "button", onclick: () => { turns.length = 0; texts = []; drawTurns(); drawTexts(); update(); } }, "New conversation");
  return element("div", { class: "row" }, element("label", {}, input, " as a conversation"), clear);
}

function messagesOf(state) {
  return state.about?.is_chat && useChat ? [...turns, { role: "user", content: $("prompt").value }] : null;
}

function copyable(name, pre) {
  const button = element("button", { type: "button", onclick: async () => {
    const copied = await navigator.clipboard?.writeText(pre.textContent).then(() => true, () => false);
    button.textContent = copied ? "Copied" : "Select the text and copy it";
    setTimeout(() => { button.textContent = "Copy"; }, 1500);
  } }, "Copy");
  pre.tabIndex = 0;
  return element("div", { class: "copyable" }, element("div", { class: "row" }, element("b", {}, name), button), pre);
}

// The turns before the one whose text is shown below.
function drawTurns() {
  parts.conversation.replaceChildren(...turns.slice(0, texts.length ? -1 : undefined).map(({ role, content }) =>
    element("p", { class: `turn ${role}` }, element("b", {}, `${role}: `), content)));
}

// ---- A run ----

async function run(state, prompt, signal) {
  const messages = messagesOf(state), request = requestOf(state.about, settings, prompt, messages);
  texts = [...Array(request.body.n || 1)].map(() => ({ pieces: [], text: "", reason: "" }));
  drawTexts();
  const answer = await post(request.path, request.body, signal);
  try {
    if (request.body.stream) await readStream(answer, (chunk) => chunk.choices.forEach(add));
    else (await readJson(answer)).choices.forEach(addWhole);
  } catch (error) {
    if (error.name !== "AbortError") throw error;
    texts.forEach((made) => { made.reason ||= "stopped by you"; });
  }
  texts.forEach((_, i) => drawEnd(i));
  if (messages) {
    turns.push(messages.at(-1), { role: "assistant", content: texts[0].text });
    drawTurns();
  }
}

function addWhole({ index, text, message, finish_reason: reason }) {
  add({ index, text: text ?? message.content, finish_reason: reason });
}

// A choice of a chunk: new text, and its tokens if they were asked for.
function add({ index, text, delta, logprobs, finish_reason: reason }) {
  const made = texts[index], n = made.pieces.length;
  let rest = text ?? delta?.content ?? "";
  made.text += rest;
  for (const found of tokensOf(logprobs)) {
    const shown = rest.startsWith(found.token) ? found.token : "";
    rest = rest.slice(shown.length);
    made.pieces.push({ ...found, text: shown });
  }
  if (rest && made.pieces.length) made.pieces.at(-1).text += rest;  // a character that its last token has completed
  else if (rest) made.pieces.push({ text: rest, candidates: [] });
  if (reason) made.reason = { stop: "the model ended the text, or a stop text came", length: "all tokens are used" }[reason] || reason;
  drawPieces(index, rest ? Math.max(0, n - 1) : n);
}

// {token, logprob, candidates} of the two forms in which the API gives log-probabilities.
function tokensOf(logprobs) {
  if (!logprobs) return [];
  if (logprobs.content) {
    return logprobs.content.map((found) => ({ token: found.token, logprob: found.logprob,
      candidates: found.top_logprobs.map((other) => [other.token, other.logprob]) }));
  }
  return logprobs.tokens.map((text, i) => ({ token: text, logprob: logprobs.token_logprobs[i],
    candidates: Object.entries(logprobs.top_logprobs?.[i] || {}).sort((a, b) => b[1] - a[1]) }));
}

// ---- The texts ----

function drawTexts() {
  parts.output.replaceChildren(...texts.map((_, i) => {
    const body = element("div", { class: "text", tabindex: "0", role: "group", "aria-label": `Text ${i + 1}. The arrow keys go from token to token.` });
    body.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: 1, ArrowUp: -1 }[event.key];
      if (!step) return;
      event.preventDefault();
      select(i, Math.min(texts[i].pieces.length - 1, Math.max(0, (body.chosen ?? -1) + step)));
    });
    return element("section", { class: "made" }, texts.length > 1 ? element("h3", {}, `Text ${i + 1}`) : null, body, element("p", { class: "muted small end" }, " "));
  }));
  parts.detail.replaceChildren(element("p", { class: "muted" }, texts.length
    ? "Point at a token, or use the arrow keys in the text, to see what else could have stood there."
    : "Press Generate, and the text appears here, token by token."));
  texts.forEach((_, i) => { drawPieces(i, 0); drawEnd(i); });
}

function drawPieces(i, from) {
  const body = parts.output.children[i]?.querySelector(".text");
  if (!body) return;
  while (body.children.length > from) body.lastChild.remove();
  texts[i].pieces.slice(from).forEach((found, offset) => {
    const place = from + offset, made = piece(found.text, place);
    if (found.text === "" && found.token) made.classList.add("part-of-character");
    made.addEventListener("pointerenter", () => select(i, place));
    made.addEventListener("click", () => select(i, place));
    body.append(made);
  });
}

function drawEnd(i) {
  const end = parts.output.children[i]?.querySelector(".end");
  if (end && texts[i].reason) end.textContent = `Ended: ${texts[i].reason}.`;
}

function select(i, place) {
  const body = parts.output.children[i].querySelector(".text"), found = texts[i].pieces[place];
  if (!found) return;
  body.querySelector(".chosen")?.classList.remove("chosen");
  body.children[place].classList.add("chosen");
  body.chosen = place;
  parts.detail.replaceChildren(...details(found, place));
}

function details(found, place) {
  if (!found.token) return [element("p", { class: "muted" }, "A beam search does not say what else could have stood there.")];
  const rank = found.candidates.filter(([, logprob]) => logprob > found.logprob).length + 1;
  const rows = found.candidates.slice(0, 6).map(([text, logprob]) => element("tr", { class: text === found.token ? "marked" : "" },
    element("td", {}, piece(visible(text))), element("td", { class: "wide" }, bar(Math.exp(logprob))), element("td", { class: "number" }, percent(Math.exp(logprob)))));
  const ranked = rank <= 5 ? `rank ${rank}` : "not among the five likeliest";
  return [element("p", {}, `Token ${place + 1}, `, piece(visible(found.token)), ` had probability ${percent(Math.exp(found.logprob))}, ${ranked}.`),
    element("table", { class: "candidates" }, element("caption", { class: "hidden" }, "Candidates"), element("tbody", {}, rows))];
}

// White space that can be seen.
function visible(text) {
  return text.replaceAll(" ", "␣").replaceAll("\n", "⏎").replaceAll("\t", "⇥");
}

export const playground = { draw, run };
