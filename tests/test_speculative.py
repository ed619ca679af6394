"""With a drafter the text is the same, to the last bit of every logit: good drafters and bad ones, greedy and sampled, any depth."""

import hashlib
import itertools
from collections import Counter

import numpy as np
import pytest
from few_layers import few_layers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from shapes import SHAPES, V, pattern, prompt, random_drafter, random_model, write_drafter, write_model

import refimpl
from refimpl.decode.draft_length import MAX_DRAFT, AutoDraftLength, FixedDraftLength
from refimpl.decode.draft_stats import DraftStats
from refimpl.decode.drafter import Drafter
from refimpl.decode.sampling import Sampler, Sampling
from refimpl.decode.speculative import Speculation, accept, speculative
from refimpl.lab.compare.known_bugs import MOE, Bug, inject
from refimpl.loading import model as model_module
from refimpl.model import drafter as network
from refimpl.model import drafter_config, gemma4

SAMPLINGS = (dict(temperature=0.0), dict(temperature=0.7, seed=1), dict(temperature=1.0, top_k=20, seed=2),
             dict(temperature=1.0, top_p=0.8, seed=3))


class Scripted:
    """A drafter that knows what the target will say (`truth`, prompt and all) and is wrong from draft `right()` on."""

    def __init__(self, target, truth: list[int], right):
        self.target, self.truth, self.right, self.auto = target, truth, right, AutoDraftLength()

    def draft(self, token, state_C, cache, n, min_p=0.0):
        known = self.truth[cache.length + 1:cache.length + 1 + n]
        right = self.right()
        return [known[i] if i < min(right, len(known)) else (known[i] + 1) % V if i < len(known) else 5 for i in range(n)]


@pytest.fixture
def picked(monkeypatch):
    """A hash of the logits of every pick, in order."""
    seen, pick = [], Sampler.pick

    def watched(self, logit_V):
        seen.append(hashlib.sha256(np.ascontiguousarray(logit_V).tobytes()).digest())
        return pick(self, logit_V)
    monkeypatch.setattr(Sampler, "pick", watched)
    return seen


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Targets and drafters of all shapes, on one and on two threads."""
    folder, made = tmp_path_factory.mktemp("pairs"), {}
    for shape in SHAPES:
        overrides = few_layers(shape) if shape in ("E2B", "E4B") else dict(layer_types=pattern(5, 1), num_hidden_layers=6)
        path = write_model(folder / f"{shape}.gguf", random_model(shape, seed=5, **overrides), "Q4_0")
        drafter = write_drafter(folder / f"{shape}-mtp.gguf", random_drafter(shape, n_centroid=20 if shape == "E2B" else 0), "Q8_0")
        models = [refimpl.load(path, threads=threads) for threads in (1, 2)]
        made[shape] = [(model, refimpl.load_drafter(drafter, model)) for model in models]
    return made


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A target of two layers, for what any target shows."""
    path = tmp_path_factory.mktemp("small") / "m.gguf"
    return refimpl.load(write_model(path, random_model("12B", seed=5, **few_layers("12B")), "Q4_0"), threads=1)


def run(picked, model, ids, n, **options):
    """(new ids, hashes of the logits they were picked from, statistics, why it stopped)."""
    picked.clear()
    out = refimpl.generate(model, ids, max_new_tokens=n, **{"temperature": 0.0} | options)
    return out.ids, list(picked), out.stats.draft, out.stats.stop


def assert_same(picked, model, drafter, ids, n, want, **options):
    """The ids, the reason to stop, and the logits of every id are those of the plain loop. Returns the statistics."""
    got = run(picked, model, ids, n, drafter=drafter, **options)
    assert got[0] == want[0] and got[3] == want[3]
    assert got[1] == want[1][:len(got[1])] and len(got[1]) == len(want[1])
    return got[2]


# ---- equality

def some_or(n_some: int, n_all: int):
    """A test with `n_some` cases, and one with `n_all` that is exhaustive."""
    return pytest.mark.parametrize("n_cases", [n_some, pytest.param(n_all, marks=pytest.mark.exhaustive)])


