"""`tokenizer.model`, a SentencePiece vocabulary, as tokens, scores, types and merges. Older directories, and Kaggle's, have only this.

SentencePiece merges the neighbours whose joined text is the token with the highest score, the leftmost pair first. So every way to cut a
token into two tokens becomes a merge, ranked by the token's score (Sennrich et al. 2016, arXiv:1508.07909; sentencepiece's bpe_model.cc;
transformers' generate_merges). Two things that cannot be written as ranked merges:

- Of two overlapping pairs that make the same token (`a|aa` and `aa|a` in `aa|a|aa`) SentencePiece takes the leftmost, merges the one with
  the longer left part, as transformers' converter does. Of 200,000 random texts in four vocabularies none has met such a pair.
- User-defined tokens match before anything is merged. Runs of spaces among them become the first merges, which is the same; another
  one with a space in it is refused.

Read with the sentencepiece package, but for four facts that its interface does not give: the kind of model, how text is normalized, whether
spaces are put in front, which tokens are user-defined. They are read from the file (sentencepiece_model.proto).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from refimpl.formats.safetensors import CheckpointError
from refimpl.text.tokenizer import NORMAL, SPACE, UNUSED, USER_DEFINED

PIECES, TRAINER, NORMALIZER = 1, 2, 3                                    # fields of ModelProto
KINDS = {1: "unigram", 2: "BPE", 3: "word", 4: "character"}
MAX_BYTES, MAX_CHARS = 64 << 20, 256


@dataclass(frozen=True)
class SentencePieceVocabulary:
    """Tokens by id with their scores and types (the file's numbers are GGUF's), merges by rank, and role -> id ("bos", "eos", ...)."""

    tokens: list[str]
    scores: list[float]
    types: list[int]
    merges: list[tuple[str, str]]
    ids: dict[str, int]


def read_sentencepiece(path: Path) -> SentencePieceVocabulary:
    """Reads a tokenizer.model. Raises CheckpointError, one line, for a file that is none or encodes text differently from Gemma's."""
    from sentencepiece import SentencePieceProcessor

    def require(holds: object, what: str):
        if not holds:
            raise CheckpointError(path, None, what)

    require(path.is_file(), "expected a SentencePiece model, found no regular file")
    require(path.stat().st_size <= MAX_BYTES, f"is larger than {MAX_BYTES:,} bytes, expected a SentencePiece model")
    try:
        data = path.read_bytes()
        model = SentencePieceProcessor()
        model.load_from_serialized_proto(data)
        fields = [(number, value) for number, value in _fields(data)]
        own_types = [dict(_fields(value)).get(3, NORMAL) for number, value in fields if number == PIECES]
        trainer, normalizer = ({k: v for number, value in fields if number == part for k, v in _fields(value)}
                               for part in (TRAINER, NORMALIZER))
    except Exception as error:                  # its exceptions are RuntimeError, or ValueError by version
        said = " ".join(str(error).split())[:200] or type(error).__name__
        raise CheckpointError(path, None, f"is no SentencePiece model, or damaged ({said})") from None
    kind = trainer.get(3, 1)
    require(kind == 2, f"expected a SentencePiece model of type BPE, found {KINDS.get(kind, kind)}")
    require(trainer.get(35, 0), "expected a SentencePiece model with byte_fallback")
    name = bytes(normalizer.get(1, b"")).decode("utf-8", "replace")
    require(not normalizer.get(2), f"it normalizes text ({name or 'with rules of its own'}), which no Gemma tokenizer does")
    require(not normalizer.get(3, 1), "it adds a space in front of a text (add_dummy_prefix), which no Gemma tokenizer does")
    require(not normalizer.get(4, 1), "it removes repeated spaces (remove_extra_whitespaces), which no Gemma tokenizer does")

    tokens = [model.id_to_piece(i) for i in range(model.get_piece_size())]
    scores = [model.get_score(i) for i in range(len(tokens))]
    types = list(own_types)
    for i, token in enumerate(tokens):
        require(len(token) <= MAX_CHARS, f"token {i} has {len(token)} characters, expected at most {MAX_CHARS}")
    spaces = {token for token, kind in zip(tokens, types) if kind == USER_DEFINED and token and not token.strip(SPACE)}
    for i, token in enumerate(tokens):
        if types[i] == USER_DEFINED and SPACE in token:
            require(token in spaces and (len(token) == 1 or token[1:] in tokens),
                    f"token {i} ({token!r}) is user-defined and has a space in it, which this version cannot match")
            types[i] = NORMAL
    ids = {role: i for role, i in (("bos", model.bos_id()), ("eos", model.eos_id()), ("unknown", model.unk_id()),
                                   ("padding", model.pad_id())) if i >= 0}
    return SentencePieceVocabulary(tokens, scores, types, merges_of(tokens, scores, types, spaces), ids)


def merges_of(tokens: list[str], scores: list[float], types: list[int], spaces: set[str]) -> list[tuple[str, str]]:
    """Every pair of tokens whose joined text is a token, by rank: first the runs of `spaces`, then by falling score."""
    score_of = {token: score for token, score, kind in zip(tokens, scores, types) if kind in (NORMAL, UNUSED) and token not in spaces}
    found = [(-score, -cut, token[:cut], token[cut:]) for token, score in score_of.items() for cut in range(1, len(token))
             if token[:cut] in score_of and token[cut:] in score_of]
    found.sort(key=lambda merge: merge[:2])
    runs = sorted((token for token in spaces if len(token) > 1), key=len, reverse=True)
    return [(run[:-1], SPACE) for run in runs] + [(left, right) for *_, left, right in found]


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(number, value) of the fields of a protocol buffer message: integers, and bytes for everything else."""
    at, end = 0, len(data)

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            at += 1
            value |= (byte & 127) << shift
            if byte < 128:
                return value
            if (shift := shift + 7) > 63:
                raise ValueError("a number of more than 64 bits")

    while at < end:
        key = varint()
        number, wire = key >> 3, key & 7
        if wire == 0:
            yield number, varint()
            continue
        size = {1: 8, 5: 4}.get(wire)
        size = varint() if wire == 2 else size
        if size is None or at + size > end:
            raise ValueError(f"field {number} does not end in the message")
        yield number, data[at:at + size]
        at += size
