// What the page asks of the server. A Problem has a message for the reader: what is wrong, and the way out.

export class Problem extends Error {
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

const LOST = "The server does not answer. If `python -m serving` has stopped, start it again; then press Run.";
let key = "";

export function setKey(text) {
  key = text;
}

async function ask(path, options = {}) {
  const headers = { ...options.headers, ...(key ? { Authorization: `Bearer ${key}` } : {}) };
  let answer;
  try {
    answer = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Problem(LOST);
  }
  if (answer.ok) return answer;
  const body = await answer.json().catch(() => ({}));
  throw new Problem(body.error?.message || `The server answers with status ${answer.status}.`, answer.status);
}

export async function get(path, values = {}, signal = undefined) {
  const answer = await ask(`${path}?${new URLSearchParams(values)}`, { signal });
  return readJson(answer);
}

export async function post(path, body, signal) {
  const headers = { "Content-Type": "application/json" };
  return ask(path, { method: "POST", headers, body: JSON.stringify(body), signal });
}

export async function readJson(answer) {
  try {
    return await answer.json();
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Problem(LOST);
  }
}

// Calls onChunk with each JSON object of a stream of server-sent events.
export async function readStream(answer, onChunk) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "", ended = false;
  for (;;) {
    const { value, done } = await reader.read().catch((error) => {
      if (error.name === "AbortError") throw error;
      throw new Problem(`The connection was lost in the middle of the text. ${LOST}`);
    });
    if (done) break;
    text += value;
    const events = text.split("\n\n");
    text = events.pop();
    for (const event of events) {
      const data = event.replace(/^data: /, "");
      if (data === "[DONE]") {
        ended = true;
        continue;
      }
      const chunk = JSON.parse(data);
      if (chunk.error) throw new Problem(chunk.error.message);
      onChunk(chunk);
    }
  }
  if (!ended) throw new Problem(`The connection was lost in the middle of the text. ${LOST}`);
}
