"""The drafter against transformers 5.22.2, step by step; files that are no drafter of this target."""

import numpy as np
import pytest
import torch
from few_layers import few_layers
from shapes import SHAPES, V, prompt, random_drafter, random_model, reference, round_to, worst, write_drafter, write_model

import refimpl
from refimpl.model import drafter as network
from refimpl.model.gemma4 import embed

TOLERANCE = 1e-4
STEPS = 5
LENGTHS = (2, 6, 40)          # less than the window of 7, as many as it shows a drafter, six windows


def oracle(target, drafter, ids: list[int]) -> list[tuple[int, np.ndarray, np.ndarray]]:
    """(proposed id, logits, state fed back) of every step, by transformers, on keys of exactly the committed positions.

    Of the sliding layer it is handed the last window - 1, because its own mask would show two more than its target's rule.
    """
    with torch.no_grad():
        out = target.model(input_ids=torch.tensor([ids[:-1]]), use_cache=False, return_shared_kv_states=True)
        state, token, found = out.last_hidden_state[:, -1:], ids[-1], []
        shared = dict(out.shared_kv_states)
        shared["sliding_attention"] = tuple(x[:, :, -(target.config.sliding_window - 1):] for x in shared["sliding_attention"])
        for _ in range(STEPS):
            embedded = target.model.embed_tokens(torch.tensor([[token]]))
            out = drafter(inputs_embeds=torch.cat([embedded, state], -1), position_ids=torch.tensor([[len(ids) - 1]]),
                          shared_kv_states=shared)
            state, token = out.last_hidden_state, int(out.logits[0, -1].argmax())
            found.append((token, out.logits[0, -1].numpy(), state[0, 0].numpy()))
    return found


def steps(model, drafter, ids: list[int]) -> list[tuple[int, np.ndarray, np.ndarray]]:
    """The same by ours."""
    cache = model.new_cache()
    state, token, found, backend = model.prefill(ids[:-1], cache)[-1], ids[-1], [], model.backend
    with backend.running():
        angles = network.angles_at(drafter.weights, cache.length)
        for _ in range(STEPS):
            embedding = embed(model.config, model.weights, np.array([token]))[0]
            z, state = network.draft_step(drafter.config, drafter.weights, backend, embedding, state, angles, cache)
            logit = network.spread(drafter.config, *network.candidates(drafter.weights, backend, z))
            token = int(logit.argmax())
            found.append((token, logit, state))
    return found


def assert_equal(ours, theirs):
    for step, ((token, logit, state), (want_token, want_logit, want_state)) in enumerate(zip(ours, theirs, strict=True)):
        assert worst(logit, want_logit) < TOLERANCE and worst(state, want_state) < TOLERANCE, step
        assert token == want_token, step


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """For every shape: transformers' target and drafter, and the paths of their files. Experts are Q4_0, as in other tests of kernels."""
    folder, made = tmp_path_factory.mktemp("pairs"), {}
    for shape in SHAPES:
        target, drafter = random_model(shape, **few_layers(shape)), random_drafter(shape)
        block = "Q4_0" if shape == "26B-A4B" else "F32"
        paths = write_model(folder / f"{shape}.gguf", target, block), write_drafter(folder / f"{shape}-mtp.gguf", drafter)
        made[shape] = round_to(target, block), drafter, *paths
    return made


@pytest.mark.parametrize("backend", ["reference", "kernels"])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_step_equals_transformers(pairs, shape, backend):
    target, drafter, path, drafter_path = pairs[shape]
    model = refimpl.load(path, backend=backend, arithmetic="exact")
    ours = refimpl.load_drafter(drafter_path, model)
    for n in LENGTHS:
        want = oracle(target, drafter, prompt(n))
        assert_equal(steps(model, ours, prompt(n)), want)
        assert refimpl.propose(model, ours, prompt(n), STEPS) == [token for token, _, _ in want]


