// The request to the API: its parameters as controls, and the same request as curl and as Python.

import { element } from "./dom.js";

// name: [label, neutral value, kind of input, its range, in which modes it is used, a hint]
const NUMBER = (min, max, step) => ({ type: "number", min, max, step });
export const FIELDS = {
  max_tokens: ["number of tokens", 40, NUMBER(0, 100000, 1), ["greedy", "sample", "beams"], "at most so many new tokens"],
  temperature: ["temperature", 0.8, NUMBER(0, 2, 0.05), ["sample"], "0 to 2; 1 is neutral"],
  top_k: ["top-k", 0, NUMBER(0, 100000, 1), ["sample"], "the k likeliest; 0 is off"],
  top_p: ["top-p", 1, NUMBER(0, 1, 0.01), ["sample"], "0 to 1; 1 is off"],
  min_p: ["min-p", 0, NUMBER(0, 1, 0.01), ["sample"], "0 to 1; 0 is off"],
  repetition_penalty: ["repetition penalty", 1, NUMBER(0.01, 100, 0.01), ["greedy", "sample", "beams"], "0.01 to 100; 1 is off"],
  seed: ["seed", "", NUMBER(undefined, undefined, 1), ["sample"], "the same text each time; empty: another one"],
  n: ["texts side by side", 1, NUMBER(1, 8, 1), ["sample", "beams"], "1 to 8"],
  best_of: ["beams", 4, NUMBER(1, 128, 1), ["beams"], "texts that are followed at once"],
  length_penalty: ["length penalty", 1, NUMBER(-10, 10, 0.1), ["beams"], "above 0 prefers long texts; 1 is usual"],
  stop: ["stop texts", "", { type: "text" }, ["greedy", "sample"], "up to 4, divided by commas"],
  bad_words: ["bad words", "", { type: "text" }, ["greedy", "sample", "beams"], "never written; divided by commas"],
  min_tokens: ["no end before", 0, NUMBER(0, 100000, 1), ["greedy", "sample", "beams"], "tokens without the end token; 0 is off"],
};
const NEUTRAL = { top_k: 0, top_p: 1, min_p: 0, repetition_penalty: 1, n: 1, length_penalty: 1, min_tokens: 0 };
export const MODES = { greedy: "greedy", sample: "sample", beams: "beams" };
const OPENAI = ["model", "prompt", "messages", "max_tokens", "temperature", "top_p", "seed", "n", "stop", "stream", "logprobs", "top_logprobs", "best_of"];

export function controls(settings, names, onchange) {
  const made = Object.entries(FIELDS).map(([name, [label, , attributes, , hint]]) => {
    const input = element("input", { ...attributes, value: settings[name], id: `field-${name}`, "aria-describedby": `hint-${name}`,
      oninput: () => { settings[name] = input.value; onchange(); } });
    return element("div", { class: "field", "data-name": name }, element("label", { for: `field-${name}` }, label), input,
      element("small", { id: `hint-${name}`, class: "muted" }, hint));
  });
  const mode = element("select", { id: "field-mode", onchange: () => { settings.mode = mode.value; hide(); onchange(); } },
    Object.entries(MODES).map(([name, label]) => element("option", { value: name }, label)));
  mode.value = settings.mode;
  const model = element("select", { id: "field-model", onchange: () => { settings.model = model.value; onchange(); } },
    names.map((name) => element("option", { value: name }, name)));
  if (names.includes(settings.model)) model.value = settings.model;
  const hide = () => made.forEach((field) => { field.hidden = !FIELDS[field.dataset.name][3].includes(settings.mode); });
  hide();
  return element("div", { class: "fields" },
    names.length > 1 ? element("div", { class: "field" }, element("label", { for: "field-model" }, "model"), model,
      element("small", { class: "muted" }, "or one of its adapters")) : null,
    element("div", { class: "field" }, element("label", { for: "field-mode" }, "mode"), mode, element("small", { class: "muted" }, "the likeliest token, one drawn at random, or the likeliest text")), made);
}

export function initial() {
  const values = Object.entries(FIELDS).map(([name, [, value]]) => [name, value]);
  return { mode: "sample", ...Object.fromEntries(values) };
}

// The path and the body of the request.
export function requestOf(about, settings, prompt, messages) {
  const isChat = Boolean(messages), isBeams = settings.mode === "beams";
  const body = { model: about.names.includes(settings.model) ? settings.model : about.names[0], ...(isChat ? { messages } : { prompt }) };
  for (const [name, [, , attributes, modes]] of Object.entries(FIELDS)) {
    if (!modes.includes(settings.mode) || settings[name] === "") continue;
    const value = attributes.type === "number" ? Number(settings[name]) : words(settings[name]);
    if (value === NEUTRAL[name] || value.length === 0) continue;
    body[name] = value;
  }
  if (settings.mode !== "sample") body.temperature = 0;
  if (isBeams) Object.assign(body, { use_beam_search: true, best_of: Math.max(body.best_of || 1, body.n || 1) });
  else Object.assign(body, { stream: true, ...(isChat ? { logprobs: true, top_logprobs: 5 } : { logprobs: 5 }) });
  return { path: isChat ? "/v1/chat/completions" : "/v1/completions", body };
}

function words(text) {
  return text.split(",").filter((word) => word !== "");
}

export function asCurl({ path, body }) {
  const quoted = JSON.stringify(body).replaceAll("'", "'\\''");
  return `curl ${location.origin}${path} -H 'Content-Type: application/json' \\\n  -d '${quoted}'`;
}

export function asPython({ path, body }) {
  const own = Object.keys(body).filter((name) => OPENAI.includes(name) && !(name === "best_of" && body.use_beam_search));
  const others = Object.keys(body).filter((name) => !own.includes(name));
  const lines = own.map((name) => `    ${name}=${python(body[name])},`);
  if (others.length) lines.push(`    extra_body={${others.map((name) => `${python(name)}: ${python(body[name])}`).join(", ")}},`);
  const call = path.includes("chat") ? "chat.completions" : "completions";
  const text = path.includes("chat") ? ".delta.content or \"\"" : ".text";
  const print = body.stream ? `for chunk in answer:\n    print(chunk.choices[0]${text}, end="")`
    : `for choice in answer.choices:\n    print(choice${path.includes("chat") ? ".message.content" : ".text"})`;
  return `import openai\n\nclient = openai.OpenAI(base_url="${location.origin}/v1", api_key="none")\n` +
    `answer = client.${call}.create(\n${lines.join("\n")}\n)\n${print}\n`;
}

// A JSON value as Python writes it.
function python(value) {
  if (value === true) return "True";
  if (value === false) return "False";
  if (Array.isArray(value)) return `[${value.map(python).join(", ")}]`;
  if (typeof value === "object") return `{${Object.entries(value).map(([name, part]) => `${python(name)}: ${python(part)}`).join(", ")}}`;
  return JSON.stringify(value);
}
