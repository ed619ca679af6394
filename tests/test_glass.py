"""The record of a text has the numbers of the run that wrote it, and the page that shows it is whole and loads nothing."""

import asyncio
import base64
import hashlib
import html.parser
import json
import re
from pathlib import Path

import hypothesis.extra.numpy as arrays
import hypothesis.strategies as st
import numpy as np
import pytest
import views
from cli import run
from hypothesis import given, settings
from serving import FakeEngine, chunks, client, get, post
from shapes import prompt, random_model, write_model

import refimpl
from refimpl.decode.prefixes import Nothing, Prefixes
from refimpl.decode.request import DRAFTER, REPEAT, Request
from refimpl.decode.run import Run, step
from refimpl.decode.sampling import Sampling
from refimpl.formats.gguf import open_gguf
from refimpl.formats.quants.blocks import BLOCKS, fields_of
from refimpl.formats.quants.codecs import DEQUANTIZABLE, dequantize
from refimpl.lab.bench.bandwidth import weight_bytes
from refimpl.lab.explain.attention_maps import attention_maps
from refimpl.lab.explain.experts import route
from refimpl.lab.glass import reading, record, taken_apart
from refimpl.lab.glass.anatomy import explained
from refimpl.lab.glass.attending import FEWEST, MOST, places
from refimpl.lab.glass.lens import chosen_layers
from refimpl.lab.glass.packing import FRACTION, largest, packed
from refimpl.loading.model import BUILT_IN, Model
from refimpl.model.soft import Soft, SoftTokens
from refimpl.model.tap import no_tap
from refimpl.reference.ops import softmax
from refimpl.serve.engine import Engine
from refimpl.serve.page.files import FOLDER, in_one_file, one_script, read_file
from refimpl.serve.scheduler import Scheduler
from refimpl.text.templates import GEMMA4_TEMPLATE

PROMPT = "def walk(folder):\n    for name in os.listdir(folder):\n        "
N_NEW = 90


def unpacked(value):
    return np.frombuffer(base64.b64decode(value["data"]), np.dtype(f"<{value['type']}")).reshape(value["shape"])


@pytest.fixture(scope="module")
def model():
    return refimpl.load()


@pytest.fixture(scope="module")
def wrote(model):
    """A run with drafts by the drafter and the text's past, at a temperature: (run, its tokens)."""
    drafter = refimpl.load_drafter(None, model)
    request = Request(model.tokenizer.encode(PROMPT), Sampling(temperature=0.8, top_k=0, top_p=1.0, seed=5), N_NEW, n_top=3,
                      drafts=(DRAFTER, REPEAT))
    made, tokens = Run(model, request, 512, Nothing(model), drafter), []
    while not made.stats.stop:
        tokens += step(model, [made], [32], drafter.auto)[0]
    return made, tokens


@pytest.fixture(scope="module")
def made(model, wrote):
    run_, _ = wrote
    return json.loads(json.dumps(record.record(model, run_.ids, run_.stats.n_prompt)))


def test_it_has_the_logits_of_the_run_that_wrote_the_text(model, wrote, made):
    """Bit for bit, although that run drafted, and read its prompt in other pieces."""
    run_, tokens = wrote
    likely, n = made["likely"], made["n_prompt"]
    at_one = likely["temperatures"].index(1.0)
    ids, logits, sums = (unpacked(likely[name]) for name in ("ids", "logits", "log_sums"))
    for i, token in enumerate(tokens):
        row = n + i - 1
        assert [k for k, _ in token.top] == ids[row, :3].tolist()
        assert np.allclose(logits[row, :3] - sums[row, at_one], [p for _, p in token.top], atol=2e-5), f"token {i}"
        assert abs(unpacked(likely["chosen"])[row] - sums[row, at_one] - token.logprob) < 2e-5
    alone = model.logits(run_.ids)
    assert np.array_equal(np.take_along_axis(alone, ids.astype(int), -1), logits)
    for k, temperature in enumerate(likely["temperatures"]):
        p_TV = np.exp(alone.astype(np.float64) / temperature)
        assert np.allclose(np.log(p_TV.sum(-1)), sums[:, k], atol=1e-4), temperature
    assert (unpacked(likely["rank"])[:-1] == [(row > row[i]).sum() for row, i in zip(alone, run_.ids[1:])]).all()
    assert "".join(made["texts"]) == model.tokenizer.decode(run_.ids, special=True)


