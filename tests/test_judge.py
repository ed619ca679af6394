"""`refimpl judge`: bounds, the test of draws, what is said of engines that are right, wrong, or no engines at all."""

import base64
import hashlib
import io
import json
import math
import time

import numpy as np
import PIL.Image
import pytest
from cli import assert_one_line, run
from endpoints import VLLM, Between, LlamaServer, MlxServer, playing, raw, served
from hypothesis import given, settings
from hypothesis import strategies as st
from shapes import random_model, reference, write_model

import refimpl
from refimpl.lab.compare.known_bugs import BUGS, MOE, PLE, inject
from refimpl.lab.evaluate.divergence import divergence, log_sum_exp, most_probable
from refimpl.lab.judge import ask
from refimpl.lab.judge.answers import Answer, Listed, Step, in_place, steps_of
from refimpl.lab.judge.ask import AGAIN, FIRST, NEW, Answers, Asked, prompts
from refimpl.lab.judge.bounds import as_line, listed_bounds
from refimpl.lab.judge.endpoint import Endpoint
from refimpl.lab.judge.http import EndpointError, Http
from refimpl.lab.judge.judge import QUESTIONS, collect, judge
from refimpl.lab.judge.measure import Position
from refimpl.lab.judge.verdicts.probabilities import judged as judged_positions
from refimpl.lab.judge.verdicts.probabilities import window
from refimpl.lab.judge.verdicts.repeats import again
from refimpl.lab.judge.verdicts.sampling import FALSE_ALARMS, stake_of
from refimpl.lab.judge.verdicts.verdict import DEPARTS, RIGHT, UNKNOWN, rises
from refimpl.lab.judge.yardstick import stored_as
from refimpl.loading.hub import local
from refimpl.media.images import data_url
from refimpl.text import chat as rendering
from refimpl.text.templates import GEMMA4_TEMPLATE

QUICK = ("template", "ids", "probabilities", "chat", "window")
LENGTHS = ask.Asking.lengths


@pytest.fixture(scope="module")
def exact():
    """What judges: the built-in model in exact arithmetic."""
    return refimpl.load(arithmetic="exact", threads=1)


@pytest.fixture(scope="module", autouse=True)
def rendered_here(exact):
    """The built-in model's template counts as a known one: every conversation would start a process to render it."""
    sha256 = hashlib.sha256(exact.file.metadata["tokenizer.chat_template"].encode()).hexdigest()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rendering, "TRUSTED_SHA256", rendering.TRUSTED_SHA256 | {sha256})
        yield


@pytest.fixture(scope="module")
def server():
    with served(refimpl.load(threads=1)) as url:
        yield url


@pytest.fixture
def few(monkeypatch):
    """A third of the prompts, none longer than three windows, the same ones in every run: how far a small departure shows depends on the
    text.
    """
    data = prompts()
    texts = {name: data["texts"][name] for name in ("code", "blanks", "special tokens")}
    conversations = {name: data["conversations"][name] for name in ("question", "turns", "special tokens")}
    monkeypatch.setattr(ask, "prompts", lambda: data | {"texts": texts, "conversations": conversations})
    monkeypatch.setattr(ask.Asking, "lengths", lambda asking: {name: n for name, n in LENGTHS(asking).items() if name != "some hundred"})
    monkeypatch.setattr(ask, "N_TWICE", 3)
    monkeypatch.setattr(ask, "N_PROMPTS", 2)
    monkeypatch.setattr(ask.secrets, "token_hex", lambda n: "5eed")
    monkeypatch.setattr(ask, "N_DRAWS", 32)


class Known(Between):
    """A Between that asks nothing twice: our server's answers depend on what it is asked alone, which other tests show."""

    answered: dict[tuple[str, str, str], str] = {}

    def sent(self, path, fields):
        key = self.url, path, json.dumps(fields)
        if key not in self.answered:
            self.answered[key] = json.dumps(super().sent(path, fields))
        return json.loads(self.answered[key])


def answers(judgement):
    return {verdict.question: verdict.answer for verdict in judgement.verdicts}


