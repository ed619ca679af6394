"""llama.cpp's options that are not ours: those without effect here are accepted with a note, those that would change the text refused."""

from collections.abc import Callable, Sequence

SWITCH, VALUE, MAYBE = 0, 1, 2          # no value; one; one if it is one of ON_OFF
ON_OFF = {"on", "off", "auto", "0", "1"}
NOTHING = {name: (names, takes) for names, takes in (
    ("-ngl --gpu-layers --n-gpu-layers", VALUE), ("-fa --flash-attn", MAYBE), ("-b --batch-size", VALUE), ("-ub --ubatch-size", VALUE),
    ("-cnv --conversation", SWITCH), ("--mlock", SWITCH), ("--no-mmap", SWITCH), ("--mmap", SWITCH), ("--jinja", SWITCH),
    ("-ctk --cache-type-k", VALUE), ("-ctv --cache-type-v", VALUE), ("-tb --threads-batch", VALUE), ("--numa", VALUE),
    ("-mg --main-gpu", VALUE), ("-sm --split-mode", VALUE), ("-ts --tensor-split", VALUE), ("-ot --override-tensor", VALUE),
    ("-dev --device", VALUE), ("-devd --device-draft", VALUE), ("-ngld --gpu-layers-draft", VALUE), ("-cmoe --cpu-moe", SWITCH),
    ("-ncmoe --n-cpu-moe", VALUE), ("-nkvo --no-kv-offload", SWITCH), ("-kvu --kv-unified", SWITCH), ("-np --parallel", VALUE),
    ("--no-warmup", SWITCH), ("--swa-full", SWITCH), ("-co --color", MAYBE), ("--prio", VALUE), ("--poll", VALUE),
    ("--log-disable", SWITCH)) for name in names.split()}
WHY = "refimpl runs on the CPU and chooses this itself"
# option: (the value that switches it off, or None; what it does)
REFUSED = {name: (neutral, what) for names, neutral, what in (
    ("--repeat-penalty --repetition-penalty", 1.0, "a repetition penalty"), ("--presence-penalty", 0.0, "a presence penalty"),
    ("--frequency-penalty", 0.0, "a frequency penalty"), ("--repeat-last-n", 0.0, "a repetition penalty"),
    ("--mirostat", 0.0, "mirostat sampling"), ("--typical --typical-p", 1.0, "typical sampling"), ("--top-nsigma", -1.0, "top-nsigma"),
    ("--xtc-probability", 0.0, "XTC sampling"), ("--dry-multiplier", 0.0, "DRY sampling"), ("--dynatemp-range", 0.0, "dynamic temperature"),
    ("--samplers --sampler-seq", None, "a custom order of samplers"), ("--grammar --grammar-file --json-schema", None, "grammars"),
    ("--logit-bias", None, "logit biases"), ("--lora --lora-scaled", None, "LoRA adapters"), ("--ignore-eos", None, "text after its end"),
    ("--rope-scaling --rope-scale --rope-freq-base --rope-freq-scale", None, "changing the model's RoPE"),
    ("--chat-template --chat-template-file", None, "a chat template other than the file's"),
    ("--reverse-prompt", None, "stop texts")) for name in names.split()}
ALIASES = {"-hf": "-m", "-hfr": "-m", "--hf-repo": "-m", "-hfd": "--draft", "--hf-repo-draft": "--draft"}       # the value is owner/name


class Refused(ValueError):
    """An option that would change the text, or is spelled differently here. One line."""


def ours(args: Sequence[str], takes_value: Callable[[str], bool | None], note: Callable[[str], None]) -> list[str]:
    """`args` without llama.cpp's options that have no effect here; `note` is called once with their names.

    `takes_value(name)`: does this option of the command take a value; None if it is not one of ours. Raises Refused.
    """
    kept, rest, named = [], list(args), {}
    while rest:
        arg = rest.pop(0)
        name, equals, value = arg.partition("=") if arg.startswith("-") else (arg, "", "")
        if arg == "--":
            kept += [arg, *rest]
            break
        known = takes_value(name)
        if known is not None:
            kept += [arg, *([rest.pop(0)] if known and not equals and rest else [])]
        elif name in ALIASES and takes_value(ALIASES[name]):
            if not equals and not rest:
                raise Refused(f"{name} requires an argument, owner/name")
            value = value if equals else rest.pop(0)
            kept += [ALIASES[name], value if value.startswith("hf:") else f"hf:{value}"]
        elif name in ("-cnv", "--conversation") and takes_value("--prompt"):
            raise Refused(f"{name}: a conversation is refimpl chat; refimpl generate --chat asks one question")
        elif name in ("-hff", "--hf-file"):
            raise Refused(f"{name}: give the file with the repository, -hf owner/name:FILE")
        elif name in NOTHING:
            names, takes = NOTHING[name]
            if not equals and rest and (takes == VALUE or takes == MAYBE and rest[0].lower() in ON_OFF):
                rest.pop(0)
            named.setdefault(names, name)
        elif name in REFUSED:
            neutral, what = REFUSED[name]
            if neutral is not None and not equals and rest:
                value = rest.pop(0)
            if neutral is None or not _is(value, neutral):
                raise Refused(f"{name} is not supported: {what}")
        else:
            kept.append(arg)
    if named:
        note(f"{', '.join(named.values())} {'have' if len(named) > 1 else 'has'} no effect here: {WHY}")
    return kept


def _is(text: str, number: float) -> bool:
    try:
        return float(text) == number
    except ValueError:
        return False
