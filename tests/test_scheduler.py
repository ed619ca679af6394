"""Many answers at a time: none of them can be told from one that was made alone."""

import functools
import itertools
from types import SimpleNamespace

import numpy as np
import pytest
from few_layers import few_layers
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from shapes import SHAPES, prompt, random_drafter, random_model, reference, write_drafter, write_model

import refimpl
from refimpl.decode.generate import plain
from refimpl.decode.prefixes import Prefixes
from refimpl.decode.request import SOURCES, Done, Failed, Reading, Request, Token
from refimpl.decode.run import Run, token_of
from refimpl.decode.sampling import Sampler, Sampling
from refimpl.decode.snapshots import Snapshots
from refimpl.model.cache import ContextFull
from refimpl.serve.scheduler import FIRST, Busy, Costs, Scheduler
from refimpl.serve.slices import Sliced

ENOUGH = 1 << 30
N_CTX = 420


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The tiny shapes in NumPy, and the built-in model with the kernels, each with a drafter."""
    folder, found = tmp_path_factory.mktemp("shapes"), {}
    for shape in SHAPES:
        model = reference(write_model(folder / f"{shape}.gguf", random_model(shape, **few_layers(shape))))
        found[shape] = model, refimpl.load_drafter(write_drafter(folder / f"{shape}-mtp.gguf", random_drafter(shape)), model)
    model = refimpl.load()
    return found | {"built-in": (model, refimpl.load_drafter(None, model))}


class EveryOther:
    """A constraint: ids of the same parity as the number of tokens so far, and the end."""

    def __init__(self, end):
        self.end, self.n = end, 0

    def mask(self, logits_V):
        masked_V = np.where(np.arange(len(logits_V)) % 2 == self.n % 2, logits_V, -np.inf).astype(np.float32)
        masked_V[list(self.end)] = logits_V[list(self.end)]
        return masked_V

    def accept(self, token):
        assert token % 2 == self.n % 2 or token in self.end
        self.n += 1

    def forced(self):
        return [4 + self.n % 2, 7 - self.n % 2]         # a guess


def block_bytes(model) -> int:
    """Of a block of all layers."""
    return sum(table.block_bytes for table in model.new_cache(1).tables)


def request(model, ids, n_new, sampling, constrained=False, drafts=SOURCES) -> Request:
    extra = {"constraint": EveryOther(model.tokenizer.end_of_generation)} if constrained else {}
    return Request(ids, sampling, n_new, n_top=4, drafts=drafts, **extra)


@functools.cache
def cold(model, ids, n_new, sampling, constrained):
    """The tokens that one gets alone, one after the other, as `plain` states it; with their probabilities."""
    extra = {"constraint": EveryOther(model.tokenizer.end_of_generation)} if constrained else {}
    cache, seen = model.new_cache(N_CTX), []

    class Watched(Sampler):
        def pick(self, logits_V):
            seen.append(logits_V)
            return super().pick(logits_V)
    sampler = Watched(sampling, model.tokenizer.suppress, **extra)
    n = min(n_new, N_CTX + 1 - len(ids))
    made = [*itertools.takewhile(lambda new: new not in model.tokenizer.end_of_generation,
                                 itertools.islice(plain(model, cache, sampler, model.prefill(ids, cache)[-1]), n))]
    tokens = []
    for new, logit_V in zip(made, seen):
        log_p_V = logit_V.astype(np.float64) - logit_V.max()
        log_p_V -= np.log(np.exp(log_p_V).sum())
        best = sorted(range(len(logit_V)), key=lambda i: (-logit_V[i], i))[:4]
        tokens.append((new, log_p_V[new], [(i, log_p_V[i]) for i in best]))
    return tokens


def compare(got, expected, whole=True):
    tokens = [event for event in got if isinstance(event, Token)]
    assert isinstance(got[-1], Done), got[-1]
    assert len(tokens) == len(expected) if whole else len(tokens) <= len(expected)
    for token, (new, logprob, top) in zip(tokens, expected):
        assert token.id == new and [i for i, _ in token.top] == [i for i, _ in top]
        assert abs(token.logprob - logprob) < 1e-12 and all(abs(a - b) < 1e-12 for (_, a), (_, b) in zip(token.top, top))


SAMPLINGS = [Sampling(temperature=0.0), Sampling(temperature=1.0, seed=5),
             Sampling(temperature=0.8, top_k=0, top_p=1.0, seed=9, frequency_penalty=0.7, presence_penalty=-0.4,
                      logit_bias=((7, 1.5), (9, -2.0)))]
ASK = st.tuples(st.just("ask"), st.integers(0, 3), st.integers(1, 330), st.sampled_from([0, 1, 9, 25]), st.sampled_from(SAMPLINGS),
                st.booleans(), st.sampled_from([SOURCES, (), SOURCES[:1]]))
EVENTS = st.lists(st.one_of(ASK, ASK, st.tuples(st.just("step"), st.integers(1, 12)), st.tuples(st.just("cancel"), st.integers(0, 9)),
                            st.just(("forget",)), st.just(("restart",))), min_size=3, max_size=14)


@pytest.mark.parametrize("shape", ["E2B", "12B", "26B-A4B", "built-in",
                                   *(pytest.param(shape, marks=pytest.mark.exhaustive) for shape in ("E4B", "31B"))])
@settings(max_examples=4, deadline=None, phases=[Phase.generate])
@given(events=EVENTS, ram=st.sampled_from([ENOUGH, 4, 0]), most=st.integers(1, 5), latency=st.sampled_from([0.0, 0.02, 9.0]),
       drafting=st.booleans(), disk=st.booleans())
def test_companions_change_nothing(models, shape, events, ram, most, latency, drafting, disk, tmp_path_factory):
    """Requests that come and go in any order, read beside others, wait for memory, are sent away and come back; with drafts and
    constraints, sampled and greedy, after restarts: ids and probabilities are those of a cold, lone run.
    """
    model, drafter = models[shape]
    folder = tmp_path_factory.mktemp("disk")

    def begin():
        prefixes = Prefixes(model, ram * block_bytes(model), Snapshots(folder, model, ENOUGH) if disk else None)
        return Scheduler(model, prefixes, N_CTX, drafter=drafter if drafting else None, most_running=most, latency=latency)
    scheduler, asked = begin(), []
    for what, *rest in events:
        if what == "ask":
            text, n, n_new, sampling, constrained, drafts = rest
            ids = tuple(prompt(n, seed=text))
            got: list = []
            ticket = scheduler.submit(request(model, ids, n_new, sampling, constrained, drafts), got.append)
            asked.append((ticket, got, (ids, n_new, sampling, constrained)))
        elif what == "step":
            for _ in range(rest[0]):
                scheduler.step()
        elif what == "cancel" and asked:
            scheduler.cancel(asked[rest[0] % len(asked)][0])
        elif what == "forget":
            scheduler.prefixes.forget()
        elif what == "restart":
            scheduler.close()
            scheduler = begin()
    while scheduler.step():
        pass
    assert not scheduler.has_work
    for _, got, case in asked:
        compare(got, cold(model, *case), whole=got[-1].stats.stop != "gone")


def test_of_equal_tokens_the_lower_id_is_named_first():
    logit_V = np.array([1, 3, 2, 3, 2, 2], np.float32)
    for n, want in ((0, []), (1, [1]), (2, [1, 3]), (3, [1, 3, 2]), (4, [1, 3, 2, 4]), (9, [1, 3, 2, 4, 5, 0])):
        token = token_of(3, logit_V, n)
        assert [i for i, _ in token.top] == want and token.logprob == pytest.approx(3 - np.log(np.exp(logit_V).sum()))
    assert token_of(3, logit_V, -1) == Token(3)


def test_the_needle(models):
    """One question among companions that are asked and go at random: every time the same bits."""
    model, drafter = models["built-in"]
    rng = np.random.default_rng(4)
    needle = tuple(prompt(90, seed=8))
    for turn in range(3):
        scheduler = Scheduler(model, Prefixes(model, ENOUGH), N_CTX, drafter=drafter if turn % 2 else None, latency=0.001)
        others = [scheduler.submit(request(model, prompt(int(rng.integers(1, 200)), seed=turn * 9 + i), 12, SAMPLINGS[i % 3]), [].append)
                  for i in range(rng.integers(1, 6))]
        for _ in range(rng.integers(0, 9)):
            scheduler.step()
        got: list = []
        scheduler.submit(request(model, needle, 12, SAMPLINGS[turn % 3]), got.append)
        while scheduler.step():
            if rng.random() < 0.1:
                scheduler.cancel(others[rng.integers(len(others))])
        compare(got, cold(model, needle, 12, SAMPLINGS[turn % 3], False))


# ---- order, places, memory

def run_all(scheduler, requests):
    """Submits them at once. Returns the events of each, and who was told something in which call."""
    got, order = [[] for _ in requests], []
    for i, each in enumerate(requests):
        scheduler.submit(each, lambda event, i=i: (got[i].append(event), order.append((calls[0], i, event))))
    calls = [0]
    while scheduler.step():
        calls[0] += 1
    return got, order


def test_a_short_prompt_does_not_wait_for_a_long_one(models):
    model, _ = models["built-in"]
    scheduler = Scheduler(model, Prefixes(model, ENOUGH), 4096, latency=0.0)
    long, short = (Request(prompt(n, seed=n), SAMPLINGS[0], 3) for n in (1100, 20))
    _, order = run_all(scheduler, [long, short])
    first = {i: call for call, i, event in reversed(order) if isinstance(event, Token)}
    assert first[1] < first[0]


def test_writers_wait_for_few_tokens_of_a_prompt(models):
    """While somebody writes, each call reads no more than fits into the time."""
    model, _ = models["built-in"]
    scheduler = Scheduler(model, Prefixes(model, ENOUGH), 4096, latency=0.0)
    got: list = []
    scheduler.submit(Request(prompt(9), SAMPLINGS[0], 200), got.append)
    scheduler.step()
    reader: list = []
    scheduler.submit(Request(prompt(400, seed=1), SAMPLINGS[0], 2), reader.append)
    for _ in range(10):
        scheduler.step()
    read = np.diff([event.n_read for event in reader if isinstance(event, Reading)])
    assert len(read) == 10 and read[0] == FIRST and (1 <= read).all() and (read[1:] <= 2 * read[:-1].cumsum()).all()
    assert sum(isinstance(event, Token) for event in got) == 11


def test_costs():
    costs = Costs()
    costs.observe(0, 512, 1e-9)                 # read without anybody who writes: says nothing
    assert costs.n_rows(0, 0.2) == 512 and costs.n_rows(3, 0.2) == FIRST and costs.spare(0, 0.2) == 0.2 and costs.spare(3, 0.2) == 0.2
    for _ in range(3):
        costs.observe(2, 0, 0.1)
        costs.observe(2, 50, 0.15)              # a thousandth of a second for each row
    assert costs.spare(2, 0.2) == pytest.approx(0.1) and costs.spare(2, 0.11) == pytest.approx(0.05)     # half as long again, at least
    assert costs.n_rows(2, 0.0955) == 95 and costs.n_rows(2, 0.0) == 1 and costs.n_rows(2, 99) == 100     # twice as many as were tried
    costs.observe(2, 500, 0.6)
    assert costs.n_rows(2, 99) == 510
    for _ in range(3):
        costs.observe(2, 10, 0.2)               # some are ten times as dear: those count
    assert costs.n_rows(2, 0.0955) == 9

def test_a_step_that_does_not_fit_waits(monkeypatch):
    """What followed a name the last time says how long the next step takes, whatever the number of its layer."""
    clock, log = [0.0], []
    monkeypatch.setattr("refimpl.serve.slices.time", SimpleNamespace(monotonic=lambda: clock[0]))

    def compute(pause):
        for layer in range(4):
            for name, seconds in ("norm", 0.01), ("ffn", 0.25), ("sum", 0.01):
                clock[0] += seconds
                log.append(name)
                pause(f"{name}-{layer}")
    sliced, slices = Sliced(compute), []
    while not sliced.ended:
        log.clear()
        sliced.go_on(0.2)
        slices.append(list(log))
    # the first time nothing is known but what there has been; afterwards the long step stands alone
    assert slices == [["norm", "ffn"], ["sum"], ["norm"], ["ffn"], ["sum", "norm"], ["ffn"], ["sum", "norm"], ["ffn"], ["sum"]]


def test_the_same_prompt_is_read_once(models):
    """Several answers to one prompt, asked for at once: the others wait until it has been read, and read nothing but its last token."""
    model, _ = models["built-in"]
    scheduler = Scheduler(model, Prefixes(model, ENOUGH), N_CTX)
    ids = prompt(300)
    got, _ = run_all(scheduler, [Request(ids, Sampling(seed=seed), 5) for seed in range(4)])
    assert [events[-1].stats.reused for events in got] == [0, 299, 299, 299]


def test_places_are_bounded_and_a_queue_too(models):
    model, _ = models["built-in"]
    scheduler = Scheduler(model, Prefixes(model, ENOUGH), N_CTX, most_running=2, most_waiting=3)
    tickets = [scheduler.submit(Request(prompt(5, seed=i), SAMPLINGS[0], 20), [].append) for i in range(3)]
    with pytest.raises(Busy, match="3 requests are waiting") as refused:
        scheduler.submit(Request(prompt(5), SAMPLINGS[0], 20), [].append)
    assert refused.value.retry_after >= 1
    scheduler.step()
    assert [ticket.state for ticket in tickets] == ["writing", "writing", "waiting"]
    scheduler.cancel(tickets[0])
    scheduler.step()
    assert tickets[2].state != "waiting" and tickets[0] not in scheduler.running


def test_where_memory_is_short_the_latest_waits_on_the_disk(models, tmp_path):
    """It comes back with what it had, and reads nothing again."""
    model, _ = models["built-in"]
    scheduler = Scheduler(model, Prefixes(model, 5 * block_bytes(model), Snapshots(tmp_path, model, ENOUGH)), N_CTX)
    asked = [request(model, prompt(60, seed=i), 15, SAMPLINGS[0]) for i in range(3)]
    paused = []
    pause = Run.pause
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "pause", lambda run: (paused.append(run), pause(run)))
        got, _ = run_all(scheduler, asked)
    assert paused and all(run.stats.stop == "limit" for run in paused)
    for each, events in zip(asked, got):
        compare(events, cold(model, tuple(each.ids), 15, SAMPLINGS[0], False))


def test_a_failing_constraint_fails_alone(models):
    model, _ = models["built-in"]

    def broken(*_):
        raise ValueError("broken")
    for where in ("mask", "accept", "forced"):
        scheduler, constraint = Scheduler(model, Prefixes(model, ENOUGH), N_CTX, draft_max=2), EveryOther((1,))
        setattr(constraint, where, broken)
        got, _ = run_all(scheduler, [Request(prompt(9), SAMPLINGS[0], 9, constraint, drafts=SOURCES),
                                     request(model, prompt(9), 9, SAMPLINGS[0])])
        assert isinstance(got[0][-1], Failed) and str(got[0][-1].error) == "broken", where
        compare(got[1], cold(model, tuple(prompt(9)), 9, SAMPLINGS[0], False))


def test_a_failing_model_fails_all_and_the_next_one_runs(models, monkeypatch):
    model, _ = models["built-in"]
    scheduler = Scheduler(model, Prefixes(model, ENOUGH), N_CTX)
    with monkeypatch.context() as patch:
        patch.setattr(type(model), "forward_together", lambda *_: 1 / 0)
        got, _ = run_all(scheduler, [Request(prompt(9), SAMPLINGS[0], 9)] * 2)
    assert all(isinstance(events[-1].error, ZeroDivisionError) for events in got) and not scheduler.has_work
    [got], _ = run_all(scheduler, [request(model, prompt(9), 9, SAMPLINGS[0])])
    compare(got, cold(model, tuple(prompt(9)), 9, SAMPLINGS[0], False))


def test_what_cannot_run_is_refused_at_once(models):
    model, _ = models["built-in"]
    scheduler = Scheduler(model, Prefixes(model, ENOUGH), N_CTX)
    with pytest.raises(ContextFull, match="the prompt has 421 tokens, the context holds 420"):
        scheduler.submit(Request(prompt(421), SAMPLINGS[0]), [].append)
    for ids in ([], [model.config.n_vocab]):
        with pytest.raises(ValueError):
            scheduler.submit(Request(ids, SAMPLINGS[0]), [].append)
