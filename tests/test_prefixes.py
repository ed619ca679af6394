"""What was read is not read again, and nothing can be told from the bits."""

import functools
from itertools import zip_longest
from types import SimpleNamespace

import numpy as np
import pytest
from few_layers import few_layers
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from kernel_cases import same
from shapes import SHAPES, prompt, random_drafter, random_model, reference, write_drafter, write_model

import refimpl
from refimpl.decode.generate import Text, events
from refimpl.decode.prefixes import Nothing, Prefixes
from refimpl.decode.snapshots import Snapshots
from refimpl.model.blocks import BlockTable
from refimpl.model.cache import cache_bytes
from refimpl.progress import silent
from refimpl.text.prompt import Encoded

ENOUGH = 1 << 30


@pytest.fixture(scope="module")
def built_in():
    return refimpl.load()


@pytest.fixture(scope="module")
def models(tmp_path_factory, built_in):
    """The tiny shapes in NumPy, and the built-in model with the kernels."""
    folder = tmp_path_factory.mktemp("shapes")
    return {"built-in": built_in} | {
        shape: reference(write_model(folder / f"{shape}.gguf", random_model(shape, **few_layers(shape)))) for shape in SHAPES}


class Cold:
    """What reading from the beginning gives, each prompt once."""

    def __init__(self, model):
        self.model = model
        self.last_state = functools.lru_cache(maxsize=None)(lambda ids: model.prefill(ids, model.new_cache())[-1])


def read(prefixes, ids, cold):
    """Reads a prompt with what is known of it, remembers it, and compares with a cold run. Returns how much was known, and why not more."""
    found = prefixes.find(ids, None)
    known = found.cache.length
    state_D = prefixes.model.prefill(ids[known:], found.cache)[-1]
    assert same(state_D, cold.last_state(tuple(ids))), f"{known} of {len(ids)} known"
    prefixes.keep(ids, found.cache)
    check(prefixes)
    return known, found.why


def check(prefixes):
    """The books are right, and the budget is kept."""
    nodes = list(prefixes._nodes())
    assert prefixes.n_bytes == sum(block.nbytes for node in nodes for block in node.blocks.values())
    assert not any(node.blocks.keys() & node.stored.keys() for node in nodes)
    assert prefixes.n_bytes <= prefixes.budget and not (prefixes.snapshots and prefixes.snapshots.notes)
    assert not any(block.flags.writeable for node in nodes for block in node.blocks.values())


def sliding_bytes(model) -> int:
    """Of a block of all sliding layers."""
    return sum(int(np.prod(table.shape)) * table.dtype.itemsize for table in model.new_cache(1).tables if table.window)


def block_bytes(model) -> int:
    """Of a block of all layers."""
    return sum(table.block_bytes for table in model.new_cache(1).tables)


# ---- bits

BUDGETS = [ENOUGH, 8, 2, 0]             # in blocks of all layers
MODELS = ["E2B", "12B", "26B-A4B", "built-in", *(pytest.param(shape, marks=pytest.mark.exhaustive) for shape in ("E4B", "31B"))]
STEPS = st.lists(st.tuples(st.sampled_from(["longer", "edit", "another", "shorter", "restart"]), st.integers(0, 400), st.integers(1, 90)),
                 min_size=2, max_size=7)