def evidence(judgement, question):
    return next(verdict.evidence for verdict in judgement.verdicts if verdict.question == question)


def judged(http, model, questions=QUICK, **options):
    end, found = collect(http, model, questions=questions)
    return judge(end, found, model, questions=questions, **options)


# ---- formulas

@settings(max_examples=200, deadline=None)
@given(st.integers(2, 60), st.integers(1, 20), st.floats(0.1, 6), st.integers(0, 2**32 - 1), st.integers(0, 3))
def test_the_true_divergence_is_between_the_bounds(n_vocab, n_top, spread, seed, n_unknown):
    rng = np.random.default_rng(seed)
    p_V, q_V = (rng.normal(0, spread, n_vocab).astype(np.float32) for _ in range(2))
    p_sum, q_sum = log_sum_exp(p_V), log_sum_exp(q_V)
    truth = divergence(p_V, q_V, p_sum, q_sum)
    id_K = most_probable(p_V, n_top)
    logprob_K = p_V[id_K].astype(np.float64) - p_sum
    low, high = listed_bounds(id_K, logprob_K, q_V)
    assert low <= truth + 1e-9 and truth <= high + 1e-9
    known = rng.permutation(len(id_K))[n_unknown:]
    known.sort()
    less, more = listed_bounds(id_K[known], logprob_K[known], q_V, whole=not n_unknown)
    assert less <= low + 1e-9 and more >= high - 1e-9
    if len(id_K) == n_vocab:
        assert abs(low - truth) < 1e-6 + 1e-6 * truth


@settings(max_examples=50, deadline=None)
@given(st.floats(0.3, 3), st.floats(0, 1), st.integers(2, 30), st.integers(0, 2**32 - 1))
def test_a_temperature_is_a_slope(temperature, shift, n, seed):
    ours_K = -np.sort(np.random.default_rng(seed).exponential(3, n)) - 0.1
    slope, found, rest = as_line(ours_K / temperature + shift, ours_K)
    assert math.isclose(slope, 1 / temperature, rel_tol=1e-6) and math.isclose(found, shift, abs_tol=1e-6) and rest < 1e-9


def test_draws_of_the_right_distribution_alarm_nobody_and_others_do():
    """Ville's inequality: of 400 sequences of 64 right draws, the stake of none is above 1000 but by chance, 0.4 are expected."""
    rng = np.random.default_rng(3)
    logit_V = rng.normal(0, 2, 50).astype(np.float32)
    texts = {i: f"t{i}" for i in range(50)}
    p_V = np.exp(logit_V - log_sum_exp(logit_V)).astype(np.float64)
    p_V /= p_V.sum()

    def stakes(draw_V, times):
        for _ in range(times):
            stake = stake_of(logit_V, [logit_V], texts)
            for i in rng.choice(50, size=64, p=draw_V):
                stake.draw(texts[int(i)])
            yield stake.log
    assert sum(log > math.log(1000) for log in stakes(p_V, 400)) <= 3
    cut_V = np.where(p_V >= np.sort(p_V)[-3], p_V, 0)
    assert all(log > math.log(1 / FALSE_ALARMS) for log in (sum(stakes(cut_V / cut_V.sum(), 4)) for _ in range(20)))


def at(place, distances, rounding=1.0, way=FIRST):
    """Positions of prompts of 11 with these distances."""
    return [Position(Asked(f"text {place} {n // 11}", [2], Answer("", (), 1, 0), way), place, 0, distance**2 / 2, math.inf,
                     (rounding**2 / 2,), (1.0, 0.0, 0.0), 20, True) for n, distance in enumerate(distances)]


@pytest.mark.parametrize("n_far, answer", [(2, UNKNOWN), (3, DEPARTS)])
def test_experts_that_changed_places_at_the_first_tokens_of_some_prompts_are_no_departure(n_far, answer):
    """A right mixture of experts: far off at all positions of two of four prompts, and rounding moves the experts of the others too."""
    far, near = at(5, [0.2] * 11 * n_far, 0.01), at(6, [0.11] * 11 * (4 - n_far), 0.12)
    found = judged_positions("chat", far + near[:9], "q8")
    assert found.figures["level"] > 3 and found.answer == answer, found.evidence


