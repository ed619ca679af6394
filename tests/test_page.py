"""The page in a real browser: flows, keyboard, errors, what a screen reader is told (axe-core), nothing on top of anything else.

Needs playwright and axe-playwright-python (the extra `page`) and a Chromium on this machine; without them nothing here can be checked.
"""

import base64
import contextlib
import json
import shutil
from types import SimpleNamespace

import numpy as np
import PIL.Image
import pytest
from answers import Eyes, with_markers
from serving import FakeEngine, on_a_port, tokenizer_and_metadata

import refimpl
from refimpl.decode.prefixes import Prefixes
from refimpl.decode.sampling import Sampling
from refimpl.lab.glass.packing import packed
from refimpl.lab.glass.written import write
from refimpl.serve.engine import Engine
from refimpl.serve.page.files import in_one_file
from refimpl.serve.scheduler import Busy, Scheduler
from refimpl.text.prompt import Encoded

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (pip install '.[page]')")
axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe is not installed (pip install '.[page]')")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on this machine")
PANELS = "likely", "drafting", "experts", "attention", "lens", "reading", "block"
DESK, PHONE = {"width": 1280, "height": 800}, {"width": 390, "height": 844}
MARKDOWN = """<|channel>thought\nhow to greet<channel|># Title

Some **bold**, *slanted* and `code`; [a link](https://example.org/) and [a trap](javascript:alert(1)).

1. first
2. second
   - inner

| a | b |
|---|---|
| 1 | 2 |

```python
if a < b:
    print("<img src=x onerror=alert(1)>")
```
<img src=x onerror="document.title='broken'"><script>document.title='broken'</script>
"""


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        made = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield made
        made.close()


@pytest.fixture
def new_page(browser):
    """Opens pages, on which nothing may go wrong unnoticed."""
    with contextlib.ExitStack() as stack:
        wrong = []

        def opened(url, viewport=DESK, scheme="light"):
            context = browser.new_context(viewport=viewport, color_scheme=scheme, reduced_motion="reduce")
            stack.callback(context.close)
            page = context.new_page()
            page.set_default_timeout(60_000)
            page.on("pageerror", lambda error: wrong.append(str(error)))
            page.on("console", lambda line: wrong.append(line.text) if line.type == "error" and "status of" not in line.text else None)
            page.goto(url)
            return page
        yield opened
        assert wrong == []


@pytest.fixture(scope="module")
def model():
    return refimpl.load()


@pytest.fixture(scope="module")
def live(model):
    """A server with the built-in model."""
    engine = Engine(Scheduler(model, Prefixes(model, 1 << 28), 2048, drafter=refimpl.load_drafter(None, model)))
    with on_a_port(engine) as (url, _):
        yield url
    engine.close()


@pytest.fixture(scope="module")
def record(model):
    ids = model.tokenizer.encode("class Stack:\n    def push(self, x):\n        ")
    return write(model, Encoded(ids), Sampling(temperature=0.0), 40, drafter=refimpl.load_drafter(None, model))


def scripted(model, *scripts, **options):
    """An engine that plays scripts, and says of the model what the page asks."""
    engine = FakeEngine(*scripts, **options)
    file = SimpleNamespace(metadata=engine.model.file.metadata, tensors=model.file.tensors, path=model.file.path)
    engine.model = SimpleNamespace(tokenizer=engine.model.tokenizer, config=model.config, backend=model.backend, name="a model", file=file)
    return engine


def send(page, text):
    page.fill("#message", text)
    page.keyboard.press("Enter")


def answered(page):
    page.locator(".message.assistant .tools:not([hidden])").last.wait_for()


def accessible(page, where):
    found = axe.Axe().run(page).response["violations"]
    assert not found, (where, [(each["id"], each["nodes"][0]["target"], each["nodes"][0]["failureSummary"]) for each in found])