@pytest.mark.parametrize("shape", MODELS)
@settings(max_examples=4, deadline=None)
@given(steps=STEPS, budget=st.sampled_from(BUDGETS), rows=st.sampled_from([512, 100, 17]), disk=st.booleans())
def test_histories_have_the_bits_of_cold_runs(models, shape, steps, budget, rows, disk, tmp_path_factory):
    """Prompts that go on, go back, change a token far back or come back to what was before the change, also after a restart; in chunks of
    all sizes; with memory for all of it, for some and for nothing.
    """
    model, folder = models[shape], tmp_path_factory.mktemp("disk")

    def begin():
        return Prefixes(model, budget * block_bytes(model), Snapshots(folder, model, ENOUGH) if disk else None)
    cold, prefixes = Cold(model), begin()
    new_cache = model.new_cache

    def small_chunks(*args, **kwargs):
        cache = new_cache(*args, **kwargs)
        cache.max_rows = rows
        return cache
    texts = [prompt(70)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "new_cache", small_chunks)
        for what, at, n in steps:
            before = texts[at % len(texts)] if what == "another" else texts[-1]
            at = at % len(before)
            if what == "restart":
                prefixes = begin()
                continue
            if what == "shorter":
                text = before[:at + 1]
            elif what == "edit":
                text = [*before[:at], (before[at] + 1) % 200, *before[at + 1:]]
            else:
                text = [*before, *prompt(n, seed=at)]
            texts.append(text[:300])
            read(prefixes, texts[-1], cold)


@pytest.mark.parametrize("temperature, drafted", [(1.0, True), *(pytest.param(*case, marks=pytest.mark.exhaustive) for case in (
    (0.0, False), (0.0, True), (1.0, False)))])
