"""Prompts of parts and of messages: where pictures, sounds and videos stand in them, and what is refused."""

from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
from answers import METADATA, SEEN, Eyes, with_markers
from films import write_film
from transformers import Gemma4Processor

from refimpl.media.parts import Audio, Image, Video
from refimpl.text.chat import ChatError
from refimpl.text.prompt import encode_messages, encode_prompt
from refimpl.text.templates import CONTINUATION_TEMPLATE, GEMMA4_TEMPLATE
from refimpl.text.tokenizer import Tokenizer

TOKENIZER = with_markers(METADATA)
BOI, _, EOI, BOA, _, EOA = map(TOKENIZER.id_of, SEEN)


CAT, DOG, SONG = Image(np.zeros((48, 48, 3), np.uint8)), Image(np.ones((48, 48, 3), np.uint8)), Audio((np.zeros(900, np.float32), 16000))


def of(part) -> list[int]:
    begin, end = (BOI, EOI) if isinstance(part, Image) else (BOA, EOA)
    return [begin, *Eyes().soft_tokens(part).ids, end]


def text(words: str) -> list[int]:
    return TOKENIZER.encode(words, bos=False)


@pytest.mark.parametrize(("parts", "ids"), [
    (["x ", CAT, "? "], [*text("x "), *of(CAT), *text("? ")]),
    ([CAT, DOG, SONG], [*of(CAT), *of(DOG), *of(SONG)]),
    (CAT, of(CAT)),
    ([CAT, CAT, ""], [*of(CAT), *of(CAT)]),
    ([[BOI], CAT, [EOI, 7]], [*of(CAT), 7]),
    ([[BOI], CAT, DOG], [*of(CAT), *of(DOG)]),
    ([CAT, [EOI], [EOI]], [*of(CAT), EOI]),
    ([[TOKENIZER.bos, 7], "a"], [7, *text("a")]),
    (["a", "b"], [*text("a"), *text("b")]),
], ids=["between", "neighbours", "alone", "twice", "markers given", "one given", "end given", "bos given", "texts"])
def test_parts(parts, ids):
    encoded = encode_prompt(TOKENIZER, None, parts, Eyes())
    assert encoded.ids == [TOKENIZER.bos, *ids]
    assert set(encoded.soft.place) == {i for i in ids if i < 0}


def test_messages():
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": ["a", CAT, {"type": "text", "text": "b"}, SONG]},
                {"role": "assistant", "content": "c"}, {"role": "user", "content": DOG}]
    shown = encode_messages(TOKENIZER, GEMMA4_TEMPLATE, messages, Eyes())
    words = [{**messages[0]}, {"role": "user", "content": "aIMAGEbAUDIO"}, messages[2], {"role": "user", "content": "IMAGE"}]
    plain = encode_messages(TOKENIZER, GEMMA4_TEMPLATE, words)
    assert not plain.soft.place
    named = TOKENIZER.decode([i if i >= 0 else TOKENIZER.id_of("<|image|>") for i in shown.ids], special=True)
    begin, sound, end = "<|image>" + "<|image|>" * 3, "<|audio>" + "<|image|>" * 2, "<image|>"
    assert named == TOKENIZER.decode(plain.ids, special=True).replace("IMAGE", begin + end).replace("AUDIO", sound + "<audio|>")
    assert [i for i in shown.ids if i < 0] == [i for part in (CAT, SONG, DOG) for i in of(part)[1:-1]]


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    """Three frames: 0, 40 and 80 s behind its beginning."""
    pictures = [np.full((48, 48, 3), 60 * i, np.uint8) for i in range(3)]
    return Video(write_film(tmp_path_factory.mktemp("film") / "it.mp4", pictures, Fraction(1, 40)))


def theirs(film) -> str:
    """What transformers makes of the place of a video, with three soft tokens a frame, as Eyes have them."""
    marks = SimpleNamespace(boi_token="<|image>", video_token="<|image|>", eoi_token="<image|>")
    facts = SimpleNamespace(fps=1 / 40, timestamps=[40.0 * i for i in range(3)])
    return Gemma4Processor.replace_video_token(marks, {"num_soft_tokens_per_video": [3], "video_metadata": [facts]}, 0)


def named(ids) -> list[int]:
    return [TOKENIZER.id_of("<|image|>") if i < 0 else i for i in ids]