def test_positions_of_few_prompts_that_happen_to_be_near_are_no_window():
    """A right mixture of experts: by the rank-sum test, which takes positions for independent, its level rises by 5 deviations."""
    before, after = at(5, [0.3] * 11 + [1.05] * 11), at(50, [1.0] * 40 + [1.4] * 92)
    assert rises(before, after) and window(before + after, {32}).answer == RIGHT
    assert window(at(5, [0.3] * 22) + after, {32}).answer == DEPARTS


def test_what_is_as_far_away_at_first_is_not_blamed_on_the_cache():
    """A wrong window: prompts that are asked again are longer than the others, so that all of their positions are far off."""
    far = [2.0] * 66
    positions = at(5, [0.1] * 300) + at(90, far, way=NEW) + at(90, far, way=AGAIN)
    found = Answers([Asked(f"text 90 {n}", [2], Answer("a", (), 1, 0), way) for n in range(6) for way in (NEW, AGAIN)])
    assert again(Endpoint(None, "m"), found, positions).answer == RIGHT
    later = at(5, [0.1] * 300) + at(90, [0.1] * 66, way=NEW) + at(90, far, way=AGAIN)
    assert again(Endpoint(None, "m"), found, later).answer == DEPARTS


# ---- engines that are right

def test_our_own_server_is_right_on_every_question(server, exact, few):
    found = judged(Http(server), exact, QUESTIONS)
    assert answers(found) == dict.fromkeys(QUESTIONS[:-2], RIGHT), [v.evidence for v in found.verdicts]
    assert found.status == 0 and found.engine == "refimpl" and found.arithmetic == "q8"


def five_of_a_text(path, fields):
    """An endpoint as OpenAI's own: no ids, five probabilities, and no engine's name."""
    if path == "/v1/completions" and (not isinstance(fields["prompt"], str) or fields.get("logprobs", 0) > 5):
        raise EndpointError("status 400: no", 400)
    if path in ("/tokenize", "/apply-template"):
        raise EndpointError("status 404: no", 404)
    return fields


def nameless(path, fields, body):
    return {"data": [{"id": "gemma"}]} if path == "/v1/models" else body


def test_an_endpoint_with_less_is_judged_by_what_it_has(server, exact, few):
    found = judged(Known(server, nameless, five_of_a_text), exact)
    assert set(answers(found).values()) == {RIGHT} and found.arithmetic == "bfloat16", [v.evidence for v in found.verdicts]
    assert {v.basis for v in found.verdicts[:2]} == {"counts only"} and found.verdicts[2].figures["listed"] == 5


class Ollama(Known):
    """Our server in ollama's clothes: /api/generate, with a text and its own names."""

    def get(self, path):
        return {"/v1/models": {"data": [{"id": "gemma", "owned_by": "library"}]}, "/api/version": {"version": "0.30"}}[path]

    def post(self, path, fields):
        if path in ("/tokenize", "/apply-template", "/v1/completions"):
            raise EndpointError("status 404: no", 404)
        if path == "/v1/chat/completions":
            assert fields["reasoning_effort"] in ("none", "high") and "chat_template_kwargs" not in fields, fields
            thinks = {"enable_thinking": fields.pop("reasoning_effort") == "high"}
            return super().post(path, self.rendered(fields) | {"chat_template_kwargs": thinks})
        assert fields["raw"] and not fields["stream"] and fields["model"] == "gemma"
        options = fields["options"]
        body = super().post("/v1/completions", {"prompt": fields["prompt"], "max_tokens": options["num_predict"], "seed": options["seed"],
                                                "temperature": options["temperature"], "logprobs": fields.get("top_logprobs")})
        listed = body["choices"][0]["logprobs"]
        logprobs = [{"token": token, "logprob": logprob, "top_logprobs": [{"token": t, "logprob": p} for t, p in top.items()]}
                    for token, logprob, top in zip(listed["tokens"], listed["token_logprobs"], listed["top_logprobs"])]
        return {"response": body["choices"][0]["text"], "logprobs": logprobs, "prompt_eval_count": body["usage"]["prompt_tokens"]}


    def rendered(self, fields):
        """What the template gets."""
        return fields