@pytest.mark.parametrize("block", ["Q4_0", "Q8_0", "BF16"])
def test_quantized_drafters(tmp_path, block):
    target = random_model("12B")
    drafter = random_drafter("12B", hidden_size=64)
    model = reference(write_model(tmp_path / "m.gguf", target))
    ours = refimpl.load_drafter(write_drafter(tmp_path / "d.gguf", drafter, block), model)
    assert block in {info.type for info in ours.file.tensors.values()}
    assert_equal(steps(model, ours, prompt(12)), oracle(target, round_to(drafter, block), prompt(12)))


@pytest.mark.parametrize("backend", ["reference", "kernels"])
@pytest.mark.parametrize("shape", ["E2B", "E4B"])
def test_the_centroid_head_equals_transformers(tmp_path, pairs, shape, backend):
    target, _, path, _ = pairs[shape]
    drafter = random_drafter(shape, n_centroid=20)
    model = refimpl.load(path, backend=backend, arithmetic="exact")
    file = write_drafter(tmp_path / "d.gguf", drafter)
    ours = refimpl.load_drafter(file, model)
    assert isinstance(ours.weights.head, network.CentroidHead) and len(ours.weights.head.token_ZV) == 20
    assert_equal(steps(model, ours, prompt(30)), oracle(target, drafter, prompt(30)))
    dense = refimpl.load_drafter(file, model, head="dense")
    drafter.config.use_ordered_embeddings = False
    assert_equal(steps(model, dense, prompt(30)), oracle(target, drafter, prompt(30)))
    assert set(dense.weights.ignored) == {network.CENTROIDS, network.ORDERING}


def test_the_centroid_head_in_8_bits(tmp_path, pairs):
    """Kernels and reference agree on quantized groups; kernels with themselves on any number of threads."""
    path = write_drafter(tmp_path / "d.gguf", random_drafter("E2B", n_centroid=20, hidden_size=64), "Q4_0")
    found = []
    for options in (dict(backend="reference"), dict(threads=1), dict(threads=2)):
        model = refimpl.load(pairs["E2B"][2], arithmetic="q8", **options)
        found.append(np.array([logit for _, logit, _ in steps(model, refimpl.load_drafter(path, model), prompt(9))]))
    assert worst(found[1], found[0]) < 0.1 and np.array_equal(found[1], found[2])


@pytest.mark.parametrize("backend", ["reference", "kernels"])
def test_a_head_of_the_first_tokens_only(pairs, backend):
    model = refimpl.load(pairs["26B-A4B"][2], backend=backend, arithmetic="exact")
    whole, short = (refimpl.load_drafter(pairs["26B-A4B"][3], model, head=head) for head in ("dense", 120))
    (_, want, _), (token, got, _) = steps(model, whole, prompt(9))[0], steps(model, short, prompt(9))[0]
    assert np.array_equal(got[:120], want[:120]) and (got[120:] == got[:120].min() - 1).all() and token == want[:120].argmax()
    assert max(refimpl.propose(model, short, prompt(9), 6)) < 120
    for head in (0, -1, 301, True, 1.5):
        with pytest.raises(ValueError, match="expected 'dense', 'centroid' or a number of tokens from 1 to 300"):
            refimpl.load_drafter(pairs["26B-A4B"][3], model, head=head)


def test_a_drafter_leaves_the_cache_as_it_is(pairs):
    model = reference(pairs["26B-A4B"][2])
    drafter, cache = refimpl.load_drafter(pairs["26B-A4B"][3], model), model.new_cache()
    state = model.prefill(prompt(20), cache)[-1]
    # as bytes: an unused slot may hold NaN
    def contents():
        return [block.tobytes() for table in cache.tables for block in table.blocks.values()]
    before = contents()
    first = drafter.draft(7, state, cache, 4)
    assert drafter.draft(7, state, cache, 4) == first and cache.length == 20
    assert contents() == before