@pytest.mark.parametrize("before", ["see ", "", "1"])
def test_a_video_is_what_transformers_writes(film, before):
    """Its first time is one text with what stands before it."""
    assert theirs(film).startswith("00:00 <|image><|image|><|image|><|image|><image|> 00:40 ") and theirs(film).count("01:20") == 1
    found = encode_prompt(TOKENIZER, None, [before, film, "!"] if before else [film, "!"], Eyes())
    assert named(found.ids) == TOKENIZER.encode(f"{before}{theirs(film)}!", special=True) and len(found.soft.place) == 9
    message = {"role": "user", "content": [before, CAT, film, {"type": "text", "text": "!"}, SONG]}
    shown = encode_messages(TOKENIZER, GEMMA4_TEMPLATE, [message], Eyes())
    plain = TOKENIZER.decode(encode_messages(TOKENIZER, GEMMA4_TEMPLATE, [{"role": "user", "content": "HERE"}]).ids, special=True)
    cat, song = "<|image>" + "<|image|>" * 3 + "<image|>", "<|audio>" + "<|image|>" * 2 + "<audio|>"
    written = plain.replace("HERE", f"{before.strip()}{cat}{theirs(film)}!{song}")
    assert named(shown.ids) == TOKENIZER.encode(written, special=True, bos=False)
    order = [i for part in (CAT, *film.stills(), SONG) for i in Eyes().soft_tokens(part).ids]
    assert [i for i in shown.ids if i < 0] == order


def test_text_that_spells_a_place_stays_text():
    encoded = encode_messages(TOKENIZER, GEMMA4_TEMPLATE, [{"role": "user", "content": ["<|image|> <|image>", CAT]}], Eyes())
    assert [i for i in encoded.ids if i < 0 or i in map(TOKENIZER.id_of, SEEN)] == of(CAT)
    assert encode_prompt(TOKENIZER, None, ["<|image>", CAT], Eyes()).ids[-5:] == of(CAT)
    assert "<|image|> <|image>" in TOKENIZER.decode([i for i in encoded.ids if i >= 0])


@pytest.mark.parametrize(("prompt", "says"), [
    ([{"role": "user", "content": [CAT]}], "projector"), (["a", SONG], "projector"), (Video("x.mp4"), "x.mp4: the model needs a projector"),
    ([{"role": "user", "content": [Video("x.mp4")]}], "projector"), (["a", 5.5], "a part of a prompt is text"),
    ([{"role": "user", "content": [{"type": "image"}]}], "message 0: a part of its content"),
    ([{"role": "user", "content": [5]}], "message 0: a part of its content"),
    ([{"role": "user", "content": "x"}, CAT], "messages only"), (5, "expected text, token ids, parts or messages"),
])
def test_refusals(prompt, says):
    with pytest.raises(ValueError, match=says) as error:
        encode_prompt(TOKENIZER, GEMMA4_TEMPLATE, prompt)
    assert "\n" not in str(error.value)


def test_templates_and_vocabularies_without_places():
    with pytest.raises(ChatError, match="no place for a picture"):
        encode_messages(TOKENIZER, CONTINUATION_TEMPLATE.replace("message['content']", "'x'"), [{"role": "user", "content": [CAT]}], Eyes())
    first = GEMMA4_TEMPLATE.replace("for part in reply.content if part.type != 'text'", "for part in []")
    called = [{"id": "1", "type": "function", "function": {"name": "f", "arguments": {}}}]
    asked = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "", "tool_calls": called},
             {"role": "tool", "tool_call_id": "1", "content": ["a", CAT]}]
    with pytest.raises(ChatError, match="no place for a picture in what a tool returns, which Google's later templates have"):
        encode_messages(TOKENIZER, first, asked, Eyes())
    reverse = "{% for part in messages[0].content | reverse %}{{ '<|' ~ part.type ~ '|>' }}{% endfor %}"
    with pytest.raises(ChatError, match="in the order of the messages"):
        encode_messages(TOKENIZER, reverse, [{"role": "user", "content": [CAT, SONG]}], Eyes())
    without = Tokenizer.from_metadata(METADATA | {"tokenizer.ggml.tokens": [
        "x" + token if token in SEEN else token for token in METADATA["tokenizer.ggml.tokens"]]}, "without")
    with pytest.raises(ChatError, match=r"has no token <\|image>; it takes no pictures"):
        encode_prompt(without, None, [CAT], Eyes())
