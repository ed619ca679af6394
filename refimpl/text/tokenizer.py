"""Text to token ids and back, from the vocabulary in a Gemma 4 file.

Gemma 4's tokenizer is a byte-pair encoding over characters: every space is written U+2581, the merges run over the whole text
(the text is not split into words first), and a character that has no token falls back to the tokens `<0x00>`..`<0xFF>` of its UTF-8
bytes. Hugging Face's `tokenizers` library does the merging; reading and checking the vocabulary, and decoding, are ours. A second judge
is SentencePiece, in whose form Gemma's vocabularies were made (tests/test_sentencepiece.py).

Where implementations differ:
- A token of type user-defined always matches in the text; a control token (`<bos>`, `<|turn>`) only when `special=True`. So do markers
  of a conversation that converters type user-defined to keep them visible (`<|channel>`): in Hugging Face's files they are special.
- A token that ends generation counts as control whatever the file says (`<|tool_response>` is marked user-defined): as llama.cpp.
- llama.cpp cuts the text at runs of newlines before merging, Hugging Face does not. The two differ only if a token mixes
  newlines with other characters or if a run of newlines has a token that its merges do not reach; among Gemma 4's 262,144 tokens
  there is neither.
- `decode` keeps the valid characters of a run of byte tokens and writes one U+FFFD for each stray byte; Hugging Face turns the
  whole run into U+FFFD as soon as one byte is stray. Keeping them is what allows text to be streamed.
- U+2581 in the text comes back as a space: the encoding cannot tell the two apart (the same in both).
"""

import codecs
import operator
from collections.abc import Iterable, Mapping
from itertools import repeat

import numpy as np
from tokenizers import AddedToken, normalizers
from tokenizers import Tokenizer as _Encoder
from tokenizers.models import BPE

SPACE = "\u2581"
BOM = "\ufeff"
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""Values of tokenizer.ggml.token_type (0, undefined, is taken as normal)."""

# Twice what Gemma 4 has: a token takes many times its bytes in memory, so these keep a hostile file's within a gigabyte.
MAX_TOKENS, MAX_MERGES = 1 << 19, 1 << 20
MAX_ADDED_CHARS = 256
"""Of a token that is matched in the text before merging; Gemma 4's longest has 31."""

END_TOKENS = ("<eos>", "<turn|>", "<|tool_response>")
"""Tokens that end generation whatever ids the metadata names. `</s>` is not among them: in Gemma 4 it is an HTML tag."""

# Google's QAT files of July 2026 dropped the byte order mark at the start of three tokens, so that each repeats another
# (llama.cpp issue 25739 shows the collisions). damaged id: (the id it collides with, the token it should be)
LOST_BOM = {135260: (715, BOM + "//"), 140291: (8510, BOM + "<?"), 208867: (236865, BOM + "#")}


class TokenizerError(ValueError):
    """The file's vocabulary cannot be used. One line that starts with the file's name."""


