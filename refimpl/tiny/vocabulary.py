"""The 4,096-piece vocabulary of the tiny models: byte-pair encoding with byte fallback, in Gemma 4's conventions.

Same parts as Gemma's tokenizer: a space is written U+2581, nothing else is normalised, a character without a piece falls
back to its UTF-8 bytes. Pieces never mix newlines with other characters (llama.cpp's reader splits there). A piece may end in
a space but not begin with one, so that a prompt like `def ` ends where a piece ends.
"""

from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

PAD, EOS, BOS, UNK, MASK = range(5)
CONTROL = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>")
MARKERS = ("<|turn>", "<turn|>", "<|think|>", "<|channel>", "<channel|>", "<|tool>", "<tool|>", "<|tool_call>", "<tool_call|>",
           "<|tool_response>", "<tool_response|>", '<|"|>')
SPACE = "\u2581"
SIZE = 4096


def train_vocabulary(texts: Iterable[str], size: int = SIZE) -> Tokenizer:
    """Learns the merges from `texts`. Returns a `tokenizers` Tokenizer that encodes text without adding special tokens."""
    byte_pieces = [f"<0x{b:02X}>" for b in range(256)]
    tokenizer = _pipeline(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(rf"\w+{SPACE}?|[^\w\n{SPACE}]+{SPACE}?|{SPACE}+|\n+"), "isolated")
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=[*CONTROL, *MARKERS, *byte_pieces], min_frequency=2,
                                  initial_alphabet=[chr(c) for c in range(32, 127) if c != 32] + ["\n", "\t", SPACE],
                                  limit_alphabet=110, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer_from_parts(tokenizer.get_vocab(), _merges(tokenizer))


def tokenizer_from_parts(vocab: dict[str, int], merges: list[tuple[str, str]]) -> Tokenizer:
    """The tokenizer as used (no pre-tokenizer): `vocab` piece -> id, `merges` in order of rank."""
    tokenizer = _pipeline(models.BPE(vocab, merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    tokenizer.add_special_tokens([*CONTROL, *MARKERS])
    return tokenizer


def _pipeline(model: models.BPE) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Replace(" ", SPACE)
    tokenizer.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


def _merges(tokenizer: Tokenizer) -> list[tuple[str, str]]:
    import json

    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    return [tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in merges]
