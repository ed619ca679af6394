"""`tokenizer.model`: SentencePiece itself is the judge of what our tokenizer makes of its vocabularies."""

import argparse
import ast
import difflib
import inspect
import io
import json
import random
import textwrap
import tokenize
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from directories import write_vocabulary
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import refimpl
from refimpl.formats.checkpoint import CheckpointError
from refimpl.loading.tokenizer_json import vocabulary_metadata
from refimpl.loading.tokenizer_model import merges_of
from refimpl.text.tokenizer import CONTROL, NORMAL, USER_DEFINED, Tokenizer

SPACE = "\u2581"
SOURCES = [line for module in (random, textwrap, tokenize, argparse, ast, difflib) for line in inspect.getsource(module).split("\n")]
FEW = SOURCES[:1500]
OTHER = ["é à ü ß", "中文 文字 文", "здравствуй мир"] * 20
TAGS = ["<|turn>", "<turn|>", "<table>", "</td>"]
GEMMA = dict(
    model_type="bpe", vocab_size=1400, byte_fallback=True, normalization_rule_name="identity", add_dummy_prefix=False,
    remove_extra_whitespaces=False, split_digits=True, allow_whitespace_only_pieces=True, pad_id=0, eos_id=1, bos_id=2, unk_id=3,
    pad_piece="<pad>", eos_piece="<eos>", bos_piece="<bos>", control_symbols=["<mask>"], num_threads=1, minloglevel=2,
    user_defined_symbols=[*TAGS, *("\n" * n for n in range(1, 6)), "\t", *(SPACE * n for n in range(2, 16))])


def trained(path: Path, sentences: list[str] = SOURCES + OTHER, **changes) -> Path:
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(sentences), model_writer=out, **GEMMA | changes)
    path.write_bytes(out.getvalue())
    return path


VARIANTS = {
    "like Gemma's": {},
    "spaces are merged": dict(user_defined_symbols=TAGS),                           # runs of spaces have scores of their own
    "words and digits joined": dict(split_digits=False, split_by_whitespace=False, user_defined_symbols=TAGS, max_sentencepiece_length=24),
    "few characters known": dict(character_coverage=0.98, vocab_size=700),
}


@pytest.fixture(scope="module", params=VARIANTS)
def pair(request, tmp_path_factory):
    """(SentencePiece's own tokenizer, ours) of the same file."""
    folder = tmp_path_factory.mktemp("spm")
    path = trained(folder / "tokenizer.model", **VARIANTS[request.param])
    return (sentencepiece.SentencePieceProcessor(model_file=str(path)),
            Tokenizer.from_metadata(vocabulary_metadata(folder, {}), str(path)))


words = st.sampled_from([word for line in SOURCES[:4000] for word in line.split()])
snippets = st.sampled_from([
    " ", "  ", " " * 7, " " * 40, "\n", "\n\n\n", "\t", "\r\n", "def ", "    return self.", "1234", "aaaaaaa", "====", "____", "<table>",
    "</td>", "<t", "able>", "é", "e\u0301", "中文字", "🙂", "\x00", "\ufeff", "\ufffd", "<0x41>", "ﬁ", "Å", SPACE, SPACE * 2])
texts = st.lists(st.one_of(words, snippets, st.text(max_size=5)), max_size=16).map("".join)
repeats = st.lists(st.tuples(st.sampled_from("aeioust =_-.\n0"), st.integers(1, 9)), max_size=12).map(
    lambda runs: "".join(character * n for character, n in runs))