class Tokenizer:
    """Encodes text and decodes ids. Made by `Tokenizer.from_metadata`.

    Attributes: `n_vocab`; `bos`, `eos` (ids); `end_of_generation` (ids after which generation stops); `suppress` (ids the file
    says must never be sampled); `markers` (tokens that structure a conversation, such as `<|turn>`); `warnings` (one line each: what
    was wrong with the file and what was done about it).
    """

    def __init__(self, tokens: list[str], bpe: BPE, *, visible: list[int], control: frozenset[int], bytes_: dict[int, int],
                 bos: int, eos: int, end_of_generation: frozenset[int], suppress: tuple[int, ...], warnings: tuple[str, ...]):
        """Takes checked parts; `from_metadata` does the checking."""
        self.n_vocab = len(tokens)
        self.bos, self.eos = bos, eos
        self.end_of_generation, self.suppress, self.warnings = end_of_generation, suppress, warnings
        marked = [*sorted(control), *(i for i in visible if tokens[i][0] == "<" and "|" in tokens[i])]
        self.markers = tuple(tokens[i] for i in marked)
        self._tokens, self._control, self._bytes = tokens, control, bytes_
        self._marker_ids = {tokens[i]: i for i in reversed(marked)}         # reversed: of equal ones the first id stays
        # Two front ends over one model (the model is shared, not copied): which added tokens they match is the difference.
        everywhere = [tokens[i] for i in visible if tokens[i] not in self.markers]
        self._plain = _encoder(bpe, everywhere, [])
        self._marked = _encoder(bpe, everywhere, self.markers)

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, object], name: str) -> "Tokenizer":
        """The tokenizer of a GGUF file, from its metadata (the `tokenizer.ggml.*` keys). `name` is the file, for messages.

        Raises TokenizerError if a key is missing, malformed or contradicts another. Known damage is repaired and listed in
        `warnings`. Takes about a second for Gemma 4's 262,144 tokens and 514,906 merges.
        """
        file = _Reader(metadata, name)
        model = metadata.get("tokenizer.ggml.model")
        file.require(isinstance(model, str) and model == "gemma4", f"tokenizer.ggml.model is {model!r}; only 'gemma4' is supported")
        tokens, types = file.strings("tokens", MAX_TOKENS), file.integers("token_type")
        file.require(tokens, "tokenizer.ggml.tokens is empty")
        file.require(len(types) == len(tokens), f"{len(types)} token types for {len(tokens)} tokens")
        file.require(bool(np.isin(types, range(7)).all()), "a token type is not one of 0..6")
        if (scores := metadata.get("tokenizer.ggml.scores")) is not None:
            file.require(hasattr(scores, "__len__"), "tokenizer.ggml.scores is not an array")
            file.require(len(scores) == len(tokens), f"{len(scores)} scores for {len(tokens)} tokens")
        warnings, damaged = [], _restore_lost_bom(tokens)
        if damaged:
            warnings.append(f"{name}: tokens {damaged} lost their byte order mark and repeat other tokens (a known defect of "
                            "Google's QAT files); restored")
        id_of = dict(zip(reversed(tokens), range(len(tokens) - 1, -1, -1)))  # reversed: of equal tokens the first id stays
        if len(id_of) != len(tokens):
            i = next(i for i, token in enumerate(tokens) if id_of[token] != i)
            warnings.append(f"{name}: {len(tokens) - len(id_of)} tokens repeat an earlier one (first: token {i} repeats "
                            f"{id_of[tokens[i]]}, {tokens[i]!r}); text is encoded with the first")
        bytes_ = _byte_tokens(file, tokens, types, id_of)
        bpe = _byte_pair_encoding(file, id_of, damaged, warnings)

        bos, eos = file.token_id("bos"), file.token_id("eos")
        for kind in ("bos", "eos"):
            file.require(file.token_id(kind) is not None, f"tokenizer.ggml.{kind}_token_id is missing")
        named = {file.token_id(kind) for kind in ("eos", "eot", "eom")} - {None}
        ends = frozenset(named | {id_of[token] for token in END_TOKENS if token in id_of})
        control = frozenset(np.flatnonzero((types == CONTROL) | (types == UNKNOWN)).tolist()) | ends | {bos}
        visible = [i for i in np.flatnonzero(types == USER_DEFINED).tolist() if i not in control]
        file.require(all(tokens[i] for i in (*visible, *control)), "a control or user-defined token is an empty string")
        file.require(all(len(tokens[i]) <= MAX_ADDED_CHARS for i in (*visible, *control)),
                     f"a control or user-defined token has more than {MAX_ADDED_CHARS} characters")
        return cls(tokens, bpe, visible=visible, control=control, bytes_=bytes_, bos=bos, eos=eos, end_of_generation=ends,
                   suppress=file.suppressed(), warnings=tuple(warnings))

    def encode(self, text: str, *, special: bool = False, bos: bool = True) -> list[int]:
        """Token ids of `text`. Raises ValueError if it is not a str that UTF-8 can hold.

        `special`: control tokens written in the text (`<|turn>`) become their ids; without it they are ordinary characters.
        `bos`: put the BOS id in front. Gemma needs it, and llama.cpp does it even where the file says not to; leave it off
        for a rendered chat template, which writes `<bos>` itself.
        """
        if not isinstance(text, str):
            raise ValueError(f"text to encode must be a str, not {type(text).__name__}")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"text to encode has a lone surrogate U+{ord(text[error.start]):04X} at index {error.start}; "
                             "no UTF-8 text can contain it") from None
        ids = (self._marked if special else self._plain).encode(text, add_special_tokens=False).ids
        return [self.bos, *ids] if bos else ids

    def decode(self, ids: Iterable[int], *, special: bool = False) -> str:
        """Text of `ids`. Control tokens are left out unless `special`. Raises ValueError for an id outside the vocabulary.

        `decode(encode(text)) == text` for every text without U+2581.
        """
        stream = self.stream(special=special)
        return "".join([stream.push(i) for i in ids]) + stream.finish()

    def stream(self, *, special: bool = False) -> "StreamDecoder":
        """A decoder that takes one id at a time."""
        return StreamDecoder(self._tokens, self._bytes, frozenset() if special else self._control)

    def token(self, token_id: int) -> str:
        """The token as the vocabulary spells it (`▁the`, `<0x0A>`, `<|turn>`)."""
        return self._tokens[_checked(token_id, self.n_vocab)]


    def bytes_of(self, token_id: int) -> bytes:
        """The bytes that a token adds to a text; those of a character's byte tokens make it when joined."""
        token_id = _checked(token_id, self.n_vocab)
        byte = self._bytes.get(token_id)
        return self._tokens[token_id].replace(SPACE, " ").encode() if byte is None else bytes((byte,))

    def id_of(self, marker: str) -> int | None:
        """The id of a token that structures a conversation (`<|turn>`); None if the vocabulary has no such token."""
        return self._marker_ids.get(marker)


