// A conversation: sending, streaming, stopping, and the operations on its list of messages (edit, fork, again).

import { partAsked } from "./composer.js";
import { say } from "./dom.js";
import { MessageView } from "./message.js";
import { streamChat } from "./server.js";
import { newChat, titleOf } from "./store.js";

export class Chat {
  // told: { changed(chat), busy(bool), forked(chat), look(message), token(message), ended(message), welcome(): an element,
  // refused(error): a promise, true to ask again }.
  constructor(box, about, options, told) {
    Object.assign(this, { box, about, options, told, views: new Map(), abort: null, running: null });
  }

  show(chat) {
    this.stop();
    this.abort = null;                    // what still runs belongs to the chat that was shown before
    this.told.busy(false);
    this.chat = chat;
    this.views.clear();
    this.box.replaceChildren();
    for (const message of chat.messages) this.#append(message);
    if (!chat.messages.length) this.box.replaceChildren(this.told.welcome());
  }

  send(text, parts) {
    if (!this.chat.messages.length) this.box.replaceChildren();
    this.#add({ role: "user", text, parts });
    this.chat.title ||= titleOf(this.chat);
    return this.answer();
  }

  // A promise: the answer that is being written has ended.
  stop() {
    this.abort?.abort();
    return this.running;
  }

  // What is asked of the server up to an answer. Parts that were not kept are left out, and answers that have no text: they failed.
  asked(answer) {
    const end = this.chat.messages.indexOf(answer);
    const before = (end < 0 ? this.chat.messages : this.chat.messages.slice(0, end)).filter((message) => message.role === "user" || message.text);
    const messages = before.map((message) => {
      const parts = (message.parts || []).filter((part) => part.url).map(partAsked);
      return { role: message.role, content: parts.length ? [...parts, { type: "text", text: message.text }] : message.text };
    });
    const { system, think } = answer.asked;
    if (system) messages.unshift({ role: "system", content: system });
    return { messages, ...(this.about.thinks ? { reasoning_effort: think ? "high" : "none" } : {}) };
  }

  answer() {
    return this.running = this.#answer();
  }

  async #answer() {
    const { chat } = this;
    const { system, think } = this.options.values;
    const message = { role: "assistant", text: "", thought: "", ids: [], rounds: [], asked: { system, think }, sampling: this.options.sampling() };
    const body = { ...this.asked(message), ...this.options.request(), stream: true, return_progress: true, return_token_ids: true, stream_options: { include_usage: true } };
    const view = this.#add(message);
    const abort = this.abort = new AbortController();
    this.told.busy(true);
    this.told.changed(chat);
    view.draw(true);
    let again = false;
    try {
      await streamChat(body, abort.signal, (seed) => { message.seed = seed; }, (chunk) => this.#take(message, view, chunk));
    } catch (error) {
      if (error.name === "AbortError") message.stats = { ...message.stats, n: message.ids.length, reused: message.reused || 0, n_prompt: message.n_prompt || 0, stop: "stopped" };
      else if (await this.told.refused(error)) again = true;
      else message.failed = `${error.message}`;
    }
    message.progress = "";
    if (this.chat !== chat) {
      this.told.changed(chat);            // another chat is shown by now
      return undefined;
    }
    this.abort = null;
    this.told.busy(false);
    if (again) {
      this.#drop(message);
      return this.#answer();
    }
    view.draw();
    say(message.failed || (message.stats?.stop === "stopped" ? "Stopped." : "The answer is complete."));
    this.told.changed(chat);
    this.told.ended(message);
    return undefined;
  }

  #take(message, view, chunk) {
    const choice = chunk.choices[0];
    if (chunk.prompt_progress) {
      const { total, processed, cache } = chunk.prompt_progress;
      Object.assign(message, { n_prompt: total, reused: cache, progress: processed < total ? `reading the prompt: ${processed} of ${total}` : "" });
    }
    if (chunk.usage) message.n_prompt = chunk.usage.prompt_tokens;
    if (choice) {
      message.text += choice.delta.content || "";
      message.thought += choice.delta.reasoning_content || "";
      for (const [at, round] of choice.rounds || []) message.rounds.push({ ...round, at: message.ids.length + at });
      message.ids.push(...(choice.token_ids || []));
      if (choice.finish_reason) {
        message.progress = "";
        const { predicted_n, predicted_per_second, cache_n, prompt_n } = chunk.timings;
        message.n_prompt = cache_n + prompt_n;
        message.stats = { n: predicted_n, per_second: predicted_per_second, reused: cache_n, n_prompt: cache_n + prompt_n, stop: choice.finish_reason };
      }
    }
    if (!this.drawing) {
      this.drawing = requestAnimationFrame(() => {
        this.drawing = null;
        const follow = this.#atEnd();
        if (this.abort) view.draw(true);
        if (follow) this.#toEnd();
      });
    }
    this.told.token(message);
  }

  #add(message) {
    const last = this.views.get(this.chat.messages[this.chat.messages.length - 1]);
    this.chat.messages.push(message);
    last?.drawTools();
    const view = this.#append(message);
    this.#toEnd();
    return view;
  }

  #append(message) {
    const view = new MessageView(message, this.about.continues, {
      edit: (one) => this.views.get(one).edit((text) => this.#edit(one, text)),
      fork: (one) => this.#fork(one),
      regenerate: (one) => { if (!this.abort) { this.#drop(one); this.answer(); } },
      look: (one) => this.told.look(one),
      isLast: (one) => this.chat.messages[this.chat.messages.length - 1] === one,
    });
    this.views.set(message, view);
    this.box.append(view.element);
    return view;
  }

  // Whoever changes a message does not wait for the answer to another one.
  async #edit(message, text) {
    const { chat } = this;
    await this.stop();
    const at = chat.messages.indexOf(message);
    if (this.chat !== chat || at < 0) return;
    for (const each of chat.messages.slice(at)) this.#drop(each);
    if (at === 0) chat.title = "";
    this.send(text, (message.parts || []).filter((part) => part.url));
  }

  #fork(message) {
    const made = newChat();
    const end = this.chat.messages.indexOf(message) + 1;
    made.messages = this.chat.messages.slice(0, end).map((each) => ({ ...each }));
    made.title = `${titleOf(made)} (fork)`;
    this.told.forked(made);
  }

  #drop(message) {
    this.chat.messages = this.chat.messages.filter((each) => each !== message);
    this.views.get(message)?.element.remove();
    this.views.delete(message);
  }

  #atEnd() {
    const box = this.box.parentElement;
    return box.scrollHeight - box.scrollTop - box.clientHeight < 80;
  }

  #toEnd() {
    const box = this.box.parentElement;
    box.scrollTop = box.scrollHeight;
  }
}
