"""Rows without ids: where pictures and sounds enter the text model, what they see, and how they are cut, cached and kept."""

import hashlib
import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from shapes import COMMON, SHAPES, random_drafter, random_model, round_to, worst, write_drafter, write_model
from transformers import Gemma4Config, Gemma4ForConditionalGeneration, Gemma4TextConfig, Gemma4VisionConfig

import refimpl
from refimpl.decode.draft_length import AutoDraftLength, FixedDraftLength
from refimpl.decode.prefixes import Nothing, Prefixes
from refimpl.decode.repeats import Repeats
from refimpl.decode.request import Done, Failed, Request, Token
from refimpl.decode.run import Run, step
from refimpl.decode.sampling import Sampling
from refimpl.decode.snapshots import Snapshots
from refimpl.model.soft import NO_SOFT, Soft, SoftTokens
from refimpl.serve.scheduler import Scheduler

WINDOW = COMMON["sliding_window"]
IMAGE, END = 290, 291


def soft_tokens(n: int, together: bool, seed: int = 0, made: list | None = None) -> SoftTokens:
    def make(look):
        if made is not None:
            made.append(seed)
        return np.random.default_rng(seed).normal(0, 4, (n, COMMON["hidden_size"])).astype(np.float32)
    return SoftTokens(hashlib.sha256(bytes([seed, n])).digest(), n, together, make)


def prompt_with(parts: list[SoftTokens], n_text: int = 9) -> list[int]:
    rng = np.random.default_rng(5)
    ids = [2, *rng.integers(5, 280, n_text).tolist()]
    for part in parts:
        ids += [*part.ids, END, *rng.integers(5, 280, n_text).tolist()]
    return ids


def theirs(shape: str, text, ids: list[int], soft: Soft) -> np.ndarray:
    """Logits of transformers' whole model, its image features replaced by these soft tokens."""
    config = Gemma4Config(
        text_config=Gemma4TextConfig(**COMMON | SHAPES[shape] | dict(
            use_bidirectional_attention=None if SHAPES[shape].get("hidden_size_per_layer_input") else "vision")),
        vision_config=Gemma4VisionConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
                                         num_key_value_heads=2, head_dim=16, patch_size=4, position_embedding_size=64),
        audio_config=None, image_token_id=IMAGE, boi_token_id=292, eoi_token_id=END, video_token_id=293, boa_token_id=294,
        audio_token_id=295, eoa_token_index=296)
    config._attn_implementation = config.text_config._attn_implementation = config.text_config._experts_implementation = "eager"
    whole = Gemma4ForConditionalGeneration(config).eval().float()
    whole.model.language_model.load_state_dict(text.model.state_dict())
    rows = [torch.from_numpy(np.concatenate([soft.place[i][0].x_TD[[soft.place[i][1]]] for i in ids if i < 0]))]

    class Features:
        pooler_output = rows
    whole.model.get_image_features = lambda *_, **__: Features
    token = torch.tensor([[IMAGE if i < 0 else i for i in ids]])
    with torch.no_grad():
        return whole(input_ids=token, pixel_values=torch.zeros(1, 9, 48), image_position_ids=torch.zeros(1, 9, 2, dtype=torch.long),
                     mm_token_type_ids=(token == IMAGE).long(), use_cache=False).logits[0].numpy()


@pytest.fixture(scope="module", params=SHAPES)
def loaded(request, tmp_path_factory):
    text = random_model(request.param)
    path = write_model(tmp_path_factory.mktemp("soft") / "model.gguf", text, "Q4_0")
    return request.param, round_to(text, "Q4_0"), path


@pytest.mark.parametrize("backend", ["reference", "kernels"])
def test_logits_are_those_of_transformers(loaded, backend):
    """Two pictures, one longer than the window."""
    shape, text, path = loaded
    model = refimpl.load(path, backend=backend, arithmetic="exact")
    assert model.config.looks_ahead_in_images == (shape not in ("E2B", "E4B"))
    parts = [soft_tokens(n, model.config.looks_ahead_in_images, n) for n in (4, 2 * WINDOW + 3)]
    soft, ids = Soft(parts), prompt_with(parts)
    ours = model.head(model.prefill(ids, model.new_cache(), soft=soft))
    assert worst(ours, theirs(shape, text, ids, soft)) < 2e-5


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return refimpl.load(write_model(tmp_path_factory.mktemp("soft") / "model.gguf", random_model("26B-A4B"), "Q4_0"), threads=1)


