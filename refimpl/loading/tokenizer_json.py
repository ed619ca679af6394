"""`tokenizer.json` and its neighbours in a Hugging Face directory as the metadata of a GGUF file.

What each file gives:
    tokenizer.json           pieces and merges
    tokenizer_config.json    which pieces are special, and what for
    chat_template.jinja      the chat template; else the one in tokenizer_config.json (the order of transformers; llama.cpp's converter
                             takes the one in tokenizer_config.json first)
    generation_config.json   ids that end a text, ids that are never sampled, how to sample

Source: llama.cpp's converter (conversion/gemma.py, gguf-py's vocab.py and metadata.py), PreTrainedTokenizerBase of transformers.
"""

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from refimpl.formats.checkpoint import CheckpointError, read_json

NORMAL, CONTROL, USER_DEFINED, BYTE = 1, 3, 4, 6
# Control pieces that a reader of the text must see: the chat parser looks for them.
VISIBLE = ("<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>", "<|tool_response>", "<tool_response|>", '<|"|>')
ROLES = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding", "mask": "mask"}
ALWAYS_END = ("<eos>", "<turn|>", "<|tool_response>")        # known to every reader of Gemma 4 files by name
SAMPLING = {"top_k": "top_k", "top_p": "top_p", "min_p": "min_p", "temperature": "temp"}
MISSING = "it holds the vocabulary: download the whole repository"


def vocabulary_metadata(folder: Path, config: Mapping[str, object]) -> dict[str, object]:
    """The `tokenizer.*` and `general.sampling.*` keys of a directory. Raises CheckpointError for files that do not make a vocabulary."""
    place = folder / "tokenizer.json"
    tokenizer, settings = read_json(place, MISSING), _optional(folder / "tokenizer_config.json")
    try:
        keys = _vocabulary(tokenizer, settings, config, place) | _template(folder, settings)
        return keys | _generation(folder, keys["tokenizer.ggml.tokens"], keys.get("tokenizer.ggml.eos_token_id"))
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise CheckpointError(place, None, f"is no vocabulary of Gemma 4: {type(error).__name__} {error}") from None


def _vocabulary(tokenizer: Mapping, settings: Mapping, config: Mapping[str, object], place: Path) -> dict[str, object]:
    model = tokenizer["model"]
    if model.get("type") != "BPE" or not model.get("byte_fallback"):
        raise CheckpointError(place, None, f"expected a BPE model with byte_fallback, found {model.get('type')}")
    pieces = _pieces(tokenizer, place)
    special = _special(tokenizer, settings)
    types = [USER_DEFINED if piece in VISIBLE else BYTE if re.fullmatch("<0x[0-9A-Fa-f]{2}>", piece)
             else CONTROL if piece in special else NORMAL if piece in model["vocab"] else USER_DEFINED for piece in pieces]
    keys = {
        "model": "gemma4", "tokens": pieces, "scores": np.full(len(pieces), -1000, np.float32), "token_type": np.array(types, np.int32),
        "merges": [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]],
        "add_bos_token": True, "add_space_prefix": False}
    id_of = {entry["content"]: entry["id"] for entry in tokenizer.get("added_tokens", ())}
    for name, role in ROLES.items():
        found = id_of.get(_content(settings.get(f"{name}_token")))
        for source in (config, config.get("text_config") or {}):
            found = source.get(f"{name}_token_id") if found is None else found
        if type(found) is int:
            keys[f"{role}_token_id"] = found
    if isinstance(settings.get("add_eos_token"), bool):
        keys["add_eos_token"] = settings["add_eos_token"]
    return {f"tokenizer.ggml.{key}": value for key, value in keys.items()}


def _pieces(tokenizer: Mapping, place: Path) -> list[str]:
    """All pieces by id: those of the model, and those that were added to it."""
    by_id = {i: piece for piece, i in tokenizer["model"]["vocab"].items()}
    for entry in tokenizer.get("added_tokens", ()):
        if by_id.setdefault(entry["id"], entry["content"]) != entry["content"]:
            raise CheckpointError(place, None, f"id {entry['id']} is {by_id[entry['id']]!r} in the model and {entry['content']!r} "
                                  "in added_tokens")
    gap = next((i for i in range(len(by_id)) if i not in by_id), None)
    if gap is not None or not by_id:
        raise CheckpointError(place, None, f"no piece has the id {gap or 0}, and there are {len(by_id)}")
    return [by_id[i] for i in range(len(by_id))]


def _special(tokenizer: Mapping, settings: Mapping) -> set[str]:
    """Pieces that are no text: every `..._token` of tokenizer_config.json, the lists of more, and what tokenizer.json calls special."""
    more = settings.get("extra_special_tokens") or settings.get("additional_special_tokens") or []
    named = [value for key, value in settings.items() if key.endswith("_token")]
    for group in (more, settings.get("model_specific_special_tokens") or {}):
        named += group.values() if isinstance(group, Mapping) else group
    marked = [entry["content"] for entry in tokenizer.get("added_tokens", ()) if entry.get("special")]
    return {_content(value) for value in named} - {None} | set(marked)


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


def _generation(folder: Path, pieces: list[str], eos: int | None) -> dict[str, object]:
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
    if not all(type(end) is int and 0 <= end < len(pieces) for end in ends):
        raise CheckpointError(place, None, f"eos_token_id is {ends}, expected ids from 0 to {len(pieces) - 1}")
    unknown = [end for end in ends if end != eos and pieces[end] not in ALWAYS_END]
    if len(unknown) > 2:
        raise CheckpointError(place, None, f"eos_token_id names {len(unknown)} pieces besides {', '.join(ALWAYS_END)}, expected 2 at most")
    return keys | dict(zip(("tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id"), unknown))


def _optional(path: Path) -> dict[str, object]:
    return read_json(path) if path.exists() else {}
