"""The page in a real browser: flows, keyboard, errors, what a screen reader is told (axe-core), nothing on top of anything else.

Needs playwright and axe-playwright-python (the extra `page`) and a Chromium on this machine; without them nothing here can be checked.
"""

import base64
import contextlib
import dataclasses
import json
import shutil
from types import SimpleNamespace

import numpy as np
import PIL.Image
import pytest
from answers import Eyes, with_markers
from serving import FakeEngine, on_a_port, tokenizer_and_metadata
from views import CHAT, GLASS, NEW, PANELS, REPORT, VIEWS, wrong_with

import refimpl
from refimpl.decode.prefixes import Prefixes
from refimpl.decode.sampling import Sampling
from refimpl.lab.compare.compare import compare
from refimpl.lab.compare.known_bugs import BUGS, inject
from refimpl.lab.compare.record import trace
from refimpl.lab.compare.reports.page import as_html
from refimpl.lab.glass.packing import packed
from refimpl.lab.glass.record import record as looked_at
from refimpl.lab.glass.written import write
from refimpl.serve.engine import Engine
from refimpl.serve.page.files import in_one_file
from refimpl.serve.scheduler import Busy, Scheduler
from refimpl.text.prompt import Encoded

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (pip install '.[page]')")
axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe is not installed (pip install '.[page]')")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on this machine")
DESK, PHONE, SMALL = {"width": 1280, "height": 800}, {"width": 390, "height": 844}, {"width": 360, "height": 640}
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
            page.on("console", lambda line: wrong.append(line.text) if line.type == "error" and "Failed to load" not in line.text else None)
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


def seeing(model, *scripts):
    """One that takes pictures."""
    engine = scripted(model, *scripts)
    engine.tokenizer = engine.model.tokenizer = with_markers(tokenizer_and_metadata()[1])
    engine.projector = Eyes()
    engine.projector.sees = True
    return engine


def send(page, text):
    page.fill("#message", text)
    page.keyboard.press("Enter")


def begun(page):
    """An answer of scripted words has come to its second."""
    page.locator(".assistant .body", has_text="two").wait_for()


def answered(page):
    page.locator(".message.assistant .tools:not([hidden])").last.wait_for()


def accessible(page, where):
    found = axe.Axe().run(page, options={"resultTypes": ["violations"]}).response["violations"]
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
    for panel in page.locator("#panel").all():
        assert panel.evaluate(COLLIDING) == [], where


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
        begun(page)
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
        page.route("**/v1/chat/completions", lambda route: route.continue_(headers={"content-type": "application/json"}), times=1)
        send(page, "and now?")
        page.locator("#key").wait_for()
        page.keyboard.press("Escape")
        page.keyboard.press("Escape")                           # Chromium closes at the second one, whatever a page wants
        page.locator("#key").fill("secret")
        page.get_by_role("button", name="Use it").click()
        page.locator("article").nth(3).locator(".body", has_text="ok").wait_for()


def test_a_picture_is_sent_and_what_the_model_does_not_take_is_refused(model, new_page, tmp_path):
    PIL.Image.fromarray(np.zeros((48, 48, 3), np.uint8)).save(tmp_path / "black.png")
    (tmp_path / "letter.txt").write_text("x")
    engine = seeing(model, "a cat")
    with on_a_port(engine) as (url, _):
        page = new_page(url)
        page.locator("input[type=file]").set_input_files([tmp_path / "black.png", tmp_path / "letter.txt"])
        page.locator(".failed", has_text="letter.txt: neither").wait_for()
        assert page.locator(".shelf img").count() == 1
        send(page, "what is it?")
        answered(page)
        assert len(engine.projector.shown) == 1 and page.locator(".user img").get_attribute("alt") == "black.png"


def test_files_that_are_not_what_they_are_called(model, new_page, tmp_path):
    PIL.Image.new("RGB", (10_000, 1)).save(tmp_path / "wide.png")
    PIL.Image.new("RGB", (1, 10_000)).save(tmp_path / "high.png")
    (tmp_path / "letter.txt").write_text("x")
    (tmp_path / "renamed.png").write_text("only text")
    engine = seeing(model, "odd")
    with on_a_port(engine) as (url, _):
        page = new_page(url, SMALL)
        names = "letter.txt", "renamed.png", "wide.png", "high.png"
        page.locator("input[type=file]").set_input_files([tmp_path / name for name in names])
        page.locator(".shelf li").nth(1).wait_for()
        said = page.locator("#composer .failed").inner_text()
        assert "letter.txt: neither" in said and "renamed.png: cannot be read" in said
        for box in (page.locator(".shelf img").nth(i).bounding_box() for i in (0, 1)):
            assert 6 < box["width"] < SMALL["width"] and 6 < box["height"] < 100
        tidy(page, "shelf")
        page.locator(".shelf").get_by_role("button", name="Remove wide.png").click()
        send(page, "what is it?")
        answered(page)
        assert len(engine.projector.shown) == 1 and page.locator(".user img").bounding_box()["width"] >= 6
        tidy(page, "a high picture")


