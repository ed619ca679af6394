// Settings: empty fields mean the model's own, which stand in them as placeholders.

import { button, el } from "./dom.js";
import { loadSettings, saveSettings } from "./store.js";

const NUMBERS = [
  ["temperature", "Temperature", "0 always takes the likeliest token; 1 draws as the model was trained", 0, 5, 0.05],
  ["top_k", "Top-k", "only the k likeliest tokens; 0 is off", 0, 100000, 1],
  ["top_p", "Top-p", "only the likeliest tokens that make up this share; 1 is off", 0.01, 1, 0.01],
  ["min_p", "Min-p", "only tokens at least this share as likely as the first; 0 is off", 0, 0.99, 0.01],
  ["max_tokens", "Longest answer", "in tokens", 1, 1000000, 1],
  ["seed", "Seed", "the same seed gives the same answer", 0, 2 ** 53, 1],
];

// about: /glass/about. Returns a dialog, and the fields that a request gets.
export class Options {
  constructor(about) {
    this.about = about;
    this.values = loadSettings();
    const own = { ...about.sampling, max_tokens: about.limit > 0 ? about.limit : "no limit", seed: "a new one each time" };
    this.system = el("textarea", { id: "set-system", rows: "3", dir: "auto", placeholder: "none" });
    this.think = el("input", { id: "set-think", type: "checkbox", disabled: !about.thinks });
    this.fields = NUMBERS.map(([name, label, hint, min, max, step]) => {
      const input = el("input", { id: `set-${name}`, type: "number", min: String(min), max: String(max), step: String(step),
        placeholder: String(own[name]), "aria-describedby": `hint-${name}` });
      return [name, input, el("div", { class: "field" }, el("label", { for: `set-${name}` }, label), input, el("span", { class: "hint", id: `hint-${name}` }, hint))];
    });
    this.dialog = el("dialog", { "aria-labelledby": "settings-title", class: "settings" },
      el("form", { method: "dialog", on: { submit: () => this.#take() } },
        el("h2", { id: "settings-title" }, "Settings"),
        el("p", { class: "hint" }, "What is left empty is the model's own setting."),
        ...this.fields.map(([, , row]) => row),
        el("div", { class: "field" }, el("label", { for: "set-system" }, "Instruction"), this.system,
          el("span", { class: "hint" }, about.continues ? "a text before the conversation" : "what the model is told before the conversation")),
        el("div", { class: "field check" }, this.think, el("label", { for: "set-think" }, "Think first"),
          el("span", { class: "hint" }, about.thinks ? "the thoughts stand folded above the answer" : "this model's template has no thoughts")),
        el("div", { class: "row" }, el("button", { type: "submit", class: "main" }, "Done"),
          button("Back to the model's own", () => this.#clear(), { class: "quiet" }))));
  }

  // What was typed and not taken, by Escape, is not shown again.
  show() {
    for (const [name, input] of this.fields) input.value = this.values[name] ?? "";
    this.system.value = this.values.system || "";
    this.think.checked = Boolean(this.values.think);
    this.dialog.showModal();
  }

  request() {
    const body = {};
    for (const [name] of this.fields) if (this.values[name] !== undefined) body[name] = this.values[name];
    return body;
  }

  // What the page says a text was written with.
  sampling() {
    const { temperature, top_k, top_p, min_p } = { ...this.about.sampling, ...this.request() };
    return { temperature, top_k, top_p, min_p };
  }

  #take() {
    this.values = { system: this.system.value.trim() || undefined, think: this.think.checked || undefined };
    for (const [name, input] of this.fields) if (input.value !== "" && input.validity.valid) this.values[name] = Number(input.value);
    saveSettings({ ...loadSettings(), ...Object.fromEntries(NUMBERS.map(([name]) => [name, undefined])), ...this.values });
  }

  #clear() {
    for (const [, input] of this.fields) input.value = "";
    this.system.value = "";
    this.think.checked = false;
  }
}

// Asks for the API key. A promise of it.
export function askForKey(wrong) {
  return new Promise((resolve) => {
    const input = el("input", { id: "key", type: "password", autocomplete: "off", required: true });
    const dialog = el("dialog", { "aria-labelledby": "key-title" }, el("form", { method: "dialog", on: { submit: () => { resolve(input.value); dialog.remove(); } } },
      el("h2", { id: "key-title" }, "API key"),
      el("p", {}, wrong ? "The server does not know this key." : "This server asks for a key (--api-key). It is kept until this tab is closed."),
      el("div", { class: "field" }, el("label", { for: "key" }, "Key"), input), el("button", { type: "submit", class: "main" }, "Use it")));
    dialog.addEventListener("close", () => { if (dialog.isConnected) dialog.showModal(); });      // by Escape: without a key nothing works
    document.body.append(dialog);
    dialog.showModal();
  });
}

const THEMES = ["system", "light", "dark"];
export const COLOURS = "refimpl-colours";        // the event after which what is drawn has other colours

export function themeButton(made) {
  function apply(theme) {
    document.documentElement.dataset.theme = theme;
    made.textContent = { system: "Auto", light: "Light", dark: "Dark" }[theme];
    made.setAttribute("aria-label", `Colours: ${made.textContent}. Press to change.`);
  }
  let theme = THEMES.includes(loadSettings().theme) ? loadSettings().theme : "system";
  apply(theme);
  const changed = () => document.dispatchEvent(new Event(COLOURS));
  made.addEventListener("click", () => {
    theme = THEMES[(THEMES.indexOf(theme) + 1) % THEMES.length];
    apply(theme);
    saveSettings({ ...loadSettings(), theme });
    changed();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", changed);
}
