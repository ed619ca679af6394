"""What Gemma 4 sees and hears, against transformers 5.22.2: soft tokens, layers, both backends, both arithmetics, awkward sizes."""

import tracemalloc

import numba
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from shapes import worst
from tower_models import KINDS, SIDE, audio_oracle, image_oracle, picture, random_towers, save_towers, sound

from refimpl.files.convert import convert
from refimpl.loading import memory
from refimpl.loading.projector import load_projector

TOLERANCE = 1e-5            # of the largest
EXACT = {"reference": {"backend": "reference"}, "kernels": {"backend": "kernels", "arithmetic": "exact"}}
CELL = 3 * SIDE


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """kind -> (transformers' model, its directory)."""
    root = tmp_path_factory.mktemp("towers")
    models = {kind: random_towers(kind) for kind in KINDS}
    return {kind: (model, save_towers(root / kind, model)) for kind, model in models.items()}


@pytest.fixture(scope="module")
def loaded(folders):
    """(kind, backend) -> (transformers' model, projector)."""
    return {(kind, name): (model, load_projector(folder, **options)) for kind, (model, folder) in folders.items()
            for name, options in EXACT.items()}


@pytest.mark.parametrize("backend", EXACT)
@pytest.mark.parametrize("kind", KINDS)
def test_soft_tokens_of_pictures(loaded, kind, backend):
    """One soft token; one row; one column; wide; not square; more patches than a chunk of attention."""
    model, projector = loaded[kind, backend]
    side = CELL if kind == "unified" else SIDE
    for size in ((3, 3), (27, 3), (3, 12), (6, 9), (15, 12), (33, 30)):
        size = tuple(n // 3 for n in size) if kind == "unified" else size
        patches, positions = picture(*size, side)
        assert worst(projector.image_tokens(patches, positions), image_oracle(model, patches, positions)) < TOLERANCE, size


@pytest.mark.parametrize("backend", EXACT)
@pytest.mark.parametrize("kind", ["small", "unified"])
def test_soft_tokens_of_sound(loaded, kind, backend):
    """From one frame (161 samples) on, fewer than a row sees, to 30 s."""
    model, projector = loaded[kind, backend]
    for n in (1, 2, 3, 4, 5, 48, 49, 100, 3000) if kind == "small" else (1, 2, 750):
        frames = sound(n, 128 if kind == "small" else 40)
        tokens = projector.audio_tokens(frames)
        assert tokens.shape == (-(-n // 4) if kind == "small" else n, projector.n_embd)
        assert worst(tokens, audio_oracle(model, frames)) < TOLERANCE, n


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 70), st.integers(0, 2**32 - 1))
@settings(max_examples=15, deadline=None)
def test_any_size(loaded, n_columns, n_rows, n_frames, seed):
    model, projector = loaded["small", "reference"]
    patches, positions = picture(3 * n_columns, 3 * n_rows, seed=seed)
    assert worst(projector.image_tokens(patches, positions), image_oracle(model, patches, positions)) < TOLERANCE
    frames = sound(n_frames, seed=seed)
    assert worst(projector.audio_tokens(frames), audio_oracle(model, frames)) < TOLERANCE


def test_padding_of_transformers_changes_nothing(loaded):
    """It pads pictures and clips, and masks what it has padded; here there is no padding."""
    for kind in ("small", "large"):
        model, projector = loaded[kind, "reference"]
        patches, positions = picture(6, 6)
        assert worst(projector.image_tokens(patches, positions), image_oracle(model, patches, positions, padding=45)) < TOLERANCE
    model, projector = loaded["small", "reference"]
    for n, padding in ((1, 7), (50, 30), (61, 3)):
        frames = sound(n)
        assert worst(projector.audio_tokens(frames), audio_oracle(model, frames, padding)) < TOLERANCE, n


# ---- inside

def hooked(model, modules: dict[str, torch.nn.Module], run) -> dict[str, np.ndarray]:
    """What `modules` return while `run(model)` runs."""
    values, hooks = {}, []
    for name, module in modules.items():
        def keep(module, args, out, name=name):
            values[name] = (out[0] if isinstance(out, tuple) else out)[0].detach().numpy().copy()
        hooks.append(module.register_forward_hook(keep))
    run(model)
    for hook in hooks:
        hook.remove()
    return values


@pytest.mark.parametrize("kind", ["small", "large"])
def test_taps_of_a_layer_that_sees(loaded, kind):
    model, projector = loaded[kind, "reference"]
    layers, got = model.model.vision_tower.encoder.layers, {}
    patches, positions = picture(9, 6)
    projector.image_tokens(patches, positions, tap=got.__setitem__)
    modules = {"layer_out-0": layers[0], "layer_inp_normed-1": layers[1].input_layernorm, "Qcur-1": layers[1].self_attn.q_norm,
               "Kcur-1": layers[1].self_attn.k_norm, "Vcur-1": layers[1].self_attn.v_proj, "Vcur_normed-1": layers[1].self_attn.v_norm,
               "attn_out-1": layers[1].self_attn.o_proj, "attn_post_normed-1": layers[1].post_attention_layernorm,
               "ffn_inp_normed-1": layers[1].pre_feedforward_layernorm, "ffn_out-1": layers[1].mlp,
               "ffn_post_normed-1": layers[1].post_feedforward_layernorm, "layer_out-1": layers[1]}
    for name, value in hooked(model, modules, lambda m: image_oracle(m, patches, positions)).items():
        assert worst(got[name].reshape(value.shape), value) < TOLERANCE, name
    ends = {"inp", "pos_embd", "pooled", "projected"} | ({"std_scaled"} if kind == "large" else set())
    assert ends <= got.keys() and {f"{name}-2" for name in ("Qcur_pos", "Kcur_pos", "kqv_out", "ffn_inp")} <= got.keys()


def test_taps_of_a_layer_that_hears(loaded):
    model, projector = loaded["small", "reference"]
    tower, got, frames = model.model.audio_tower, {}, sound(70)
    projector.audio_tokens(frames, tap=got.__setitem__)
    layer = tower.layers[1]
    modules = {"inp": tower.subsample_conv_projection, "ffn_out-1": layer.feed_forward1, "conv_out-1": layer.lconv1d,
               "ffn_out_1-1": layer.feed_forward2, "layer_out-1": layer, "encoded": tower.output_proj}
    for name, value in hooked(model, modules, lambda m: audio_oracle(m, frames)).items():
        assert worst(got[name], value) < TOLERANCE, name
    assert {f"{name}-0" for name in ("Qcur", "Kcur", "kqv_out", "attn_out")} | {"projected"} <= got.keys()


def test_a_row_of_sound_depends_on_what_it_may(loaded):
    """With its convolutions in time (5 taps) and attention (12 rows), one layer of three reaches 4 + 11 rows back, and none ahead."""
    _, projector = loaded["small", "kernels"]
    frames, other = sound(400), sound(400)
    other[200:] += 1
    a, b = projector.audio_tokens(frames), projector.audio_tokens(other)
    assert np.array_equal(a[:50], b[:50]) and not np.array_equal(a[50], b[50])       # row t ends with frame 4 t + 3
    late = projector.audio_tokens(frames[200:])
    n = 3 * (4 + 11) + 2
    assert worst(late[n:], a[50 + n:]) < 1e-6 and worst(late[:9], a[50:59]) > 1e-3


# ---- integers, threads

@pytest.mark.parametrize("kind", KINDS)
def test_q8_files_in_both_backends(tmp_path, folders, kind):
    """The kernels' integer products have the reference's bits; what is between them departs by roundings, which 8 bits may magnify."""
    convert(folders[kind][1], tmp_path / "q8.gguf", "Q8_0", projector=True)
    a, b = (load_projector(tmp_path / "q8.gguf", backend=backend, arithmetic="q8") for backend in ("reference", "kernels"))
    exact = load_projector(tmp_path / "q8.gguf", backend="reference")
    side = CELL if kind == "unified" else SIDE
    picked = [("image_tokens", picture(6, 6, side))]
    if a.hears:
        picked.append(("audio_tokens", (sound(60, 40 if kind == "unified" else 128),)))
    for name, arguments in picked:
        want, got, full = (getattr(p, name)(*arguments) for p in (a, b, exact))
        assert worst(got, want) < 1e-2 and worst(want, full) < 5e-2, (name, worst(got, want), worst(want, full))


@pytest.mark.parametrize("kind", KINDS)
def test_any_number_of_threads_gives_the_same_bits(folders, kind):
    if numba.config.NUMBA_NUM_THREADS < 2:
        pytest.skip("Numba was started with one thread")
    one, two = (load_projector(folders[kind][1], threads=threads) for threads in (1, 2))
    side = CELL if kind == "unified" else SIDE
    patches, positions = picture(24, 24, side)
    assert np.array_equal(one.image_tokens(patches, positions), two.image_tokens(patches, positions))
    if one.hears:
        frames = sound(2500, 40 if kind == "unified" else 128)
        assert np.array_equal(one.audio_tokens(frames), two.audio_tokens(frames))


# ---- memory

@pytest.mark.parametrize("kind", KINDS)
def test_buffers_are_counted(loaded, kind, monkeypatch):
    """What the largest picture and sound take is about what `tower_bytes` says, which stands in for it before a projector is loaded."""
    _, projector = loaded[kind, "kernels"]
    n = 31 if kind == "unified" else 63                     # squares in each direction, for which there are positions
    monkeypatch.setattr(memory, "BUDGETS", (n * n // projector.squares[1] ** 2,))

    def peak(compute, make) -> int:
        tracemalloc.start()
        compute(*make())
        taken = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return taken
    taken = peak(projector.image_tokens, lambda: picture(n, n, CELL if kind == "unified" else SIDE))
    if projector.hears:
        width = projector.config.audio.n_samples if kind == "unified" else 128
        taken = max(taken, peak(projector.audio_tokens, lambda: (sound(480_000 // width if kind == "unified" else 2999, width),)))
    assert 0.5 < taken / memory.tower_bytes(projector.config) < 1.05


# ---- wrong arguments

def test_wrong_pictures_and_sounds_are_refused(loaded):
    _, small = loaded["small", "kernels"]
    patches, positions = picture(6, 3)
    tall = picture(3, 66)
    for image, words in (((patches.astype(np.float64), positions), "48 numbers in float32"), ((patches[:, :47], positions), "48 numbers"),
                         ((patches[:0], positions[:0]), "at least one"), ((patches, positions.astype(np.int32)), "int64"),
                         ((patches, positions[:, ::-1].copy()), "row by row"), ((patches, positions - 1), "row by row"),
                         (picture(4, 3), "multiples of 3"), (tall, "64 positions")):
        with pytest.raises(ValueError, match=words):
            small.image_tokens(*image)
    for frames in (sound(4).astype(np.float64), sound(4)[:, :127], sound(4)[:0], sound(4)[0]):
        with pytest.raises(ValueError, match="at least one frame of 128 numbers in float32"):
            small.audio_tokens(frames)
    with pytest.raises(ValueError, match="does not hear"):
        loaded["large", "reference"][1].audio_tokens(sound(4))