def test_rounds_say_who_drafted_what(model, wrote):
    """They tile the answer, and what is accepted is what was written."""
    run_, tokens = wrote
    at, sources = 1, set()                  # the first token comes out of the prompt
    assert tokens[0].round is None
    for i, token in enumerate(tokens[1:], start=1):
        if token.round is None:
            continue
        assert i == at
        told = record.round_as_json(model.tokenizer, token.round)
        written = [each.id for each in tokens[i:i + told["emitted"]]]
        assert written[:told["accepted"]] == [k for k, _ in told["drafted"]][:told["accepted"]]
        assert told["accepted"] == len(told["drafted"]) or told["drafted"][told["accepted"]][0] != written[told["accepted"]]
        at += told["emitted"]
        sources |= {told["source"]} if told["drafted"] else set()
    assert at == N_NEW and sources


def test_experts_attention_and_layers_agree_with_what_notebooks_compute(model, wrote, made):
    ids = wrote[0].ids
    routes = route(model, [ids])
    for i, one in enumerate(made["experts"]):
        chosen = unpacked(one["ids"])
        assert np.array_equal(chosen[1:], routes.id_LTX[i])
        exact = np.take_along_axis(routes.probability_LTE[i], chosen[1:].astype(int), -1)
        assert np.abs(unpacked(one["chance"])[1:] / FRACTION - exact).max() < 1e-4
    for i, exact_NTT in enumerate(attention_maps(model, ids)):
        at, weight = unpacked(made["attention"][i]["at"]).astype(int), unpacked(made["attention"][i]["weight"]) / FRACTION
        kept_TNT = np.zeros((len(ids), exact_NTT.shape[0], len(ids)))
        np.put_along_axis(kept_TNT, at, np.maximum(weight, np.take_along_axis(kept_TNT, at, -1)), -1)
        largest_TN = np.sort(exact_NTT.transpose(1, 0, 2), axis=-1)[..., ::-1][..., :at.shape[-1]].sum(-1)
        assert np.abs(weight.sum(-1) - largest_TN).max() < 2e-2, f"layer {i}"    # float16 keys in the cache
        seen = kept_TNT > 0
        assert np.abs(kept_TNT - exact_NTT.transpose(1, 0, 2))[seen].max() < 2e-2, f"layer {i}"
    lens, likely = made["lens"], unpacked(made["likely"]["ids"])
    assert np.array_equal(unpacked(lens["ids"])[-1], likely[lens["first"]:, :3]), "the last layer says what the model says"
    assert lens["layers"] == list(range(model.config.n_layer))


@pytest.mark.parametrize("together", [True, False])
def test_rows_of_a_picture_have_their_place_and_their_sight(model, together):
    part = SoftTokens(b"a picture", 80, together, lambda look: np.random.default_rng(3).standard_normal((80, 128), np.float32))
    soft, ids, window = Soft([part]), [2, 9, *part.ids, 11, *prompt(20)], model.config.layers[0].window
    found = record.record(model, ids, 90, soft)
    assert found["soft"] == [{"first": 2, "n": 80, "together": together}] and found["ids"][1:83] == [9, *[-1] * 80, 11]
    logit_TV = model.head(model.prefill(ids, model.new_cache(), soft=soft))
    assert np.array_equal(unpacked(found["likely"]["logits"]), np.sort(logit_TV)[:, ::-1][:, :10])
    taken = {}
    model.forward(model.checked(ids, soft), model.new_cache(), lambda name, value: taken.setdefault(name, value.copy()), soft)
    q_TNH, k_TKH = taken["Qcur_pos-0"], taken["Kcur_pos-0"]
    row_T = np.arange(len(ids))
    picture_T = (row_T >= 2) & (row_T < 82) & together
    ahead_TT = picture_T[:, None] & picture_T
    seen_TT = (row_T > row_T[:, None] - window) & ((row_T <= row_T[:, None]) | ahead_TT)
    score_NTT = np.einsum("TKGH,SKH->KGTS", q_TNH.reshape(len(ids), k_TKH.shape[1], -1, k_TKH.shape[2]), k_TKH).reshape(-1, *seen_TT.shape)
    weight_TNT = softmax(np.where(seen_TT, score_NTT, -np.inf)).transpose(1, 0, 2)
    at, weight = unpacked(found["attention"][0]["at"]).astype(int), unpacked(found["attention"][0]["weight"]) / FRACTION
    assert np.abs(weight - np.take_along_axis(weight_TNT, at, -1))[weight > 0].max() < 2e-2    # float16 keys in the cache
    assert (weight[at > row_T[:, None, None]] > 0).any() == together


