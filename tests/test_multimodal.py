"""Pictures, sounds and videos from files to logits: a whole model and its projector against transformers, the same bits however read."""

from fractions import Fraction
from functools import partial

import numpy as np
import pytest
import torch
from films import write_film
from shapes import worst
from tower_traces import tower_folder
from transformers.models.gemma4_unified.modeling_gemma4_unified import create_masks_for_vision_model

import refimpl
from refimpl import Audio, Image, Video
from refimpl.media.mel import mel_frames, raw_frames
from refimpl.media.patches import patches, pixels
from refimpl.text.prompt import encode_prompt

IMAGE, AUDIO, VIDEO = 258880, 258881, 258884           # transformers': outside of the small vocabulary


@pytest.fixture(scope="module", params=["small", "large", "unified"])
def opened(request, tmp_path_factory):
    """(transformers' model, our model, its projector)."""
    theirs, folder = tower_folder(tmp_path_factory.mktemp(request.param), request.param)
    model = refimpl.load(folder, arithmetic="exact", threads=2)
    return theirs, model, refimpl.load_projector(folder, target=model)


def picture(height: int, width: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def tone(n: int) -> np.ndarray:
    return (0.3 * np.sin(np.arange(n) * 0.05) + 0.05 * np.random.default_rng(n).normal(size=n)).astype(np.float32)


def theirs_of(theirs, projector, parts, encoded) -> np.ndarray:
    """Logits of transformers, with its own towers."""
    kind = {i: IMAGE if part.together or not audio else AUDIO for part, audio in encoded.kinds for i in part.ids}
    ids = torch.tensor([[kind.get(i, i) for i in encoded.ids]])
    inputs: dict[str, torch.Tensor] = {}
    patch, pool = projector.squares
    cut = [patches(pixels(part.rgb_HWC, part.tokens, patch, pool), patch) for part in parts if isinstance(part, Image)]
    most = max(len(each) for each, _ in cut)
    inputs["pixel_values"] = torch.from_numpy(np.stack([np.pad(each, ((0, most - len(each)), (0, 0))) for each, _ in cut]))
    inputs["image_position_ids"] = torch.from_numpy(np.stack([np.pad(pos, ((0, most - len(pos)), (0, 0)), constant_values=-1)
                                                              for _, pos in cut]))
    for part in parts:
        if isinstance(part, Audio):
            frames = raw_frames(part.samples_N, 40) if projector.encoder_free else mel_frames(part.samples_N)
            inputs["input_features"] = torch.from_numpy(frames)[None]
            inputs["input_features_mask"] = torch.ones(1, len(frames), dtype=torch.bool)
    types = (ids == IMAGE).long()
    if projector.encoder_free:          # the model itself would take the mask of an older release
        text = theirs.config.text_config
        blocks, number = torch.full_like(ids, -1), -1
        for t, is_image in enumerate(types[0]):
            number += int(is_image) and not (t and types[0, t - 1])
            blocks[0, t] = number if is_image else -1
        x = torch.zeros(1, ids.shape[1], text.hidden_size)
        inputs["attention_mask"] = create_masks_for_vision_model(text, x, None, None, None, blocks)
    with torch.no_grad():
        return theirs(input_ids=ids, mm_token_type_ids=types + 3 * (ids == AUDIO), use_cache=False, **inputs).logits[0].numpy()


def test_logits_are_those_of_transformers(opened):
    """Two pictures of different shapes, one enlarged, one shrunk and longer than the window, and a sound."""
    theirs, model, projector = opened
    parts = ["ab ", Image(picture(20, 33, 0), 70), " cd", Image(picture(200, 90, 1), 70), "e f ", *(
        [Audio((tone(9_000), 16000)), "gh"] if projector.hears else [])]
    encoded = encode_prompt(model.tokenizer, None, parts, projector)

    class Kinds:
        ids, kinds = encoded.ids, [(projector.soft_tokens(part), isinstance(part, Audio)) for part in parts if not isinstance(part, str)]
    wanted = theirs_of(theirs, projector, parts, Kinds)
    assert worst(model.logits(parts, projector=projector), wanted) < 2e-5
    reference = refimpl.load(model.file.path, backend="reference")
    eyes = refimpl.load_projector(model.file.path, target=reference)
    assert worst(reference.logits(parts, projector=eyes), wanted) < 2e-5


def test_logits_of_a_video_are_those_of_transformers(opened, tmp_path):
    """Three frames, with text before, between and behind them."""
    theirs, model, projector = opened
    film = Video(write_film(tmp_path / "it.mp4", [picture(40, 60, seed) for seed in range(3)], Fraction(1, 40)))
    prompt, side = ["ab ", film, " cd"], projector.squares[0]
    encoded = encode_prompt(model.tokenizer, None, prompt, projector)
    cut = [patches(still.rgb_HWC, side) for still in film.stills(*projector.squares)]
    values, positions = (torch.from_numpy(np.stack(arrays)) for arrays in zip(*cut))
    kind = torch.tensor([[int(i < 0) for i in encoded.ids]])
    given = {"pixel_values_videos": values, "video_position_ids": positions}
    if projector.encoder_free:
        starts = torch.nn.functional.pad(kind, (1, 0)).diff() == 1
        blocks = torch.where(kind == 1, starts.cumsum(1) - 1, -1)
        given["attention_mask"] = create_masks_for_vision_model(
            theirs.config.text_config, torch.zeros(1, len(encoded.ids), model.config.n_embd), None, None, None, blocks)
    ids, features = torch.tensor([[VIDEO if i < 0 else i for i in encoded.ids]]), theirs.model.get_video_features
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:         # transformers 5.22.2 does not pass the number of frames on
        patch.setattr(theirs.model, "get_video_features", partial(features, num_frames_per_video=torch.tensor([3])))
        wanted = theirs(input_ids=ids, mm_token_type_ids=2 * kind, use_cache=False, **given).logits[0].numpy()
    assert worst(model.logits(prompt, projector=projector), wanted) < 2e-5


def test_a_conversation_about_a_picture(opened):
    _, model, projector = opened
    cat = Image(picture(30, 40, 3), 70)
    made = []
    count, projector.image_tokens = projector.image_tokens, lambda *given: made.append(given) or count(*given)
    prompts = [["ab", cat, "cd"], ["ab", cat, "cd ef"], ["ab", Image(picture(30, 40, 3), 70), "gh"], ["ab", Image(picture(30, 40, 4), 70)]]
    cold = [refimpl.generate(model, prompt, max_new_tokens=4, temperature=0, projector=projector).ids for prompt in prompts]
    assert len(made) == 2           # the same pixels are the same picture
    one = refimpl.load(model.file.path, arithmetic="exact", threads=1)
    alone = refimpl.load_projector(model.file.path, target=one)
    assert [refimpl.generate(one, prompt, max_new_tokens=4, temperature=0, projector=alone).ids for prompt in prompts] == cold
    del projector.image_tokens


def test_api(opened, tmp_path):
    _, model, projector = opened
    array = picture(24, 24, 5)
    assert projector.image(array, tokens=70).shape == (64, model.config.n_embd)
    assert np.array_equal(projector.image(Image(array, 70)), projector.image(array, tokens=70))
    if projector.hears:
        heard = projector.audio((tone(16_000), 16000))
        assert heard.shape == (400 if projector.encoder_free else 25, model.config.n_embd)
        with pytest.raises(refimpl.MediaError, match="161|expected at least") if not projector.encoder_free else pytest.raises(ValueError):
            projector.audio((np.zeros(0 if projector.encoder_free else 160, np.float32), 16000))
    else:
        with pytest.raises(ValueError, match="does not hear"):
            projector.audio((tone(900), 16000))
    with pytest.raises(ValueError, match="without the model that takes its tokens"):
        refimpl.load_projector(model.file.path).soft_tokens(Image(array, 70))
    with pytest.raises(ValueError, match="needs a projector"):
        refimpl.generate(model, ["a", Image(array)])
