"""Small models that see and hear, with a prompt of text, a picture and a sound, for traces."""

import json

import numpy as np
import pytest
from answers import SEEN
from tower_models import random_towers, save_towers

import refimpl
from refimpl import Audio, Image
from refimpl.media import patches

RATE = 24_000           # of the sound's file: it has to be resampled
BUDGET = 9              # tokens of a picture; Gemma 4 has none so small


@pytest.fixture(autouse=True, scope="module")
def small_budget():
    """Pictures may have BUDGET tokens too, which is quick."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(patches, "BUDGETS", (*patches.BUDGETS, BUDGET))
        yield


def tower_folder(folder, kind: str):
    """(transformers' model, its directory): `random_towers(kind)`, with markers of pictures and sounds in the vocabulary."""
    theirs = random_towers(kind)
    place = save_towers(folder, theirs) / "tokenizer.json"
    tokenizer = json.loads(place.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    for name, marker in zip("456789", SEEN):
        vocabulary[marker] = vocabulary.pop(name)
        tokenizer["added_tokens"].append(tokenizer["added_tokens"][0] | {"id": vocabulary[marker], "content": marker})
    place.write_text(json.dumps(tokenizer))
    return theirs, folder


def picture(height: int = 80, width: int = 37, seed: int = 1) -> np.ndarray:
    """Smooth shades and noise, which shrink."""
    y, x = np.mgrid[:height, :width]
    waves = np.stack([np.sin(x / 9) + np.cos(y / 7), np.sin((x + y) / 13), np.cos(x * y / 900)], axis=-1)
    return np.clip(128 + 60 * waves + np.random.default_rng(seed).normal(0, 25, waves.shape), 0, 255).astype(np.uint8)


def sound(n: int = 13_920, seed: int = 2) -> tuple[np.ndarray, int]:
    """0.58 s. At 16 kHz it has a whole number of hops: one frame more would be there without the last sample of its window."""
    t = np.arange(n) / RATE
    waves = 0.3 * np.sin(2 * np.pi * 440 * t * (1 + t)) * np.exp(-3 * t)
    return (waves + 0.01 * np.random.default_rng(seed).normal(size=n)).astype(np.float32), RATE


def parts(projector) -> list:
    """What a model of this projector is asked."""
    return ["ab ", Image(picture(), BUDGET), " cd ef ", *([Audio(sound()), "gh ab cd ef gh"] if projector.hears else ["ij kl"])]


def opened(folder, **options):
    """(the reference of the model in a directory, its projector)."""
    model = refimpl.load(folder, backend="reference", **options)
    return model, refimpl.load_projector(folder, target=model)
