"""A trial of `refimpl judge` on models, texts and engines that its limits were not chosen by. Run by hand:

    python tests/judge_trial.py right PATH/TO/llama-server FIRST N     # llama-server as it is: N random models from seed FIRST on
    python tests/judge_trial.py wrong PATH/TO/llama-server FIRST N     # llama-server with one setting wrong
    python tests/judge_trial.py bugs FIRST N                           # known bugs in our forward pass, which rounds to 8 bits

Every seed makes another model (shape, width, window, type of the weights; every sixth is the built-in one), other texts and other options.
Prints a line a run and a count at the end. refimpl/lab/judge/README.md says what came out.
"""

import random
import sys
import tempfile
from pathlib import Path
from unittest import mock

from endpoints import LlamaServer
from judge_llama_server import llama_server
from shapes import SHAPES, random_model, write_model

from refimpl.lab.compare.known_bugs import BUGS, K_QUANTS, MOE, PLE, inject
from refimpl.lab.compare.tolerance import judge as exact_model
from refimpl.lab.judge import ask
from refimpl.lab.judge.http import Http
from refimpl.lab.judge.judge import QUESTIONS, collect, judge
from refimpl.lab.judge.verdicts.verdict import DEPARTS
from refimpl.loading.model import BUILT_IN, load
from refimpl.text.templates import GEMMA4_TEMPLATE

PROMPTS = ask.prompts()
NARROW = ("Q4_0", "Q8_0", "Q5_0", "Q4_1", "BF16", "F16", "IQ4_NL", "Q5_1")
WIDE = ("Q4_K", "Q6_K", "Q5_K", "Q3_K", "Q4_0", "Q8_0")
RIGHT_OPTIONS = (["-np", "1", "--no-cache-prompt"], ["-np", "4"], ["-np", "4", "-fa", "off"], ["-np", "2", "--swa-full"],
                 ["-np", "1", "-ctk", "q8_0", "-ctv", "q8_0"], ["-np", "1", "-ub", "64"], ["-np", "2", "--no-kv-unified"])
WINDOW, BASE = "gemma4.attention.sliding_window=int:{}", "gemma4.rope.freq_base{}=float:{}"
SAID = {                    # the wrong settings: what a file would have to say for them; {window} is its own
    "window one too long": WINDOW.format("{window}+1"), "window one too short": WINDOW.format("{window}-1"),
    "window twice as long": WINDOW.format("{window}*2"), "RoPE base of sliding layers 2e4": BASE.format("_swa", 2e4),
    "RoPE base of full layers 1e5": BASE.format("", 1e5), "soft cap 25": "gemma4.final_logit_softcapping=float:25",
    "soft cap 60": "gemma4.final_logit_softcapping=float:60", "epsilon 1e-2": "gemma4.attention.layer_norm_rms_epsilon=float:0.01",
}
OTHER_SETTINGS = {"keys and values in 4 bits": ["-ctk", "q4_0", "-ctv", "q4_0"]}
LINES = [
    "He counted {n} geese over the reservoir before the rain came back.\n", "let total_{n} = items.iter().map(|x| x.price * {n}).sum();\n",
    "SELECT name, {n} AS rank FROM towns WHERE height > {n}00 ORDER BY name;\n", "{n}) Le facteur passait vers {n} heures, sans un mot.\n",
    "<li class=\"row-{n}\"><a href=\"/page/{n}\">no. {n}</a></li>\n", "Theorem {n}. Every such map has a fixed point; see (1.{n}).\n",
    "if __name__ == '__main__':\n    main({n})\n", "\t{n}\tmolto allegro, poi più lento\n", "Прошло {n} дней, а письма всё не было.\n"]


def texts(seed):
    """Other prompts: pieces of other lines, in another order, of other lengths."""
    chance = random.Random(seed)
    made = {}
    for name in range(9):
        lines = [line.replace("{n}", str(chance.randint(2, 999))) for line in chance.choices(LINES, k=chance.randint(1, 4))]
        made[f"text {name}"] = "".join(lines)[:chance.randint(3, 240)]
    return PROMPTS | {"texts": made, "lines": chance.sample(LINES, len(LINES))}