HOSTILE = {"quotes": ">" * 5000 + " x", "lists": "- " * 3000 + "x", "emphasis": "*a **b _c " * 900,
           "brackets": "[" * 9000 + "](http://a.b)", "blanks": "a | b\n" + " " * 60_000 + "x", "fences": "```" * 2000, "word": "x" * 20_000,
           "rtl": "שלום \u202eעולם"}


def test_no_text_hangs_the_page_or_breaks_it(model, new_page):
    with on_a_port(scripted(model, "x")) as (url, _):
        page = new_page(url, SMALL)
        page.set_default_timeout(10_000)
        texts = iter(HOSTILE.values())

        def answer(route):
            body = json.dumps({"choices": [{"delta": {"content": next(texts)}, "token_ids": [5]}]})
            route.fulfill(body=f"data: {body}\n\ndata: [DONE]\n\n")
        page.route("**/v1/chat/completions", answer)
        for n, (name, text) in enumerate(HOSTILE.items()):
            send(page, text[:9000])
            page.locator("article.assistant").nth(n).locator(".tools:not([hidden])").wait_for()
            body = page.locator(".assistant .body").last
            assert body.locator("*").count() < 6000 and body.inner_text().strip(), name
            tidy(page, name)
        assert body.locator("p").first.evaluate("e => getComputedStyle(e).direction") == "rtl"


GROWS = """async ([text, cuts]) => {
  const { Growing } = await import('/page/markdown.js');
  const whole = document.createElement('div'), grown = document.createElement('div');
  new Growing(whole).show(text);
  const growing = new Growing(grown), touched = [];
  const observer = new MutationObserver(() => {});
  observer.observe(grown, {childList: true, characterData: true, subtree: true});
  for (const cut of cuts) {
    growing.show(text.slice(0, cut));
    const nodes = observer.takeRecords().flatMap(r => r.type === 'childList' ? [...r.addedNodes, ...r.removedNodes] : [r.target]);
    touched.push(nodes.reduce((sum, node) => sum + 1 + (node.querySelectorAll?.('*').length ?? 0), 0));
  }
  return [whole.innerHTML, grown.innerHTML, touched];
}"""
PIECES = ["# A", "### C\n", "\n", "\n\n", "- a", "* b\n", "1", ". c\n", "  text", "> q\n", "```", "```py\n", "code\n", "|a|b|\n", "|-|-|\n",
          "**bold** `x`", "_i", " ", "---", "~~~\n", "[l](http://x)", "\\| "]


def test_a_text_that_grows_is_what_it_is_at_once(model, new_page):
    """Whatever its pieces are, and wherever they are cut; and each new piece touches as much at the end as at the beginning."""
    random = np.random.default_rng(3)
    with on_a_port(scripted(model, "x")) as (url, _):
        page = new_page(url)
        for _ in range(60):
            text = "".join(random.choice(PIECES, 40))
            cuts = [*sorted(random.integers(0, len(text), 25).tolist()), len(text)]
            whole, grown, _ = page.evaluate(GROWS, [text, cuts])
            assert grown == whole, (text, cuts)
        part = "Some **bold** text of a line.\n\n- an item\n- and another\n\n```python\n" + "x = 1\n" * 40 + "```\n\n"
        text = part * 30
        _, _, touched = page.evaluate(GROWS, [text, list(range(0, len(text), 7))])
        third = len(touched) // 3
        assert max(touched[-third:]) <= max(touched[:third]) < 60


