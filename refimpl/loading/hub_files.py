"""Which files of a repository on a hub are the model: by type, by name, or by convention."""

import re

PART = re.compile(r"(?P<start>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.IGNORECASE)
NO_MODEL = re.compile(r"mmproj|imatrix", re.IGNORECASE)
DRAFTER = re.compile(r"mtp|assistant", re.IGNORECASE)
PROJECTOR = re.compile(r"mmproj", re.IGNORECASE)
ROLES = ("model", "drafter", "projector")
PREFERRED = {"projector": ("BF16", "F16", "F32", "Q8_0")}       # the type of the weights as they were published first
DIRECTORY = re.compile(r"[^/]+\.(json|safetensors)|(chat_template|tokenizer)[^/]*")     # of a repository without GGUF: the files needed


class HubError(OSError):
    """A model that cannot be downloaded. One line: what was asked for, what is wrong, what helps."""


def chosen(spec: str, names: list[str], what: str | None, role: str, place: str) -> list[str]:
    """The files to fetch, of `names`: all parts of a GGUF file, the first one first, or what a folder needs.

    `what`: the type or file after the colon; `role`: one of ROLES; `place`: where these files are, for messages. Raises HubError for none
    or several.
    """
    models = sorted(name for name in names if name.lower().endswith(".gguf") and _part(name)[0] == 1)
    if what is not None and what.lower().endswith(".gguf"):
        first = _first_part(what)
        if first not in models:
            raise HubError(f"{spec}: no such file in {place}; {_shown(models)}")
        return _all_parts(spec, first, names, place)
    if not models:
        needed = sorted(name for name in names if DIRECTORY.fullmatch(name))
        if what is not None or "config.json" not in needed or not any(name.endswith(".safetensors") for name in needed):
            raise HubError(f"{spec}: no GGUF file in {place}" + (
                "" if what is not None else ", and no config.json with safetensors either"))
        return needed
    found = candidates = _counted(models, role)
    if not candidates:
        raise HubError(f"{spec}: no projector (mmproj) in {place}; {_shown(models)}")
    if what is not None:
        found = _of_type(candidates, what)
    elif len(candidates) > 1:
        preferred = PREFERRED.get(role, ("Q4_0" if "qat" in spec.lower() else "Q4_K_M",))
        found = next((of_type for wanted in preferred if len(of_type := _of_type(candidates, wanted)) == 1), candidates)
    if not found:
        raise HubError(f"{spec}: no GGUF file of type {what} in {place}; {_shown(models)}")
    if len(found) > 1:
        raise HubError(f"{spec}: {place} has several; name one after a colon: {_shown(found)}")
    return _all_parts(spec, found[0], names, place)


def _counted(models: list[str], role: str) -> list[str]:
    """Projectors where one is wanted. Else all but those that are no language model, drafters only if one is wanted; if nothing is left,
    all of them.
    """
    if role == "projector":
        return [name for name in models if PROJECTOR.search(_base(name))]
    candidates = [name for name in models if not NO_MODEL.search(_base(name))] or models
    return [name for name in candidates if bool(DRAFTER.search(_base(name))) == (role == "drafter")] or candidates


def _of_type(models: list[str], wanted: str) -> list[str]:
    """Those whose name ends in the type, or else have it ahead of a dot or hyphen, as llama.cpp searches; in any case."""
    def stem(name: str) -> str:
        match = PART.fullmatch(_base(name))
        return match["start"] if match else _base(name)[:-len(".gguf")]
    whole = [name for name in models if re.search(rf"(?i)[-.]{re.escape(wanted)}$", stem(name))]
    return whole or [name for name in models if re.search(rf"(?i){re.escape(wanted)}[.-]", stem(name) + ".")]


def _part(name: str) -> tuple[int, int]:
    """(number, count) of a part of a split file; (1, 1) of a whole one."""
    match = PART.fullmatch(name)
    return (int(match["number"]), int(match["count"])) if match else (1, 1)


def _first_part(name: str) -> str:
    match = PART.fullmatch(name)
    return f"{match['start']}-00001-of-{match['count']}{name[-5:]}" if match else name


def _all_parts(spec: str, first: str, names: list[str], place: str) -> list[str]:
    match, (_, count) = PART.fullmatch(first), _part(first)
    numbers = range(1, min(max(count, 1), 1000) + 1)
    parts = [first] if match is None else [f"{match['start']}-{i:05}-of-{match['count']}{first[-5:]}" for i in numbers]
    for name in parts:
        if name not in names:
            raise HubError(f"{spec}: {name} is missing in {place}, one of {count} parts")
    return parts


def _base(name: str) -> str:
    return name.rpartition("/")[2]


def _shown(models: list[str]) -> str:
    more = f" and {len(models) - 40} more" if len(models) > 40 else ""
    return f"there are {', '.join(models[:40])}{more}" if models else "it has no GGUF file"