def test_layers_that_share_keys_and_a_model_without_experts(tmp_path):
    """A small E2B: its last layers attend to keys of earlier ones, and every layer has an embedding of its own."""
    small = refimpl.load(write_model(tmp_path / "e2b.gguf", random_model("E2B"), "Q4_0"))
    ids = prompt(40)
    found = record.record(small, ids, 7)
    assert found["experts"] == [] and {layer["kv_from"] for layer in found["model"]["layers"]} < set(range(small.config.n_layer))
    for i, exact_NTT in enumerate(attention_maps(small, ids)):
        at, weight = unpacked(found["attention"][i]["at"]).astype(int), unpacked(found["attention"][i]["weight"]) / FRACTION
        exact_TNk = np.take_along_axis(exact_NTT.transpose(1, 0, 2), at, -1)
        assert np.abs(weight - exact_TNk)[weight > 0].max() < 1e-2, f"layer {i}"
    assert unpacked(found["likely"]["ids"]).shape == (40, min(10, small.config.n_vocab))


def test_bytes_read_are_those_that_the_benchmark_counts(model):
    found = reading.weight_bytes(model)
    with open_gguf(BUILT_IN) as file:
        scalars = 4 * model.config.n_layer                  # the scales of layers' outputs, which that one leaves out
        assert sum(found.values()) == weight_bytes(file, model.config) + scalars
    assert all(n > 0 for n in found.values())


def test_a_block_is_its_bytes(model):
    for sample in taken_apart.samples(model):
        raw = model.file.raw(sample["name"])
        row = raw.reshape(-1, raw.shape[-1])[sample["row"]]
        n = len(sample["bytes"])
        assert row[n * sample["block"]:][:n].tolist() == sample["bytes"]
        weights = dequantize(row, sample["type"])[32 * sample["block"]:][:32]
        assert np.allclose(sample["weights"], weights, rtol=1e-5)
        [scale], [[end, step, added]] = sample["fields"][0]["values"], sample["parts"]
        assert (end, added) == (32, 0) and np.array_equal((np.array(sample["codes"]) + sample["offset"]) * np.float32(step), weights)
        assert step == pytest.approx(scale, rel=1e-6)
    for name, row, block, wrong in (("nothing", 0, 0, "no tensor"), ("token_embd.weight", 4096, 0, "row: 4096"),
                                    ("token_embd.weight", 0, -1, "block: -1"), ("output_norm.weight", 0, 0, "no tensor")):
        with pytest.raises(ValueError, match=wrong):
            taken_apart.taken_apart(model, name, row, block)


SIMPLE = [name for name in sorted(DEQUANTIZABLE) if BLOCKS[name].elements > 1 and not name.startswith(("IQ1", "IQ2", "IQ3", "TQ1"))]


@pytest.mark.parametrize("name", SIMPLE)
def test_a_weight_is_its_bits_its_step_and_what_is_added(name):
    """To the last bit, although nothing but flipped bits told which is which."""
    kind, random = BLOCKS[name], np.random.default_rng(4)
    for _ in range(10):
        raw = random.integers(0, 256, kind.n_bytes, np.uint8)
        for field in (field for field, dtype, _ in kind.fields if dtype.startswith("<f")):
            fields_of(raw, kind)[field] = random.uniform(-0.1, 0.1)
        if name == "MXFP4":                             # powers of two that a float32 has
            raw[0] = random.integers(100, 150)
        if name == "NVFP4":                             # not the one scale that is no number
            raw[:4] &= 0x77
        told = explained(name, raw)
        lengths = np.diff([0, *(end for end, _, _ in told["parts"])])
        step, added = (np.repeat(np.float32([part[i] for part in told["parts"]]), lengths) for i in (1, 2))
        codes = np.array(told["codes"])
        steps = np.float32(told["levels"])[codes] if told["levels"] else np.float32(codes + told["offset"])
        assert np.array_equal(steps * step + added, dequantize(raw[None], name)[0])