def test_what_is_being_edited_outlives_an_answer_and_need_not_wait(model, new_page):
    engine = scripted(model, "one two three four five", stall_after=3)
    with on_a_port(engine) as (url, _):
        page = new_page(url)
        send(page, "first")
        begun(page)
        page.get_by_role("button", name="Edit").click()
        box = page.get_by_label("Change the message")
        box.fill("changed")
        page.locator("#composer .stop").click()
        page.locator(".meta", has_text="stopped").wait_for()
        assert box.input_value() == "changed"
        page.get_by_role("button", name="Leave it").click()
        page.get_by_role("button", name="Regenerate").click()
        begun(page)
        page.get_by_role("button", name="Edit").click()
        box.fill("changed while it writes")
        engine.stall_after = None
        page.locator(".user .main").click()
        page.locator(".assistant .body", has_text="five").wait_for()
        answered(page)
        assert "changed while it writes" in engine.prompt and page.locator("article").count() == 2 and len(engine.requests) == 3


def test_dialogs_have_their_own_escape(model, new_page):
    engine = scripted(model, "one two three four five", stall_after=3)
    with on_a_port(engine) as (url, _):
        page = new_page(url)
        send(page, "first")
        begun(page)
        page.get_by_role("button", name="Settings").click()
        page.get_by_label("Top-k").fill("7")
        page.keyboard.press("Escape")
        assert page.locator("#composer .stop").is_visible() and not engine.cancelled
        page.get_by_role("button", name="Settings").click()
        assert page.get_by_label("Top-k").input_value() == "", "what was not taken is not shown as if it were"


def test_chats_of_two_tabs_and_of_one_that_was_closed(model, new_page):
    engine = scripted(model, "one two three four five")
    with on_a_port(engine) as (url, _):
        first = new_page(url)
        second = first.context.new_page()
        second.goto(url)
        for page, text in ((first, "from the first"), (second, "from the second")):
            send(page, text)
            answered(page)
        for page in (first, second):
            page.locator("#side .chat", has_text="from the first").wait_for()
            page.locator("#side .chat", has_text="from the second").wait_for()
        second.locator("#side .chat", has_text="from the first").click()
        send(second, "and more")
        first.locator("article").nth(3).locator(".body", has_text="five").wait_for()
        engine.stall_after = 3
        first.bring_to_front()                                  # what is hidden is drawn when it is looked at again
        send(first, "cut short")
        first.locator("article").nth(5).locator(".body", has_text="two").wait_for()
        first.reload()
        first.locator("#side .chat", has_text="from the first").click()
        assert first.locator(".said").last.inner_text() == "cut short" and "two" in first.locator(".assistant .body").last.inner_text()
        first.get_by_label("Delete from the first").click()
        second.wait_for_function("document.querySelectorAll('#side .chat').length === 2")
        assert first.locator("#side .chat").all_inner_texts() == ["from the second"]


def test_a_chat_is_deleted_while_it_is_written(model, new_page):
    with on_a_port(scripted(model, "one two three four five", stall_after=3)) as (url, _):
        page = new_page(url)
        send(page, "first")
        begun(page)
        page.get_by_label("Delete first").focus()
        page.keyboard.press("Enter")
        assert page.locator("#side button").count() == 2 and page.locator("#composer .stop").is_hidden()
        assert page.evaluate("document.activeElement.closest('#side') !== null"), "a keyboard is still where it was"
        page.reload()
        page.locator("#side .chat").first.wait_for()            # the list is drawn after the page is there
        assert page.locator("#side .chat").all_inner_texts() == ["New chat"]


FORBIDDEN = """for (const name of ['localStorage', 'sessionStorage'])
  Object.defineProperty(window, name, { get() { throw new DOMException('no', 'SecurityError'); } })"""
TIGHT = """const set = Storage.prototype.setItem;
Storage.prototype.setItem = function (key, value) {
  if (value.length > 3000) throw new DOMException('full', 'QuotaExceededError');
  return set.call(this, key, value);
}"""


@pytest.mark.parametrize(("script", "kept"), [(FORBIDDEN, []), (TIGHT, ["third"])], ids=["forbidden", "full"])
def test_out_of_storage(model, new_page, script, kept):
    """The oldest chats give way; where there is no room at all it is said, and everything else works."""
    with on_a_port(scripted(model, "words " * 120), api_key="schlüssel") as (url, _):
        page = new_page("about:blank")
        page.add_init_script(script)
        page.goto(url)
        page.locator("#key").fill("schlüssel")
        page.get_by_role("button", name="Use it").click()
        for text in ("first", "second", "third"):
            page.get_by_role("button", name="New chat").first.click()
            send(page, text)
            answered(page)
        assert page.locator("#side .chat").count() == 3 and page.locator(".unkept-note").is_visible() == (not kept)
        page.reload()
        if kept:
            assert page.locator("#side .chat").all_inner_texts()[1:] == kept