COLLIDING = """root => {
  const leaves = [...root.querySelectorAll('*')].filter(e => e.getClientRects().length && !e.closest('.unseen, select, .tokens, canvas')
    && [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim()) && !e.closest('details:not([open])'));
  const boxes = leaves.flatMap(e => [...e.childNodes].filter(n => n.nodeType === 3 && n.textContent.trim()).flatMap(n => {
    const range = document.createRange(); range.selectNodeContents(n);
    const seen = e.closest('.film, .scroll')?.getBoundingClientRect() ?? {top: -1e9, bottom: 1e9};
    return [...range.getClientRects()].filter(r => r.top > seen.top - 3 && r.bottom < seen.bottom + 3)
      .map(r => [r, n.textContent.trim()]); }));
  const hit = [];
  for (let i = 0; i < boxes.length; i++) for (let j = i + 1; j < boxes.length; j++) {
    const [a, p] = boxes[i], [b, q] = boxes[j];
    if (Math.min(a.right, b.right) - Math.max(a.left, b.left) > 2 && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 6)
      hit.push([p.slice(0, 30), q.slice(0, 30)]);
  }
  return hit;
}"""


def tidy(page, where):
    """No text lies on another, nothing is wider than the window."""
    assert page.evaluate("document.documentElement.scrollWidth - window.innerWidth") <= 0, where
    assert page.locator("#panel").evaluate(COLLIDING) == [], where


# ---- chat

def test_an_answer_in_markdown_is_text_and_never_markup(model, new_page):
    with on_a_port(scripted(model, MARKDOWN)) as (url, _):
        page = new_page(url)
        send(page, "hello <b>you</b>")
        answered(page)
        body = page.locator(".assistant .body")
        assert body.locator("h3").inner_text() == "Title" and body.locator("strong").inner_text() == "bold"
        assert body.locator("ol li").count() == 3 and body.locator("ol ul li").inner_text() == "inner" and body.locator("td").count() == 2
        assert body.locator("a").evaluate_all("all => all.map(a => a.href)") == ["https://example.org/"]
        assert "onerror=alert(1)" in body.locator("pre").inner_text() and body.locator("img, script").count() == 0
        assert page.locator(".user .said").inner_text() == "hello <b>you</b>" and page.title() == "refimpl"
        assert not page.locator(".assistant .thought").is_visible()
        page.locator(".assistant .thoughts summary").click()
        assert page.locator(".assistant .thought").inner_text() == "how to greet"
        accessible(page, "markdown")


def test_stop_again_edit_fork_and_reload(model, new_page):
    engine = scripted(model, "one two three four five six seven eight nine ten eleven twelve", stall_after=6)
    with on_a_port(engine) as (url, _):
        page = new_page(url)
        send(page, "count")
        page.locator("#composer .stop").wait_for()
        page.locator(".assistant .body", has_text="two").wait_for()
        page.keyboard.press("Escape")
        page.locator(".meta", has_text="stopped").wait_for()
        assert engine.cancelled and page.locator("#status").inner_text() == "Stopped."
        engine.stall_after = None
        page.get_by_role("button", name="Regenerate").click()
        page.locator(".assistant .body", has_text="twelve").wait_for()
        answered(page)
        assert len(engine.requests) == 2 and page.locator("article").count() == 2
        send(page, "more")
        page.locator("article").nth(3).locator(".body", has_text="twelve").wait_for()
        answered(page)
        page.locator("article").nth(1).get_by_role("button", name="Fork").click()
        assert page.locator("article").count() == 2 and page.locator("#side .chat").count() == 2
        page.get_by_role("button", name="Edit").click()
        page.get_by_label("Change the message").fill("count again")
        page.locator(".body button.main").click()
        page.locator(".assistant .body", has_text="twelve").wait_for()
        answered(page)
        assert "count again" in engine.prompt and "more" not in engine.prompt
        page.reload()
        page.locator("#side .chat", has_text="count again").click()
        assert page.locator(".said").inner_text() == "count again"
        page.locator("#side .chat", has_text="count").last.click()
        assert page.locator("article").count() == 4


