// Where a message is written: Enter sends, Shift and Enter begin a line; pictures and sounds are dropped, pasted or chosen.

import { button, el, refill } from "./dom.js";

const SOUNDS = { "audio/wav": "wav", "audio/x-wav": "wav", "audio/wave": "wav", "audio/mpeg": "mp3", "audio/flac": "flac", "audio/x-flac": "flac", "audio/ogg": "ogg" };

export class Composer {
  // told: { send(text, parts), stop() }.
  constructor(form, about, told) {
    this.form = form;
    this.about = about;
    this.parts = [];
    this.busy = false;
    this.input = el("textarea", {
      id: "message", rows: "1", placeholder: about.continues ? "Python code to continue" : "Message",
      "aria-label": about.continues ? "Code to continue" : "Message", on: {
        input: () => this.#grow(), paste: (event) => this.#take(event.clipboardData?.files),
        keydown: (event) => {
          if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
            event.preventDefault();
            this.#submit(told);
          }
        },
      },
    });
    const accepted = [...(about.sees ? ["image/*"] : []), ...(about.hears ? ["audio/*"] : [])];
    this.file = el("input", { type: "file", accept: accepted.join(","), multiple: true, hidden: true, on: { change: () => { this.#take(this.file.files); this.file.value = ""; } } });
    this.attach = button("Attach", () => this.file.click(), { class: "quiet", hidden: !accepted.length });
    this.sender = el("button", { type: "submit", class: "main" }, "Send");
    this.stop = button("Stop", told.stop, { class: "stop", hidden: true });
    this.note = el("p", { class: "failed", role: "alert", hidden: true });
    this.shelf = el("ul", { class: "shelf", "aria-label": "Attached" });
    form.append(this.note, this.shelf, el("div", { class: "line" }, this.attach, this.input, this.sender, this.stop), this.file);
    form.addEventListener("submit", (event) => { event.preventDefault(); this.#submit(told); });
    for (const kind of ["dragover", "drop"]) {
      document.body.addEventListener(kind, (event) => {
        if (!event.dataTransfer?.types.includes("Files")) return;
        event.preventDefault();
        if (kind === "drop") this.#take(event.dataTransfer.files);
      });
    }
    form.hidden = false;
  }

  setBusy(busy) {
    this.busy = busy;
    this.sender.hidden = busy;
    this.stop.hidden = !busy;
  }

  fill(text) {
    this.input.value = text;
    this.#grow();
    this.input.focus();
  }

  #submit(told) {
    const text = this.input.value;
    if (this.busy || (!text.trim() && !this.parts.length)) return;
    const parts = this.parts;
    this.parts = [];
    this.input.value = "";
    this.note.hidden = true;
    this.#grow();
    this.#shelve();
    told.send(text, parts);
  }

  #grow() {
    this.input.style.height = "auto";
    this.input.style.height = `${Math.min(this.input.scrollHeight + 2, 240)}px`;
  }

  async #take(files) {
    for (const file of [...(files || [])]) {          // a copy: the field is emptied meanwhile
      const format = SOUNDS[file.type];
      const kind = file.type.startsWith("image/") ? "image" : format ? "audio" : null;
      const able = kind === "image" ? this.about.sees : kind === "audio" && this.about.hears;
      this.note.hidden = able;
      if (!able) {
        this.note.textContent = kind ? `This model takes no ${kind === "image" ? "pictures" : "sounds"}: refimpl serve --mmproj FILE lets it.`
          : `${file.name}: neither a picture nor a sound (WAV, MP3, FLAC or OGG).`;
        continue;
      }
      this.parts.push({ kind, name: file.name, url: await dataUrl(file), format });
    }
    this.#shelve();
  }

  #shelve() {
    refill(this.shelf, ...this.parts.map((part) => el("li", {}, partShown(part),
      button("Remove", () => { this.parts = this.parts.filter((each) => each !== part); this.#shelve(); }, { class: "quiet", "aria-label": `Remove ${part.name}` }))));
  }
}

export function partShown(part) {
  if (!part.url) return el("span", { class: "hint" }, `${part.name} (not kept)`);
  return part.kind === "image" ? el("img", { src: part.url, alt: part.name }) : el("audio", { src: part.url, controls: true, "aria-label": part.name });
}

// As the API takes it.
export function partAsked(part) {
  return part.kind === "image" ? { type: "image_url", image_url: { url: part.url } }
    : { type: "input_audio", input_audio: { data: part.url.slice(part.url.indexOf(",") + 1), format: part.format } };
}

function dataUrl(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(file);
  });
}