@settings(max_examples=10, deadline=None)
@given(st.data())
def test_the_bits_do_not_depend_on_how_a_prompt_is_read(model, data):
    """In any cut, beside another sequence, after what was read before."""
    together = data.draw(st.booleans())
    sizes = data.draw(st.lists(st.integers(1, 70), min_size=1, max_size=3))
    parts = [soft_tokens(n, together, seed) for seed, n in enumerate(sizes)]
    soft, ids = Soft(parts), prompt_with(parts, data.draw(st.integers(1, 70)))
    whole = model.prefill(ids, model.new_cache(), soft=soft)
    prefixes = Prefixes(model, data.draw(st.sampled_from((0, 40_000, 1 << 30))))
    other = [2, *range(5, 60)]
    for _ in range(2):
        runs = [Run(model, Request(chosen, Sampling(temperature=0.0), 1, soft=asked), 512, prefixes)
                for chosen, asked in ((other, NO_SOFT), (ids, soft))]
        run, states = runs[1], []
        known, finish = run.cache.length, run.finish
        run.finish = lambda state, logit, seconds, finish=finish, states=states: states.append(state) or finish(state, logit, seconds)
        while run.reading:
            active = [each for each in runs if not each.stats.stop]
            step(model, active, [data.draw(st.integers(1, 90)) for _ in active], AutoDraftLength())
            assert run.error is None
        del run.finish
        assert np.array_equal(np.concatenate(states), whole[known:])
        for run in runs:
            run.close("gone")


def test_a_picture_that_is_known_is_not_made_again(model):
    made: list[int] = []
    prefixes = Prefixes(model, 1 << 30)
    for text in (7, 8):
        part = soft_tokens(40, True, 3, made)
        run = Run(model, Request([2, 9, *part.ids, END, text], Sampling(temperature=0.0), 1, soft=Soft([part])), 512, prefixes)
        while not run.stats.stop:
            step(model, [run], [512], AutoDraftLength())
        run.close("gone")
    assert made == [3] and run.stats.reused == 43
    other = soft_tokens(40, True, 4, made)
    assert Run(model, Request([2, 9, *other.ids, END, 8], Sampling(), 1, soft=Soft([other])), 512, prefixes).stats.reused == 2


def answer(model, ids, soft, prefixes, temperature: float, drafter=None) -> tuple[list[int], int]:
    """(new ids, tokens that were not read)."""
    run = Run(model, Request(ids, Sampling(temperature=temperature, seed=3), 12, soft=soft), 512, prefixes, drafter)
    while not run.stats.stop:
        step(model, [run], [512], AutoDraftLength() if drafter is None else FixedDraftLength(3))
    run.close("gone")
    return run.ids[len(ids):], run.stats.reused


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_drafting_behind_a_picture_changes_nothing(model, temperature, tmp_path):
    drafter = refimpl.load_drafter(write_drafter(tmp_path / "drafter.gguf", random_drafter("26B-A4B")), model)
    part = soft_tokens(30, True, 6)
    ids = [2, 9, *part.ids, END, 7]
    plain, drafted = (answer(model, ids, Soft([part]), Nothing(model), temperature, each) for each in (None, drafter))
    assert plain == drafted and plain[0]


def test_a_picture_is_known_after_a_restart(model, tmp_path):
    made: list[int] = []
    ids = [2, 9, *soft_tokens(40, True, 7).ids, END, 7]
    found = [answer(model, ids, Soft([soft_tokens(40, True, 7, made)]), Prefixes(model, 1 << 30, Snapshots(tmp_path, model, 1 << 30)), 0.0)
             for _ in range(2)]
    assert found[0][0] == found[1][0] and (found[0][1], found[1][1]) == (0, len(ids) - 1) and made == [7]


class Slow:
    """A picture that takes ten looks to compute. `log`: a line for each, and what else a test writes."""

    def __init__(self, log: list, error: Exception | None = None):
        made = soft_tokens(30, True, 8)

        def make(look):
            for i in range(10):
                log.append("look")
                if error is not None and i == 4:
                    raise error
                look("name", made.x_TD)
            return made.x_TD
        self.part = SoftTokens(made.digest, made.n, True, make)
        self.request = Request([2, 9, *made.ids, END, 7], Sampling(temperature=0.0), 5, soft=Soft([self.part]))