def test_ollama_is_asked_in_its_own_form(server, exact, few):
    found = judged(Ollama(server), exact, ("template", "ids", "probabilities"))
    assert set(answers(found).values()) == {RIGHT} and found.engine == "ollama 0.30", [v.evidence for v in found.verdicts]
    assert found.verdicts[2].figures["listed"] == 20 and "thinking" not in " ".join(found.notes)


def test_another_template_is_not_blamed_on_the_forward_pass(server, exact, few):
    """ollama has its own, whatever the file says."""
    engine = Ollama(server)
    engine.rendered = lambda fields: other_template("", fields)
    found = judged(engine, exact, ("template", "chat"))
    assert answers(found) == {"template": DEPARTS, "chat": UNKNOWN} and found.status == 1, found.verdicts
    assert "become other prompts: question" in evidence(found, "chat")


def test_vllms_tokens_are_known_by_their_ids():
    older = {"tokens": ["token_id:7", "token_id:9"], "token_logprobs": [-0.5, -1.0],
             "top_logprobs": [{"token_id:7": -0.5, "token_id:3": -2}, {"token_id:9": -1.0}]}
    first, second = steps_of(older, "here")
    assert (first.chosen.id, [token.id for token in first.top], second.chosen.id) == (7, [7, 3], 9)


@pytest.mark.parametrize("native", [True, False])
def test_tokens_that_are_not_listed_are_no_departure(native, tmp_path, few):
    """A random model writes half of its text in bytes, and llama-server lists no token that ends inside of a character."""
    model = refimpl.load(write_model(tmp_path / "m.gguf", random_model("12B", seed=1), "Q4_0"), arithmetic="exact", threads=1)
    found = judged(LlamaServer(model, native), model, ("probabilities", "again"))
    assert answers(found) == {"probabilities": RIGHT, "again": RIGHT}, [v.evidence for v in found.verdicts]
    assert found.verdicts[0].figures["level"] < 0.1 and found.verdicts[0].figures["listed"] == (100 if native else 20)
    assert native != any("leave out tokens" in note for note in found.notes)


def test_tokens_that_were_not_written_are_not_believed(exact, few):
    """The first of each answer is judged all the same, after many beginnings of texts."""
    end, found = collect(MlxServer(exact), exact, questions=("ids", "probabilities"))
    assert (end.takes_ids, end.asks_as_chats, end.n_top) == (False, True, 10)
    judgement = judge(end, found, exact, questions=("ids", "probabilities"), arithmetic="float32")
    assert answers(judgement) == {"ids": DEPARTS, "probabilities": RIGHT}, [v.evidence for v in judgement.verdicts]
    assert "list tokens that they did not write" in evidence(judgement, "ids") and any("not believed" in note for note in judgement.notes)
    assert judgement.verdicts[1].figures["positions"] >= 24


@given(st.lists(st.integers(0, 5), min_size=1, max_size=12), st.data())
def test_listed_tokens_are_put_where_they_must_stand(ids, data):
    left = data.draw(st.lists(st.integers(0, len(ids) - 1), unique=True).map(sorted))
    listed = [Step(Listed(b"", -1.0, ids[n]), (Listed(b"", -n - 1.0, 0),)) for n in left]
    placed = in_place(ids, listed, "here")
    assert [step.chosen.id for step in placed] == ids
    assert all(step.top == (Listed(b"", -n - 1.0, 0),) for n, step in enumerate(placed) if step.top)
    assert len(left) < len(ids) or all(step.top for step in placed)
    with pytest.raises(EndpointError, match="not those of the answer"):
        in_place(ids, [*listed, Step(Listed(b"", -1.0, 6), ())], "here")


