"""The vocabulary of 4,096 tokens of the tiny models: byte-pair encoding with byte fallback, in Gemma 4's conventions.

Same parts as Gemma's tokenizer: a space is written U+2581, nothing else is normalised, a character without a token falls
back to its UTF-8 bytes. Tokens never mix newlines with other characters (llama.cpp's tokenizer splits there). A token may end in
a space but not begin with one, so that a prompt like `def ` ends at the end of a token.
"""

import json
from collections import Counter
from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

PAD, EOS, BOS, UNK, MASK = range(5)
CONTROL = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>")
MARKERS = ("<|turn>", "<turn|>", "<|think|>", "<|channel>", "<channel|>", "<|tool>", "<tool|>", "<|tool_call>", "<tool_call|>",
           "<|tool_response>", "<tool_response|>", '<|"|>')
SOFT_MARKERS = {"\u0119": "<|image>", "\u2514": "<|image|>", "\u0151": "<image|>",
                "\xe8": "<|audio>", "\xe0": "<|audio|>", "\xbf": "<audio|>"}
"""Around pictures and sounds. They came after the training, in the places of the six rarest characters that had a token (43 to 81 times in
the whole corpus, never in what is held out); these are written in bytes since."""
SPACE = "\u2581"
SIZE = 4096
ALPHABET = 110


def train_vocabulary(texts: Iterable[str], size: int = SIZE) -> Tokenizer:
    """Learns the merges from `texts`. Returns a `tokenizers` Tokenizer that encodes text without adding special tokens.

    The most frequent characters beyond ASCII get a token, up to 110 characters in all. They are counted here because the library breaks
    ties at random.
    """
    texts = list(texts)
    count = Counter()
    for text in texts:
        count.update(text.replace(" ", SPACE))
    ascii_ = [chr(c) for c in range(33, 127)] + ["\n", "\t", SPACE]
    others = sorted((c for c in count if c not in ascii_), key=lambda c: (-count[c], c))[:ALPHABET - len(ascii_)]
    byte_tokens = [f"<0x{b:02X}>" for b in range(256)]
    tokenizer = _pipeline(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(rf"\w+{SPACE}?|[^\w\n{SPACE}]+{SPACE}?|{SPACE}+|\n+"), "isolated")
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=[*CONTROL, *MARKERS, *byte_tokens], min_frequency=2,
                                  initial_alphabet=[*ascii_, *others], limit_alphabet=len(ascii_) + len(others), show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer_from_parts(tokenizer.get_vocab(), _merges(tokenizer))


def tokenizer_from_parts(vocab: dict[str, int], merges: list[tuple[str, str]]) -> Tokenizer:
    """The tokenizer as used (no pre-tokenizer): `vocab` token -> id, `merges` in order of rank."""
    tokenizer = _pipeline(models.BPE(vocab, merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    tokenizer.add_special_tokens([*CONTROL, *MARKERS])
    return tokenizer


def _pipeline(model: models.BPE) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Replace(" ", SPACE)
    tokenizer.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


def _merges(tokenizer: Tokenizer) -> list[tuple[str, str]]:
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    return [tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in merges]