def test_bits_are_where_the_formats_say():
    """Some of each type, read off the pictures in formats/quants."""
    for name, byte, expected in (
            ("Q4_0", 2 + 5, [[0, 4, "code", 5, 0, 4], [4, 4, "code", 21, 0, 4]]),
            ("IQ4_NL", 17, [[0, 4, "code", 15, 0, 4], [4, 4, "code", 31, 0, 4]]),
            ("Q8_0", 2 + 9, [[0, 8, "code", 9, 0, 8]]), ("Q5_0", 3, [[bit, 1, "code", 8 + bit, 4, 5] for bit in range(8)]),
            ("Q4_K", 4 + 1, [[0, 6, "scale", 32, 64], [6, 2, "scale", 160, 192]]),
            ("Q4_K", 4 + 9, [[0, 4, "scale", 160, 192], [4, 4, "minimum", 160, 192]]),
            ("Q4_K", 16 + 33, [[0, 4, "code", 65, 0, 4], [4, 4, "code", 97, 0, 4]]), ("Q4_K", 2, [[0, 8, "field"]]),
            ("Q6_K", 1, [[0, 4, "code", 1, 0, 6], [4, 4, "code", 65, 0, 6]]),
            ("Q6_K", 128 + 2, [[2 * i, 2, "code", 2 + 32 * i, 4, 6] for i in range(4)]),
            ("Q6_K", 192 + 3, [[0, 8, "scale", 48, 64]]), ("IQ3_S", 2, [[0, 8, "shared", [0, 1, 2, 3]]])):
        found = explained(name, np.full(BLOCKS[name].n_bytes, 60, np.uint8))
        assert found["bits"][byte] == expected, (name, byte)
        assert ("codes" in found) == (name != "IQ3_S")


def test_what_is_too_long_is_refused_and_large_models_show_less(model):
    with pytest.raises(ValueError, match="at most 2048"):
        record.record(model, [5] * 2049, 1)
    with pytest.raises(ValueError, match="n_prompt is 3"):
        record.record(model, [5, 6], 3)
    with pytest.raises(ValueError, match="outside of the vocabulary"):
        record.record(model, [5, 4096], 1)
    assert places(model.config, 10, 6 * 10**6) == MOST and places(model.config, 2000, 10**5) == FEWEST
    per_state = model.config.n_embd * model.config.n_vocab
    for n_states in (1, 5, 40, 600, 10**6):
        layers, n = chosen_layers(model, 100, n_states * per_state)
        assert layers == sorted(set(layers)) and layers[-1] == model.config.n_layer - 1 and 1 <= n <= 100
        assert len(layers) * n <= max(n_states, len(layers))


ROWS = arrays.arrays(np.float32, st.tuples(st.integers(1, 4), st.integers(1, 30)), elements=st.integers(-3, 3).map(float))


@given(ROWS, st.integers(1, 12))
@settings(max_examples=60, deadline=None)
def test_the_largest_are_those_of_a_stable_sort(values, k):
    assert np.array_equal(largest(values, k), np.argsort(-values, axis=-1, kind="stable")[:, :k])


def test_only_what_a_browser_knows_is_packed():
    with pytest.raises(ValueError, match="float64"):
        packed(np.zeros(3))


# ---- the server

@pytest.fixture
def engine(model):
    made = Engine(Scheduler(model, Prefixes(model, 1 << 28), 2048, most_running=4))
    yield made
    made.close()


def test_an_answer_says_its_ids_and_they_can_be_looked_at(engine, model):
    """In both forms of the answer; what is looked at meanwhile changes no bit of it."""
    asked = {"messages": [{"role": "user", "content": "def f(x):"}], "max_tokens": 40, "seed": 3, "return_token_ids": True}

    async def both():
        async with asyncio.timeout(60), client(engine) as c:
            alone = (await c.post("/v1/chat/completions", json=asked)).json()
            body = {"messages": asked["messages"], "token_ids": alone["choices"][0]["token_ids"]}
            return alone, *await asyncio.gather(c.post("/v1/chat/completions", json=asked | {"stream": True}),
                                                c.post("/glass/inspect", json=body), c.post("/glass/inspect", json=body))
    alone, beside, *looked = asyncio.run(both())
    [choice] = alone["choices"]
    streamed = [each["choices"][0] for each in chunks(beside) if each["choices"]]
    assert sum((each.get("token_ids", []) for each in streamed), []) == choice["token_ids"] and len(choice["token_ids"]) == 40
    assert "".join(each["delta"].get("content", "") for each in streamed) == choice["message"]["content"]
    assert model.tokenizer.decode(choice["token_ids"]) == choice["message"]["content"]
    first, again = (response.json() for response in looked)
    assert first["ids"][first["n_prompt"]:] == choice["token_ids"] and first["likely"] == again["likely"]


