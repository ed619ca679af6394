"""Pictures and sounds in requests, in the form of each API: what the model is shown, and what is refused."""

import base64
import io

import numpy as np
import PIL.Image
import pytest
import soundfile
from answers import Eyes, with_markers
from serving import FakeEngine, post, tokenizer_and_metadata

import refimpl
from refimpl.media.parts import Image

CHAT, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/responses", "/v1/messages"


def engine_that_sees() -> FakeEngine:
    engine = FakeEngine("a cat")
    engine.tokenizer = engine.model.tokenizer = with_markers(tokenizer_and_metadata()[1])
    engine.projector = Eyes()
    return engine


def encoded(save) -> str:
    file = io.BytesIO()
    save(file)
    return base64.b64encode(file.getvalue()).decode()


PIXELS = np.arange(48 * 50 * 3, dtype=np.uint8).reshape(48, 50, 3)
PNG = encoded(lambda file: PIL.Image.fromarray(PIXELS).save(file, "PNG"))
WAV = encoded(lambda file: soundfile.write(file, np.zeros(900), 16000, format="WAV"))
URL = f"data:image/png;base64,{PNG}"
TEXT, PICTURE = {"type": "text", "text": "what is it?"}, {"type": "image_url", "image_url": {"url": URL}}


def chat(*parts, role="user") -> dict:
    return {"messages": [{"role": role, "content": list(parts)}], "max_tokens": 5}


@pytest.mark.parametrize(("path", "body"), [
    (CHAT, chat(PICTURE, TEXT)),
    (CHAT, chat({"type": "image_url", "image_url": URL}, TEXT)),
    (RESPONSES, {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": URL},
                                                        {"type": "input_text", "text": "what is it?"}]}]}),
    (MESSAGES, chat({"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": PNG}}, TEXT)),
], ids=lambda value: str(value)[:40])
def test_a_picture(path, body):
    engine = engine_that_sees()
    response = post(engine, path, body)
    assert response.status_code == 200, response.text
    [picture], request = engine.projector.shown, engine.requests[0]
    assert np.array_equal(picture.rgb_HWC, PIXELS) and picture.tokens == 280
    at = next(i for i, token in enumerate(request.ids) if token < 0)
    ids = engine.tokenizer.id_of("<|image>"), engine.tokenizer.id_of("<image|>")
    assert (request.ids[at - 1], request.ids[at + 3]) == ids and set(request.soft.place) == set(request.ids[at:at + 3])
    assert engine.tokenizer.decode(request.ids[at + 4:], special=True).startswith("what is it?")
    assert str(len(request.ids)) in response.text           # it counts


LOOK = {"role": "user", "content": "look"}
USED = {"role": "assistant", "content": [{"type": "tool_use", "id": "t1", "name": "look", "input": {}}]}
CALL = {"id": "t1", "type": "function", "function": {"name": "look", "arguments": "{}"}}
ANTHROPICS = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": PNG}}


@pytest.fixture(scope="module")
def that_ships():
    """The projector that ships; its tower, in NumPy, computes what it is given once."""
    made, computed = refimpl.load_projector(None, refimpl.load(backend="reference")), {}
    compute = made.image_tokens

    def known(patches_TP, pos_T2, *tap):
        key = patches_TP.tobytes(), pos_T2.tobytes()
        if key not in computed:
            computed[key] = compute(patches_TP, pos_T2, *tap)
        return computed[key]
    made.image_tokens = known
    return made


