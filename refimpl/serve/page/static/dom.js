// Elements without markup in strings: text is always text, so nothing that a model writes can become a part of the page.

export function el(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (value === undefined || value === null || value === false) continue;
    if (key === "on") for (const [event, handler] of Object.entries(value)) made.addEventListener(event, handler);
    else if (key === "class") made.className = value;
    else if (key in PROPERTIES) made[key] = value;
    else made.setAttribute(key, value === true ? "" : value);
  }
  made.append(...present(children));
  return made;
}

function present(children) {
  return children.filter((child) => child !== null && child !== undefined && child !== false);
}

const PROPERTIES = { value: 1, checked: 1, disabled: 1, hidden: 1, textContent: 1 };

export function button(label, handler, attributes = {}) {
  return el("button", { type: "button", ...attributes, on: { click: handler } }, label);
}

export function refill(box, ...children) {
  box.replaceChildren(...present(children));
}

// Makes `text` the text of an element. Of a text that has grown only the new part is touched: what is selected stays so.
export function grow(box, text) {
  const shown = box.firstChild;
  if (shown?.nodeType !== Node.TEXT_NODE || !text.startsWith(shown.data)) box.textContent = text;
  else if (text.length > shown.length) shown.appendData(text.slice(shown.length));
}

// Copies what text() returns then. Without HTTPS a browser offers its clipboard to selections only.
export function copyButton(text, attributes) {
  const made = button("Copy", async () => {
    let done = true;
    try {
      await navigator.clipboard.writeText(text());
    } catch {
      const input = el("textarea", { value: text(), class: "unseen", "aria-hidden": "true" });
      made.after(input);
      input.select();
      done = document.execCommand("copy");
      input.remove();
      made.focus();
    }
    made.textContent = done ? "Copied" : "Select it, and press Ctrl C";
    setTimeout(() => { made.textContent = "Copy"; }, 2000);
  }, attributes);
  return made;
}

export function say(text) {
  document.getElementById("status").textContent = text;
}

// A token in running text: what cannot be seen is shown as a sign.
export function visible(text) {
  return text.replaceAll("\n", "↵").replaceAll("\t", "⇥").replaceAll(" ", "␣") || "∅";
}

export function token(text) {
  return el("code", { class: "token", dir: "auto" }, visible(text));
}

export function percent(share) {
  if (share >= 0.9995) return "100 %";
  if (share >= 0.0995) return `${(100 * share).toFixed(1)} %`;
  return share >= 0.0005 ? `${(100 * share).toFixed(2)} %` : "under 0.05 %";
}

export function size(bytes) {
  for (const [unit, scale] of [["GB", 1e9], ["MB", 1e6], ["kB", 1e3]]) {
    if (bytes >= scale) return `${(bytes / scale).toPrecision(3)} ${unit}`;
  }
  return `${Math.round(bytes)} B`;
}

export function colour(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

// A bar of a share from 0 to 1.
export function bar(share, kind = "") {
  const filled = el("span", { class: "filled" });
  filled.style.width = `${Math.max(0, Math.min(1, share)) * 100}%`;
  return el("span", { class: `bar-of ${kind}`, "aria-hidden": "true" }, filled);
}

// A canvas as sharp as the screen, and its context, in CSS pixels.
export function canvas(width, height, label) {
  const made = el("canvas", { role: "img", "aria-label": label });
  const ratio = window.devicePixelRatio || 1;
  made.width = Math.round(width * ratio);
  made.height = Math.round(height * ratio);
  made.style.width = `${width}px`;
  made.style.height = `${height}px`;
  const context = made.getContext("2d");
  context.scale(ratio, ratio);
  return [made, context];
}