@pytest.mark.parametrize("echo", [False, True])
def test_probabilities_of_a_prompts_own_tokens_are_judged(echo, tmp_path, few, monkeypatch):
    """Many positions for a request; the same engine with a longer window departs by them."""
    monkeypatch.setattr(ask.Asking, "lengths", LENGTHS)             # 48 positions of each long text, of which windows of 7 make two
    made = random_model("12B", seed=3)
    paths = [write_model(tmp_path / f"{n}.gguf", made, extra={"gemma4.attention.sliding_window": n}) for n in (7, 9)]
    model = refimpl.load(paths[0], arithmetic="exact", threads=1)
    for path, expected in zip(paths, (RIGHT, DEPARTS)):
        end, found = collect(VLLM(refimpl.load(path, arithmetic="exact", threads=1), echo), model, questions=("probabilities",))
        judgement = judge(end, found, model, questions=("probabilities",), arithmetic="float32")
        figures = judgement.verdicts[0].figures
        assert judgement.verdicts[0].answer == expected and figures["positions"] > 250, judgement.verdicts[0]
        assert echo or end.prompt_top == figures["listed"] == 20, "texts of tokens are the same for many, ids are not"


@pytest.mark.parametrize("before, expected", [([], RIGHT), ([2], DEPARTS)])
def test_an_engine_that_tells_the_ids_of_a_conversation(before, expected, exact):
    """vLLM's /tokenize; a second <bos> is a bug that engines had."""
    engine = VLLM(exact)
    engine.prompt = lambda fields, right=engine.prompt: before + right(fields)
    found = judged(engine, exact, ("template", "ids"))
    assert answers(found) == {"template": expected, "ids": RIGHT} and found.verdicts[0].basis == "ids compared", found.verdicts
    assert expected == RIGHT or "at token 1 '<bos>" in evidence(found, "template"), evidence(found, "template")


@pytest.mark.parametrize("right", [True, False])
def test_pictures_are_sent_where_there_is_a_projector(right, exact):
    """Wrong: another picture arrives, upside down and as its negative."""
    def changed(path, fields):
        content = fields["messages"][0]["content"] if path == "/v1/chat/completions" else "text"
        if not right and isinstance(content, list):
            url = content[0]["image_url"]["url"].partition(",")[2]
            rgb_HWC = np.array(PIL.Image.open(io.BytesIO(base64.b64decode(url))))
            content[0]["image_url"]["url"] = data_url(255 - rgb_HWC[::-1])
        return fields
    model = refimpl.load(threads=1)
    with served(model, projector=refimpl.load_projector(None, model)) as url:
        end, found = collect(Between(url, ask=changed), exact, questions=("picture",), projector=refimpl.load_projector(None, exact))
        judgement = judge(end, found, exact)
    assert answers(judgement)["picture"] == (RIGHT if right else DEPARTS), judgement.verdicts


# ---- engines that are wrong

def warmer(path, fields, body):
    """Probabilities after a temperature of 0.8."""
    if path == "/v1/completions":
        logprobs = body["choices"][0]["logprobs"]
        for top in logprobs["top_logprobs"]:
            raised = {token: p / 0.8 for token, p in top.items()}
            rest = math.log1p(-min(1 - 1e-12, sum(map(math.exp, top.values())))) / 0.8
            total = math.log(sum(map(math.exp, raised.values())) + math.exp(rest))
            top.update({token: p - total for token, p in raised.items()})
    return body


def cut(path, fields, body):
    """Probabilities of the five most probable, renormalised."""
    if path == "/v1/completions":
        for top in body["choices"][0]["logprobs"]["top_logprobs"]:
            kept = dict(sorted(top.items(), key=lambda item: -item[1])[:5])
            total = math.log(sum(map(math.exp, kept.values())))
            top.clear()
            top.update({token: p - total for token, p in kept.items()})
    return body


def without_bos(path, fields):
    if path == "/v1/completions" and isinstance(fields["prompt"], list):
        fields["prompt"] = fields["prompt"][1:]
    return fields


def other_template(path, fields):
    if "messages" in fields:
        fields["messages"] = [{"role": m["role"], "content": str(m["content"]) + "!"} for m in fields["messages"]]
    return fields