@pytest.mark.parametrize("n_cases", [200, pytest.param(1000, marks=pytest.mark.exhaustive)])
def test_the_same_ids_and_the_same_text(pair, n_cases):
    theirs, ours = pair

    @settings(max_examples=n_cases, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(text=st.one_of(texts, repeats))
    def check(text):
        if any(marker in text for marker in ("<|turn>", "<turn|>")):
            return                      # markers of a conversation: here only with special=True
        ids = theirs.encode(text)
        assert ours.encode(text, bos=False) == ids and not any(theirs.is_control(i) for i in ids)
        assert ours.decode(ids) == theirs.decode(ids) == text.replace(SPACE, " ")
    check()


def test_a_whole_text(pair):
    theirs, ours = pair
    text = "\n".join(SOURCES[:1500] + OTHER)
    ids = theirs.encode(text)
    assert ours.encode(text, bos=False) == ids and ours.decode(ids) == text and len(ids) > 10_000


def test_special_tokens_are_where_they_were(pair):
    theirs, ours = pair
    assert (ours.bos, ours.eos, ours.n_vocab) == (theirs.bos_id(), theirs.eos_id(), theirs.vocab_size()) and not ours.warnings
    assert [ours.token(i) for i in range(ours.n_vocab)] == [theirs.id_to_piece(i) for i in range(ours.n_vocab)]
    turn = theirs.piece_to_id("<|turn>")
    assert ours.encode("<|turn>user", special=True)[:2] == [ours.bos, turn] and turn not in ours.encode("<|turn>user")
    assert ours.decode([turn, *theirs.encode("x")]) == "<|turn>x"


def test_overlapping_pairs_of_one_token():
    """Where ranked merges cannot be SentencePiece: `aa|a|aa` has `aaa` twice, and the leftmost is not the one with the longer left part."""
    tokens, scores = ["a", "aa", "aaa"], [-2.0, -0.0, -1.0]
    assert merges_of(tokens, scores, [NORMAL] * 3, set()) == [("a", "a"), ("aa", "a"), ("a", "aa")]


# ---- in a directory

@pytest.fixture
def folder(tmp_path):
    trained(tmp_path / "tokenizer.model", FEW, vocab_size=600)
    return tmp_path


def test_tokenizer_json_wins(folder):
    alone = vocabulary_metadata(folder, {})
    write_vocabulary(folder)
    (folder / "tokenizer_config.json").unlink()
    both = vocabulary_metadata(folder, {})
    assert len(both["tokenizer.ggml.tokens"]) == 300 != len(alone["tokenizer.ggml.tokens"]) == 600


def test_settings_name_special_tokens_and_add_others(folder):
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "bos_token": "<table>", "extra_special_tokens": ["<turn|>"],
        "added_tokens_decoder": {"2": {"content": "<bos>", "special": True}, "600": {"content": "<image>", "special": True},
                                 "601": {"content": "<|channel>", "special": True}, "602": {"content": "<b>", "special": False}}}))
    keys = vocabulary_metadata(folder, {"eos_token_id": 5})
    tokens, types = keys["tokenizer.ggml.tokens"], keys["tokenizer.ggml.token_type"]
    assert tokens[600:] == ["<image>", "<|channel>", "<b>"] and list(types[600:]) == [CONTROL, USER_DEFINED, USER_DEFINED]
    assert types[tokens.index("<turn|>")] == CONTROL and types[tokens.index("</td>")] == USER_DEFINED
    assert tokens[keys["tokenizer.ggml.bos_token_id"]] == "<table>" and keys["tokenizer.ggml.eos_token_id"] == 5
    assert keys["tokenizer.ggml.padding_token_id"] == 0 and Tokenizer.from_metadata(keys, "x").n_vocab == 603
    (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": {"605": {"content": "<b>"}}}))
    with pytest.raises(CheckpointError, match="adds token 605, but 600 is in neither"):
        vocabulary_metadata(folder, {})


@pytest.mark.parametrize(("changes", "expected"), [
    (dict(model_type="unigram"), "type BPE, found unigram"),
    (dict(model_type="char"), "type BPE, found character"),
    (dict(byte_fallback=False), "with byte_fallback"),
    (dict(normalization_rule_name="nmt_nfkc"), "normalizes text .nmt_nfkc., which no Gemma"),
    (dict(add_dummy_prefix=True), "adds a space in front"),
    (dict(remove_extra_whitespaces=True), "removes repeated spaces"),
    (dict(user_defined_symbols=[SPACE + "def"]), "is user-defined and has a space in it"),
    (dict(user_defined_symbols=[SPACE * 4]), "is user-defined and has a space in it")])
def test_a_model_that_is_not_like_gemmas_is_refused_in_one_line(tmp_path, changes, expected):
    path = trained(tmp_path / "tokenizer.model", FEW, **{"vocab_size": 600, "hard_vocab_limit": False} | changes)
    with pytest.raises(CheckpointError, match=expected) as caught:
        vocabulary_metadata(tmp_path, {})
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)


@pytest.mark.parametrize("damage", [
    lambda raw: b"", lambda raw: b"version https://git-lfs.github.com/spec/v1\n", lambda raw: raw[:len(raw) // 2],
    lambda raw: raw[:-1], lambda raw: b"{}" + raw, lambda raw: bytes(len(raw))])
def test_a_broken_file_is_refused_in_one_line(folder, damage):
    path = folder / "tokenizer.model"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(CheckpointError) as caught:
        vocabulary_metadata(folder, {})
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)


@settings(max_examples=100, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(places=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=4))
def test_changed_bytes_are_read_or_refused(folder_bytes, places):
    folder, raw = folder_bytes
    changed = bytearray(raw)
    for where, byte in places:
        changed[int(where * len(raw))] = byte
    (folder / "tokenizer.model").write_bytes(changed)
    try:
        Tokenizer.from_metadata(vocabulary_metadata(folder, {}), "changed")
    except (CheckpointError, refimpl.TokenizerError) as error:
        assert "\n" not in str(error)


@pytest.fixture(scope="module")
def folder_bytes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("changed")
    return folder, trained(folder / "tokenizer.model", vocab_size=600).read_bytes()


def test_a_whole_directory_is_loaded_with_it(tmp_path):
    from directories import save
    from shapes import random_model

    folder = save(tmp_path / "m", random_model("12B", vocab_size=600))
    (folder / "tokenizer.json").unlink()
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(trained(folder / "tokenizer.model", vocab_size=600)))
    model = refimpl.load(folder, backend="reference")
    text = "    return self.x  # é\n"
    assert model.tokenizer.encode(text) == [2, *theirs.encode(text)]
    assert np.isfinite(model.logits(model.tokenizer.encode(text))).all()