def test_a_server_that_goes_and_comes_back(model, new_page):
    engine = scripted(model, "one two three four five", stall_after=3)
    with on_a_port(engine) as (url, port):
        page = new_page(url)
        cut = 'data: {"choices": [{"delta": {"content": "cut o"}}]}\n\n'
        page.route("**/v1/chat/completions", lambda route: route.fulfill(body=cut), times=1)
        send(page, "first")
        page.locator(".failed", has_text="broke off").wait_for()             # although it ended as if it were whole
        send(page, "second")
        begun(page)
    page.locator(".failed", has_text="broke off").nth(1).wait_for()
    send(page, "third")
    page.locator(".failed", has_text="does not answer").wait_for()
    engine.stall_after = None
    with on_a_port(engine, use=port):
        send(page, "fourth")
        page.locator("article").nth(7).locator(".body", has_text="five").wait_for()
        answered(page)
    assert "third" in engine.prompt and "<|turn>model\n<turn|>" not in engine.prompt, "an answer that never came is not part of the talk"


def test_code_is_copied_with_and_without_a_clipboard(model, new_page):
    with on_a_port(scripted(model, "```\na = 1\n```")) as (url, _):
        page = new_page(url)
        send(page, "code")
        answered(page)
        for before in ("navigator.clipboard.writeText = () => Promise.reject(new Error('denied'))",
                       "Object.defineProperty(navigator, 'clipboard', { value: undefined })"):
            page.evaluate(f"void ({before})")
            page.locator(".code .copy").click()
            page.locator(".code .copy", has_text="Copied").wait_for()
            page.locator(".code .copy", has_text="Copy").wait_for()
            page.fill("#message", "")
            page.keyboard.press("Control+V")
            assert page.locator("#message").input_value().strip() == "a = 1"


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
        tidy(page, name)
    accessible(page, "weights that are asked for")
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


def test_blocks_of_weights_come_in_any_order_and_a_keyboard_on_the_screen_takes_no_focus(live, new_page):
    page = new_page(live)
    send(page, "x = 1")
    answered(page)
    page.get_by_role("button", name="Look inside").click()
    page.locator("#tab-block").click()
    page.locator("#panel .bytes").wait_for()
    page.route("**/glass/block", lambda route: (page.wait_for_timeout(600), route.continue_()), times=1)
    for name in ("blk.0.attn_q.weight", "blk.1.attn_k.weight"):
        with page.expect_request("**/glass/block"):
            page.get_by_label("Tensor").select_option(name)
    page.wait_for_timeout(900)
    rows = page.locator("#panel .note").first.inner_text()
    assert "of 64," in rows, f"what was asked for last is shown: {rows}"
    page.get_by_label("Row", exact=True).focus()
    page.set_viewport_size({**DESK, "height": 500})
    page.wait_for_timeout(400)
    assert page.evaluate("document.activeElement.type") == "number"


GROWN = """async ([short, long]) => {
  const { Glass } = await import('/page/glass.js');
  const pane = document.createElement('aside'), text = document.createElement('div');
  document.body.append(text, pane);
  const glass = new Glass(pane, null);
  text.append(glass.show(short));
  const found = [];
  for (const tab of pane.querySelectorAll('[role=tab]')) {
    tab.click();
    glass.show(short);
    text.replaceChildren(glass.show(short));
    const chosen = pane.querySelector('#panel input, #panel select') || pane.querySelector('[aria-selected=true][role=tab]');
    chosen.focus();
    const observer = new MutationObserver(() => {});
    observer.observe(text, {childList: true, characterData: true, subtree: true});
    glass.show(long, true, true);
    const nodes = observer.takeRecords().flatMap(r => [...r.addedNodes, ...r.removedNodes]);
    found.push([tab.textContent, document.activeElement === chosen, nodes.length, text.querySelectorAll('.tok').length, glass.t]);
    glass.touched = false;
  }
  return found;
}"""


def test_a_text_that_is_looked_at_grows_in_place(record, model, live, new_page):
    """Whatever has the focus keeps it, and only the new tokens are made; the place follows the text."""
    n = len(record["ids"])
    short = json.loads(json.dumps(looked_at(model, record["ids"][:-12], record["n_prompt"])))
    found = new_page(live).evaluate(GROWN, [short | {"written": record["written"]}, json.loads(json.dumps(record))])
    assert [each[0] for each in found] == ["Likely", "Drafting", "Experts", "Attention", "Layers", "Reading", "Weights"]
    assert all(each[1:] == [True, 14, n, n - 1] for each in found), found