def second_time(n=None):
    """A cache that loses the latest three tokens; `n`: only of prompts of so many."""
    seen = set()

    def ask(path, fields):
        if path == "/v1/completions" and isinstance(fields["prompt"], list):
            key = tuple(fields["prompt"])
            if key in seen and len(key) == (n or len(key)):
                fields["prompt"] = fields["prompt"][:-3]
            seen.add(key)
        return fields
    return ask


def no_logprobs(path, fields, body):
    for choice in body.get("choices", []) if isinstance(body, dict) else []:
        choice["logprobs"] = None
    return body


LIES = {
    "temperature": (dict(change=warmer), {"probabilities": DEPARTS}, "probabilities", "divided by 0.8"),
    "cut": (dict(change=cut), {"probabilities": DEPARTS}, "probabilities", "cut and renormalised"),
    "no <bos>": (dict(ask=without_bos), {"probabilities": DEPARTS}, "probabilities", "first clearly at position"),
    "template": (dict(ask=other_template), {"template": DEPARTS, "ids": RIGHT}, "template", "'!"),
}


@pytest.mark.parametrize("name", LIES)
def test_what_an_endpoint_does_to_our_answers_is_named(name, server, exact, few):
    how, expected, question, said = LIES[name]
    found = judged(Known(server, **how), exact, tuple(expected))
    assert expected.items() <= answers(found).items(), [v.evidence for v in found.verdicts]
    assert said in evidence(found, question) and found.status == 1


def test_what_rounding_would_be_as_large_as_a_departure_is_said(exact, few):
    found = judged(LlamaServer(refimpl.load(threads=1), native=True, tap=stored_as("q4_0")), exact, ("probabilities",))
    assert answers(found) == {"probabilities": DEPARTS}
    assert "the rounding of --arithmetic q8 --kv q4_0 would be as large" in evidence(found, "probabilities")


@pytest.mark.parametrize("n", [None, 33])
def test_a_cache_that_gives_back_other_tokens_shows_the_second_time(n, server, exact, few, monkeypatch):
    monkeypatch.setattr(ask, "N_TWICE", 2)                          # prompts of 12 tokens and of 33
    found = judged(Known(server, ask=second_time(n)), exact, ("probabilities", "again"))
    assert answers(found) == {"probabilities": RIGHT, "again": DEPARTS}
    assert "what it kept is not what it computed" in evidence(found, "again")


@pytest.mark.parametrize("right", [True, False])
def test_an_endpoint_without_logprobs_is_judged_by_its_draws(right, server, exact, few):
    def colder(path, fields):
        return fields if right or "temperature" not in fields else fields | {"temperature": 0.4}
    found = judged(Known(server, change=no_logprobs, ask=colder), exact, ("template", "probabilities", "sampling"))
    assert answers(found) == {"template": RIGHT, "probabilities": UNKNOWN, "sampling": RIGHT if right else DEPARTS}
    assert evidence(found, "probabilities") == "the endpoint gives no logprobs" and found.status == (0 if right else 1)


# ---- known bugs behind our server

def behind_our_server(bug, path, model, arithmetics):
    """The judgements on our server with a bug in the functions of its model; the judge's own run has none."""
    questions = ("probabilities", "window")
    with inject(bug):
        with served(reference(path), n_ctx=512) as url:
            end, found = collect(Http(url), model, questions=questions)
    return [judge(end, found, model, questions=questions, arithmetic=arithmetic) for arithmetic in arithmetics]


def test_a_window_of_another_length_behind_our_server_is_found(exact, few, monkeypatch):
    data = ask.prompts()
    monkeypatch.setattr(ask, "prompts", lambda: data | {"texts": {"code": data["texts"]["code"]}})      # the long ones show it
    (found,) = behind_our_server(BUGS["window one too long"], None, exact, ["q8"])
    assert answers(found) == {"probabilities": RIGHT, "window": DEPARTS}, [v.evidence for v in found.verdicts]
    assert found.verdicts[1].figures["length"] == 64 and 62 <= found.verdicts[1].figures["first"] <= 80


