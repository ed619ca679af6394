"""The tokenizer against Hugging Face's, which made the vocabulary, and against damaged vocabularies."""

import inspect
import itertools
import json
import os
import random
import textwrap
import tokenize

import numpy as np
import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken
from tokenizers import Tokenizer as HuggingFace

from refimpl.text import tokenizer as ours
from refimpl.text.tokenizer import Tokenizer, TokenizerError
from refimpl.tiny.training.vocabulary import CONTROL, MARKERS, tokenizer_from_parts, train_vocabulary

SPACE, BOM, MARK = "\u2581", "\ufeff", "\ufffd"
# what is user-defined in the second vocabulary
VISIBLE = ["<table>", "</td>", "\n\n", "\n\n\n", "\t\t", "<|channel>", "<channel|>", SPACE + "q"]


def parts_of(hf: HuggingFace) -> tuple[dict[str, int], list[tuple[str, str]]]:
    merges = json.loads(hf.to_str())["model"]["merges"]
    return hf.get_vocab(), [tuple(merge) for merge in merges]


def trained() -> HuggingFace:
    sources = [inspect.getsource(module) for module in (random, textwrap, tokenize)]
    return train_vocabulary([*sources, "é à ü 中文 здравствуй <table></td>\n\n\n" * 3], 1200)


def with_visible_pieces(hf: HuggingFace) -> HuggingFace:
    """In the style of Gemma 3: HTML tags and runs of newlines are added tokens outside the merges; conversation markers are special."""
    vocab, merges = parts_of(hf)
    for token in VISIBLE:
        vocab.setdefault(token, len(vocab))
    hf = tokenizer_from_parts(vocab, merges)
    plain = json.loads(hf.to_str())
    plain["added_tokens"] = [token for token in plain["added_tokens"] if token["content"] not in VISIBLE]
    hf = HuggingFace.from_str(json.dumps(plain))
    hf.add_tokens([AddedToken(token, normalized=False, special="|" in token) for token in VISIBLE])
    return hf


def metadata_of(hf: HuggingFace, visible=()) -> dict[str, object]:
    vocab, merges = parts_of(hf)
    tokens = sorted(vocab, key=vocab.get)
    kind = dict.fromkeys([*CONTROL, *MARKERS], 3) | {f"<0x{b:02X}>": 6 for b in range(256)} | dict.fromkeys(visible, 4)
    return {
        "tokenizer.ggml.model": "gemma4", "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": np.zeros(len(tokens), np.float32),
        "tokenizer.ggml.token_type": np.array([kind.get(token, 1) for token in tokens], np.int32),
        "tokenizer.ggml.merges": [" ".join(merge) for merge in merges],
        "tokenizer.ggml.bos_token_id": np.uint32(vocab["<bos>"]), "tokenizer.ggml.eos_token_id": vocab["<eos>"],
        "tokenizer.ggml.unknown_token_id": vocab["<unk>"], "tokenizer.ggml.padding_token_id": vocab["<pad>"],
        "tokenizer.ggml.add_bos_token": False,
    }


PLAIN = trained()
PAIRS = {"tiny": (PLAIN, metadata_of(PLAIN))}
PAIRS["visible"] = (with_visible_pieces(PLAIN), metadata_of(with_visible_pieces(PLAIN), VISIBLE))
PAIRS = {name: (hf, Tokenizer.from_metadata(metadata, f"{name}.gguf"), metadata) for name, (hf, metadata) in PAIRS.items()}
TOKENIZER = PAIRS["tiny"][1]

snippets = st.sampled_from([
    *CONTROL, *MARKERS, *VISIBLE, "<0x41>", "</s>", " ", "  ", "\n", "\n\n\n\n", "\t", "\r\n", "def ", "self.", "return", " the",
    "12", "//", "#", "é", "e\u0301", "中", "文字", "🙂", "👩\u200d👩\u200d👧", SPACE, BOM, "\x00", MARK])
any_id = st.integers(0, TOKENIZER.n_vocab - 1)
byte_id = st.integers(*(PLAIN.get_vocab()[token] for token in ("<0x00>", "<0xFF>")))
texts = st.lists(st.one_of(snippets, st.text(max_size=6)), max_size=14).map("".join)
often = pytest.mark.parametrize("n_cases", [250, pytest.param(700, marks=pytest.mark.exhaustive)])


