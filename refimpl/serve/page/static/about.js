// The sentences above a panel: what is seen, and where in the source it is computed.

import { el } from "./dom.js";

export function about(text, ...files) {
  const named = files.flatMap((file, i) => [i ? ", " : " ", el("code", {}, file)]);
  return el("p", { class: "about" }, text, el("span", { class: "source" }, " In the source:", ...named, "."));
}