def test_a_draft_ends_ahead_of_a_weak_token(pairs):
    model = reference(pairs["E2B"][2])
    drafter, cache = refimpl.load_drafter(pairs["E2B"][3], model), model.new_cache()
    state = model.prefill(prompt(20), cache)[-1]
    whole = drafter.draft(7, state, cache, 6)
    lengths = [len(drafter.draft(7, state, cache, 6, min_p=p)) for p in (0.0, 0.15, 0.2, 0.3, 0.99)]
    assert len(whole) == 6 and lengths[0] == 6 and lengths == sorted(lengths, reverse=True) and lengths[-1] == 0
    assert 0 < lengths[2] < 6 or 0 < lengths[1] < 6 or 0 < lengths[3] < 6
    assert all(drafter.draft(7, state, cache, 6, min_p=p) == whole[:n] for p, n in zip((0.15, 0.2, 0.3), lengths[1:4]))


# ---- what does not fit

def test_drafters_of_other_targets_are_refused(tmp_path, pairs):
    model = reference(pairs["26B-A4B"][2])

    def message(**overrides):
        path = write_drafter(tmp_path / "other.gguf", random_drafter("26B-A4B", **overrides))
        with pytest.raises(refimpl.GGUFError) as caught:
            refimpl.load_drafter(path, model)
        assert "\n" not in str(caught.value) and "other.gguf" in str(caught.value)
        return str(caught.value)

    assert "head_count_kv of layer 0 is 1, the target has 2" in message(num_key_value_heads=1)
    assert "sliding_window is 9, the target has 7" in message(sliding_window=9)
    assert "width of a sliding layer's keys is 48, the target has 16" in message(head_dim=48)
    with pytest.raises(refimpl.GGUFError, match="head_count_kv of layer 0 is 1, the target has 2: this drafter belongs to another model"):
        refimpl.load_drafter(pairs["E2B"][3], model)


@pytest.mark.parametrize(("key", "value", "expected"), [
    ("gemma4-assistant.embedding_length_out", 65, "embedding_length_out is 65, the target has 64"),
    ("gemma4-assistant.embedding_length_out", None, "metadata key gemma4-assistant.embedding_length_out is missing"),
    ("gemma4-assistant.attention.shared_kv_layers", 3, "expected all 4 layers"),
    ("gemma4-assistant.embedding_length_per_layer_input", 8, "no per-layer inputs"),
    ("gemma4-assistant.expert_count", 8, "expert_count is not 0; a drafter has no experts"),
    ("gemma4-assistant.attention.sliding_window", 1, "expected 2 to"),
    ("general.architecture", "llama", "architecture is 'llama'; a drafter is gemma4-assistant"),
    ("general.architecture", "gemma4", "this is a model"),
    ("tokenizer.ggml.tokens", ["a"] * V, "token 0 is 'a', the target's is '<pad>'"),
])
def test_odd_metadata_is_refused(tmp_path, pairs, monkeypatch, key, value, expected):
    model = reference(pairs["12B"][2])
    import shapes

    written = shapes.write_gguf

    def changed(path, metadata, tensors):
        metadata = {k: v for k, v in metadata.items() if k != key} | ({} if value is None else {key: value})
        written(path, metadata, tensors)
    monkeypatch.setattr(shapes, "write_gguf", changed)
    path = write_drafter(tmp_path / "odd.gguf", random_drafter("12B"))
    with pytest.raises(refimpl.GGUFError, match=expected):
        refimpl.load_drafter(path, model)