def test_whoever_no_longer_looks_is_forgotten_and_errors_reach_whoever_asked(engine, monkeypatch):
    monkeypatch.setattr("refimpl.serve.scheduler.layer", lambda: "omp")          # where there are slices
    engine.scheduler.latency = 0.01

    async def ask():
        loop, begun, rounds = asyncio.get_running_loop(), asyncio.Event(), []

        def endless(pause):
            loop.call_soon_threadsafe(begun.set)
            while True:
                pause()
                rounds.append(1)

        async with asyncio.timeout(20):
            task = asyncio.ensure_future(engine.aside(endless))
            await begun.wait()
            answer = await engine.submit(Request([2, 5, 6], Sampling(temperature=0.0), 3))
            assert len([event async for event in answer]) >= 4, "answers go on meanwhile"
            task.cancel()
            with pytest.raises(ZeroDivisionError):
                await engine.aside(lambda pause: 1 / 0)
            n = len(rounds)
            assert await engine.aside(lambda pause: "the next one") == "the next one" and len(rounds) == n
            waiting = [asyncio.ensure_future(engine.aside(endless)) for _ in range(9)]
            with pytest.raises(ValueError, match="try again later"):
                await waiting[-1]
            for each in waiting:
                each.cancel()
    asyncio.run(ask())


def test_nothing_is_tapped_but_by_whoever_looks(engine, model, monkeypatch):
    """Neither before the box is opened nor after it. Only experts are counted, where a call verifies drafts."""
    taps, forward = [], Model.forward_together

    def watched(self, ids_T, sequences, tap=no_tap, *rest):
        taps.append(tap.__qualname__.partition(".")[0])
        return forward(self, ids_T, sequences, tap, *rest)
    monkeypatch.setattr(Model, "forward_together", watched)
    asked = {"messages": [{"role": "user", "content": "def f(x):"}], "max_tokens": 20, "seed": 3, "return_token_ids": True}

    def chat():
        del taps[:]
        ids = post(engine, "/v1/chat/completions", asked).json()["choices"][0]["token_ids"]
        assert len(taps) > 10 and taps.count("no_tap") > len(taps) // 2 and set(taps) <= {"no_tap", "counting_experts"}
        return ids
    ids = chat()
    n = len(taps)
    looked = post(engine, "/glass/inspect", {"messages": asked["messages"], "token_ids": ids})
    assert looked.status_code == 200 and taps[n:] == ["record"] + ["step_seconds"] * reading.STEPS
    chat()


@pytest.mark.parametrize(("path", "body", "wrong"), [
    ("/glass/inspect", {"messages": [{"role": "user", "content": "x"}], "token_ids": [4096]}, "token_ids: 4096"),
    ("/glass/inspect", {"messages": [{"role": "user", "content": "x"}]}, "token_ids"),
    ("/glass/inspect", {"messages": [{"role": "user", "content": "x " * 3000}], "token_ids": [5]}, "at most 2048"),
    ("/glass/block", {"tensor": "blk.9.nothing"}, "no tensor of blocks"),
    ("/glass/block", {"tensor": "token_embd.weight", "row": "two"}, "row"),
])
def test_what_cannot_be_shown(engine, path, body, wrong):
    response = post(engine, path, body)
    assert response.status_code == 400 and wrong in response.json()["error"]["message"]


def test_the_page_needs_no_key_and_its_questions_do():
    engine = FakeEngine()
    for path in ("/", "/page/main.js", "/page/style.css", "/page/icon.svg"):
        response = get(engine, path, api_key="secret")
        assert response.status_code == 200 and "script-src 'self'" in response.headers["content-security-policy"]
        assert response.headers["x-content-type-options"] == "nosniff"
    for path in ("/glass/about", "/slots", "/pages", "/page"):
        assert get(engine, path, api_key="secret").status_code == 401
    assert get(engine, "/page/..%2ffiles.py").status_code == 404 and get(engine, "/page/files.py").status_code == 404
    assert get(engine, "/", headers={"host": "evil.example"}).status_code == 403