def test_turns_have_the_ids_of_cold_runs(built_in, drafted, temperature):
    """A conversation of token ids: each answer is followed by more, twice one is edited, and one is stopped half-way."""
    session = SimpleNamespace(model=built_in, prefixes=Prefixes(built_in, ENOUGH))
    prefixes = session.prefixes
    options = {"max_new_tokens": 12, "temperature": temperature, "drafter": refimpl.load_drafter(None, built_in) if drafted else None}
    ids, rng = built_in.tokenizer.encode("def sort(items):\n"), np.random.default_rng(1)
    for turn in range(6):
        warm, cold = (refimpl.generate(built_in, ids, seed=turn, **options, **more) for more in ({"session": session}, {}))
        assert warm.ids == cold.ids and cold.stats.reused == 0
        assert warm.stats.reused > (0 if turn == 0 else len(ids) // 3) - 1
        check(prefixes)
        if turn in (2, 4):
            ids[len(ids) // 2] = 77
        ids = [*ids, *warm.ids, *rng.integers(5, 500, 30).tolist()]
        if turn == 3:
            pieces = refimpl.stream(built_in, ids, seed=9, session=session, **options)
            for _ in range(5):
                next(pieces)
            pieces.close()
            check(prefixes)


class Talk:
    """Conversations of token ids that share what was read; every answer is compared with a cold run's."""

    def __init__(self, model, drafter, temperature, begin):
        self.model, self.begin, self.prefixes, self.texts, self.asked = model, begin, begin(), [prompt(20)], 0
        self.options = {"max_new_tokens": 10, "temperature": temperature, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "drafter": drafter,
                        "n_ctx": None, "special": False, "draft_max": "auto", "draft_min_p": 0.0, "progress": silent}

    def answer(self, text):
        """New ids one by one. The last thing that it does is to compare."""
        self.asked += 1
        seed = self.asked
        cold = self.run(text, seed, Nothing(self.model))
        warm = self.run(text, seed, self.prefixes)
        for new in cold:
            assert next(warm) == new, f"{len(text)} ids"
            yield new
        assert next(warm, None) is None
        check(self.prefixes)

    def run(self, text, seed, prefixes):
        """New ids of one run."""
        for event in events(self.model, Encoded(text), seed=seed, prefixes=prefixes, **self.options):
            yield from event.ids if isinstance(event, Text) else ()

    def step(self, what, which, at, n):
        """One thing that people do with conversations."""
        which %= len(self.texts)
        text = self.texts[which]
        if what == "restart":
            self.prefixes = self.begin()
        elif what == "evict":
            self.prefixes.forget()
        elif what == "fork":
            self.texts.append(list(text))
        elif what == "undo":
            del text[at % len(text) + 1:]
        elif what == "edit":
            text[at % len(text)] = 3 + at % 190
        elif what == "stop":
            text += prompt(n, seed=at)
            answer = self.answer(text)
            text += [new for new, _ in zip(answer, range(at % 10))]
            answer.close()
        elif what == "together":                # two answers to the same text, in turns
            both = [self.answer(text), self.answer(list(text))]
            pairs = list(zip_longest(*both))
            first, second = ([pair[i] for pair in pairs if pair[i] is not None] for i in (0, 1))
            self.texts.append(text + second)
            text += first
        else:
            text += prompt(n, seed=at)
            text += self.answer(list(text))
        del text[260:]


@pytest.fixture(scope="module")
def drafters(tmp_path_factory, models):
    folder = tmp_path_factory.mktemp("drafters")
    return {shape: refimpl.load_drafter(write_drafter(folder / f"{shape}.gguf", random_drafter(shape)), models[shape])
            for shape in SHAPES} | {"built-in": refimpl.load_drafter(None, models["built-in"])}


@pytest.mark.parametrize("shape", MODELS)
@settings(max_examples=3, deadline=None, phases=[Phase.reuse, Phase.generate])           # to shrink takes minutes
@given(steps=st.lists(st.tuples(st.sampled_from(["say", "say", "together", "stop", "fork", "undo", "edit", "restart", "evict"]),
                                st.integers(0, 5), st.integers(0, 400), st.integers(1, 90)), min_size=3, max_size=7),
       temperature=st.sampled_from([0.0, 1.0]), drafted=st.booleans(), budget=st.sampled_from([ENOUGH, 2]), disk=st.booleans())
def test_conversations_have_the_ids_of_cold_runs(models, drafters, shape, steps, temperature, drafted, budget, disk, tmp_path_factory):
    """Said, edited, taken back, forked, stopped half-way, answered twice at a time, saved, evicted and restored."""
    model, folder = models[shape], tmp_path_factory.mktemp("disk")
    talk = Talk(model, drafters[shape] if drafted else None, temperature,
                lambda: Prefixes(model, budget * block_bytes(model), Snapshots(folder, model, ENOUGH) if disk else None))
    for step in steps:
        talk.step(*step)


# ---- what is known, and what is said about it

def test_only_what_is_new_is_read(built_in):
    cold, prefixes, text = Cold(built_in), Prefixes(built_in, ENOUGH), prompt(400)
    assert read(prefixes, text[:200], cold) == (0, "nothing that was read before begins like it")
    assert read(prefixes, text[:300], cold) == (200, "token 200 is not the one that was read there before")
    assert read(prefixes, text[:300], cold) == (299, "")
    assert read(prefixes, text[:100], cold) == (99, "")
    edited = [*text[:150], 3, *text[151:400]]
    assert read(prefixes, edited, cold) == (150, "token 150 is not the one that was read there before")
    assert read(prefixes, text, cold) == (300, "token 300 is not the one that was read there before")
    assert read(prefixes, [*edited, 7], cold)[0] == 400


def test_blocks_are_shared_between_what_begins_alike(built_in):
    cold, prefixes, text = Cold(built_in), Prefixes(built_in, ENOUGH), prompt(256)
    read(prefixes, text, cold)
    alone = prefixes.n_bytes
    for last in range(5):
        read(prefixes, [*text[:192], *prompt(64, seed=last)], cold)
    assert prefixes.n_bytes == alone // 4 * 9, "four blocks, and one more for each of the others"


def test_where_the_window_is_gone_the_nearest_point_before_it_is_taken(built_in):
    """Memory for the full layers and the last windows: what was read long ago is gone on with from where its window is there."""
    cold, prefixes, text = Cold(built_in), Prefixes(built_in, ENOUGH), prompt(1000)
    read(prefixes, text, cold)
    prefixes.budget = prefixes.n_bytes - 8 * sliding_bytes(built_in)
    assert read(prefixes, [*text, 5], cold)[0] == 1000
    assert read(prefixes, [*text[:900], 5], cold)[0] == 900
    assert read(prefixes, [*text[:400], 5], cold) == (0, "the keys and values that token 400 sees are not all there any more")


def test_the_ends_of_sequences_stay_longest(built_in):
    cold, prefixes, text = Cold(built_in), Prefixes(built_in, ENOUGH), prompt(900)
    read(prefixes, text[:320], cold)
    read(prefixes, text, cold)
    prefixes.budget = prefixes.n_bytes - 9 * sliding_bytes(built_in)
    read(prefixes, [*text, 1], cold)
    assert read(prefixes, [*text[:320], 9], cold)[0] == 320, "a turn ended there"
    assert read(prefixes, [*text[:500], 9], cold)[0] < 500


def test_what_is_left_of_a_long_sequence_is_spread(built_in, monkeypatch):
    """Memory for a few windows: the one before the fourth point stays longest, then that before the second, in a prompt and in what is
    written. Between them nothing is left, and from the nearest one it goes on with the same bits.
    """
    for module in ("run", "prefixes"):
        monkeypatch.setattr(f"refimpl.decode.{module}.POINT", 128)
    text, sliding = prompt(770), sliding_bytes(built_in)
    full = sum(int(np.prod(table.shape)) * table.dtype.itemsize for table in built_in.new_cache(1).tables if not table.window)
    for n_windows, written, known in ((2, 0, [512, 256]), (1, 150, [512, 0])):
        session = SimpleNamespace(model=built_in, prefixes=Prefixes(built_in, 13 * full + (2 + n_windows) * sliding))
        first = refimpl.generate(built_in, text[:770 - written], max_new_tokens=written + 1, temperature=0, session=session)
        both = [*text[:770 - written], *first.ids][:770]
        check(session.prefixes)
        for at, want in zip((630, 370), known):
            assert session.prefixes.find([*both[:at], 5], None).cache.length == want, (n_windows, written, at)
    state_TD = built_in.prefill(both[512:], session.prefixes.find([*both[:630], 5], None).cache)
    assert same(state_TD[-1], Cold(built_in).last_state(tuple(both)))


def test_what_was_read_makes_room_for_what_has_to_be(built_in, monkeypatch):
    """A prompt is refused where memory is short, but not because of what is remembered."""
    from refimpl.loading import model as loading

    session = SimpleNamespace(model=built_in, prefixes=Prefixes(built_in, ENOUGH))
    text = prompt(300)
    want = refimpl.generate(built_in, text, max_new_tokens=5, session=session).ids
    need = cache_bytes(built_in.config, 305, 512, built_in.backend.kv_type)
    monkeypatch.setattr(loading, "available", lambda: need - session.prefixes.n_bytes)
    again = refimpl.generate(built_in, text, max_new_tokens=5, session=session)
    assert again.ids == want and again.stats.reused == 0
    monkeypatch.setattr(loading, "available", lambda: 0)
    with pytest.raises(refimpl.MemoryRefusal):
        refimpl.generate(built_in, text, max_new_tokens=5, session=session)


# ---- broken on purpose, each is caught

def one_more_is_the_same(walk):
    def broken(self, ids):
        path, n = walk(self, ids)
        return path, n + (1 if path else 0)
    return broken


def without_a_copy(make_room):
    def broken(self, first, end):
        for block in self.blocks.values():
            block.setflags(write=True)
        make_room(self, first, end)
    return broken


def shorter(first_visible):
    return lambda self, pos: np.minimum(pos, first_visible(self, pos) + 1)


@pytest.mark.parametrize("target, name, broken", [
    (Prefixes, "_walk", one_more_is_the_same), (BlockTable, "make_room", without_a_copy), (BlockTable, "first_visible", shorter),
], ids=["keys", "copy on write", "window"])
def test_mistakes_are_seen(built_in, monkeypatch, target, name, broken):
    cold, prefixes, text = Cold(built_in), Prefixes(built_in, ENOUGH), prompt(300)
    texts = [text[:150], text[:250], [*text[:120], *prompt(100, seed=5)], text, [*text[:130], 9, 8]]
    for ids in texts:
        cold.last_state(tuple(ids))
    monkeypatch.setattr(target, name, broken(getattr(target, name)))
    with pytest.raises((AssertionError, ValueError)):
        for ids in texts:
            read(prefixes, ids, cold)