ARITHMETICS = "q8", "float32"
# changes no probability: a rotation by positions that all count from 1 is the same, and a norm follows
INVISIBLE = {"positions counted from 1", "weights not renormalised", "expert scale before renormalisation",
             "per-layer projection not scaled", "per-layer input not scaled"}
# about as small as the rounding of 8-bit activations, or smaller: found with --arithmetic float32, and otherwise perhaps
NEAR_Q8 = {"GELU by erf", "embedding scale rounded to bfloat16", "expert scale dropped", "one expert too few", "soft cap left out",
           "soft cap twice", "rope_freqs ignored"}


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", [name for name, bug in BUGS.items() if not bug.first.startswith("draft")])
def test_known_bugs_behind_our_server(name, exact, tmp_path):
    bug = BUGS[name]
    path, model = None, exact
    if bug.on != MOE:
        path = local("built-in:e2b")
        if bug.on != PLE or "scalar" in name:           # the built-in models' scalars are 1
            made = random_model("E2B", seed=6) if bug.on == PLE else random_model("26B-A4B", seed=6, hidden_size=256, intermediate_size=256)
            path = write_model(tmp_path / "m.gguf", made, "F32" if bug.on == PLE else "Q4_K", {"tokenizer.chat_template": GEMMA4_TEMPLATE})
        model = refimpl.load(path, arithmetic="exact")
    for arithmetic, found in zip(ARITHMETICS, behind_our_server(bug, path, model, ARITHMETICS)):
        if arithmetic == "float32" or name not in NEAR_Q8:
            assert (DEPARTS in answers(found).values()) == (name not in INVISIBLE), [v.evidence for v in found.verdicts]


@pytest.mark.exhaustive
@pytest.mark.parametrize("turn", range(100))
def test_no_false_alarm(turn, tmp_path):
    """Right engines: our server in both arithmetics and backends, with the built-in model and random ones of all shapes."""
    shape = None if turn % 20 == 0 else ["E2B", "E4B", "12B", "26B-A4B", "31B"][turn % 5]
    backend, arithmetic = [("kernels", "q8"), ("kernels", "exact"), ("reference", "exact")][turn % 3]
    path = None
    if shape is not None:
        block = ["Q4_0", "Q8_0", "F32", "BF16"][turn % 4]
        path = write_model(tmp_path / "m.gguf", random_model(shape, seed=turn), block, {"tokenizer.chat_template": GEMMA4_TEMPLATE})
    model = refimpl.load(path, arithmetic="exact")
    with served(refimpl.load(path, backend=backend, arithmetic=arithmetic), n_ctx=512) as url:
        found = judged(Http(url), model, QUESTIONS)
    assert DEPARTS not in answers(found).values() and found.status == 0, [v.evidence for v in found.verdicts]


# ---- what is no engine

OK = {"Content-Type": "application/json"}


def endless(first=b""):
    return b"HTTP/1.1 200 OK\r\nContent-Length: 2000000000\r\n\r\n" + first


@pytest.mark.parametrize("pieces, hold, says", [
    ([b"SSH-2.0-OpenSSH_9.2p1\r\n"], False, "this is no HTTP"),
    ([b""], False, "the connection was closed without an answer"),
    ([b"HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n{\"cho"], True, "no whole answer within 0.3 s"),
    ([b""], True, "no whole answer within 0.3 s"),
    ([b"HTTP/1.1 302 Found\r\nLocation: http://elsewhere.example/v1\r\nContent-Length: 0\r\n\r\n"], False, "it redirects to"),
    ([b"HTTP/1.1 429 Slow Down\r\nRetry-After: 1e9\r\nContent-Length: 2\r\n\r\n{}"], False, "busy: status 429 5 times in a row"),
    ([b"HTTP/1.1 401 No\r\nContent-Length: 30\r\n\r\n{\"error\":{\"message\":\"no key\"}}"], False, "status 401: no key"),
])
def test_what_is_no_endpoint_is_one_line(pieces, hold, says, exact):
    waited = []
    with raw(*pieces, hold=hold) as url, pytest.raises(EndpointError, match=says) as error:
        collect(Http(url, timeout=0.3, pause=waited.append), exact)
    assert "\n" not in str(error.value) and sum(waited) <= 120


