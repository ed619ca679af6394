// Conversations and settings in the browser: bounded, and never more than a convenience. Pictures and sounds are not kept.

const MOST = 50;
const MOST_CHARS = 3_000_000;
const CHATS = "refimpl.chats", SETTINGS = "refimpl.settings";

function loaded(key, otherwise) {
  try {
    return JSON.parse(localStorage.getItem(key)) ?? otherwise;
  } catch {
    return otherwise;
  }
}

export function loadChats() {
  const chats = loaded(CHATS, []);
  return Array.isArray(chats) ? chats.filter((chat) => chat && Array.isArray(chat.messages)) : [];
}

export function saveChats(chats) {
  let kept = chats.filter((chat) => chat.messages.length).slice(0, MOST).map(plain);
  while (kept.length && JSON.stringify(kept).length > MOST_CHARS) kept.pop();
  try {
    localStorage.setItem(CHATS, JSON.stringify(kept));
  } catch {
    kept = [];           // a full or forbidden store: the page works without
  }
}

function plain(chat) {
  return { ...chat, messages: chat.messages.map((message) => ({
    ...message, parts: message.parts?.map(({ kind, name }) => ({ kind, name })),
  })) };
}

export function loadSettings() {
  return loaded(SETTINGS, {});
}

export function saveSettings(settings) {
  try {
    localStorage.setItem(SETTINGS, JSON.stringify(settings));
  } catch { /* as above */ }
}

export function newChat() {
  return { id: crypto.randomUUID ? crypto.randomUUID() : String(Date.now() + Math.random()), title: "", messages: [] };
}

export function titleOf(chat) {
  const first = chat.messages.find((message) => message.role === "user");
  const line = (first?.text || "").trim().split("\n")[0];
  return line ? (line.length > 40 ? `${line.slice(0, 39)}…` : line) : "New chat";
}