def test_a_picture_is_looked_into(model, new_page, tmp_path):
    """Rows that are no tokens are called what they are, and see as far as they did."""
    eyes, picture = refimpl.load_projector(None, model), tmp_path / "picture.png"
    PIL.Image.fromarray(np.random.default_rng(2).integers(0, 255, (96, 96, 3), np.uint8)).save(picture)
    engine = Engine(Scheduler(model, Prefixes(model, 1 << 28), 2048))
    engine.projector = eyes
    with on_a_port(engine) as (url, _):
        page = new_page(url)
        page.locator("input[type=file]").set_input_files(picture)
        page.locator(".shelf img").wait_for()
        send(page, "# what is it?")
        answered(page)
        page.get_by_role("button", name="Look inside").click()
        soft = page.locator(".tok[aria-label*='of a picture']")
        soft.first.wait_for()
        n = soft.count()
        assert n > 4
        soft.nth(2).click()
        assert f"row 3 of {n} of a picture or sound" in page.locator(".which").inner_text()
        assert "could have written" not in page.locator(".which").inner_text()
        assert "no token of the vocabulary" in page.locator("#panel .note").inner_text()
        soft.nth(3).click()
        for name in PANELS:
            page.locator(f"#tab-{name}").click()
            tidy(page, name)
        page.locator("#tab-reading").click()
        assert "came out of a tower" in page.locator("#panel .note").first.inner_text()
        page.locator("#tab-attention").click()
        said = page.locator(".side .note").all_inner_texts()
        ahead = model.config.looks_ahead_in_images
        assert ("whose rows see each other" in said[0]) == ahead and "It sees all places" in said[1], said
    engine.close()


def test_a_sound_is_heard_and_looked_into(model, new_page, tmp_path, monkeypatch):
    """With a random tower for the built-in model: it can be played, its rows are no tokens, and it is heard from the left."""
    import shapes
    import soundfile
    from tower_models import random_towers, save_towers

    monkeypatch.setitem(shapes.COMMON, "hidden_size", model.config.n_embd)
    ears = refimpl.load_projector(save_towers(tmp_path / "towers", random_towers("small")), model)
    t = np.arange(16_000) / 16_000
    soundfile.write(tmp_path / "tone.wav", 0.3 * np.sin(2000 * t), 16_000)
    (tmp_path / "renamed.wav").write_text("only text")
    engine = Engine(Scheduler(model, Prefixes(model, 1 << 28), 2048))
    engine.projector = ears
    with on_a_port(engine) as (url, _):
        page = new_page(url)
        page.locator("input[type=file]").set_input_files(tmp_path / "renamed.wav")
        page.locator(".shelf audio").wait_for()
        send(page, "# what is it?")
        page.locator(".failed", has_text="no sound").wait_for()
        page.get_by_role("button", name="New chat", exact=True).click()
        page.locator("input[type=file]").set_input_files(tmp_path / "tone.wav")
        page.locator(".shelf audio").wait_for()
        send(page, "# what is it?")
        answered(page)
        heard = page.locator(".user audio")
        assert heard.get_attribute("aria-label") == "tone.wav" and heard.evaluate("e => e.error") is None
        assert abs(heard.evaluate("e => e.duration") - 1) < 0.05
        page.get_by_role("button", name="Look inside").click()
        soft = page.locator(".tok[aria-label*='of a picture or sound']")
        soft.first.wait_for()
        assert soft.count() == 25, "one a 40 ms"
        soft.nth(2).click()
        assert "row 3 of 25 of a picture or sound" in page.locator(".which").inner_text()
        for name in PANELS:
            page.locator(f"#tab-{name}").click()
            tidy(page, name)
        accessible(page, "a sound in the glass")
        page.locator("#tab-attention").click()
        assert not any("whose rows see each other" in said for said in page.locator(".side .note").all_inner_texts())
    engine.close()


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


# ---- reports

@pytest.fixture(scope="module")
def report():
    """Makes a page of a comparison that departs, with another engine's file of a name."""
    reference = refimpl.load(backend="reference")
    ids = reference.tokenizer.encode("def main():\n    pass")
    ours = trace(reference, ids)
    with inject(BUGS["values not normalised"]):
        wrong = dict(trace(reference, ids).arrays)
    return lambda name: as_html(compare(ours, dataclasses.replace(ours, where=name, arithmetic="float32", arrays=wrong)))


