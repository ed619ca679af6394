"""The vocabulary and chat template of a Hugging Face directory as the metadata of a GGUF file.

What each file gives:
    tokenizer.json           tokens and merges
    tokenizer.model          the same, where there is no tokenizer.json (tokenizer_model.py)
    tokenizer_config.json    which tokens are special, and what for; tokens added to those of tokenizer.model
    chat_template.jinja      the chat template; else the one in tokenizer_config.json (the order of transformers; llama.cpp's converter
                             looks into tokenizer_config.json first)
    generation_config.json   ids that end a text, ids that are never sampled, how to sample

Source: llama.cpp's converter (conversion/gemma.py, gguf-py's vocab.py and metadata.py), PreTrainedTokenizerBase of transformers.
"""

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from refimpl.formats.checkpoint import CheckpointError, read_json
from refimpl.loading.tokenizer_model import read_sentencepiece
from refimpl.text.tokenizer import BYTE, CONTROL, NORMAL, UNKNOWN, USER_DEFINED

# Control tokens that a reader of the text must see: the chat parser looks for them.
VISIBLE = ("<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>", "<|tool_response>", "<tool_response|>", '<|"|>')
ROLES = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding", "mask": "mask"}
ALWAYS_END = ("<eos>", "<turn|>", "<|tool_response>")        # known to every reader of Gemma 4 files by name
SAMPLING = {"top_k": "top_k", "top_p": "top_p", "min_p": "min_p", "temperature": "temp"}
MISSING = "it holds the vocabulary: download the whole repository"


def vocabulary_metadata(folder: Path, config: Mapping[str, object]) -> dict[str, object]:
    """The `tokenizer.*` and `general.sampling.*` keys of a directory. Raises CheckpointError for files that do not make a vocabulary."""
    place, settings = folder / "tokenizer.json", _optional(folder / "tokenizer_config.json")
    if not place.exists() and (folder / "tokenizer.model").exists():
        place, read = folder / "tokenizer.model", _from_sentencepiece
    else:
        read = _from_json
    try:
        keys = read(place, settings, config) | _template(folder, settings)
        return keys | _generation(folder, keys["tokenizer.ggml.tokens"], keys.get("tokenizer.ggml.eos_token_id"))
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise CheckpointError(place, None, f"is no vocabulary of Gemma 4: {type(error).__name__} {error}") from None


def has_vocabulary(folder: Path) -> bool:
    """Is there a tokenizer.json or a tokenizer.model?"""
    return any((folder / name).exists() for name in ("tokenizer.json", "tokenizer.model"))


def _from_json(place: Path, settings: Mapping, config: Mapping[str, object]) -> dict[str, object]:
    tokenizer = read_json(place, MISSING)
    model = tokenizer["model"]
    if model.get("type") != "BPE" or not model.get("byte_fallback"):
        raise CheckpointError(place, None, f"expected a BPE model with byte_fallback, found {model.get('type')}")
    tokens = _tokens(tokenizer, place)
    special = _special(settings) | {entry["content"] for entry in tokenizer.get("added_tokens", ()) if entry.get("special")}
    types = [USER_DEFINED if token in VISIBLE else BYTE if re.fullmatch("<0x[0-9A-Fa-f]{2}>", token)
             else CONTROL if token in special else NORMAL if token in model["vocab"] else USER_DEFINED for token in tokens]
    id_of = {entry["content"]: entry["id"] for entry in tokenizer.get("added_tokens", ())}
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    return _keys(tokens, [-1000.0] * len(tokens), types, merges, id_of, {}, settings, config)


def _from_sentencepiece(place: Path, settings: Mapping, config: Mapping[str, object]) -> dict[str, object]:
    found = read_sentencepiece(place)
    tokens, scores, types = found.tokens, found.scores, found.types
    added = {int(i): token for i, token in (settings.get("added_tokens_decoder") or {}).items()}
    special = _special(settings) | {_content(token) for token in added.values() if token.get("special")}
    for i in range(len(tokens), max(added, default=-1) + 1):
        if i not in added:
            raise CheckpointError(place, None, f"tokenizer_config.json adds token {max(added)}, but {i} is in neither")
        tokens, scores, types = [*tokens, _content(added[i])], [*scores, -1000.0], [*types, USER_DEFINED]
    types = [USER_DEFINED if token in VISIBLE else CONTROL if kind in (NORMAL, USER_DEFINED) and token in special else kind
             for token, kind in zip(tokens, types)]
    id_of = {token: i for i, token in enumerate(tokens) if types[i] in (CONTROL, UNKNOWN, USER_DEFINED)}
    return _keys(tokens, scores, types, [" ".join(merge) for merge in found.merges], id_of, found.ids, settings, config)


