// The page as a whole: which view is shown, the prompt that all views share, and what the server said of it.

import { get, Problem, setKey } from "./api.js";
import { $, element } from "./dom.js";
import { attention } from "./attention.js";
import { broken } from "./broken.js";
import { cache } from "./cache.js";
import { cost } from "./cost.js";
import { lens, loss } from "./lens.js";
import { playground } from "./playground.js";
import { sampling } from "./sampling.js";
import { tokens } from "./tokens.js";
import { walkthrough } from "./walkthrough.js";

const EXAMPLE = "Once upon a time, there was a little girl named Lily. She";
const VIEWS = { playground, walkthrough, tokens, attention, lens, loss, sampling, cache, cost, broken };
const WITH_BLOCK = ["walkthrough", "attention", "cache"];

const state = { about: null, data: null, key: "", block: 0, head: 0, name: "playground", running: null, loading: null, waiting: 0, show, busy };

function currentName() {
  const name = location.hash.slice(1);
  return name in VIEWS ? name : "playground";
}

function say(text) {
  $("status").textContent = text;
}

function complain(error) {
  if (error.name === "AbortError") return;
  if (!(error instanceof Problem)) console.error(error);
  $("problem").textContent = error.message;
  $("problem").hidden = false;
  if (error.status === 401) $("key").hidden = false;
}

// Marks the view that was chosen, before its numbers are there.
function mark() {
  const name = state.name, links = document.querySelector("nav");
  for (const link of links.querySelectorAll("a")) {
    if (link.hash === `#${name}`) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  const current = links.querySelector("[aria-current]");
  links.scrollLeft = current.offsetLeft - links.offsetLeft - (links.clientWidth - current.clientWidth) / 2;
  document.title = `${current.textContent} · GPT-2, line by line`;
  $("run").textContent = name === "playground" ? "Generate" : "Run";
  $("stop").hidden = name !== "playground";
  $("where").hidden = !WITH_BLOCK.includes(name) || !state.data;
}

function draw() {
  const { name, about } = state, main = $("main");
  mark();
  if (name === "playground") main.replaceChildren(VIEWS.playground.draw(state));
  else if (about && !about.is_recorded) main.replaceChildren(note(`${about.reason}.`));
  else if (state.data) {
    main.replaceChildren(VIEWS[name].draw(state));
    VIEWS[name].drawn?.(state);
  } else main.replaceChildren(note("Press Run to send the prompt through the model."));
}

function note(text) {
  return element("p", { class: "note" }, text);
}

// The walkthrough of the prompt, unless it is there already.
async function load() {
  const wanted = JSON.stringify([$("prompt").value, state.block]);
  if (wanted === state.key || !state.about?.is_recorded) return;
  say("computing …");
  const prompt = $("prompt").value, { max_tokens: most } = state.about;
  if (prompt.length > 128 * most) throw new Problem(`The walkthrough shows at most ${most} tokens: shorten the prompt.`);
  state.loading?.abort();
  state.loading = new AbortController();
  const data = await get("/walkthrough", { prompt, block: state.block }, state.loading.signal);
  Object.assign(state, { data, key: wanted });
  options($("block"), data.sizes.n_layer, state.block);
  options($("head"), data.sizes.n_head, state.head);
  say("");
}

function options(select, n, chosen) {
  select.replaceChildren(...[...Array(n).keys()].map((i) => element("option", { value: i }, String(i))));
  select.value = chosen;
}

async function show(settings = {}) {
  Object.assign(state, settings);
  $("problem").hidden = true;
  busy(1);
  mark();
  try {
    if (state.name !== "playground") await load();
    draw();
  } catch (error) {
    say("");
    complain(error);
    if (error.name !== "AbortError") $("main").replaceChildren(note("There are no numbers to show: see the message above."));
  }
  busy(-1);
}

// How many things the page is waiting for.
function busy(change) {
  state.waiting += change;
  $("main").setAttribute("aria-busy", String(state.waiting > 0));
}

async function run(event) {
  event.preventDefault();
  $("problem").hidden = true;
  if (!state.about && !(await meet())) return;
  if (state.name !== "playground") return show({ key: "" });
  $("run").disabled = true;
  $("stop").disabled = false;
  busy(1);
  try {
    state.running = new AbortController();
    await playground.run(state, $("prompt").value, state.running.signal);
  } catch (error) {
    complain(error);
  }
  $("run").disabled = false;
  $("stop").disabled = true;
  busy(-1);
}

// Asks which model answers.
async function meet() {
  try {
    state.about = await get("/about");
  } catch (error) {
    complain(error);
    return false;
  }
  const { names: [name], n_tokens } = state.about;
  $("model").textContent = `Model ${name}: a prompt and its continuation have at most ${n_tokens} tokens.`;
  await show({ name: currentName() });
  return true;
}

function start() {
  $("prompt").value = EXAMPLE;
  $("ask").addEventListener("submit", run);
  $("prompt").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) $("ask").requestSubmit();
  });
  $("stop").addEventListener("click", () => state.running?.abort());
  $("block").addEventListener("change", () => show({ block: Number($("block").value) }));
  $("head").addEventListener("change", () => show({ head: Number($("head").value) }));
  $("key-value").addEventListener("input", () => setKey($("key-value").value));
  window.addEventListener("hashchange", () => {
    if (location.hash !== "#main") show({ name: currentName() });
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  state.name = currentName();
  draw();
  meet().then(() => document.body.setAttribute("data-ready", ""));
}

start();