@pytest.mark.parametrize(("viewport", "scheme"), [(DESK, "dark"), (SMALL, "light")], ids=["dark", "phone"])
def test_a_comparison_as_a_page(report, new_page, tmp_path, viewport, scheme):
    file = tmp_path / "report.html"
    file.write_text(report("<script>" + "long" * 40 + ".npz"), encoding="utf-8")
    page = new_page("about:blank", viewport, scheme)
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(file.as_uri())
    if scheme == "dark":
        page.locator("summary").click()
    accessible(page, "report")
    tidy(page, "report")
    assert page.locator("figure img").is_visible() and page.locator("td.first").count() == 1
    paper = "rgb(21, 24, 28)" if scheme == "dark" else "rgb(255, 255, 255)"
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == paper
    assert [url for url in asked if not url.startswith("data:")] == [file.as_uri()]


# ---- views: compared with stored pictures and geometry; UPDATE_SCREENSHOTS=1 writes them anew

ANSWER = """Yes. **Each** token is drawn, as *probabilities* say; see [the paper](https://example.org/).

## In code

```python
def draw(p):
    return min(range(len(p)), key=lambda i: -p[i])
```

> A quote.

| temperature | what comes |
|---|---|
| 0 | the likeliest |
"""
BREAKS = {"chat": [("#side { width: 10rem }", "#side"), (":root { --ink: #333 }", "h1"), (".code { border: 0 }", ".code")],
          "glass-likely": [(".bars li { display: block }", ".bars"), ("#glass { width: 60% }", "#glass"),
                           (".tok.s5 { background: none }", ".s5"), (".bars .came .filled { background: lime }", ".filled"),
                           ("body { filter: invert(1) }", "blocks")]}


@pytest.fixture
def view(new_page, model, record, report, tmp_path):
    """Opens one: (page, what is looked at)."""
    with contextlib.ExitStack() as stack:
        def opened(name):
            kind, _, rest = name.partition("-")
            viewport, scheme = SMALL if rest == "phone" else DESK, "dark" if rest == "dark" else "light"
            if kind == "chat":
                url, _ = stack.enter_context(on_a_port(scripted(model, ANSWER)))
                page = new_page(url, viewport, scheme)
                page.evaluate("localStorage.setItem('refimpl.settings', JSON.stringify({ seed: 7 }))")
                page.reload()
                send(page, "How does a model choose its next word?")
                answered(page)
                page.locator("h1").click()
                page.locator("#main").evaluate("box => { box.scrollTop = 0; }")
                return page, CHAT
            file = tmp_path / "view.html"
            steady = json.loads(json.dumps(record))
            steady["read"] |= {"seconds": [0.001 * (1 + i) for i in range(len(steady["read"]["parts"]))], "bandwidth": 2e10}
            for done in steady["written"]["rounds"]:
                done |= {"draft_ms": 1.0, "verify_ms": 4.0}
            file.write_text(in_one_file(steady, "a run") if kind == "glass" else report("theirs.npz"), encoding="utf-8")
            page = new_page(file.as_uri(), viewport, scheme)
            if kind == "glass":
                page.locator(f"#tok-{record['n_prompt'] + 9}").click()
                page.locator("#tab-attention").click()
            return page, GLASS if kind == "glass" else REPORT
        yield opened


@pytest.mark.parametrize("name", [name for name in VIEWS if name.removeprefix("glass-") not in PANELS])
def test_a_view_is_the_stored_one(view, name):
    assert wrong_with(*view(name), name) == []


def test_panels_are_the_stored_ones(view):
    page, selectors = view("glass")
    for name in PANELS:
        page.locator(f"#tab-{name}").click()
        assert wrong_with(page, selectors, f"glass-{name}") == []


@pytest.mark.skipif(NEW, reason="views are being written")
@pytest.mark.parametrize("name", BREAKS)
def test_a_broken_style_is_seen(view, name):
    page, selectors = view(name)
    for tab in page.locator("#tab-likely").all():
        tab.click()
    for rule, where in BREAKS[name]:
        n = page.evaluate("rule => { const sheet = document.styleSheets[0]; return sheet.insertRule(rule, sheet.cssRules.length); }", rule)
        assert any(where in each for each in wrong_with(page, selectors, name)), rule
        page.evaluate("n => document.styleSheets[0].deleteRule(n)", n)