@some_or(3, 48)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_text_is_the_same(pairs, picked, shape, n_cases):
    """Prompts of 2 to 49 tokens (the window is 7), 15 or 240 in all, each with every kind of drafter; drafts of 1 to 8."""
    rng = np.random.default_rng(0)
    kinds = {"random": 0, "wrong": 0, "right": 0, "now and then": 0}
    for i in range(0, 48, 48 // n_cases | 1):           # odd, so that the few have different samplings and numbers of threads
        ids, n, sampling = prompt(2 + i, seed=i), 18 + i % 7, SAMPLINGS[i % len(SAMPLINGS)]
        model, drafter = pairs[shape][i % 2]
        want = run(picked, model, ids, n, **sampling)
        truth = ids + want[0]
        for j, (kind, made) in enumerate({
                "random": drafter, "wrong": Scripted(model, truth, lambda: 0), "right": Scripted(model, truth, lambda: 99),
                "now and then": Scripted(model, truth, lambda: int(rng.integers(0, 9)))}.items()):
            stats = assert_same(picked, model, made, ids, n, want, draft_max=1 + (i + 3 * j) % MAX_DRAFT, **sampling)
            kinds[kind] += stats.n_accepted
            assert kind != "right" or stats.n_accepted == stats.n_proposed or want[3] == "end"
            assert kind != "wrong" or stats.n_accepted == 0
    assert kinds["right"] > kinds["now and then"] > 4 * n_cases and kinds["wrong"] == 0


@some_or(1, 3)
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_the_built_in_model(picked, sampling, n_cases):
    for threads in (1, 2) if n_cases > 1 else (1 + SAMPLINGS.index(sampling) % 2,):
        model = refimpl.load(threads=threads)
        texts = "def ", "import os\n\nclass Reader:\n", "    def __init__(self, x):\n        "
        for k, text in enumerate(texts[:n_cases]):
            ids = model.tokenizer.encode(text)
            n = 80 if n_cases > 1 else 30
            want = run(picked, model, ids, n, **sampling)
            truth, rng = ids + want[0], np.random.default_rng(k)
            for made in (Scripted(model, truth, lambda: 99), Scripted(model, truth, lambda: int(rng.integers(0, 7)))):     # noqa: B023
                assert_same(picked, model, made, ids, n, want, draft_max=2 + 2 * k, **sampling)
                assert_same(picked, model, made, ids, n, want, **sampling)                                                # auto


@pytest.mark.parametrize("backend", [dict(backend="reference"), dict(arithmetic="exact")])
def test_other_arithmetic(tmp_path, picked, backend):
    model = refimpl.load(write_model(tmp_path / "m.gguf", random_model("26B-A4B", **few_layers("26B-A4B")), "Q4_0"), **backend)
    drafter = refimpl.load_drafter(write_drafter(tmp_path / "d.gguf", random_drafter("26B-A4B")), model)
    for sampling in SAMPLINGS[:2]:
        want = run(picked, model, prompt(9), 16, **sampling)
        for made in (drafter, Scripted(model, prompt(9) + want[0], lambda: 2)):
            assert_same(picked, model, made, prompt(9), 16, want, draft_max=4, **sampling)


@pytest.mark.parametrize("shape, n", [("26B-A4B", 110), *(pytest.param(shape, 150, marks=pytest.mark.exhaustive) for shape in (
    "26B-A4B", "E4B"))])
def test_rings_that_wrap(pairs, picked, monkeypatch, shape, n):
    """With 10 rows in a call the rings have 17 slots: 140 tokens go round them eight times, and end in the third block of 64."""
    monkeypatch.setattr(model_module, "CHUNK", 10)
    model, drafter = pairs[shape][0]
    want, rng = run(picked, model, prompt(30), n, temperature=1.0, seed=4), np.random.default_rng(1)
    for made in (drafter, Scripted(model, prompt(30) + want[0], lambda: int(rng.integers(0, 9)))):
        assert_same(picked, model, made, prompt(30), n, want, draft_max=8, temperature=1.0, seed=4)


# ---- where it ends

def test_token_limit_and_context_end_inside_of_a_draft(small, picked):
    model = small
    truth = prompt(9) + run(picked, model, prompt(9), 60)[0]
    for n in range(12):
        want = run(picked, model, prompt(9), n)
        stats = assert_same(picked, model, Scripted(model, truth, lambda: 99), prompt(9), n, want, draft_max=4)
        assert stats.n_proposed <= max(0, n - 1) and want[3] == "limit"
    for room in range(9, 20):
        want = run(picked, model, prompt(9), 60, n_ctx=room)
        assert_same(picked, model, Scripted(model, truth, lambda: 99), prompt(9), 60, want, draft_max=4, n_ctx=room)
        assert want[3] == "context" and len(want[0]) == room - 9 + 1


def test_end_of_generation_inside_of_a_draft(small, picked, monkeypatch):
    model = small
    truth = prompt(9) + run(picked, model, prompt(9), 60, temperature=1.0, seed=8)[0]
    for at in range(0, 14):
        monkeypatch.setattr(model.tokenizer, "end_of_generation", frozenset({truth[9 + at]}))
        want = run(picked, model, prompt(9), 60, temperature=1.0, seed=8)
        assert want[3] == "end" and len(want[0]) <= at
        for right in (99, 2):
            assert_same(picked, model, Scripted(model, truth, lambda: right), prompt(9), 60, want, draft_max=5,          # noqa: B023
                        temperature=1.0, seed=8)


class Interrupted(Exception):
    pass


def test_an_interruption_between_any_two_steps_leaves_a_cache_that_can_go_on(pairs, monkeypatch):
    """Stopped at the n-th call of anything that a round is made of, the cache holds committed tokens of the true text and nothing else."""
    model, _ = pairs["26B-A4B"][0]
    ids = prompt(9)
    truth = ids + refimpl.generate(model, ids, max_new_tokens=18, temperature=0).ids
    clean = model.prefill(truth, model.new_cache())
    drafter, calls = Scripted(model, truth, lambda: 2), itertools.count()

    def breaking(function, at):
        def called(*args, **kwargs):
            if next(calls) == at:
                raise Interrupted
            return function(*args, **kwargs)
        return called

    for at in range(60):
        cache, calls = model.new_cache(), itertools.count()
        state = model.prefill(ids, cache)[-1]
        with monkeypatch.context() as patch:
            patch.setattr(model, "forward", breaking(model.forward, at))
            patch.setattr(model, "head", breaking(model.head, at))
            patch.setattr(cache, "advance", breaking(cache.advance, at))
            patch.setattr(drafter, "draft", breaking(drafter.draft, at))
            got = []
            try:
                greedy = Sampler(Sampling(temperature=0))
                token = greedy.pick(model.head(state[None])[0])
                got.append(token)
                for done in speculative(model, drafter.draft, cache, greedy, token, state, 17, FixedDraftLength(4)):
                    got += done.emitted
                interrupted = False
            except Interrupted:
                interrupted = True
        assert ids + got == truth[:9 + len(got)] and 0 <= cache.length - (9 + len(got)) + 1 <= 5
        rest = truth[cache.length:]
        assert not rest or np.array_equal(model.prefill(rest, cache), clean[len(truth) - len(rest):])
        if not interrupted:
            break
    assert not interrupted and at > 20, "not every step was the last one once"


# ---- the cache

@settings(max_examples=4, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(counts=st.lists(st.integers(0, 8), min_size=60, max_size=120), depth=st.integers(1, 8), seed=st.integers(0, 1000))
def test_any_accept_counts_leave_the_cache_of_the_committed_tokens(pairs, counts, depth, seed):
    """Hundreds of rounds in all, a window of 7 positions: after every example each visible key and value has the bits of a fresh cache."""
    model, _ = pairs["26B-A4B"][0]
    truth = prompt(450, seed=seed)

    class Sure:
        """Says what the text says."""

        def __init__(self):
            self.left = iter(truth[5:])

        def pick(self, logit_V):
            return next(self.left)
    from refimpl.model.cache import Cache
    caches, left = [Cache(model.config, 512, 9, model.backend.kv_type) for _ in range(2)], iter(counts)
    state = model.prefill(truth[:5], caches[0])[-1]
    made, sure = Scripted(model, truth, lambda: next(left, 0)), Sure()
    got, rounds = [sure.pick(None)], 0
    for done in speculative(model, made.draft, caches[0], sure, got[0], state, 439, FixedDraftLength(depth)):
        got, rounds = got + done.emitted, rounds + 1
        if rounds == len(counts) or len(got) >= 400:
            break
    assert truth[5:5 + len(got)] == got and rounds >= 40
    n = caches[0].length
    model.prefill(truth[:n], caches[1])
    for i, layer in caches[0].layers.items():
        first = int(layer.first_visible(n))
        for ours, fresh in zip(layer.read(first, n), caches[1].layers[i].read(first, n)):
            assert np.array_equal(ours.view(np.uint8), fresh.view(np.uint8))


# ---- every round's drafts are those of a clean start

def rounds_of(model, drafter, ids, n) -> tuple[bool, list[tuple[list[int], list[int]]]]:
    """Is the text that of the plain loop? And of every round (committed ids and the latest, what was drafted then).

    A few right tokens are pushed in, as a random drafter is never right.
    """
    truth = ids + refimpl.generate(model, ids, max_new_tokens=n, temperature=0).ids
    rounds, draft, turn = [], drafter.draft, itertools.count()

    def watched(token, state_C, cache, k, min_p=0.0):
        drafted = draft(token, state_C, cache, k, min_p)
        rounds.append((truth[:cache.length] + [token], drafted))
        right = next(turn) % 4
        return truth[cache.length + 1:cache.length + 1 + right][:k] + drafted[right:]
    drafter.draft = watched
    try:
        out = refimpl.generate(model, ids, max_new_tokens=n, temperature=0, drafter=drafter, draft_max=4)
    finally:
        del drafter.draft
    return ids + out.ids == truth and sum(out.stats.draft.accepted) > n // 3, rounds


def as_from_a_clean_start(model, drafter, rounds) -> bool:
    return all(refimpl.propose(model, drafter, committed, len(drafted)) == drafted for committed, drafted in rounds if drafted)


@pytest.mark.parametrize("shape", ["E2B", "26B-A4B", *(
    pytest.param(shape, marks=pytest.mark.exhaustive) for shape in ("E4B", "12B", "31B"))])
def test_drafts_do_not_depend_on_what_was_rejected_before(pairs, shape):
    model, drafter = pairs[shape][0]
    same_text, rounds = rounds_of(model, drafter, prompt(11), 40)
    assert same_text and as_from_a_clean_start(model, drafter, rounds)


OF_A_ROUND = {      # what only shows after a partial acceptance, and where: in the text or in the drafts
    "wrong row carried": ("drafts", Speculation.finish, "state_TD[len(emitted) - 1]", "state_TD[-1]"),
    "rejected rows committed": ("text", Speculation.finish, "cache.advance(len(emitted))", "cache.advance(1 + len(drafted))"),
    "too little committed": ("drafts", Speculation.finish, "cache.advance(len(emitted))", "cache.advance(max(1, len(emitted) - 1))"),
    "one key too many visible": ("drafts", network.draft_step, "fromkeys(AttentionType, pos_T)", "fromkeys(AttentionType, pos_T + 1)"),
}


@pytest.mark.parametrize("what", OF_A_ROUND)
def test_a_bug_in_the_round_is_caught(pairs, what):
    where, *change = OF_A_ROUND[what]
    model, drafter = pairs["26B-A4B"][0]
    with inject(Bug(*change, MOE, "")):
        same_text, rounds = rounds_of(model, drafter, prompt(11), 40)
    assert same_text == (where != "text")
    assert where == "text" or not as_from_a_clean_start(model, drafter, rounds)
    assert rounds_of(model, drafter, prompt(11), 40)[0], "the change was not undone"


OF_A_STEP = {
    "projection before the norm": (network.draft_step, "backend.matmul(z_TD, weights.post_", "backend.matmul(x_TD, weights.post_"),
    "state before the target's norm": (gemma4.forward, "backend.rms_norm(x_TD, weights.norm_D, config.norm_eps)", "x_TD"),
    "position advances with the draft": (Drafter.draft, "z_D, state_C = network.draft_step(", "angles = network.angles_at(self.weights, "
                                         "cache.length + len(proposed)); z_D, state_C = network.draft_step("),
    "state before the embedding": (network.draft_step, "[embedding_C, state_C]", "[state_C, embedding_C]"),
    "embedding not scaled": (network.draft_step, "np.concatenate([embedding_C, state_C])", "np.concatenate([embedding_C / 8, state_C])"),
    "keys of the first layer of the kind": (drafter_config.drafter_config_from_gguf, "target.last_own(attention)",
                                            "min(layer.index for layer in target.layers if layer.attention is attention)"),
    "no final norm": (network.draft_step, "backend.rms_norm(x_TD, weights.norm_D, step.eps)", "x_TD"),
    "worst group": (network.candidates, "np.argsort(-score_Z, kind=\"stable\")", "np.argsort(score_Z, kind=\"stable\")"),
}


@pytest.fixture(scope="module")
def unlike(tmp_path_factory):
    """By shape, files of a target and a drafter. Two of the target's layers are of one kind, and have other keys."""
    folder, made = tmp_path_factory.mktemp("unlike"), {}
    for shape, n_centroid, overrides in (("E2B", 20, few_layers("E2B")), ("12B", 0, dict(layer_types=pattern(2, 1), num_hidden_layers=3))):
        made[shape] = (write_model(folder / f"{shape}.gguf", random_model(shape, **overrides)),
                       write_drafter(folder / f"{shape}-mtp.gguf", random_drafter(shape, n_centroid=n_centroid)))
    return made


@pytest.mark.parametrize("what", OF_A_STEP)
def test_a_bug_in_the_step_is_caught(unlike, what):
    """What transformers proposes (test_drafter.py compares it) is what a clean version proposes; one with a bug must propose other ids."""
    paths = unlike["E2B" if what == "worst group" else "12B"]

    def proposals():
        model = refimpl.load(paths[0], backend="reference")
        drafter = refimpl.load_drafter(paths[1], model)
        return [refimpl.propose(model, drafter, prompt(n), 6) for n in (3, 9, 30, 45)]
    want = proposals()
    with inject(Bug(*OF_A_STEP[what], MOE, "")):
        assert proposals() != want, what
    assert proposals() == want


# ---- sampling

@some_or(500, 3000)
def test_sampled_text_has_the_targets_distribution(small, monkeypatch, n_cases):
    """A chi-square test of the first two tokens of 500 or 3,000 short texts against the model's own probabilities; the second token is
    drafted.
    """
    model = small
    monkeypatch.setattr(model.tokenizer, "end_of_generation", frozenset())
    ids, n, count, expected, most_probable = prompt(6), n_cases, Counter(), Counter(), {}
    sampling = Sampling(temperature=1.0, top_k=4, top_p=1.0)

    def after(tokens):
        return [(int(token), float(p)) for token, p in zip(*Sampler(sampling).distribution(model.logits(tokens)[-1]))]
    for a, p in after(ids):
        most_probable[a] = max(after([*ids, a]), key=lambda pair: pair[1])[0]
        for b, q in after([*ids, a]):
            expected[a, b] += n * p * q

    class Likely:
        """Right in the second place as often as a draft can be."""

        target, auto = model, AutoDraftLength()

        def draft(self, token, state_C, cache, k, min_p=0.0):
            return [most_probable[token], 7][:k] if cache.length == 6 else [7] * k
    accepted = 0
    for seed in range(n):
        out = refimpl.generate(model, ids, max_new_tokens=3, temperature=1.0, top_k=4, top_p=1.0, seed=seed, drafter=Likely(), draft_max=2)
        count[tuple(out.ids[:2])] += 1
        accepted += out.stats.draft.accepted[0]
    assert set(count) <= set(expected) and len(expected) == 16 and accepted > n // 4
    chi = sum((count[key] - e) ** 2 / e for key, e in expected.items())
    assert chi < 45, chi                    # 15 degrees of freedom: 44.3 is passed once in 10,000 times


def test_accept_takes_choices_one_by_one():
    taken = []

    def chosen(*ids):
        for token in ids:
            taken.append(token)
            yield token
    assert accept([5, 6, 7], chosen(5, 6, 9, 8)) == [5, 6, 9] and taken == [5, 6, 9]
    assert accept([5, 6, 7], chosen(5, 6, 7, 8)) == [5, 6, 7, 8]
    assert accept([5, 6], chosen(4, 1, 2)) == [4] and accept([], chosen(3)) == [3]
    taken.clear()
    assert accept([5, 6, 7], chosen(5, 6, 7, 8), end={6}) == [5, 6] and taken == [5, 6]
    assert accept([5, 6, 7], chosen(1, 6, 7, 8), end={1}) == [1]


# ---- options and figures

@pytest.mark.parametrize("options", [dict(draft_max=0), dict(draft_max=-1), dict(draft_max=1000), dict(draft_max=True),
                                     dict(draft_max="many"), dict(draft_min_p=1.0), dict(draft_min_p=-0.1)])
def test_odd_options_are_refused(pairs, options):
    model, drafter = pairs["12B"][0]
    with pytest.raises(ValueError, match="draft_m"):
        refimpl.generate(model, [2, 5], drafter=drafter, **options)


def test_statistics(pairs):
    model, _ = pairs["26B-A4B"][0]
    truth = prompt(9) + refimpl.generate(model, prompt(9), max_new_tokens=31, temperature=0).ids
    turn = itertools.cycle([0, 1, 3])
    out = refimpl.generate(model, prompt(9), max_new_tokens=22, temperature=0, draft_max=3,
                           drafter=Scripted(model, truth, lambda: next(turn)))
    stats = out.stats.draft         # 1 from the prompt, then rounds of 1, 2, 4 tokens: 3 times
    assert (stats.rounds, stats.proposed, stats.accepted) == (9, [9, 9, 9], [6, 3, 3])
    assert stats.n_proposed == 27 and stats.n_accepted == 12 and stats.tokens_per_round == 1 + 12 / 9
    assert stats.acceptance == [6 / 9, 3 / 9, 3 / 9]
    assert stats.expert_layers == 9 * 6 and 3 <= stats.experts_per_layer <= 12      # 3 of 16 a row, 4 rows
    assert 0 < stats.draft_seconds < out.stats.decode_seconds and 0 < stats.verify_seconds < out.stats.decode_seconds
    assert refimpl.generate(model, prompt(9), max_new_tokens=3).stats.draft is None


def test_auto_leaves_a_useless_drafter_alone(small, picked):
    """No time is measured here: the costs are given."""
    model = small

    class Clocked(AutoDraftLength):
        def observe(self, drafted, accepted, draft_seconds, verify_seconds):
            super().observe(drafted, accepted, 0.2 * drafted, 1 + 0.1 * drafted)
    truth = prompt(9) + run(picked, model, prompt(9), 400)[0]
    for right, low, high in ((0, 0.0, 0.1), (99, 5.0, 9.0)):
        stats, cache = DraftStats(), model.new_cache()
        state = model.prefill(prompt(9), cache)[-1]
        made = Scripted(model, truth, lambda: right)                                                                      # noqa: B023
        greedy = Sampler(Sampling(temperature=0))
        got = [greedy.pick(model.head(state[None])[0])]
        for done in speculative(model, made.draft, cache, greedy, got[0], state, 399, Clocked()):
            got += done.emitted
            stats.add(done)
        assert prompt(9) + got == truth and low <= stats.n_proposed / stats.rounds <= high
