"""generate, stream and events: what a prompt may be, whose settings hold, why a run stops, and whose Ctrl-C is whose."""

import inspect
from types import SimpleNamespace

import numpy as np
import pytest

import refimpl
from refimpl.decode.generate import Done, PromptDone, Text, events
from refimpl.decode.prefixes import Nothing
from refimpl.decode.sampling import Sampler, Sampling
from refimpl.text.prompt import Encoded
from refimpl.text.templates import GEMMA4_TEMPLATE


@pytest.fixture(scope="module")
def model():
    return refimpl.load(threads=1)


@pytest.fixture
def metadata(model, monkeypatch):
    """The file's metadata, to be changed."""
    changed = dict(model.file.metadata)
    monkeypatch.setattr(model, "file", SimpleNamespace(metadata=changed, path=model.file.path))
    return changed


def test_a_prompt_is_text_or_ids(model):
    text = "def read(path):\n"
    ids = model.tokenizer.encode(text)
    want = refimpl.generate(model, ids, max_new_tokens=12, temperature=0)
    assert want == refimpl.Output(want.ids, model.tokenizer.decode(want.ids), want.stats) and len(want.ids) == 12
    for prompt in (text, tuple(ids), np.array(ids)):
        assert refimpl.generate(model, prompt, max_new_tokens=12, temperature=0).ids == want.ids
    assert "".join(refimpl.stream(model, text, max_new_tokens=12, temperature=0)) == want.text


def test_a_prompt_is_a_conversation_where_the_file_has_a_template(model, metadata):
    messages = [{"role": "user", "content": "hello"}]
    del metadata["tokenizer.chat_template"]
    with pytest.raises(refimpl.ChatError, match="no chat template"):
        refimpl.generate(model, messages)
    metadata["tokenizer.chat_template"] = GEMMA4_TEMPLATE
    out = refimpl.generate(model, messages, max_new_tokens=3)
    rendered = model.tokenizer.encode("<bos><|turn>user\nhello<turn|>\n<|turn>model\n<|channel>thought\n<channel|>",
                                      special=True, bos=False)
    assert out.stats.n_prompt == len(rendered) and out.ids == refimpl.generate(model, rendered, max_new_tokens=3).ids


@pytest.mark.parametrize("ids", [[], [5.5], [[2, 4096]], [2, 4096], [-1]])
def test_ids_are_checked(model, ids):
    for call in (model.logits, lambda ids: refimpl.generate(model, ids), lambda ids: list(refimpl.stream(model, ids))):
        with pytest.raises(ValueError, match="at least one token id|outside of the vocabulary"):
            call(ids)


def test_settings_that_are_not_given_are_the_files(model, metadata, monkeypatch):
    seen, init = [], Sampler.__init__

    def watched(self, sampling, *args):
        seen.append(sampling)
        init(self, sampling, *args)
    monkeypatch.setattr(Sampler, "__init__", watched)
    metadata |= {"general.sampling.temp": np.float32(0.3), "general.sampling.top_k": 7}
    refimpl.generate(model, [2, 5], max_new_tokens=1, top_p=0.5, seed=4)
    assert seen == [Sampling(0.3, 7, 0.5, 0.0, 4)]


def test_both_signatures_are_spelled_out_and_the_same():
    ours, theirs = (inspect.signature(function).parameters for function in (refimpl.generate, refimpl.stream))
    assert dict(ours) == dict(theirs) and not any(p.kind is p.VAR_KEYWORD for p in ours.values())
    assert {"max_new_tokens", "temperature", "top_k", "top_p", "min_p", "seed", "drafter", "draft_max", "progress"} <= set(ours)


def test_defaults_are_those_of_the_command_line():
    from refimpl.cli.run import generate

    ours, theirs = ({name: p.default for name, p in inspect.signature(f).parameters.items()} for f in (refimpl.generate, generate))
    spelled = {"max_new_tokens": "predict", "temperature": "temp", "n_ctx": "ctx"}
    both = {name for name in ours if spelled.get(name, name) in theirs} - {"model", "prompt"}
    assert both >= {"max_new_tokens", "temperature", "top_k", "top_p", "min_p", "seed", "n_ctx", "special", "draft_max", "draft_min_p"}
    assert {name: ours[name] for name in both} == {name: theirs[spelled.get(name, name)] for name in both}


def test_without_a_limit_it_runs_to_the_end_of_the_context(model, monkeypatch):
    monkeypatch.setattr(model.tokenizer, "end_of_generation", frozenset())
    out = refimpl.generate(model, [2, 5, 6], max_new_tokens=-1, n_ctx=20)
    assert out.stats.stop == "context" and len(out.ids) == 18
    drafter = refimpl.load_drafter(None, model)
    assert refimpl.generate(model, [2, 5, 6], max_new_tokens=-1, n_ctx=20, drafter=drafter).ids == out.ids
    assert refimpl.generate(model, [2, 5, 6], max_new_tokens=4).stats.stop == "limit"


def test_events_come_in_order_and_their_statistics_are_live(model):
    options = dict(temperature=0.0, top_k=None, top_p=None, min_p=None, seed=0, n_ctx=None, special=False, drafter=None, draft_max="auto",
                   draft_min_p=0.0, prefixes=Nothing(model), progress=lambda what, total, unit=1: bar)

    class Bar:
        n = 0

        def __enter__(self):
            return self.add

        def __exit__(self, *error):
            pass

        def add(self, n):
            self.n += n
    bar, run = Bar(), events(model, Encoded([2, 5, 6]), max_new_tokens=3, **options)
    first = next(run)
    assert isinstance(first, PromptDone) and first.ids == [2, 5, 6] and bar.n == 3 and first.stats.n_generated == 1
    new = [next(run) for _ in range(3)]
    assert all(isinstance(event, Text) for event in new) and first.stats.n_generated == 3
    *_, last = run
    assert isinstance(last, Done) and last.stats is first.stats and last.stats.stop == "limit"


def test_ctrl_c_is_the_callers(model, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt
    monkeypatch.setattr(model, "head", interrupted)
    with pytest.raises(KeyboardInterrupt):
        refimpl.generate(model, [2, 5])


def test_what_prints_as_one_line_says_what_it_is(model):
    assert repr(model) == ("<Model refimpl tiny python: 6 layers (1 full), width 128, 128 experts/8 used, vocabulary 4096; "
                           "bytes Q4_0 94%, F32 6%; kernels, q8, 1 thread>")
    assert repr(refimpl.load_drafter(None, model)) == "<Drafter of refimpl tiny python: 4 layers, width 96, dense head>"


@pytest.mark.parametrize("prompt", [None, 5, b"ids?", {"role": "user", "content": "x"}, iter([2]), [{"role": "user", "content": "x"}, 3]])
def test_a_prompt_of_another_kind_is_refused(prompt):
    with pytest.raises(ValueError, match="expected (text|messages)"):
        refimpl.generate(refimpl.load(), prompt, max_new_tokens=1)


@pytest.mark.parametrize("options", [{"max_new_tokens": 1.5}, {"max_new_tokens": None}, {"n_ctx": -4}, {"n_ctx": 1.5}])
def test_numbers_of_tokens_are_integers(options):
    with pytest.raises(ValueError, match="max_new_tokens is|n_ctx is"):
        refimpl.generate(refimpl.load(), "x", **{"max_new_tokens": 1} | options)
