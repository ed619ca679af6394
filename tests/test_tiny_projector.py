"""The projector that ships: it reads, as transformers' network does with its weights; its training can be repeated."""

import hashlib

import numpy as np
import pytest
import torch
from shapes import worst

import refimpl
from refimpl.formats.quants.codecs import dequantize
from refimpl.loading.projector import BUILT_IN_PROJECTOR, projectors_beside
from refimpl.loading.towers.names import gguf_name
from refimpl.media.parts import Image
from refimpl.media.patches import patches, pixels
from refimpl.media.source import MediaError
from refimpl.text.prompt import encode_messages, encode_prompt
from refimpl.tiny.evaluate_projector import read
from refimpl.tiny.pictures import HEIGHT, TOKENS, WIDTH, WORDS, draw, held_out
from refimpl.tiny.training import export, train_projector, vocabulary

CARD = draw("return", 50, 25, ink=(20, 40, 90), paper=(250, 240, 215))
KNOWN = "9f11b9cd4b4a823e706d6abb051b055a4dcb643b033aa9fd8de6e46d9eefee71"
"""Of the soft tokens of CARD by the kernels, exact arithmetic."""


@pytest.fixture(scope="module")
def model():
    return refimpl.load(threads=1, arithmetic="exact")


@pytest.fixture(scope="module")
def projector(model):
    return refimpl.load_projector(None, model)


def test_it_reads_cards_that_it_has_not_seen(model, projector):
    cards = list(held_out(len(WORDS), seed=3))[::4]
    right = [word == read(model, projector, card) for word, card in cards]
    assert sum(right) >= 0.8 * len(right), right
    blank = np.full((HEIGHT, WIDTH, 3), 230, np.uint8)
    assert read(model, projector, blank) != cards[0][0]


def test_it_reads_in_other_prompts_and_arithmetic_too():
    model = refimpl.load(threads=1)
    projector = refimpl.load_projector(None, model)
    assert read(model, projector, CARD, before="# ", behind="") == "return"
    message = [{"role": "user", "content": [Image(CARD, TOKENS)]}]
    assert refimpl.generate(model, message, max_new_tokens=1, temperature=0, projector=projector).text == "return"


def test_its_bits_are_known(projector):
    soft_TD = projector.image(CARD, TOKENS)
    assert soft_TD.shape == (60, 128) and soft_TD.dtype == np.float32
    assert hashlib.sha256(soft_TD.tobytes()).hexdigest() == KNOWN


def test_it_is_found_without_a_path_and_small(projector):
    assert projectors_beside(None) == [BUILT_IN_PROJECTOR] == projectors_beside(BUILT_IN_PROJECTOR.with_name("model.gguf"))
    assert projector.file.path == BUILT_IN_PROJECTOR and BUILT_IN_PROJECTOR.stat().st_size < 400_000
    assert projector.sees and not projector.hears and not projector.encoder_free


def test_training_computes_what_the_file_does(projector):
    """transformers' tower with the weights of the file; and the card is scaled as in training."""
    eyes, held = train_projector.Eyes(0), projector.file
    state = {}
    for theirs, value in eyes.state_dict().items():
        info = held.tensors[gguf_name(theirs)]
        array = dequantize(held.raw(info.name), info.type).reshape(info.shape)
        state[theirs] = torch.tensor(array.transpose(0, 2, 3, 1) if array.ndim == 4 else array).reshape(value.shape)
    eyes.load_state_dict(state)
    scaled = pixels(CARD, TOKENS)
    assert np.array_equal(scaled, train_projector.enlarged(CARD)) and scaled.shape == (240, 576, 3)
    patches_TP, pos_T2 = patches(scaled)
    with torch.no_grad():
        want = eyes(torch.from_numpy(patches_TP)[None], torch.from_numpy(pos_T2))[0].numpy()
    assert worst(projector.image(CARD, TOKENS), want) < 1e-4


def test_the_loss_is_that_of_the_text_model(model, projector):
    """Pictures in the middle of a batch with others, masks and all: the nats of torch are those of the kernels."""
    reader, rng = train_projector.Reader(), np.random.default_rng(5)
    words = np.array([WORDS.index("return"), WORDS.index("yield")])
    soft_BND = np.stack([projector.image(draw(WORDS[word], 30, 20), TOKENS) for word in words])
    with torch.no_grad():
        got, _ = reader.loss(torch.from_numpy(soft_BND), words, rng)
    rng, nats = np.random.default_rng(5), []
    for word in words:
        before, behind = (texts[rng.integers(len(texts))] for texts in (train_projector.BEFORE, train_projector.BEHIND))
        parts = [before, Image(draw(WORDS[word], 30, 20), TOKENS), behind]
        answer = model.tokenizer.encode(f"{WORDS[word]}\n", bos=False)
        prompt = [part for part in (*parts, answer) if not isinstance(part, str) or part]
        logits = model.logits(prompt, projector=projector)[-len(answer) - 1:-1]
        nats.append(torch.nn.functional.cross_entropy(torch.from_numpy(logits), torch.tensor(answer), reduction="none"))
    assert abs(got.item() - torch.cat(nats).mean().item()) < 2e-3


def test_quick_training_exports_a_projector_that_loads(tmp_path, model):
    train_projector.main(["--out", str(tmp_path), "--steps", "2", "1", "--batch", "4"])
    export.main([str(tmp_path), "--projector", "-o", str(tmp_path / "mmproj.gguf")])
    made = refimpl.load_projector(tmp_path / "mmproj.gguf", model)
    assert made.config == refimpl.load_projector(None, model).config and np.isfinite(made.image(CARD, TOKENS)).all()
    assert {name: (info.type, info.shape) for name, info in made.file.tensors.items()} == {
        name: (info.type, info.shape) for name, info in refimpl.load_projector(None, model).file.tensors.items()}


def test_a_ribbon_is_refused_before_anything_is_computed(model):
    eyes = refimpl.load_projector(None, model)
    for shape, squares in (((10_000, 1, 3), "3 x 840"), ((1, 10_000, 3), "840 x 3")):
        with pytest.raises(MediaError, match=f"becomes {squares} squares, and this projector has 256 positions"):
            eyes.soft_tokens(Image(np.zeros(shape, np.uint8)))
    assert eyes.soft_tokens(Image(np.zeros((500, 1, 3), np.uint8), 70)).n <= 70


def test_markers_took_the_places_of_characters_that_are_written_in_bytes_since(model):
    tokenizer = model.tokenizer
    for character, marker in vocabulary.SOFT_MARKERS.items():
        assert tokenizer.token(tokenizer.id_of(marker)) == marker and marker in tokenizer.markers
        ids = tokenizer.encode(character, bos=False)
        assert len(ids) == len(character.encode()) and tokenizer.decode(ids) == character
        assert tokenizer.id_of(marker) not in tokenizer.encode(marker)          # in a text it is text
    projector = refimpl.load_projector(None, model)
    encoded = encode_messages(tokenizer, model.file.metadata["tokenizer.chat_template"],
                              [{"role": "user", "content": ["see <|image|>", Image(CARD, TOKENS)]}], projector)
    want = encode_prompt(tokenizer, None, ["see <|image|>", Image(CARD, TOKENS), "\n"], projector)
    assert encoded.ids == want.ids and sum(i < 0 for i in want.ids) == 60
