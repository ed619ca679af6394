"""Rounding in towers of their true depth, narrow: float32 here against the same network of transformers in float64."""

import numpy as np
import pytest
import torch
from tower_models import KINDS, audio_oracle, image_oracle, picture, random_towers, save_towers, sound

from refimpl.loading.projector import load_projector

DEPTHS = {"small": (16, 12), "large": (27, 0)}          # layers that see, and that hear
BOUND = 3e-6            # relative RMS; tests/README.md has what was found


def relative_rms(got: np.ndarray, want: np.ndarray) -> float:
    return float(np.sqrt(np.mean((got - want) ** 2) / np.mean(want ** 2)))


def in_float64(patch, model, oracle, *given) -> np.ndarray:
    """What `oracle` gives with a model in float64; its norms, scores and sums would be float32."""
    softmax = torch.nn.functional.softmax
    patch.setattr(torch.Tensor, "float", torch.Tensor.double)
    patch.setattr(torch.nn.functional, "softmax", lambda x, dim, dtype=None: softmax(x, dim))
    return oracle(model.double(), *(x.astype(np.float64) if x.dtype == np.float32 else x for x in given))


@pytest.fixture(scope="module", params=["small", pytest.param("large", marks=pytest.mark.exhaustive)])
def deep(request, tmp_path_factory):
    """(kind, transformers' model, our projectors)."""
    kind, (seeing, hearing) = request.param, DEPTHS[request.param]
    shape = {part: own | {"num_hidden_layers": seeing if part == "vision_config" else hearing} for part, own in KINDS[kind].items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(KINDS, kind, shape)
        model = random_towers(kind)
    folder = save_towers(tmp_path_factory.mktemp(kind), model)
    return kind, model, [load_projector(folder, backend="reference"), load_projector(folder, arithmetic="exact", threads=1)]


def test_rounding_at_true_depth(deep, monkeypatch):
    kind, model, projectors = deep
    asked = [("image_tokens", image_oracle, picture(27, 24)), *([("audio_tokens", audio_oracle, (sound(500),))] if kind == "small" else [])]
    assert projectors[0].config.vision.n_layer == DEPTHS[kind][0] and (kind == "large" or projectors[0].config.audio.n_layer == 12)
    for name, oracle, given in asked:
        found = [oracle(model, *given), *(getattr(projector, name)(*given) for projector in projectors)]
        with monkeypatch.context() as patch:
            want = in_float64(patch, model, oracle, *given)
        assert want.dtype == np.float64
        errors = [relative_rms(x, want) for x in found]
        model.float()
        assert max(errors) < BOUND, (name, errors)
