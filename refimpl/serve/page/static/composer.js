// Where a message is written: Enter sends, Shift and Enter begin a line; pictures and sounds are dropped, pasted or chosen.

import { button, el, refill } from "./dom.js";

const SOUNDS = { "audio/wav": "wav", "audio/x-wav": "wav", "audio/wave": "wav", "audio/mpeg": "mp3", "audio/flac": "flac", "audio/x-flac": "flac", "audio/ogg": "ogg" };

export class Composer {
  // told: { send(text, parts), stop() }.
  constructor(form, about, told) {
    this.form = form;
    this.about = about;
    this.parts = [];
    this.reading = Promise.resolve();           // files that are being read
    this.busy = false;
    this.input = el("textarea", {
      id: "message", rows: "1", dir: "auto", placeholder: about.continues ? "Python code to continue" : "Message",
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

  async #submit(told) {
    await this.reading;                         // what was just dropped goes along
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

  #take(files) {
    const all = [...(files || [])];                   // a copy: the field is emptied meanwhile
    if (all.length) this.reading = this.reading.then(() => this.#read(all));
  }

  async #read(files) {
    const wrong = [];
    for (const file of files) {
      const format = SOUNDS[file.type];
      const kind = file.type.startsWith("image/") ? "image" : format ? "audio" : null;
      const able = kind === "image" ? this.about.sees : kind === "audio" && this.about.hears;
      if (able) {
        try {
          const url = await dataUrl(file);
          if (kind === "image") await decoded(url);
          this.parts.push({ kind, name: file.name, url, format });
        } catch {
          wrong.push(`${file.name}: cannot be read as ${kind === "image" ? "a picture" : "a sound"}.`);
        }
      } else if (kind) {
        wrong.push(`This model takes no ${kind === "image" ? "pictures" : "sounds"}: refimpl serve --mmproj FILE lets it.`);
      } else {
        wrong.push(`${file.name}: neither a picture nor a sound (WAV, MP3, FLAC or OGG).`);
      }
    }
    this.note.textContent = [...new Set(wrong)].join(" ");
    this.note.hidden = !wrong.length;
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

// Fails where the browser finds no picture in it, whatever the file is called.
function decoded(url) {
  return el("img", { src: url }).decode();
}

function dataUrl(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(file);
  });
}
