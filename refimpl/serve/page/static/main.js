// The page: a chat with a server, or a recorded run that lies in the page itself.

import { Chat } from "./chat.js";
import { Composer } from "./composer.js";
import { button, el, refill, say } from "./dom.js";
import { Glass, NOTHING } from "./glass.js";
import { Options, askForKey, themeButton } from "./options.js";
import { askAbout, askForBlock, inspectText, setKey } from "./server.js";
import { forgetChat, keepChat, loadChats, newChat, sameChat, titleOf, watchChats } from "./store.js";

const at = (id) => document.getElementById(id);
const LIVE = 3;          // while an answer is written, it is looked at again after so many times what the last look took
const AFFORDABLE = 4000; // milliseconds: where a look takes longer, there is none before the end
const EXAMPLES = ["def fibonacci(n):\n    ", "import os\n\ndef walk(folder):\n    ", "class Stack:\n    def __init__(self):\n        "];

function showGlass(open) {
  at("glass").hidden = !open;
  document.body.classList.toggle("glass-open", open);
  at("glass-switch").setAttribute("aria-pressed", String(open));
}

function recorded(record) {
  document.body.classList.add("recorded");
  for (const id of ["menu", "open-settings", "side", "glass-switch"]) at(id).hidden = true;
  at("model").textContent = record.model.name;
  const glass = new Glass(at("glass"), null);
  showGlass(true);
  const tokens = glass.show(record);
  refill(at("thread"),
    el("p", { class: "lead" }, "A recorded run. Touch any token, or walk with the arrow keys; Play goes through the text. The shaded block is what " +
      "the model was given; green lines are under guesses of the drafter that it accepted."),
    el("article", { class: "message assistant opened", "aria-label": "The text" }, el("div", { class: "body" }, tokens)));
}

