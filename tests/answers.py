"""A tokenizer with Gemma's markers, and an answer by it: from parts to ids, and from ids to what AnswerSplitter makes of them."""

import hashlib
import json

import numpy as np

from refimpl.media.parts import Image
from refimpl.model.soft import SoftTokens
from refimpl.text import calls as form
from refimpl.text import chat
from refimpl.text.answer import AnswerSplitter, CallArguments, CallEnd, CallStart, Content, Thought
from refimpl.text.tokenizer import Tokenizer
from refimpl.tiny.training.export import tokenizer_metadata
from refimpl.tiny.training.vocabulary import train_vocabulary

WORDS = ['call:f{a:1,b:true} "x": null, [1.5] thought\n get_weather{city:', "{} [] , : é \U0001f642 false -1e5 the answer is "] * 40
METADATA = tokenizer_metadata(train_vocabulary(WORDS, 500).to_str())
TOKENIZER = Tokenizer.from_metadata(METADATA, "tiny")
BYTES = {TOKENIZER.bytes_of(i): i for i in range(TOKENIZER.n_vocab) if TOKENIZER.token(i).startswith("<0x")}


class Marker(str):
    """A marker's token and not the text that spells it."""


MARKERS = CALL, CALL_END, QUOTE, THOUGHT, CHANNEL_END = [
    Marker(token) for token in (form.CALL, form.CALL_END, form.QUOTE, chat.THOUGHT, chat.CHANNEL_END)]


SEEN = "<|image>", "<|image|>", "<image|>", "<|audio>", "<|audio|>", "<audio|>"


def with_markers(metadata: dict) -> Tokenizer:
    """The vocabulary with the markers of pictures and sounds, as control tokens at its end where it has none."""
    new = [token for token in SEEN if token not in metadata["tokenizer.ggml.tokens"]]
    changed = {"tokenizer.ggml.tokens": [*metadata["tokenizer.ggml.tokens"], *new],
               "tokenizer.ggml.token_type": np.append(metadata["tokenizer.ggml.token_type"], [3] * len(new)).astype(np.int32)}
    if "tokenizer.ggml.scores" in metadata:
        changed["tokenizer.ggml.scores"] = np.append(metadata["tokenizer.ggml.scores"], [0] * len(new)).astype(np.float32)
    return Tokenizer.from_metadata(metadata | changed, "with markers")


class Eyes:
    """In place of a projector: three soft tokens for a picture, two for a sound. `shown`: what it was asked for."""

    def __init__(self):
        self.shown = []

    def soft_tokens(self, part):
        self.shown.append(part)
        return SoftTokens(hashlib.sha256(part.digest.encode()).digest(), 3 if isinstance(part, Image) else 2, True, lambda look: None)

    def stills(self, video):
        return video.stills()


def ids_of(*parts: str, in_bytes: bool = False) -> list[int]:
    """Tokens of markers and of text; `in_bytes`: the text is cut into its bytes, in the middle of characters too."""
    return [i for part in parts for i in ([TOKENIZER.id_of(part)] if isinstance(part, Marker)
                                          else [BYTES[bytes((b,))] for b in part.encode()] if in_bytes
                                          else TOKENIZER.encode(part, bos=False))]


def pieces_of(ids, **options) -> list:
    splitter = AnswerSplitter(TOKENIZER, **options)
    return [piece for i in ids for piece in splitter.push(i)] + splitter.finish()


def parts_of(pieces) -> tuple[str, str, list[tuple[str, object, bool]]]:
    """(thought, content, [(name, arguments, broken)]); checks the order of a call's pieces."""
    calls = []
    for piece in pieces:
        if isinstance(piece, CallStart):
            assert piece.index == len(calls) and (not calls or calls[-1][2] is not None)
            calls.append([piece.name, "", None])
        elif isinstance(piece, CallArguments):
            assert piece.index == len(calls) - 1 and calls[-1][2] is None and piece.json
            calls[-1][1] += piece.json
        elif isinstance(piece, CallEnd):
            assert piece.index == len(calls) - 1 and calls[-1][2] is None
            calls[-1][2] = piece.broken
        else:
            assert piece.text
    texts = ["".join(piece.text for piece in pieces if isinstance(piece, kind)) for kind in (Thought, Content)]
    return *texts, [(name, json.loads(arguments), broken) for name, arguments, broken in calls]
