// What is asked of the server: the chat API that every client has, and what the glass shows.

const KEY = "refimpl.key";

export class Refused extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

export function setKey(key) {
  sessionStorage.setItem(KEY, key);
}

async function ask(path, body, signal) {
  const key = sessionStorage.getItem(KEY);
  const headers = { ...(key ? { authorization: `Bearer ${key}` } : {}), ...(body ? { "content-type": "application/json" } : {}) };
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

// Calls `told` with every chunk of an answer. Returns the seed.
export async function streamChat(body, signal, told) {
  const response = await ask("/v1/chat/completions", body, signal);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read().catch((error) => {
      if (error.name === "AbortError") throw error;
      throw new Refused(0, "The connection broke off.");
    });
    if (done) break;
    const events = (rest + value).split("\n\n");
    rest = events.pop();
    for (const event of events) {
      if (!event.startsWith("data: ") || event === "data: [DONE]") continue;
      const data = JSON.parse(event.slice(6));
      if (data.error) throw new Refused(500, data.error.message);
      told(data);
    }
  }
  return response.headers.get("x-refimpl-seed");
}
