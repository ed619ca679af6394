// What is asked of the server: the chat API that every client has, and what the glass shows.

const KEY = "refimpl.key";
let key = "";
try {
  key = sessionStorage.getItem(KEY) || "";
} catch { /* a forbidden store: the key lasts as long as the page */ }

export class Refused extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

export function setKey(given) {
  key = given;
  try {
    sessionStorage.setItem(KEY, key);
  } catch { /* as above */ }
}

// A header takes bytes: those of UTF-8, as the server compares them.
function bearer() {
  return `Bearer ${String.fromCharCode(...new TextEncoder().encode(key))}`;
}

async function ask(path, body, signal) {
  const headers = { ...(key ? { authorization: bearer() } : {}), ...(body ? { "content-type": "application/json" } : {}) };
  let response;
  try {
    response = await fetch(path, { method: body ? "POST" : "GET", headers, body: body ? JSON.stringify(body) : undefined, signal });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refused(0, "The server does not answer. Is it still running?");
  }
  if (response.ok) return response;
  let message = `${response.status} ${response.statusText}`;
  try {
    message = (await response.json()).error.message;
  } catch { /* no JSON: the status says it */ }
  throw new Refused(response.status, message);
}

export async function askAbout() {
  return (await ask("/glass/about")).json();
}

export async function inspectText(body, signal) {
  return (await ask("/glass/inspect", body, signal)).json();
}

export async function askForBlock(tensor, row, block) {
  return (await ask("/glass/block", { tensor, row, block })).json();
}

// Calls `told` with every chunk of an answer, and first `begun` with the seed. What ends without saying so was cut off.
export async function streamChat(body, signal, begun, told) {
  const response = await ask("/v1/chat/completions", body, signal);
  begun(response.headers.get("x-refimpl-seed"));
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read().catch((error) => {
        if (error.name === "AbortError") throw error;
        throw new Refused(0, "The connection broke off.");
      });
      if (done) throw new Refused(0, "The connection broke off.");
      const events = (rest + value).split("\n\n");
      rest = events.pop();
      for (const event of events) {
        if (event === "data: [DONE]") return;
        if (!event.startsWith("data: ")) continue;
        const data = JSON.parse(event.slice(6));
        if (data.error) throw new Refused(500, data.error.message);
        told(data);
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