def test_settings_reach_the_request_and_are_the_models_own_where_empty(model, new_page):
    engine = scripted(model, "ok")
    with on_a_port(engine) as (url, _):
        page = new_page(url)
        send(page, "a")
        answered(page)
        assert engine.requests[0].sampling.temperature == 0.7 and engine.requests[0].max_new_tokens == -1
        page.get_by_role("button", name="Settings").click()
        accessible(page, "settings")
        for name, value in (("Temperature", "0.3"), ("Top-k", "7"), ("Longest answer", "5"), ("Seed", "11"), ("Instruction", "Be short.")):
            page.get_by_label(name, exact=True).fill(value)
        page.get_by_label("Think first").check()
        page.get_by_role("button", name="Done").click()
        send(page, "b")
        page.locator("article").nth(3).locator(".tools:not([hidden])").wait_for()
        asked = engine.requests[1]
        assert (asked.sampling.temperature, asked.sampling.top_k, asked.sampling.seed, asked.max_new_tokens) == (0.3, 7, 11, 5)
        assert "Be short." in engine.prompt and "<|think|>" in engine.prompt


def test_a_key_is_asked_for_and_errors_are_said(model, new_page):
    engine = scripted(model, "ok", busy=Busy(9, 3.0))
    with on_a_port(engine, api_key="secret") as (url, _):
        page = new_page(url)
        for key in ("wrong", "secret"):
            page.locator("#key").fill(key)
            page.get_by_role("button", name="Use it").click()
        page.locator("#message").wait_for()
        engine.error = Busy(9, 3.0)
        send(page, "hello")
        page.locator(".failed", has_text="9 requests are waiting").wait_for()
        engine.error = None
        page.get_by_role("button", name="Regenerate").click()
        page.locator(".assistant .body", has_text="ok").wait_for()
        assert page.locator("article").count() == 2
        page.evaluate("sessionStorage.clear()")
        send(page, "and now?")
        page.locator("#key").fill("secret")
        page.get_by_role("button", name="Use it").click()
        page.locator("article").nth(3).locator(".body", has_text="ok").wait_for()


def test_a_picture_is_sent_and_what_the_model_does_not_take_is_refused(model, new_page, tmp_path):
    PIL.Image.fromarray(np.zeros((48, 48, 3), np.uint8)).save(tmp_path / "black.png")
    (tmp_path / "letter.txt").write_text("x")
    engine = scripted(model, "a cat")
    engine.tokenizer = engine.model.tokenizer = with_markers(tokenizer_and_metadata()[1])
    engine.projector = Eyes()
    engine.projector.sees = True
    with on_a_port(engine) as (url, _):
        page = new_page(url)
        page.locator("input[type=file]").set_input_files([tmp_path / "black.png", tmp_path / "letter.txt"])
        page.locator(".failed", has_text="letter.txt: neither").wait_for()
        assert page.locator(".shelf img").count() == 1
        send(page, "what is it?")
        answered(page)
        assert len(engine.projector.shown) == 1 and page.locator(".user img").get_attribute("alt") == "black.png"


# ---- glass

def test_every_token_can_be_touched_while_the_model_is_there(live, new_page):
    page = new_page(live)
    page.get_by_role("button", name="def fibonacci(n):").click()
    page.keyboard.press("Enter")
    answered(page)
    page.get_by_role("button", name="Glass").click()
    page.locator(".tokens").wait_for()
    for name in PANELS:
        page.locator(f"#tab-{name}").click()
        page.locator(".tokens").focus()
        for key in ("Home", "End", "ArrowLeft", "ArrowUp"):
            page.keyboard.press(key)
        accessible(page, name)
        tidy(page, name)
    assert page.locator("[aria-selected=true].tok").count() == 1
    page.locator("#panel .bytes button").nth(5).click()
    assert "low nibble" in page.locator("#panel p.now").inner_text()
    page.get_by_label("Tensor").select_option("blk.2.attn_q.weight")
    page.locator("#panel .note", has_text="Row 0 of 128").wait_for()
    page.get_by_label("Row", exact=True).fill("127")
    page.keyboard.press("Tab")
    page.locator("#panel .note", has_text="Row 127 of 128").wait_for()
    page.get_by_role("button", name="Glass").click()
    assert page.locator(".tokens").count() == 0 and page.locator(".assistant pre").is_visible()