def model_file(seed, folder, kind=None):
    """(name, path) of the model of a seed. `kind`: of known bugs that it has to show."""
    chance = random.Random(f"model {seed}")
    if kind == MOE and seed % 2 == 0 or kind is None and seed % 6 == 0:
        return "built-in", str(BUILT_IN)
    shape = {None: list(SHAPES)[seed % 5], MOE: "26B-A4B", PLE: ("E2B", "E4B")[seed % 2], K_QUANTS: "26B-A4B"}[kind]
    wide = kind == K_QUANTS or kind is None and chance.random() < 0.4
    block = {K_QUANTS: "Q4_K", MOE: "Q4_0"}[kind] if kind in (K_QUANTS, MOE) else chance.choice(WIDE if wide else NARROW)
    sizes = {"hidden_size": 256, "intermediate_size": 256} if wide else {}
    if shape == "E4B":
        sizes["num_kv_shared_layers"] = 6           # llama.cpp takes the last two layers with keys for a sliding and a full one
    made = random_model(shape, seed=seed, head_dim=32, global_head_dim=64, sliding_window=chance.choice((24, 32, 48)), **sizes)
    path = write_model(folder / f"{seed}.gguf", made, block, {"tokenizer.chat_template": GEMMA4_TEMPLATE})
    return f"random {shape} {made.config.hidden_size} wide, {block}", str(path)


def window_of(model):
    """The sliding window's length."""
    return next(layer.window for layer in model.config.layers if layer.window)


def behind_llama_server(binary, path, options, questions, kv="f16"):
    """A function of the exact model that gives the judgement."""
    def made(model):
        with llama_server(binary, path, [part.replace("{window}", str(window_of(model))) for part in options]) as url:
            end, found = collect(Http(url), model, questions=questions)
        return judge(end, found, model, questions=questions, kv_type=kv)
    return made


def with_bug(bug, path):
    """The same for a bug in our own pass; the judge's own run has none."""
    def made(model):
        with inject(bug):
            end, found = collect(LlamaServer(load(path, backend="reference", arithmetic="q8"), native=True), model,
                                 questions=("probabilities", "window"))
        return judge(end, found, model, questions=("probabilities", "window"))
    return made


def right_runs(binary, seeds, folder):
    """(name, what is run) of each."""
    for seed in seeds:
        name, path = model_file(seed, folder)
        options = RIGHT_OPTIONS[seed % len(RIGHT_OPTIONS)]
        kv = "q8_0" if "-ctk" in options and seed % 2 else "f16"
        yield f"{seed} {name}, {' '.join(options)}, --kv {kv}", path, behind_llama_server(binary, path, options, QUESTIONS, kv), seed


def wrong_runs(binary, seeds, folder):
    """The same, every wrong setting on the model of every seed."""
    for seed in seeds:
        name, path = model_file(seed, folder)
        window = window_of(exact_model(path, threads=1))
        for what, said in SAID.items():
            key, value = said.replace("{window}", str(window)).split(":")
            options = ["-np", "1", "--override-kv", f"{key}:{eval(value)}"]
            yield f"{seed} {name}, {what}", path, behind_llama_server(binary, path, options, QUESTIONS[:5]), seed
        for what, options in OTHER_SETTINGS.items():
            yield f"{seed} {name}, {what}", path, behind_llama_server(binary, path, ["-np", "1", *options], QUESTIONS[:5]), seed


def bug_runs(seeds, folder):
    """The same for known bugs, every one on the models of every seed."""
    for name, bug in BUGS.items():
        if not bug.first.startswith("draft"):
            for seed in seeds:
                on, path = model_file(seed, folder, bug.on)
                yield f"{seed} {on}, {name}", path, with_bug(bug, path), seed


def main(what, *rest):
    """Runs all."""
    first, n = map(int, rest[-2:])
    seeds, counted = range(first, first + n), {"departs": 0, "other bits": 0, "neither": 0}
    with tempfile.TemporaryDirectory() as folder:
        runs = {"right": right_runs, "wrong": wrong_runs, "bugs": bug_runs}[what](*rest[:-2], seeds, Path(folder))
        for name, path, run, seed in runs:
            with mock.patch.object(ask, "prompts", lambda seed=seed: texts(seed)):
                result = run(exact_model(path, threads=1))
            departs = [v for v in result.verdicts if v.answer == DEPARTS]
            bits = [v for v in departs if v.question in ("again", "company") and "other bits" in v.evidence]
            outcome = "departs" if len(departs) > len(bits) else "other bits" if bits else "neither"
            counted[outcome] += 1
            figures = {v.question: round(v.figures["level"], 3) for v in result.verdicts if "level" in v.figures}
            print(f"{outcome:10} {name}: {figures}", *(f"\n    {v.question}: {v.evidence} ({v.basis})" for v in departs if v not in bits),
                  flush=True)
    print(counted)


if __name__ == "__main__":
    main(*sys.argv[1:])