class StreamDecoder:
    """Decodes ids one by one; the texts returned, joined, equal `Tokenizer.decode`. Each call costs the same."""

    def __init__(self, tokens: list[str], bytes_: dict[int, int], hidden: frozenset[int]):
        """`bytes_`: id -> byte for byte tokens; `hidden`: ids that have no text."""
        self._tokens, self._bytes, self._hidden = tokens, bytes_, hidden
        self._utf8 = codecs.getincrementaldecoder("utf-8")("refimpl.one_mark_per_byte")

    def push(self, token_id: int) -> str:
        """The text that `token_id` completes: empty while the bytes of a character are still coming."""
        token_id = _checked(token_id, len(self._tokens))
        if token_id in self._hidden:
            return ""
        if (byte := self._bytes.get(token_id)) is not None:
            return self._utf8.decode(bytes((byte,)))
        return self.finish() + self._tokens[token_id].replace(SPACE, " ")

    def finish(self) -> str:
        """What was still held back: U+FFFD for each byte of a character that was never completed."""
        return self._utf8.decode(b"", final=True)  # final also makes it ready for the next character


codecs.register_error("refimpl.one_mark_per_byte", lambda error: ("\ufffd" * (error.end - error.start), error.end))


def _checked(token_id: int, n_vocab: int) -> int:
    try:
        index = operator.index(token_id)
    except TypeError:
        raise ValueError(f"a token id must be an integer, not {token_id!r}") from None
    if not 0 <= index < n_vocab:
        raise ValueError(f"token id {index} is outside the vocabulary (0..{n_vocab - 1})")
    return index


def _encoder(bpe: BPE, visible: list[str], control: list[str]) -> _Encoder:
    encoder = _Encoder(bpe)
    encoder.normalizer = normalizers.Replace(" ", SPACE)
    # normalized=False: matched in the text as written, so a token with U+2581 in it does not match spaces
    encoder.add_tokens([AddedToken(token, normalized=False, special=False) for token in visible])
    encoder.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in control])
    return encoder


def _restore_lost_bom(tokens: list[str]) -> list[int]:
    """Repairs `tokens` in place; returns the ids repaired. Afterwards "//", "<?" and "#" belong to ids 715, 8510 and 236865."""
    damaged = [i for i, (twin, token) in LOST_BOM.items()
               if max(i, twin) < len(tokens) and tokens[i] == tokens[twin] == token.removeprefix(BOM)]
    for i in damaged:
        tokens[i] = LOST_BOM[i][1]
    return damaged


def _byte_tokens(file: "_Reader", tokens: list[str], types: np.ndarray, id_of: dict[str, int]) -> dict[int, int]:
    """Id -> byte. All 256 must exist: with one missing, a character made of it could not be encoded."""
    byte_of = {f"<0x{byte:02X}>": byte for byte in range(256)}
    missing = [token for token in byte_of if token not in id_of]
    file.require(not missing, f"{len(missing)} of the 256 byte tokens are missing, first {missing[:1]}")
    for i in np.flatnonzero(types == BYTE).tolist():
        file.require(tokens[i] in byte_of, f"token {i} has type byte but is {tokens[i]!r}, not '<0x00>'..'<0xFF>'")
    repeated = {i: byte_of[tokens[i]] for i in np.flatnonzero(types == BYTE).tolist()}
    return repeated | {id_of[token]: byte for token, byte in byte_of.items()}


