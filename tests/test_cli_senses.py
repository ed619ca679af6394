"""Pictures, sounds and videos on the command line and in chat: what is loaded for them, counted, typed, dropped, kept, refused."""

import json
import sys
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import PIL.Image
import pytest
import soundfile
from answers import Eyes
from cli import assert_one_line, run
from films import write_film
from shapes import random_model, write_model

import refimpl
import refimpl.cli.chat
import refimpl.cli.run
from refimpl.cli.app import Failure
from refimpl.cli.conversation import transcript
from refimpl.cli.conversation.commands import dropped, run_command
from refimpl.cli.senses import n_tokens_of, opened, projector_of
from refimpl.loading.projector import BUILT_IN_PROJECTOR
from refimpl.media.parts import Audio, Image, Video
from refimpl.text.prompt import encode_prompt
from refimpl.tiny.pictures import TOKENS, draw

REFERENCE = ("--temp", 0, "--backend", "reference")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A picture, a sound of a minute, a video of three frames, a small model without a projector."""
    folder = tmp_path_factory.mktemp("a folder")
    PIL.Image.fromarray(draw("return", 50, 25)).save(folder / "a cat.png")
    soundfile.write(folder / "minute.wav", np.zeros(60 * 8000), 8000)
    write_film(folder / "film.mp4", [np.full((48, 96, 3), 60 * i, np.uint8) for i in range(3)], Fraction(1, 40))
    write_model(folder / "small.gguf", random_model("12B"))
    return folder


@pytest.mark.parametrize(("command", "says"), [
    ("generate -p x --mmproj-q8", "needs --image, --audio or --video"),
    ("generate -p x --mmproj-q8 --mmproj none --image {}/a cat.png", "none is loaded"),
    ("chat {}/small.gguf --mmproj-q8", "none is loaded; name it with --mmproj FILE"),
    ("chat --mmproj none --mmproj-q8", "none is loaded"), ("serve {}/small.gguf --mmproj-q8", "none is loaded"),
])
def test_rounding_a_projector_that_is_not_there_is_refused(files, command, says):
    words = [word.replace("{}", str(files)) for word in command.replace("a cat", "a~cat").split()]
    assert_one_line(run(*(word.replace("a~cat", "a cat") for word in words)), 2, says)


def test_the_built_in_model_has_its_own_projector(files, capsys):
    model = refimpl.load(backend="reference")
    assert projector_of(model, None, None, None, needed=False).file.path == BUILT_IN_PROJECTOR
    assert projector_of(model, None, None, "none", needed=True) is None and capsys.readouterr().err == ""
    assert projector_of(model, files / "small.gguf", "x", None, needed=False) is None
    status, out, err = run("chat", "--image", files / "a cat.png", "--image-tokens", TOKENS, "-n", 1, *REFERENCE, stdin=" ")
    assert (status, err.strip()) == (0, "note: standard input is empty, there is nothing to answer") and out == ""


def test_every_file_is_counted_by_itself(files, monkeypatch):
    seen = opened([files / "a cat.png"], [files / "minute.wav"], [files / "film.mp4"], 140)
    assert list(map(type, seen)) == [Image, Audio, Video]
    cat, sound, film = ([part] for part in seen)
    assert n_tokens_of(sound) == 60 * 25 + 8 and 100 < n_tokens_of(cat) <= 148 and 3 * 60 < n_tokens_of(film) <= 3 * 78

    def load(path, backend, arithmetic, threads, n_ctx, *rest):
        raise Failure(f"asked for {n_ctx}")
    for module in (refimpl.cli.run, refimpl.cli.chat):
        monkeypatch.setattr(module, "load", load)
    assert_one_line(run("generate", "-p", "x", "-n", 3, "--audio", files / "minute.wav"), 1, f"asked for {1 + 3 + 256 + 1508}")
    assert_one_line(run("chat", "--audio", files / "minute.wav"), 1, f"asked for {4096 + 1508}")


def test_a_video_on_the_command_line(files, monkeypatch):
    status, out, err = run("generate", "-p", "x", "-n", 1, "--video", files / "film.mp4", "--json", *REFERENCE)
    ids = json.loads(out)["prompt_ids"]
    soft = [i for i in ids if i < 0]
    assert status == 0 and err == "" and len(soft) == len(set(soft)) == 3 * 55
    tokenizer = refimpl.load(backend="reference").tokenizer
    assert tokenizer.decode([i for i in ids if i >= 0], special=True).endswith(
        "00:00 <|image><image|> 00:40 <|image><image|> 01:20 <|image><image|>x")
    joined = tokenizer.encode("100:00 ")
    assert encode_prompt(tokenizer, None, ["1", Video(files / "film.mp4")], Eyes()).ids[:len(joined)] == joined
    assert joined != tokenizer.encode("1") + tokenizer.encode("00:00 ", bos=False)
    monkeypatch.setitem(sys.modules, "av", None)
    for command in (("generate", "-p", "x"), ("chat",)):
        assert_one_line(run(*command, "--video", files / "film.mp4"), 1, "av is not installed; pip install")


# ---- in chat

def test_what_is_dropped(files):
    cat, film = files / "a cat.png", files / "film.mp4"
    quoted = str(cat).replace(" ", "\\ ")
    for text in (f"'{cat}'", quoted, f"file://{cat}".replace(" ", "%20"), f"file://localhost{cat}".replace(" ", "%20"),
                 f"'file:{cat}' ", f"'file://{cat}'"):
        assert dropped(text) == ("image", str(cat)), text
    assert dropped(str(film).replace(" ", "\\ ")) == ("video", str(film))
    for text in ("", "it's", "~nobody-of-this-name/a.png", "file:///%00.png", "file://other/a.png", "a cat.png", str(cat), "file:///"):
        assert dropped(text) is None, text


def test_a_video_is_attached_and_kept(files, tmp_path, monkeypatch):
    asked = []
    talk = SimpleNamespace(session=SimpleNamespace(projector=Eyes()), files=[], n_tokens=280, ask=asked.append)
    run_command(talk, "video", f'"{files}/film.mp4" what happens?')
    [(name, film)] = talk.files
    assert name == "film.mp4" and isinstance(film, Video) and asked == ["what happens?"]
    with pytest.raises(Failure, match="is no video"):
        run_command(talk, "video", f'"{files}/a cat.png"')
    transcript.write(tmp_path / "s.json", "m", [{"role": "user", "content": [film, "what?"]}])
    [message] = transcript.read(tmp_path / "s.json").messages
    assert isinstance(message["content"][0], Video) and len(message["content"][0].stills()) == 3
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(Failure, match="av is not installed; pip install"):
        run_command(talk, "video", f"{files}/film.mp4")