def test_the_page_is_told_what_the_model_can(engine):
    about = get(engine, "/glass/about").json()
    assert about["continues"] and not about["thinks"] and not about["sees"] and about["limit"] == 128
    assert {"name": "token_embd.weight", "type": "Q4_0", "rows": 4096, "blocks": 4} in about["tensors"]
    assert about["sampling"]["temperature"] == 0.7 and "enable_thinking" in GEMMA4_TEMPLATE


# ---- the files of the page

class Scripts(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.found, self.inside = [], False

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        assert not any(name.startswith("on") or name == "style" for name in attributes), "the policy allows none"
        for name in ("src", "href"):
            assert attributes.get(name, "data:").startswith("data:"), "an offline page loads nothing"
        self.inside = tag == "script"
        if self.inside:
            self.found.append([attributes.get("type"), ""])

    def handle_endtag(self, tag):
        self.inside = False

    def handle_data(self, data):
        if self.inside:
            self.found[-1][1] += data


def test_one_file_has_everything_and_nothing_in_a_text_breaks_out(made):
    hostile = "</script><script>alert(1)</script><!--"
    page = in_one_file(made | {"texts": [hostile]}, hostile)
    parser = Scripts()
    parser.feed(page)
    (kind, data), (module, script) = parser.found
    assert kind == "application/json" and json.loads(data) == made | {"texts": [hostile]} and module == "module"
    assert f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'" in page
    assert "import " not in re.sub(r"//.*", "", script).split('"')[0] and not re.search(r"^(import|export)\b", script, re.MULTILINE)


def test_modules_are_short_and_can_share_a_scope():
    names = re.findall(r"^(?:async )?(?:function|const|let|class) (\w+)", one_script(), re.MULTILINE)
    names += [name for line in re.findall(r"^const (\w+ = .*), (\w+) = ", one_script(), re.MULTILINE) for name in line[1:]]
    assert len(names) == len(set(names)), sorted(name for name in names if names.count(name) > 1)
    used = one_script()
    for path in FOLDER.iterdir():
        content, _ = read_file(path.name)
        assert len(content.splitlines()) < 250, path.name
        assert re.findall(rb"https?://(?!www\.w3\.org)\w+\.", content) == [], f"{path.name} names another site"
        assert b"innerHTML" not in content and b"eval(" not in content and b"insertAdjacentHTML" not in content
        if path.suffix == ".js":
            assert content.decode().splitlines()[0] in used, f"{path.name} is imported by nobody"


def test_pictures_in_documents_are_drawn_by_a_test():
    """test_page.py draws the views, where there is a browser; no document shows anything else."""
    root = Path(__file__).parent.parent
    assert sorted(path.stem for path in views.FOLDER.glob("*.png")) == sorted(views.VIEWS)
    assert sum(path.stat().st_size for path in views.FOLDER.iterdir()) < 400_000
    shown = [(path, link) for folder in ("refimpl", "tests", ".github") for path in (root / folder).rglob("*.md")
             for link in re.findall(r"!\[[^\]]+\]\(([^)]+\.png)\)", path.read_text())]
    shown += [(root / "README.md", link) for link in re.findall(r"!\[[^\]]+\]\(([^)]+\.png)\)", (root / "README.md").read_text())]
    assert len(shown) >= 2
    drawn = [views.FOLDER / f"{name}.png" for name in views.VIEWS]
    for path, link in shown:
        assert (path.parent / link).resolve() in drawn, f"{path} shows {link}, which no test draws"


def test_the_command(tmp_path):
    page = tmp_path / "page.html"
    status, out, err = run("glass", "-p", "def main():\n    ", "-n", "12", "-o", page)
    assert status == 0 and page.stat().st_size > 50_000 and out == "" and str(page) in err
    parser = Scripts()
    parser.feed(page.read_text(encoding="utf-8"))
    found = json.loads(parser.found[0][1])
    assert len(found["ids"]) == found["n_prompt"] + 12 and sum(each["emitted"] for each in found["written"]["rounds"]) == 11
    for args, why in ((("x", page), "--force"), (("x" * 9000, tmp_path / "other.html"), "can be looked at")):
        status, out, err = run("glass", "-p", args[0], "-o", args[1])
        assert status == 1 and why in err and err.count("\n") == 1
    assert run("glass", "-p", "x")[0] == 2 and run("glass", "--chat")[0] == 2 and run("glass", "--temp", "1")[0] == 2
    assert run("glass", "-p", "x", "-o", page, "--port", "1")[0] == 2
    assert list(tmp_path.iterdir()) == [page]