def _byte_pair_encoding(file: "_Reader", id_of: dict[str, int], damaged: list[int], warnings: list[str]) -> BPE:
    merges = _pairs(file.strings("merges", MAX_MERGES))
    if damaged:  # the same hand that dropped byte order marks from the tokens may have dropped them from the merges
        merges = [(BOM, merge[1]) if len(merge) == 2 and not merge[0] else merge for merge in merges]
        usable = [merge for merge in merges if _merge_fault(merge, id_of) is None]
        if len(usable) != len(merges):
            warnings.append(f"{file.name}: {len(merges) - len(usable)} merges refer to missing tokens; left out")
        merges = usable
    unknown = file.token_id("unknown")  # never used while all byte tokens exist; given because the original has it
    options = {} if unknown is None else {"unk_token": file.token(unknown)}
    try:
        # no cache: its words are whole texts here, of which a server would keep 10,000 and never see one again
        return BPE(id_of, merges, byte_fallback=True, fuse_unk=True, cache_capacity=0, **options)
    except Exception as error:  # the library's own words do not say which merge; looking for it only now costs nothing before
        for rank, merge in enumerate(merges):
            fault = _merge_fault(merge, id_of)
            file.require(fault is None, f"merge {rank} ({' '.join(merge)[:100]!r}) {fault}")
        raise TokenizerError(f"{file.name}: vocabulary refused: {' '.join(str(error).split())}") from None


def _pairs(merges: list[str]) -> list[tuple[str, ...]]:
    """Every merge cut at its space; all at once, which takes a third of the time, where each has one."""
    if set(map(str.count, merges, repeat(" "))) == {1}:
        parts = " ".join(merges).split(" ")
        return list(zip(parts[::2], parts[1::2]))
    return [tuple(merge.split(" ", 2)) for merge in merges]


def _merge_fault(merge: tuple[str, ...], id_of: dict[str, int]) -> str | None:
    if len(merge) != 2 or not all(merge):
        return "is not two tokens with a space between them"
    unknown = [token for token in (*merge, "".join(merge)) if token not in id_of]
    return f"refers to the unknown token {unknown[0][:100]!r}" if unknown else None


class _Reader:
    """Checked access to the metadata of one file."""

    def __init__(self, metadata: Mapping[str, object], name: str):
        self.metadata, self.name = metadata, name

    def require(self, condition: object, message: str) -> None:
        if not condition:
            raise TokenizerError(f"{self.name}: {message[:500]}")           # it may quote the file

    def _get(self, key: str) -> object:
        self.require(key in self.metadata, f"{key} is missing")
        return self.metadata[key]

    def strings(self, key: str, most: int) -> list[str]:
        key = f"tokenizer.ggml.{key}"
        value = self._get(key)
        self.require(not isinstance(value, str | bytes) and hasattr(value, "__len__"), f"{key} is not an array of strings")
        self.require(len(value) <= most, f"{key} has {len(value)} entries, expected at most {most}")
        items = list(value.tolist() if hasattr(value, "tolist") else value)  # our own: repairs must not reach the caller's
        self.require(set(map(type, items)) <= {str}, f"{key} is not an array of strings")
        try:
            "".join(items).encode()
        except UnicodeEncodeError:
            raise TokenizerError(f"{self.name}: {key} holds a string that is not valid UTF-8") from None
        return items

    def integers(self, key: str) -> np.ndarray:
        key = f"tokenizer.ggml.{key}"
        value = self._get(key)
        try:
            array = np.asarray(value)
        except ValueError:  # nested lists of different lengths
            array = np.empty((0, 0))
        self.require(array.ndim == 1 and (array.dtype.kind in "iu" or array.size == 0), f"{key} is not an array of integers")
        return array

    def token_id(self, kind: str) -> int | None:
        key = f"tokenizer.ggml.{kind}_token_id"
        value = self.metadata.get(key)
        return None if value is None else self._in_range(key, value)

    def suppressed(self) -> tuple[int, ...]:
        key = "tokenizer.ggml.suppress_tokens"
        return tuple(self._in_range(key, i) for i in self.integers("suppress_tokens")) if key in self.metadata else ()

    def token(self, token_id: int) -> str:
        return self.metadata["tokenizer.ggml.tokens"][token_id]

    def _in_range(self, key: str, value: object) -> int:
        n_vocab = len(self.metadata["tokenizer.ggml.tokens"])
        is_integer = isinstance(value, int | np.integer) and not isinstance(value, bool)
        self.require(is_integer and 0 <= value < n_vocab, f"{key} names token {value!r}, but ids are 0..{n_vocab - 1}")
        return int(value)