def beside_a_writer(model, log: list, *requests: Request, latency: float = 0.0):
    """A scheduler with an answer that is being written, and these requests behind it; events of each."""
    scheduler, told = Scheduler(model, Prefixes(model, 1 << 30), 512, latency=latency), [[] for _ in range(1 + len(requests))]
    scheduler.costs.spare = lambda n_writing, latency: latency       # whatever this machine takes for an answer

    def tell(event):
        told[0].append(event)
        log.append("written")
    scheduler.submit(Request([2, *range(5, 60)], Sampling(temperature=1.0, seed=1), 40), tell)
    while len(told[0]) < 4:
        scheduler.step()
    log.clear()
    return scheduler, [scheduler.submit(request, events.append) for request, events in zip(requests, told[1:])], told


def tokens_of(events) -> list[int]:
    return [event.id for event in events if isinstance(event, Token)]


def test_others_write_while_a_picture_is_computed(model):
    log: list[str] = []
    first, second = Slow(log), Slow(log)
    scheduler, _, told = beside_a_writer(model, log, first.request, second.request)
    while scheduler.step():
        pass
    assert log[:20] == ["look", "written"] * 10 and log.count("look") == 20 and isinstance(told[0][-1], Done)
    known = Slow([]).request
    alone, _ = answer(model, known.ids, known.soft, Nothing(model), 0.0)
    assert tokens_of(told[1]) == tokens_of(told[2]) == alone[:5] and len(alone) >= 5
    log.clear()
    scheduler, _, told = beside_a_writer(model, log, Slow(log).request, latency=9.0)
    scheduler.step()
    assert log[:10] == ["look"] * 10            # in one slice where nobody minds
    scheduler.close()


def test_a_picture_that_nobody_wants_any_more(model):
    log: list[str] = []
    scheduler, [ticket], told = beside_a_writer(model, log, Slow(log).request)
    for _ in range(3):
        scheduler.step()
    scheduler.cancel(ticket)
    while scheduler.step():
        pass
    assert log.count("look") == 3 and told[1][-1].stats.stop == "gone" and isinstance(told[0][-1], Done)
    scheduler, _, _ = beside_a_writer(model, log, Slow(log).request)
    scheduler.step()
    scheduler.close()
    assert log.count("look") == 1 and not [thread for thread in threading.enumerate() if thread.name == "refimpl slices"]
    scheduler = Scheduler(model, Prefixes(model, 1 << 30), 512, latency=0.0)          # alone: it must not wait for the next request
    ticket = scheduler.submit(Slow(log).request, [].append)
    scheduler.step()
    scheduler.cancel(ticket)
    assert not scheduler.step() and not [thread for thread in threading.enumerate() if thread.name == "refimpl slices"]


def test_a_picture_that_fails_fails_alone(model):
    log: list[str] = []
    scheduler, _, told = beside_a_writer(model, log, Slow(log, MemoryError("no room")).request)
    while scheduler.step():
        pass
    assert isinstance(told[1][-1], Failed) and str(told[1][-1].error) == "no room" and isinstance(told[0][-1], Done)
    assert len(tokens_of(told[0])) == 40 or told[0][-1].stats.stop != "limit"


def test_a_picture_that_looks_ahead_is_not_cut(model):
    part = soft_tokens(20, True)
    soft = Soft([part])
    ids = [2, *part.ids, END]
    with pytest.raises(ValueError, match="must be read in one call: 5 are missing"):
        model.forward(model.checked(ids[:16], soft), model.new_cache(), soft=soft)
    assert [soft.cut(ids, first, end) for first, end in ((0, 10), (1, 10), (5, 10), (0, 1), (0, 21))] == [1, 21, 21, 1, 21]
    free = soft_tokens(20, False)
    assert Soft([free]).cut([2, *free.ids], 0, 10) == 10


def test_numbers_of_soft_tokens_are_nobody_elses(model):
    a, b = soft_tokens(30, True, 1), soft_tokens(30, True, 2)
    assert len({*a.ids, *b.ids}) == 60 and all(-2 ** 63 <= i < 0 for i in a.ids) and a.ids == soft_tokens(30, True, 1).ids
    with pytest.raises(ValueError, match="outside of the vocabulary"):
        model.checked([2, a.ids[0]], Soft([b]))
    assert Nothing(model).find(a.ids, 64).cache.length == 0


def test_wrong_number_of_rows(model):
    part = SoftTokens(b"x", 3, True, lambda look: np.zeros((2, COMMON["hidden_size"]), np.float32))
    with pytest.raises(ValueError, match="2 soft tokens were made, 3 expected"):
        model.prefill([2, *part.ids], model.new_cache(), soft=Soft([part]))


def test_drafts_never_propose_a_picture(model):
    part = soft_tokens(4, True)
    ids = [7, 8, 9, 10, *part.ids, 7, 8, 9]
    assert Repeats().offer(ids, 5) == [10]
