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

// The latest first. What does not look like a conversation is left out.
export function loadChats() {
  const chats = loaded(CHATS, []);
  const whole = (message) => ["user", "assistant"].includes(message?.role) && typeof message.text === "string";
  return Array.isArray(chats) ? chats.filter((chat) => typeof chat?.id === "string" && Array.isArray(chat.messages) && chat.messages.every(whole)) : [];
}

// Puts a chat in front of those that are kept, by other tabs too. False where there is no room for it.
export function keepChat(chat) {
  return save([plain(chat), ...others(chat)]);
}

export function forgetChat(chat) {
  save(others(chat));
}

// Calls `changed` when another tab has kept or forgotten a chat.
export function watchChats(changed) {
  window.addEventListener("storage", (event) => { if (event.key === CHATS || event.key === null) changed(); });
}

export function sameChat(one, other) {
  return JSON.stringify(plain(one)) === JSON.stringify(plain(other));
}

function others(chat) {
  return loadChats().filter(({ id }) => id !== chat.id);
}

// The oldest give way: beyond the bounds, and where the browser has no room.
function save(chats) {
  const texts = chats.slice(0, MOST).map((chat) => JSON.stringify(chat));
  let length = texts.reduce((sum, text) => sum + text.length, 0);
  while (texts.length > 1 && length > MOST_CHARS) length -= texts.pop().length;
  for (;;) {
    try {
      localStorage.setItem(CHATS, `[${texts.join(",")}]`);
      return true;
    } catch {
      if (texts.length < 2) return false;
      texts.pop();
    }
  }
}

function plain(chat) {
  return { ...chat, messages: chat.messages.map((message) => ({
    ...message, parts: message.parts?.map(({ kind, name }) => ({ kind, name })),
  })) };
}

export function loadSettings() {
  const settings = loaded(SETTINGS, {});
  return typeof settings === "object" ? settings : {};
}

export function saveSettings(settings) {
  try {
    localStorage.setItem(SETTINGS, JSON.stringify(settings));
  } catch { /* a full or forbidden store: the page works without */ }
}

export function newChat() {
  return { id: crypto.randomUUID ? crypto.randomUUID() : String(Date.now() + Math.random()), title: "", messages: [] };
}

export function titleOf(chat) {
  const first = chat.messages.find((message) => message.role === "user");
  const line = (first?.text || "").trim().split("\n")[0];
  return line ? (line.length > 40 ? `${line.slice(0, 39)}…` : line) : "New chat";
}