async function live() {
  let about = null;
  for (let wrong = false; !about; wrong = true) {
    try {
      about = await askAbout();
    } catch (error) {
      if (error.status !== 401) {
        const again = button("Try again", () => { refill(at("thread")); live(); });
        refill(at("thread"), el("p", { class: "failed", role: "alert" }, error.message), again);
        return;
      }
      setKey(await askForKey(wrong));
    }
  }
  at("model").textContent = about.name;
  const options = new Options(about);
  document.body.append(options.dialog);
  at("open-settings").addEventListener("click", () => options.show());
  const ask = Object.assign((tensor, row, block) => askForBlock(tensor, row, block), { tensors: about.tensors });
  const glass = new Glass(at("glass"), ask);
  let chats = loadChats();
  const state = { looked: null, took: 0, since: 0, n: 0, abort: null };

  async function look(message, keepPlace = false) {
    state.abort?.abort();
    if (!chat.chat.messages.includes(message)) return;              // it is no longer shown
    if (chat.chat.messages.some((each) => each.parts?.some((part) => !part.url))) {
      putBack();
      glass.wait("A picture or a sound of this chat was not kept, so its text cannot be run again.");
      return;
    }
    const abort = state.abort = new AbortController();
    if (!keepPlace) glass.wait("Running the text once more, with the box open …");
    const started = performance.now();
    const ids = [...message.ids], seen = message.text.length;
    try {
      const record = await inspectText({ ...chat.asked(message), token_ids: ids }, abort.signal);
      if (state.abort !== abort || at("glass").hidden || !chat.views.has(message)) return;
      record.written = { sampling: message.sampling, rounds: message.rounds.map((round) => ({ ...round, at: round.at + record.n_prompt })),
        reused: message.reused ?? message.stats?.reused ?? 0 };
      if (state.looked !== message) putBack();
      chat.views.get(message).swap(glass.show(record, keepPlace, Boolean(chat.abort)), seen);
      state.looked = message;
      if (!keepPlace) glass.select(glass.t);              // now that it is on the page, it can be scrolled to
    } catch (error) {
      if (state.abort === abort && error.name !== "AbortError") {
        putBack();
        glass.wait(error.message, true);
      }
    } finally {
      if (state.abort === abort) {
        state.took = state.n++ ? performance.now() - started : 0;       // the first one has more to do
        state.since = performance.now();
        state.abort = null;
      }
    }
  }

  function putBack() {
    if (state.looked) chat.views.get(state.looked)?.swap(null);
    state.looked = null;
  }

  function latest() {
    return chat.chat.messages.filter((message) => message.ids?.length).pop();
  }

  at("glass-switch").addEventListener("click", () => {
    const open = at("glass").hidden;
    showGlass(open);
    if (!open) {
      state.abort?.abort();
      putBack();
      glass.wait(NOTHING);
    } else if (latest() && !chat.abort) look(latest());
  });

  const chat = new Chat(at("thread"), about, options, {
    welcome: () => welcome(about, (text) => composer.fill(text)),
    changed: (one) => keep(one),
    busy: (busy) => composer.setBusy(busy),
    forked: (made) => { keep(made); open(made); say("Forked: this is a new chat."); },
    look: (message) => { showGlass(true); look(message); },
    token: (message) => {                     // only while the box is open, and only as often as it costs little
      if (at("glass").hidden || state.abort || message.ids.length < 2) return;
      const wait = LIVE * state.took;
      if (wait < LIVE * AFFORDABLE && performance.now() - state.since > wait) look(message, state.looked === message);
    },
    ended: (message) => { if (!at("glass").hidden && message.ids.length) look(message, state.looked === message); },
    refused: async (error) => {
      if (error.status !== 401) return false;
      setKey(await askForKey(true));
      return true;
    },
  });
  const composer = new Composer(at("composer"), about, { send: (text, parts) => chat.send(text, parts), stop: () => chat.stop() });
  document.addEventListener("keydown", (event) => {
    if (event.key !== "Escape" || document.querySelector("dialog[open]")) return;
    if (document.body.classList.contains("side-open")) {
      showSide(false);
      at("menu").focus();
    } else if (chat.abort) chat.stop();
  });

  function open(one) {
    state.abort?.abort();
    state.looked = state.abort = null;
    chat.show(one);
    glass.wait(NOTHING);
    if (!at("glass").hidden && latest()) look(latest());
    drawSide();
    showSide(false);
  }

  // The chat that was used last stands first.
  function keep(one) {
    if (!one.messages.length) return;
    chats = [one, ...chats.filter((each) => each !== one)];
    at("side").classList.toggle("unkept", !keepChat(one));
    drawSide();
  }

  function drawSide() {
    const focused = [...at("side").querySelectorAll("button")].indexOf(document.activeElement);
    const shown = chats.includes(chat.chat) ? chats : [chat.chat, ...chats];
    refill(at("side"), button("New chat", () => { open(newChat()); composer.input.focus(); }, { class: "main" }),
      el("ul", {}, ...shown.map((one) => el("li", {},
        button(one.title || titleOf(one), () => open(one), { class: "quiet chat", dir: "auto", "aria-current": one === chat.chat ? "true" : undefined }),
        chats.includes(one) && button("×", () => remove(one), { class: "quiet", "aria-label": `Delete ${titleOf(one)}` })))),
      el("p", { class: "hint unkept-note" }, "This browser has no room for conversations: they end with this tab."));
    const all = at("side").querySelectorAll("button");
    if (focused >= 0) all[Math.min(focused, all.length - 1)].focus();
  }

  function remove(one) {
    chats = chats.filter((each) => each !== one);
    if (one === chat.chat) {
      one.messages = [];                       // should its answer still be ending, it is not kept
      open(chats[0] || newChat());
    } else drawSide();
    forgetChat(one);
  }

  // Another tab has kept or forgotten chats: what is the same stays the object that it is, with its pictures.
  watchChats(() => {
    const mine = new Map(chats.map((each) => [each.id, each]));
    const writing = chat.abort ? chat.chat : null;
    chats = loadChats().map((one) => {
      const own = mine.get(one.id);
      return own && (own === writing || sameChat(own, one)) ? own : one;
    });
    if (writing && !chats.includes(writing)) chats.unshift(writing);
    const now = chats.find(({ id }) => id === chat.chat.id);
    if (now && now !== chat.chat) open(now);
    else drawSide();
  });

  function showSide(shown) {
    document.body.classList.toggle("side-open", shown);
    at("menu").setAttribute("aria-expanded", String(shown));
  }
  at("menu").addEventListener("click", () => showSide(!document.body.classList.contains("side-open")));
  at("main").addEventListener("click", () => showSide(false));
  window.addEventListener("pagehide", () => { if (chat.abort) keepChat(chat.chat); });
  open(newChat());
  if (location.hash === "#glass") showGlass(true);
  composer.input.focus();
}

function welcome(about, fill) {
  const text = about.continues
    ? "This small model ships with refimpl. It has read Python and nothing else: it does not chat, it goes on with code. Try one of these."
    : "Ask something. Glass, above, opens the box: every token of the answer can then be touched, and shows how it came about.";
  return el("div", { class: "welcome" }, el("p", {}, text), about.continues && el("div", { class: "row" },
    ...EXAMPLES.map((example) => button(example.trim().split("\n").pop(), () => fill(example), { class: "example" }))));
}

themeButton(at("theme"));
const inside = document.getElementById("record");
if (inside) recorded(JSON.parse(inside.textContent));
else live();