@pytest.mark.parametrize(("viewport", "scheme"), [(DESK, "dark"), (PHONE, "light")], ids=["dark", "phone"])
def test_a_recorded_run_needs_nothing_but_its_file(record, new_page, tmp_path, viewport, scheme):
    file = tmp_path / "page.html"
    file.write_text(in_one_file(record, "a run"), encoding="utf-8")
    page = new_page("about:blank", viewport, scheme)
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(file.as_uri())
    for name in PANELS:
        page.locator(f"#tab-{name}").click()
        page.locator(".tokens").focus()
        page.keyboard.press("ArrowRight")
        if scheme == "dark":
            accessible(page, name)
        tidy(page, name)
    assert [url for url in asked if not url.startswith("data:")] == [file.as_uri()]


def test_what_is_shown_is_what_was_computed(record, model, new_page, tmp_path):
    file = tmp_path / "page.html"
    file.write_text(in_one_file(record, "a run"), encoding="utf-8")
    page = new_page(file.as_uri())
    t = record["n_prompt"] + 9
    page.locator(f"#tok-{t}").click()
    logits_V = model.logits(record["ids"])[t - 1].astype(np.float64)

    def share(temperature):
        p_V = np.exp((logits_V - logits_V.max()) / temperature)
        return p_V[record["ids"][t]] / p_V.sum()
    for steps, temperature in ((0, 1.0), (2, 1.25), (-8, 0.4)):
        for _ in range(abs(steps)):
            page.get_by_label("Temperature").press("ArrowRight" if steps > 0 else "ArrowLeft")
        assert page.locator(".control output").inner_text() == f"{temperature:g}"
        shown = page.locator(".bars .came .number").inner_text()
        assert float(shown.removesuffix("\u202f%").removeprefix("under ")) == pytest.approx(100 * share(temperature), abs=0.06), temperature
    page.locator("#tab-drafting").click()
    assert page.locator(".film li").count() == min(40, len(record["written"]["rounds"]))
    page.locator("#tab-experts").click()
    page.get_by_role("button", name="Play").click()
    page.get_by_role("button", name="Play").wait_for(timeout=60_000)
    assert f"After {len(record['ids']) - 1} tokens" in page.locator("#panel .note").inner_text()


def test_two_thousand_tokens_cost_no_more_than_two(record, new_page, tmp_path):
    """To go to the next token changes a handful of elements of the text, however long it is; and the file stays small."""
    n, long = 2000 // len(record["ids"]) + 1, json.loads(json.dumps(record))

    def longer(part, axis):
        kinds = {"u1": np.uint8, "u2": np.uint16, "u4": np.uint32, "f4": np.float32}
        values = np.frombuffer(base64.b64decode(part["data"]), kinds[part["type"]]).reshape(part["shape"])
        return packed(np.concatenate([values] * n, axis=axis))
    for key, axis in (("likely", 0), ("lens", 1)):
        long[key] |= {name: longer(part, axis) for name, part in long[key].items() if isinstance(part, dict)}
    for key in ("experts", "attention"):
        long[key] = [each | {name: longer(part, 0) for name, part in each.items() if isinstance(part, dict)} for each in long[key]]
    long |= {"ids": long["ids"] * n, "texts": long["texts"] * n}
    file = tmp_path / "page.html"
    file.write_text(in_one_file(long, "a long run"), encoding="utf-8")
    assert file.stat().st_size < 12e6
    page = new_page(file.as_uri())
    page.evaluate("""() => { window.changed = 0; new MutationObserver(list => { window.changed += list.length; })
        .observe(document.querySelector('.tokens'), {attributes: true, childList: true, subtree: true}); }""")
    for name in PANELS:
        page.locator(f"#tab-{name}").click()
        page.locator(".tokens").focus()
        page.keyboard.press("End")
        page.evaluate("window.changed = 0")
        page.keyboard.press("ArrowLeft")
        assert 2 <= page.evaluate("window.changed") < 200, name
        assert page.locator("#panel *").count() < 1000, name