@pytest.mark.parametrize(("change", "expected"), [
    (lambda tensors: tensors[1:], "rope_freqs.weight is missing"),
    (lambda tensors: [(n, t, d[:, 1:] if n == "nextn.post_projection.weight" else d) for n, t, d in tensors], "projection.weight has"),
    (lambda tensors: [*tensors, ("blk.0.attn_x.weight", "F32", np.ones(4, np.float32))], "1 unexpected tensor .first: blk.0.attn_x"),
    (lambda tensors: [(n, t, np.zeros_like(d) if n == network.ORDERING else d) for n, t, d in tensors], "does not name every token once"),
    (lambda tensors: [(n, t, d[:7] if n == network.CENTROIDS else d) for n, t, d in tensors], "do not divide the vocabulary"),
    (lambda tensors: [(n, t, d[:2] if n == network.CENTROIDS else d) for n, t, d in tensors], "2 centroids for 300 tokens, 3 of them"),
    (lambda tensors: [(n, "F32", d.astype(np.float32)) if n == network.ORDERING else (n, t, d) for n, t, d in tensors], "reads I32, I64"),
    (lambda tensors: [(n, t, d) for n, t, d in tensors if n != network.ORDERING], "has no centroid head"),
])
def test_odd_tensors_are_refused(tmp_path, pairs, change, expected):
    model = reference(pairs["E2B"][2])
    path = write_drafter(tmp_path / "odd.gguf", random_drafter("E2B", n_centroid=20), change=change)
    with pytest.raises(refimpl.GGUFError, match=expected):
        refimpl.load_drafter(path, model, head="centroid")


def test_a_key_of_a_newer_version_is_a_note(tmp_path, pairs, monkeypatch):
    import shapes

    written, model = shapes.write_gguf, reference(pairs["12B"][2])
    monkeypatch.setattr(shapes, "write_gguf", lambda path, keys, tensors: written(path, keys | {"gemma4-assistant.zeal": 1}, tensors))
    with pytest.warns(UserWarning, match="does not know gemma4-assistant.zeal and ignores it"):
        refimpl.load_drafter(write_drafter(tmp_path / "newer.gguf", random_drafter("12B")), model)


def test_models_and_drafters_are_told_apart(pairs):
    with pytest.raises(refimpl.GGUFError, match="this is a drafter"):
        refimpl.load(pairs["12B"][3])
    model, other = reference(pairs["12B"][2]), reference(pairs["12B"][2])
    with pytest.raises(refimpl.GGUFError, match=r"this is a model \(gemma4\), no drafter"):
        refimpl.load_drafter(pairs["12B"][2], model)
    drafter = refimpl.load_drafter(pairs["12B"][3], model)
    for call in (lambda: refimpl.propose(other, drafter, [2, 5], 1), lambda: refimpl.generate(other, [2, 5], drafter=drafter)):
        with pytest.raises(ValueError, match="loaded for another model"):
            call()
    for ids, k, expected in (([2], 1, "at least two ids"), ([2, 5], 0, "k=0: expected 1 or more"), ([2, 999], 1, "outside of the voc")):
        with pytest.raises(ValueError, match=expected):
            refimpl.propose(model, drafter, ids, k)
    with pytest.raises(ValueError, match="head='x': expected 'dense', 'centroid' or a number"):
        refimpl.load_drafter(pairs["12B"][3], model, head="x")


# ---- whole texts

@pytest.mark.parametrize("shape", SHAPES)
def test_greedy_text_equals_transformers_assisted_generation(pairs, shape):
    """And the drafts of its first round: with 5 tokens before them, less than the window, transformers' own cache is clean then."""
    target, drafter, path, drafter_path = pairs[shape]
    drafter.generation_config.num_assistant_tokens = 4
    drafter.generation_config.num_assistant_tokens_schedule = "constant"
    target.generation_config.eos_token_id = None
    seen, forward = [], drafter.forward

    def watched(*args, **kwargs):
        out = forward(*args, **kwargs)
        seen.append(int(out.logits[0, -1].argmax()))
        return out
    drafter.forward = watched
    try:
        with torch.no_grad():
            want = target.generate(torch.tensor([prompt(5)]), assistant_model=drafter, max_new_tokens=16, do_sample=False)[0, 5:].tolist()
    finally:
        del drafter.forward
    model = refimpl.load(path, arithmetic="exact")
    ours = refimpl.load_drafter(drafter_path, model)
    out = refimpl.generate(model, prompt(5), max_new_tokens=16, temperature=0, drafter=ours, draft_max=4)
    assert out.ids == want[:len(out.ids)] and (len(out.ids) == 16 or want[len(out.ids)] == 1)
    assert refimpl.propose(model, ours, prompt(5) + want[:1], 4) == seen[:4]