@pytest.mark.parametrize(("path", "body", "says"), [
    (CHAT, {"messages": [LOOK, {"role": "assistant", "content": None, "tool_calls": [CALL]},
                         {"role": "tool", "tool_call_id": "t1", "content": [PICTURE, {"type": "text", "text": "a word"}, TEXT]}]},
     "a word\nwhat is it?"),
    (CHAT, {"messages": [LOOK, {"role": "assistant", "content": None, "tool_calls": [CALL]},
                         {"role": "tool", "tool_call_id": "t1", "content": [PICTURE]}]}, ""),
    (RESPONSES, {"input": [LOOK, {"type": "function_call", "call_id": "t1", "name": "look", "arguments": "{}"},
                           {"type": "function_call_output", "call_id": "t1", "output": [
                               {"type": "input_text", "text": "a word"}, {"type": "input_image", "image_url": URL}]}]}, "a word"),
    (MESSAGES, {"max_tokens": 5, "messages": [
        LOOK, USED, {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t1", "is_error": True, "content": [
            ANTHROPICS, {"type": "text", "text": "a word"}]}]}]}, "Error: a word"),
], ids=["chat", "picture only", "responses", "messages"])
def test_a_picture_that_a_tool_returns(that_ships, path, body, says):
    """Behind the tool's response, with the soft tokens of the projector that ships."""
    engine = FakeEngine("a cat")
    engine.projector = that_ships
    response = post(engine, path, body)
    assert response.status_code == 200, response.text
    request = engine.requests[0]
    text = engine.tokenizer.decode([i for i in request.ids if i >= 0], special=True)
    assert text.endswith(f'<|tool_response>response:look{{value:<|"|>{says}<|"|>}}<tool_response|><|image><image|>')
    [begin, *ids, end] = request.ids[request.ids.index(engine.tokenizer.id_of("<|image>")):]
    assert end == engine.tokenizer.id_of("<image|>") and all(i < 0 for i in ids)
    part, row = request.soft.place[ids[0]]
    assert row == 0 and part.n == len(ids) == Image(PIXELS).n_tokens()
    assert not says or np.array_equal(part.x_TD, that_ships.image(PIXELS))


def test_detail_and_sound():
    engine = engine_that_sees()
    low = {"type": "image_url", "image_url": {"url": URL, "detail": "low"}}
    assert post(engine, CHAT, chat(low, {"type": "input_audio", "input_audio": {"data": WAV, "format": "wav"}})).status_code == 200
    picture, sound = engine.projector.shown
    assert picture.tokens == 70 and len(sound.samples_N) == 900
    shown = post(engine, "/apply-template", {"messages": chat(PICTURE, TEXT)["messages"]}).json()["prompt"]
    assert "<|image|>what is it?" in shown
    counted = post(engine, MESSAGES + "/count_tokens", {"messages": [{"role": "user", "content": [
        {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": PNG}}]}], "model": "m"}).json()["input_tokens"]
    assert counted > 5


@pytest.mark.parametrize(("body", "says"), [
    (chat({"type": "image_url", "image_url": {"url": "https://example.com/x.png"}}), "fetches nothing"),
    (chat({"type": "image_url", "image_url": {"url": "data:image/png,abc"}}), "base64"),
    (chat({"type": "image_url", "image_url": {"url": "data:image/png;base64,%%%"}}), "not base64"),
    (chat({"type": "image_url", "image_url": {"url": URL, "detail": "ultra"}}), "detail must be"),
    (chat({"type": "image_url", "image_url": {"url": URL, "detail": []}}), "detail must be"),
    (chat({"type": "image_url"}), "fetches nothing"), (chat({"type": "image_url", "image_url": {"url": 5}}), "fetches nothing"),
    (chat({"type": "image_url", "image_url": {"url": f"data:image/png;base64,{base64.b64encode(b'hello').decode()}"}}), "is no picture"),
    (chat({"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PNG[:80]}"}}), "messages"),
    (chat({"type": "input_audio", "input_audio": {"data": WAV, "format": "aiff"}}), "format"),
    (chat({"type": "input_audio", "input_audio": {"data": PNG, "format": "wav"}}), "sound"),
    (chat({"type": "input_audio"}), "input_audio must have data"), (chat(PICTURE, role="assistant"), "text only"),
    (chat({"type": "video_url", "video_url": URL}), "video_url"),
], ids=lambda value: str(value)[:60])
def test_what_is_refused(body, says):
    engine = engine_that_sees()
    response = post(engine, CHAT, body)
    assert response.status_code == 400 and says in response.json()["error"]["message"], response.text
    assert post(engine, CHAT, chat(TEXT)).status_code == 200


def test_without_a_projector():
    engine = engine_that_sees()
    engine.projector = None
    response = post(engine, CHAT, chat(PICTURE))
    assert response.status_code == 400 and "--mmproj" in response.json()["error"]["message"]
