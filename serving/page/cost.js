// The operations and bytes of each line of a forward pass.

import { bar, element, heading, large } from "./dom.js";

function draw(state) {
  const { data } = state, total = { operations: 0, bytes: 0 };
  for (const found of data.cost) {
    total.operations += found.operations;
    total.bytes += found.bytes;
  }
  const row = (found) => element("tr", {},
    element("td", { class: "number" }, String(found.line)),
    element("td", { class: "wide-code" }, element("code", {}, data.source.lines[found.line - 1].text.trim().split("  #")[0])),
    element("td", { class: "number" }, large(found.operations)), element("td", { class: "wide" }, bar(found.operations / total.operations)),
    element("td", { class: "number" }, `${large(found.bytes)}B`), element("td", { class: "wide" }, bar(found.bytes / total.bytes)));
  const columns = ["line", "code", "operations", "", "bytes", ""];
  return element("div", {},
    heading("The cost of each line",
      `One forward pass of these ${data.tokens.length} tokens, counted while it ran: each addition, multiplication, comparison and ` +
      "function such as exp is one operation, a matrix product of [n, m] and [m, k] is 2·n·m·k. Bytes are those of the " +
      "arrays that an operation reads and writes. A line counts what it computes itself, not what it calls, in all blocks."),
    element("div", { class: "scroll", tabindex: "0", role: "group", "aria-label": "Costs" },
      element("table", { class: "costs" },
        element("thead", {}, element("tr", {}, columns.map((name) => element(name ? "th" : "td", name ? { scope: "col" } : {}, name)))),
        element("tbody", {}, data.cost.map(row)),
        element("tfoot", {}, element("tr", {}, element("th", { scope: "row", colspan: "2" }, "sum"),
          element("td", { class: "number", id: "all-operations" }, large(total.operations)), element("td"),
          element("td", { class: "number" }, `${large(total.bytes)}B`), element("td"))))),
    element("p", {}, `That is ${(total.operations / total.bytes).toPrecision(2)} operations for each byte. A processor can do ` +
      "many operations in the time in which it reads one byte from memory: so a single token, which reads all weights for " +
      "few operations, is limited by the memory, and many tokens together by the arithmetic."));
}

export const cost = { draw };
