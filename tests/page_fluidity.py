"""How smoothly the page writes: `python tests/page_fluidity.py [TOKENS]`. By hand; it needs Chromium and playwright, and a quiet machine.

A script writes Python of so many tokens, 100 a second; the box is closed, then open, and the built-in model is looked into. Said are the
times between frames, the tasks of more than 50 ms that kept the page from drawing one, and what Chromium's main thread computed.
"""

import asyncio
import shutil
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright
from serving import FakeAnswer, FakeEngine, on_a_port

import refimpl
from refimpl.decode.prefixes import Prefixes
from refimpl.serve.engine import Engine
from refimpl.serve.scheduler import Scheduler

PER_SECOND = 100
COUNTED = "TaskDuration", "ScriptDuration", "LayoutDuration", "RecalcStyleDuration"           # the first one has the others in it
WATCH = """() => {
  window.frames_ms = []; window.tasks_ms = [];
  new PerformanceObserver(list => tasks_ms.push(...list.getEntries().map(each => each.duration))).observe({type: 'longtask'});
  let before = performance.now();
  const frame = now => { frames_ms.push(now - before); before = now; requestAnimationFrame(frame); };
  requestAnimationFrame(frame);
}"""


class Paced(FakeEngine):
    """Writes a text at a speed, and lets a real engine look at it."""

    def __init__(self, engine: Engine, text: str):
        super().__init__(text)
        self.engine, self.model, self.aside = engine, engine.model, engine.aside

    async def submit(self, request):
        """An answer that waits between its tokens."""
        answer = await super().submit(request)
        return PacedAnswer(self, request, self.scripts[0]) if answer else answer


class PacedAnswer(FakeAnswer):
    """One token, a pause, the next one."""

    async def __aiter__(self):
        """The events of the script."""
        async for event in super().__aiter__():
            yield event
            await asyncio.sleep(1 / PER_SECOND)


def metrics(session) -> dict[str, float]:
    """Chromium's own counters."""
    return {each["name"]: each["value"] for each in session.send("Performance.getMetrics")["metrics"]}


def main(n_tokens: int):
    """Prints a line without the box, and one with it."""
    model = refimpl.load()
    text = "\n".join(path.read_text() for path in sorted(Path(refimpl.__file__).parent.rglob("*.py")))
    text = model.tokenizer.decode(model.tokenizer.encode(text[:20 * n_tokens], bos=False)[:n_tokens])
    engine = Engine(Scheduler(model, Prefixes(model, 1 << 28), 2048))
    with on_a_port(Paced(engine, text)) as (url, _), sync_playwright() as started:
        chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))))
        browser = started.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for is_open in (False, True):
            page = browser.new_page(viewport={"width": 1280, "height": 800})
            page.add_init_script("localStorage.setItem('refimpl.settings', JSON.stringify({ max_tokens: 4000 }))")
            page.goto(url + ("#glass" if is_open else ""))
            page.fill("#message", "# code")
            page.evaluate(WATCH)
            looks = []
            page.on("request", lambda request, looks=looks: looks.append(request) if "inspect" in request.url else None)
            session = page.context.new_cdp_session(page)
            session.send("Performance.enable", {"timeDomain": "threadTicks"})         # processor time, whoever else is running
            before = metrics(session)
            page.keyboard.press("Enter")
            page.locator(".message.assistant .tools:not([hidden])").last.wait_for(timeout=300_000)
            frames, tasks = page.evaluate("[frames_ms.slice(1), tasks_ms]")
            frames.sort()
            used = {name: value - before[name] for name, value in metrics(session).items()}
            half, most = frames[len(frames) // 2], frames[len(frames) * 99 // 100]
            n = page.locator(".meta").last.inner_text().split()[0]
            state = "open" if is_open else "closed"
            print(f"glass {state}: {n} tokens, {len(looks)} looks, {len(frames)} frames; half within {half:.1f} ms, 99 of 100 within "
                  f"{most:.1f} ms, longest {frames[-1]:.0f} ms; {len(tasks)} tasks of more than 50 ms, together {sum(tasks):.0f} ms")
            print("processor seconds:", ", ".join(f"{name} {used[name]:.2f}" for name in COUNTED), flush=True)
            page.close()
        browser.close()
    engine.close()


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 1990)