@pytest.mark.parametrize("content, says", [
    (b"data: {\"choices\": [", "the answer is no JSON"), (b"[" * 100_000, "the answer is no JSON"), (b"{}", "no choices"),
    (b'{"choices": [{"text": 3}]}', "has no text"), (b'{"choices": 1}', "no choices"), (b"null", "an object was expected"),
    (b'{"choices": [{"text": "a", "logprobs": {"tokens": ["a"], "token_logprobs": [0.5], "top_logprobs": [{}]}}]}', "no log-probability"),
    (b'{"choices": [{"text": "a", "logprobs": {"tokens": ["a"], "token_logprobs": [NaN], "top_logprobs": [{}]}}]}', "no log-probability"),
    (b'{"choices": [{"text": "a", "logprobs": {"content": [{"token": "a", "logprob": -1, "top_logprobs": [{"token": "a", "logprob": 0},'
     b' {"token": "b", "logprob": 0}]}]}}]}', "add up to 2"),
    (b'{"choices": [{"text": "a", "logprobs": [1, 2]}]}', "an object was expected"),
])
def test_answers_that_make_no_sense_are_one_line(content, says, exact):
    with playing(lambda method, path, body: (200, OK, content)) as url, pytest.raises(EndpointError, match=says) as error:
        collect(Http(url), exact)
    assert "\n" not in str(error.value)


def test_an_answer_without_an_end_is_not_read(exact, monkeypatch):
    monkeypatch.setattr("refimpl.lab.judge.http.MAX_BYTES", 1 << 20)
    with raw(endless(), *[b" " * 65536] * 40) as url, pytest.raises(EndpointError, match="more than 1 MiB"):
        collect(Http(url, timeout=5), exact)


def test_what_was_answered_before_it_hangs_is_judged(server, exact, few):
    asked = []

    def hanging(path, fields):
        asked.append(path)
        if len(asked) > 10:
            raise EndpointError("no whole answer within 300 s", fatal=True)
        return fields
    found = judged(Known(server, ask=hanging), exact, ("probabilities", "again"))
    assert answers(found) == {"probabilities": RIGHT, "again": UNKNOWN} and len(asked) == 11
    assert any("no whole answer" in note for note in found.notes)


def test_another_model_is_called_one(server, tmp_path, few):
    path = write_model(tmp_path / "other.gguf", random_model("12B"))
    found = judged(Http(server), refimpl.load(path, arithmetic="exact"))
    assert answers(found)["ids"] == DEPARTS and found.status == 1


# ---- the command

def test_the_command_says_a_line_for_each_question(server, few):
    code, out, err = run("judge", server, "--ask", "template,ids,probabilities")
    assert code == 0 and [line.split()[:2] for line in out.splitlines()[1:4]] == [[q, RIGHT] for q in ("template", "ids", "probabilities")]
    code, out, err = run("judge", server, "--ask", "ids", "--json")
    found = json.loads(out)
    assert code == 0 and found["status"] == 0 and found["verdicts"][0]["answer"] == RIGHT


def test_wrong_usage_and_no_endpoint(tmp_path):
    assert_one_line(run("judge", "127.0.0.1:8080"), 2, "is no address of an endpoint")
    assert_one_line(run("judge", "http://127.0.0.1:1", "--ask", "taste"), 2, "--ask taste", "probabilities")
    assert_one_line(run("judge", "http://127.0.0.1:1", "--kv", "q2"), 2, "q4_0")
    began = time.monotonic()
    assert_one_line(run("judge", "http://127.0.0.1:1"), 3, "127.0.0.1:1/v1/models: nothing listens there")
    assert_one_line(run("judge", "http://127.0.0.1:1", "-m", tmp_path / "no.gguf"), 3, "no.gguf")
    assert time.monotonic() - began < 30