def thorough(n_cases):
    return settings(max_examples=n_cases, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


def hf_encode(hf: HuggingFace, text: str, special: bool) -> list[int]:
    hf.encode_special_tokens = not special
    return hf.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("name", PAIRS)
@often
def test_encodes_and_decodes_as_hugging_face(name, n_cases):
    hf, tokenizer, _ = PAIRS[name]

    @thorough(n_cases)
    @given(text=texts)
    def check(text):
        for special in (False, True):
            ids = tokenizer.encode(text, special=special, bos=False)
            assert ids == hf_encode(hf, text, special)
            # markers that a file keeps visible are special to Hugging Face and would be left out by it
            kept_visible = any(tokenizer.token(i) in VISIBLE and "|" in tokenizer.token(i) for i in ids) and name == "visible"
            for shown in (True,) if kept_visible else (False, True):
                assert tokenizer.decode(ids, special=shown) == hf.decode(ids, skip_special_tokens=not shown)
        assert tokenizer.decode(tokenizer.encode(text)) == text.replace(SPACE, " ")
    check()


def test_agrees_with_transformers_in_a_long_text():
    from transformers import PreTrainedTokenizerFast

    hf, tokenizer, _ = PAIRS["visible"]
    theirs = PreTrainedTokenizerFast(tokenizer_object=hf, bos_token="<bos>", eos_token="<eos>")
    text = inspect.getsource(inspect) + "<|turn>user\n🙂<turn|>"
    ids = tokenizer.encode(text, special=True, bos=False)
    assert ids == theirs.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


@often
def test_stream_equals_decode_equals_the_rule(n_cases):
    """Any ids at all: byte runs are UTF-8, a stray byte is one U+FFFD, hidden tokens do not end a run."""
    hidden = {i for i in range(TOKENIZER.n_vocab) if TOKENIZER.token(i) in (*CONTROL, *MARKERS)}

    @thorough(n_cases)
    @given(ids=st.lists(st.one_of(any_id, byte_id), max_size=12), special=st.booleans())
    def check(ids, special):
        visible = [i for i in ids if special or i not in hidden]
        expected = ""
        for is_byte, run in itertools.groupby(visible, key=lambda i: TOKENIZER.token(i).startswith("<0x")):
            tokens = [TOKENIZER.token(i) for i in run]
            if is_byte:
                text = bytes(int(token[3:5], 16) for token in tokens).decode("utf-8", "surrogateescape")
                expected += "".join(MARK if 0xDC80 <= ord(c) <= 0xDCFF else c for c in text)
            else:
                expected += "".join(tokens).replace(SPACE, " ")
        assert TOKENIZER.decode(ids, special=special) == expected
        stream = TOKENIZER.stream(special=special)
        assert "".join([stream.push(i) for i in ids]) + stream.finish() == expected
    check()


def test_stream_gives_a_character_when_its_last_byte_comes_and_not_before():
    ids = TOKENIZER.encode("🙂é!", bos=False)
    byte = {b: TOKENIZER.encode(chr(b), bos=False)[0] for b in b"a!"}
    stream = TOKENIZER.stream()
    assert [stream.push(i) for i in ids] + [stream.finish()] == ["", "", "", "🙂", "é", "!", ""]
    stream = TOKENIZER.stream()
    assert [stream.push(i) for i in [*ids[:2], byte[ord("a")], ids[0]]] == ["", "", MARK * 2 + "a", ""]
    assert stream.finish() == MARK and stream.finish() == ""


def test_where_decoding_differs_from_hugging_face():
    """One stray byte after a valid character: Hugging Face loses the character as well, we do not."""
    ids = [*TOKENIZER.encode("🙂", bos=False), TOKENIZER.encode("🙂", bos=False)[0]]
    assert TOKENIZER.decode(ids) == "🙂" + MARK
    assert PLAIN.decode(ids) == MARK * 5


def test_bos_special_pieces_and_attributes():
    vocab = PLAIN.get_vocab()
    assert (TOKENIZER.n_vocab, TOKENIZER.bos, TOKENIZER.eos) == (len(vocab), vocab["<bos>"], vocab["<eos>"])
    assert TOKENIZER.encode("") == [vocab["<bos>"]] and TOKENIZER.encode("", bos=False) == []
    assert TOKENIZER.warnings == () and TOKENIZER.suppress == ()
    assert TOKENIZER.token(vocab["<|turn>"]) == "<|turn>"
    assert TOKENIZER.encode("<|turn>", special=True, bos=False) == [vocab["<|turn>"]]
    assert vocab["<|turn>"] not in TOKENIZER.encode("<|turn>", bos=False)
    assert TOKENIZER.decode([vocab["<|turn>"], vocab["a"]]) == "a"
    assert TOKENIZER.decode([np.int32(vocab["a"])]) == "a"


def test_end_of_generation_is_llama_cpps():
    ends = {TOKENIZER.token(i) for i in TOKENIZER.end_of_generation}
    assert ends == {"<eos>", "<turn|>", "<|tool_response>"}
    metadata = dict(PAIRS["tiny"][2])
    vocab = PLAIN.get_vocab()
    types = metadata["tokenizer.ggml.token_type"].copy()
    types[vocab["<|tool_response>"]] = 4  # as llama.cpp's converter writes it; llama.cpp then treats it as control
    metadata["tokenizer.ggml.tokens"] = [*metadata["tokenizer.ggml.tokens"], "</s>"]
    metadata |= {"tokenizer.ggml.token_type": np.append(types, 1), "tokenizer.ggml.eot_token_id": vocab["<|tool>"],
                 "tokenizer.ggml.eos_token_id": vocab["<turn|>"], "tokenizer.ggml.suppress_tokens": np.array([7, 9], np.int32)}
    del metadata["tokenizer.ggml.scores"]
    tokenizer = Tokenizer.from_metadata(metadata, "x")
    assert {tokenizer.token(i) for i in tokenizer.end_of_generation} == ends | {"<|tool>"}
    assert tokenizer.eos == vocab["<turn|>"] and tokenizer.suppress == (7, 9)
    assert vocab["<|tool_response>"] not in tokenizer.encode("<|tool_response>")
    assert tokenizer.decode([vocab["<|tool_response>"]]) == ""


@pytest.mark.parametrize("bad, words", [("a\ud800b", "U+D800 at index 1"), (b"a", "bytes"), (None, "NoneType")])
def test_refuses_text_that_is_none(bad, words):
    with pytest.raises(ValueError, match=words.replace("+", r"\+")):
        TOKENIZER.encode(bad)


@pytest.mark.parametrize("bad", [-1, TOKENIZER.n_vocab, 10**30, 1.5, "1", None])
def test_refuses_ids_outside_the_vocabulary(bad):
    for call in (lambda: TOKENIZER.decode([bad]), lambda: TOKENIZER.token(bad), lambda: TOKENIZER.stream().push(bad)):
        with pytest.raises(ValueError, match="token id"):
            call()


class Lazy:
    """An array of strings as the container gives it."""

    def __init__(self, items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        return self.items[i]

    def tolist(self):
        return self.items


def test_takes_lazy_string_arrays_and_leaves_them_alone():
    metadata = dict(PAIRS["tiny"][2])
    for key in ("tokenizer.ggml.tokens", "tokenizer.ggml.merges"):
        metadata[key] = Lazy(metadata[key])
    assert Tokenizer.from_metadata(metadata, "x").encode("def main():") == TOKENIZER.encode("def main():")


def damaged_by_google():
    """Metadata with the defect of Google's QAT files: two tokens repeat others; and what it should be."""
    metadata = dict(PAIRS["tiny"][2])
    tokens = metadata["tokenizer.ggml.tokens"]
    slashes = tokens.index("//") if "//" in tokens else len(tokens)
    tokens = [*tokens, *[p for p in ("//", BOM) if p not in tokens]]
    merges = [m for m in metadata["tokenizer.ggml.merges"] if m.replace(" ", "") != "//"]
    damaged, sharp = len(tokens), tokens.index("#")
    healthy = [*tokens, BOM + "//", BOM + "#"]
    repeated = [*tokens, "//", "#"]
    # the damaged twin of "#" before the real one, as in the file: 208867 before 236865
    for both in (healthy, repeated):
        both[sharp], both[damaged + 1] = both[damaged + 1], both[sharp]
    metadata |= {"tokenizer.ggml.token_type": np.append(metadata["tokenizer.ggml.token_type"],
                                                        np.ones(len(healthy) - TOKENIZER.n_vocab, np.int32))}
    del metadata["tokenizer.ggml.scores"]
    table = {damaged: (slashes, BOM + "//"), sharp: (damaged + 1, BOM + "#")}
    healthy_merges = [*merges, "/ /", f"{BOM} //", f"{BOM} #"]
    good = metadata | {"tokenizer.ggml.tokens": healthy, "tokenizer.ggml.merges": healthy_merges}
    return good, metadata | {"tokenizer.ggml.tokens": repeated}, healthy_merges, table


@pytest.mark.parametrize("merges_lost_it_too", [False, True])
def test_repairs_the_defect_of_googles_files(monkeypatch, merges_lost_it_too):
    good, bad, merges, table = damaged_by_google()
    monkeypatch.setattr(ours, "LOST_BOM", table)
    bad["tokenizer.ggml.tokens"] = Lazy(bad["tokenizer.ggml.tokens"])
    bad["tokenizer.ggml.merges"] = [merge.removeprefix(BOM) if merges_lost_it_too else merge for merge in merges]
    expected, tokenizer = Tokenizer.from_metadata(good, "good"), Tokenizer.from_metadata(bad, "bad.gguf")
    assert len(tokenizer.warnings) == 1 and "byte order mark" in tokenizer.warnings[0] and "bad.gguf" in tokenizer.warnings[0]
    assert expected.warnings == ()
    text = f"# a // b {BOM}// {BOM}# ///"
    assert tokenizer.encode(text) == expected.encode(text) and tokenizer.decode(tokenizer.encode(text)) == text
    (slashes, (first, _)), (sharp_damaged, (sharp, _)) = table.items()
    assert tokenizer.encode("//", bos=False) == [first] and tokenizer.encode("#", bos=False) == [sharp]
    assert tokenizer.encode(f"{BOM}//", bos=False) == [slashes] and tokenizer.encode(f"{BOM}#", bos=False) == [sharp_damaged]
    assert bad["tokenizer.ggml.tokens"][slashes] == "//", "the caller's metadata must not change"


def test_the_repair_drops_merges_it_cannot_place(monkeypatch):
    _, bad, merges, table = damaged_by_google()
    monkeypatch.setattr(ours, "LOST_BOM", table)
    tokenizer = Tokenizer.from_metadata(bad | {"tokenizer.ggml.merges": [*merges, "q zqzq"]}, "bad.gguf")
    assert "1 merges" in tokenizer.warnings[1]


def test_the_known_defect_is_written_down_as_reported():
    assert ours.LOST_BOM == {135260: (715, "\ufeff//"), 140291: (8510, "\ufeff<?"), 208867: (236865, "\ufeff#")}


def test_of_unknown_duplicates_the_first_id_wins():
    metadata = dict(PAIRS["tiny"][2])
    metadata |= {"tokenizer.ggml.tokens": [*metadata["tokenizer.ggml.tokens"], "return", "<0x0B>"],
                 "tokenizer.ggml.token_type": np.append(metadata["tokenizer.ggml.token_type"], [1, 6])}
    del metadata["tokenizer.ggml.scores"]
    tokenizer = Tokenizer.from_metadata(metadata, "twice.gguf")
    assert tokenizer.encode("return\v") == TOKENIZER.encode("return\v")
    assert tokenizer.decode([tokenizer.n_vocab - 2, tokenizer.n_vocab - 1]) == "return\v"
    assert len(tokenizer.warnings) == 1 and "2 tokens repeat" in tokenizer.warnings[0] and "'return'" in tokenizer.warnings[0]


def test_byte_pieces_are_known_by_their_spelling():
    metadata = dict(PAIRS["tiny"][2])
    types = metadata["tokenizer.ggml.token_type"]
    tokenizer = Tokenizer.from_metadata(metadata | {"tokenizer.ggml.token_type": np.where(types == 6, 1, types)}, "x")
    assert tokenizer.decode(tokenizer.encode("🙂")) == "🙂"


def changed(key, change):
    return lambda m: m | {f"tokenizer.ggml.{key}": change(m[f"tokenizer.ggml.{key}"])}


def without(key):
    return lambda m: {k: v for k, v in m.items() if k != f"tokenizer.ggml.{key}"}


def replaced(old, new):
    return changed("tokens", lambda tokens: [new if token == old else token for token in tokens])


BAD_FILES = {
    "another model": (changed("model", lambda _: "llama"), "only 'gemma4'"),
    "no model": (without("model"), "None"),
    "no tokens": (without("tokens"), "tokens is missing"),
    "empty tokens": (changed("tokens", lambda _: []), "empty"),
    "tokens of bytes": (changed("tokens", lambda t: [token.encode() for token in t]), "array of strings"),
    "tokens is a string": (changed("tokens", "".join), "array of strings"),
    "tokens is a number": (changed("tokens", len), "array of strings"),
    "surrogate in a token": (replaced("return", "re\udc80"), "not valid UTF-8"),
    "no types": (without("token_type"), "token_type is missing"),
    "short types": (changed("token_type", lambda t: t[:-1]), "token types for"),
    "float types": (changed("token_type", lambda t: t.astype(np.float32)), "array of integers"),
    "type 9": (changed("token_type", lambda t: np.where(np.arange(len(t)) == 300, 9, t)), "0..6"),
    "scores a number": (changed("scores", len), "scores is not an array"),
    "model an array": (changed("model", lambda _: np.array([], np.int32)), "only 'gemma4'"),
    "short scores": (changed("scores", lambda s: s[:-2]), "scores for"),
    "no merges": (without("merges"), "merges is missing"),
    "merge of one token": (changed("merges", lambda m: [*m, "ab"]), "is not two tokens"),
    "merge of three tokens": (changed("merges", lambda m: [*m, "a b c"]), "is not two tokens"),
    "merge of nothing": (changed("merges", lambda m: [*m, "a "]), "is not two tokens"),
    "merge of an unknown token": (changed("merges", lambda m: [*m, "a zqzq"]), "unknown token 'zqzq'"),
    "merge to an unknown token": (changed("merges", lambda m: [*m, "# é"]), "unknown token '#é'"),
    "malformed byte": (replaced("<0x0A>", "<0x-1>"), "'<0x0A>'"),
    "byte in lower case": (replaced("<0xAB>", "<0xab>"), "'<0xAB>'"),
    "extra byte": (changed("token_type", lambda t: np.where(np.arange(len(t)) == 300, 6, t)), "has type byte but is"),
    "empty control token": (replaced("<mask>", ""), "empty string"),
    "no bos": (without("bos_token_id"), "bos_token_id is missing"),
    "no eos": (without("eos_token_id"), "eos_token_id is missing"),
    "bos too large": (changed("bos_token_id", lambda _: 10**6), "ids are 0.."),
    "bos negative": (changed("bos_token_id", lambda _: -1), "ids are 0.."),
    "bos a string": (changed("bos_token_id", lambda _: "<bos>"), "ids are 0.."),
    "bos true": (changed("bos_token_id", lambda _: True), "ids are 0.."),
    "suppressed id too large": (lambda m: m | {"tokenizer.ggml.suppress_tokens": np.array([5, 10**6])}, "ids are 0.."),
    "suppressed names": (lambda m: m | {"tokenizer.ggml.suppress_tokens": ["a"]}, "array of integers"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_refuses_a_bad_file_in_one_line_that_names_it(case):
    change, words = BAD_FILES[case]
    with pytest.raises(TokenizerError) as caught:
        Tokenizer.from_metadata(change(PAIRS["tiny"][2]), "some/file.gguf")
    message = str(caught.value)
    assert message.startswith("some/file.gguf: ") and "\n" not in message and len(message) < 300
    assert words in message


def test_nothing_is_kept_of_the_texts():
    """Hugging Face's library has a cache of words, which are whole texts where nothing splits them: 2.6 KB of each of the last 10,000."""
    process = psutil.Process()
    for n in (500, 4000):
        before = process.memory_info().rss
        for i in range(n):
            TOKENIZER.encode(f"{i} def f{i * i}(x):\n" * 6)
    assert process.memory_info().rss - before < 3 << 20


@pytest.mark.skipif("REFIMPL_GEMMA4_VOCAB" not in os.environ, reason="set it to the path of llama.cpp's ggml-vocab-gemma-4.gguf")
def test_gives_llama_cpps_ids_with_the_real_vocabulary():
    """The strings and ids that llama.cpp itself is tested with lie beside the file."""
    from refimpl.formats.gguf import open_gguf

    path = os.environ["REFIMPL_GEMMA4_VOCAB"]
    tokenizer = Tokenizer.from_metadata(open_gguf(path).metadata, path)
    with open(path + ".inp", encoding="utf-8", newline="") as strings, open(path + ".out", encoding="utf-8") as ids:
        cases = list(zip(strings.read().split("\n__ggml_vocab_test__\n"), ids.read().split("\n")))
    assert len(cases) > 40 and tokenizer.end_of_generation == {1, 50, 106}
    for text, expected in cases:
        assert tokenizer.encode(text, bos=False) == [int(i) for i in expected.split()]
        assert tokenizer.decode(tokenizer.encode(text)) == text
