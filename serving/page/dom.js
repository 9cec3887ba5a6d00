// Making elements. Text goes in as text nodes only, so no text of a user or a model is ever read as HTML.

export const $ = (id) => document.getElementById(id);

// element("p", { class: "muted", onclick: f }, "text", another) makes a <p>.
export function element(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  set(made, properties);
  made.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return made;
}

export function svg(tag, properties = {}, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  set(made, properties);
  made.append(...children.flat());
  return made;
}

function set(made, properties) {
  for (const [name, value] of Object.entries(properties)) {
    if (value === null || value === undefined || value === false) continue;
    if (typeof value === "function") made.addEventListener(name.slice(2), value);
    else if (name === "value" || name === "checked") made[name] = value;
    else made.setAttribute(name, value === true ? "" : value);
  }
}

// Four significant digits, as everywhere on the page.
export function format(value) {
  if (value === null || value === undefined) return "not a number";
  return Number.isInteger(value) ? String(value) : String(Number(value.toPrecision(4)));
}

export function percent(value) {
  if (value === null || value === undefined) return "not a number";
  return value > 0 && value < 0.001 ? "< 0.1%" : `${(100 * value).toFixed(1)}%`;
}

export function large(value) {
  for (const [size, unit] of [[1e9, "G"], [1e6, "M"], [1e3, "k"]]) {
    if (value >= size) return `${(value / size).toPrecision(3)} ${unit}`;
  }
  return `${value} `;
}

// A bar whose length is a share, from 0 to 1.
export function bar(share, kind = "") {
  const fill = element("span", { class: `fill ${kind}` });
  fill.style.width = `${100 * Math.min(1, Math.max(0, share || 0))}%`;
  return element("span", { class: "bar", "aria-hidden": "true" }, fill);
}

// A list of candidates with their probabilities as bars.
export function candidateTable(caption, candidates, marked = null) {
  const rows = candidates.map((found, i) =>
    element("tr", { class: found.id === marked ? "marked" : "" },
      element("td", { class: "number" }, `${i + 1}.`),
      element("td", {}, token(found.token)),
      element("td", { class: "wide" }, bar(found.probability)),
      element("td", { class: "number" }, percent(found.probability))));
  const none = element("tr", {}, element("td", {}, "none: the logits are not finite numbers"));
  return element("table", { class: "candidates" }, element("caption", {}, caption),
    element("tbody", {}, rows.length ? rows : none));
}

export function token(text, index = 0) {
  return element("span", { class: `token tint${index % 4}` }, text);
}

export function heading(title, ...lead) {
  return element("div", { class: "lead" }, element("h2", {}, title), ...lead.map((text) => element("p", {}, text)));
}

// <label>name <input type=range> value</label>
export function slider({ label, min, max, step, value, show = format, oninput }) {
  const shown = element("output", { class: "number" }, show(value));
  const input = element("input", { type: "range", min, max, step, value });
  input.addEventListener("input", () => {
    shown.textContent = show(Number(input.value));
    oninput(Number(input.value));
  });
  return element("label", { class: "slider" }, element("span", {}, label), input, shown);
}
