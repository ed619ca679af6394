"""Views of the pages: which there are, and how one is compared with its stored picture and geometry.

Fonts differ between machines, so letters are not compared. Exactly: which elements are there, where they begin and how wide they are (text
decides neither), and how they are styled. By eye: the picture in blocks of 16 pixels, in which letters are no more than a grey.
"""

import io
import json
import os
from pathlib import Path

import numpy as np
import PIL.Image

FOLDER = Path(__file__).parent / "files" / "views"
GEOMETRY = FOLDER / "geometry.json"
NEW = bool(os.environ.get("UPDATE_SCREENSHOTS"))        # pictures and geometry are written instead of compared
WIDTH, COLOURS, BLOCK = 800, 64, 16
APART, SHARE = 48, 0.08         # so many levels of 256 may a block be away, and so many blocks further: other fonts move up to 6 %
PANELS = "likely", "drafting", "experts", "attention", "lens", "reading", "block"
VIEWS = ("chat", "chat-dark", "chat-phone", *(f"glass-{name}" for name in PANELS), "glass-phone", "comparison")
CHAT = (
    ".bar", "h1", "#side", "#side .chat", "#main", "#thread", "#composer", "#message", ".user .body", ".assistant .body",
    ".assistant h3", ".assistant .code", ".assistant pre", ".assistant blockquote", ".assistant td", ".assistant a",
    ".tools button", ".meta")
GLASS = (
    ".bar", "#main", ".tokens", ".given", ".rest", ".tok.s5", ".tok[aria-selected=true]", "#glass", ".which", ".player",
    ".player input", ".tabs", ".tabs [aria-selected=true]", "#panel", "#panel .about", "#panel canvas", ".bars li", ".bars .bar-of",
    ".bars .came .filled", ".legend", ".film", ".film li", ".film .now", ".layers li", ".sides", ".side", ".lens", ".lens .settled",
    ".parts", ".parts .wide", ".bytes", ".byte.on", ".fields", ".foot")
REPORT = "main", "h1", "h1 .departs", "figure img", "pre", ".wide", ".grid td.first", ".list"
LETTERS = ("h1", "h1 .departs", ".tok.s5", ".tok[aria-selected=true]", ".tools button", ".tabs [aria-selected=true]", ".byte.on",
           ".assistant td", ".assistant a", ".parts .wide", ".lens", ".lens .settled", ".list", "#side .chat", "#message",
           ".grid td.first")                            # as wide as their text, or as what stands beside them
READ = """([selectors, styles]) => Object.fromEntries(selectors.map(selector => {
  const found = [...document.querySelectorAll(selector)].find(each => each.getClientRects().length);
  if (!found) return [selector, null];
  const box = found.getBoundingClientRect(), style = getComputedStyle(found);
  return [selector, [Math.round(box.x), Math.round(box.width), ...styles.map(name => style[name])]];
}))"""
STYLES = "color", "backgroundColor", "display", "position", "fontSize", "borderTopWidth", "borderTopColor", "borderRadius", "textAlign"


def geometry(page, selectors) -> dict[str, list | None]:
    """For every selector where its first visible element begins, how wide it is, and its style; None without one."""
    found = page.evaluate(READ, [list(selectors), list(STYLES)])
    return {name: ["", "", *box[2:]] if box is not None and name in LETTERS else box for name, box in found.items()}


def picture(page) -> PIL.Image.Image:
    """The window, as small as it is stored."""
    image = PIL.Image.open(io.BytesIO(page.screenshot())).convert("RGB")
    if image.width > WIDTH:
        image = image.resize((WIDTH, round(image.height * WIDTH / image.width)), PIL.Image.Resampling.LANCZOS)
    return image


def wrong_with(page, selectors, name: str) -> list[str]:
    """What differs from the stored view."""
    found, image, file = geometry(page, selectors), picture(page), FOLDER / f"{name}.png"
    known = json.loads(GEOMETRY.read_text())
    if NEW:
        image.quantize(COLOURS, PIL.Image.Quantize.MAXCOVERAGE, dither=PIL.Image.Dither.NONE).save(file, optimize=True)
        GEOMETRY.write_text(json.dumps(known | {name: found}, indent=0, sort_keys=True) + "\n")
        return []
    wrong = [f"{each}: {box}, stored {old}" for each, box in found.items() for old in [known[name].get(each)] if not alike(box, old)]
    away = np.abs(blocks(image) - blocks(PIL.Image.open(file).convert("RGB"))).max(axis=-1)
    if (away > APART).mean() > SHARE:
        wrong.append(f"{(away > APART).mean():.0%} of the picture's blocks are not those of {file.name}")
    return wrong


def alike(box, old) -> bool:
    """The same style; the same place, give or take two pixels."""
    if box is None or old is None:
        return box is old
    near = all(a == b or a != "" and b != "" and abs(a - b) <= 2 for a, b in zip(box[:2], old[:2]))
    return near and box[2:] == old[2:]


def blocks(image: PIL.Image.Image) -> np.ndarray:
    """Mean colours of blocks, (rows, columns, 3)."""
    pixels = np.asarray(image, np.float64)
    height, width = (n // BLOCK * BLOCK for n in pixels.shape[:2])
    return pixels[:height, :width].reshape(height // BLOCK, BLOCK, width // BLOCK, BLOCK, 3).mean(axis=(1, 3))
