"""The files of the page: as a server gives them out, and all of them in one."""

import base64
import functools
import hashlib
import html
import json
import re
from collections.abc import Mapping
from pathlib import Path

FOLDER = Path(__file__).parent / "static"
INDEX, STYLE, MAIN = "index.html", "style.css", "main.js"
TYPES = {".html": "text/html; charset=utf-8", ".css": "text/css; charset=utf-8", ".js": "text/javascript; charset=utf-8",
         ".svg": "image/svg+xml"}
POLICY = ("default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; media-src data: blob:; "
          "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'")
HEADERS = {"Content-Security-Policy": POLICY, "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer",
           "Cache-Control": "no-cache"}
IMPORT = re.compile(r'^import (?:\{([^}]*)\} from )?"\./([\w-]+\.js)";\n', re.MULTILINE)


@functools.cache
def _files() -> Mapping[str, bytes]:
    return {path.name: path.read_bytes() for path in FOLDER.iterdir() if path.suffix in TYPES}


def read_file(name: str) -> tuple[bytes, str]:
    """Its bytes and its media type. Raises KeyError where there is none of this name."""
    return _files()[name], TYPES[Path(name).suffix]


def in_one_file(record: Mapping[str, object], title: str) -> str:
    """The page with a recorded run, as one HTML file that loads nothing and sends nothing: its policy allows only what is in it."""
    page, style, script = _text(INDEX), "\n" + _text(STYLE), "\n" + one_script()
    policy = (f"default-src 'none'; script-src '{_hash(script)}'; style-src '{_hash(style)}'; img-src data: blob:; media-src data: blob:; "
              "base-uri 'none'; form-action 'none'")
    data = json.dumps(record, separators=(",", ":")).replace("<", "\\u003c")         # so that nothing in it ends the element
    icon = base64.b64encode(_files()["icon.svg"]).decode()
    meta = f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
    replaced = {r'<link rel="stylesheet"[^>]*>': f"<style>{style}</style>",
                r'<link rel="icon"[^>]*>': f'<link rel="icon" href="data:image/svg+xml;base64,{icon}">',
                r"<title>[^<]*</title>": f"{meta}\n<title>{html.escape(title)}</title>",
                r'<script type="module"[^>]*></script>':
                    f'<script type="application/json" id="record">{data}</script>\n<script type="module">{script}</script>'}
    for pattern, text in replaced.items():
        page, n = re.subn(pattern, lambda match, text=text: text, page)
        if n != 1:
            raise ValueError(f"{INDEX} has {n} places for {pattern}")
    return page


def one_script() -> str:
    """All modules as one: each once, after those that it imports. They share one scope then, so their names differ."""
    ordered: list[str] = []

    def add(name: str):
        if name not in ordered:
            for _, imported in IMPORT.findall(_text(name)):
                add(imported)
            ordered.append(name)
    add(MAIN)
    return "\n".join(re.sub(r"^export (?=(?:async )?function|const|let|class)", "", IMPORT.sub("", _text(name)), flags=re.MULTILINE)
                     for name in ordered)


def _text(name: str) -> str:
    return _files()[name].decode()


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