def _keys(tokens: list[str], scores: list[float], types: list[int], merges: list[str], id_of: Mapping[str, int], ids: Mapping[str, int],
          settings: Mapping, config: Mapping[str, object]) -> dict[str, object]:
    """The `tokenizer.ggml.*` keys. `ids`: role -> id, for roles that neither settings nor config name."""
    keys = {
        "model": "gemma4", "tokens": tokens, "scores": np.array(scores, np.float32), "token_type": np.array(types, np.int32),
        "merges": merges, "add_bos_token": True, "add_space_prefix": False}
    for name, role in ROLES.items():
        found = id_of.get(_content(settings.get(f"{name}_token")))
        for source in (config, config.get("text_config") or {}):
            found = source.get(f"{name}_token_id") if found is None else found
        found = ids.get(role) if found is None else found
        if type(found) is int:
            keys[f"{role}_token_id"] = found
    if isinstance(settings.get("add_eos_token"), bool):
        keys["add_eos_token"] = settings["add_eos_token"]
    return {f"tokenizer.ggml.{key}": value for key, value in keys.items()}


def _tokens(tokenizer: Mapping, place: Path) -> list[str]:
    """All tokens by id: those of the model, and those that were added to it."""
    by_id = {i: token for token, i in tokenizer["model"]["vocab"].items()}
    for entry in tokenizer.get("added_tokens", ()):
        if by_id.setdefault(entry["id"], entry["content"]) != entry["content"]:
            raise CheckpointError(place, None, f"id {entry['id']} is {by_id[entry['id']]!r} in the model and {entry['content']!r} "
                                  "in added_tokens")
    gap = next((i for i in range(len(by_id)) if i not in by_id), None)
    if gap is not None or not by_id:
        raise CheckpointError(place, None, f"no token has the id {gap or 0}, and there are {len(by_id)}")
    return [by_id[i] for i in range(len(by_id))]


def _special(settings: Mapping) -> set[str]:
    """Tokens that are no text by tokenizer_config.json: every `..._token`, and its lists of more."""
    more = settings.get("extra_special_tokens") or settings.get("additional_special_tokens") or []
    named = [value for key, value in settings.items() if key.endswith("_token")]
    for group in (more, settings.get("model_specific_special_tokens") or {}):
        named += group.values() if isinstance(group, Mapping) else group
    return {_content(value) for value in named} - {None}


def _content(token: object) -> str | None:
    """A token is written as its text, or as an object with its text under `content`."""
    token = token.get("content") if isinstance(token, Mapping) else token
    return token if isinstance(token, str) else None


def _template(folder: Path, settings: Mapping) -> dict[str, object]:
    path, template = folder / "chat_template.jinja", settings.get("chat_template")
    if path.exists():
        try:
            template = path.read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(path, None, f"cannot be read as text: {error}") from None
    if isinstance(template, list):          # several by name
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    return {"tokenizer.chat_template": template} if isinstance(template, str) else {}


def _generation(folder: Path, tokens: list[str], eos: int | None) -> dict[str, object]:
    """From generation_config.json. GGUF has room for two ids that end a text besides eos: for those that no reader knows by name."""
    place = folder / "generation_config.json"
    settings = _optional(place)
    keys = {f"general.sampling.{name}": value for key, name in SAMPLING.items()
            if isinstance(value := settings.get(key), int | float) and not isinstance(value, bool)}
    for name in ("temp", "top_p", "min_p"):
        if (key := f"general.sampling.{name}") in keys:
            keys[key] = float(keys[key])
    if suppress := settings.get("suppress_tokens"):
        keys["tokenizer.ggml.suppress_tokens"] = np.array(suppress, np.int32)
    ends = settings.get("eos_token_id")
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    if not all(type(end) is int and 0 <= end < len(tokens) for end in ends):
        raise CheckpointError(place, None, f"eos_token_id is {ends}, expected ids from 0 to {len(tokens) - 1}")
    unknown = [end for end in ends if end != eos and tokens[end] not in ALWAYS_END]
    if len(unknown) > 2:
        raise CheckpointError(place, None, f"eos_token_id names {len(unknown)} tokens besides {', '.join(ALWAYS_END)}, expected 2 at most")
    return keys | dict(zip(("tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id"), unknown))


def _optional(path: Path) -> dict[str, object]:
    return read_json(path) if path.exists() else {}
