"""Results of `inspect` as text: what the file is, whether it fits this machine, its layers, its types."""

from collections import Counter

from refimpl.cli.show.table import size, table

GRID_NOTES = ("on grid: blocks of 32 weights that are one scale times codes -8 .. 7, to the precision of their format",
              "error, best scale or by the rule: what Q4_0 loses with the best scale or llama.cpp's (largest / -8), relative RMS",
              "moved: weights that the rule moves from where the best scale has them, by more than 1/16 of a step")


def as_text(described: dict[str, object], everything: bool = False) -> str:
    """The result of `files.inspect.describe`: the summary first; `everything` adds all metadata keys."""
    parts = [_head(described)]
    if "drafter" in described:
        parts.append(_drafter(described["drafter"]))
    elif "projector" in described:
        parts.append(_projector(described["projector"]))
    else:
        parts += [_model(described["model"]), _memory(described["memory"]), _layers(described["layers"])]
    parts.append(_types(described))
    n_keys = len(described["metadata"])
    parts.append(_metadata(described["metadata"]) if everything else f"{n_keys} metadata keys (--all shows them)")
    return "\n\n".join(parts)


def _head(described: dict[str, object]) -> str:
    form = f"GGUF v{described['gguf_version']}" if "gguf_version" in described else f"{described['safetensors_files']} safetensors files"
    name = described["metadata"].get("general.name")
    return f"{described['path']}: {form}, {size(described['file_bytes'])}" + (f", {name!r}" if name else "")


def _drafter(drafter: dict[str, object]) -> str:
    return (f"a drafter, for a target of width {drafter['n_target']} and {drafter['n_vocab']:,} tokens: give it with --draft\n"
            f"{drafter['n_parameters']:,} parameters, {drafter['n_layer']} layers of width {drafter['n_embd']}, heads: "
            f"{' and '.join(drafter['heads'])}")


def _projector(projector: dict[str, object]) -> str:
    lines = [f"a projector, for a model of width {projector['n_out']}: give it with --mmproj",
             f"{projector['n_parameters']:,} parameters"]
    for part, verb in (("vision", "sees"), ("audio", "hears")):
        if projector[part] is None:
            lines.append(f"does not {verb.removesuffix('s')}")
        else:
            lines.append(f"{verb}: " + ", ".join(f"{key} {value}" for key, value in projector[part].items() if key != "n_out"))
    memory = projector["memory"]
    total, free = memory["weight_bytes"] + memory["buffer_bytes"], memory["free_bytes"]
    lines += [f"memory: {size(total)} = weights {size(memory['weight_bytes'])} + buffers {size(memory['buffer_bytes'])} "
              "(for a picture of 1,120 tokens, or a sound of 30 s)",
              f"fits this machine: {'yes' if total <= free else 'no'}; {size(free)} free"]
    return "\n".join(lines)


def _model(model: dict[str, object]) -> str:
    return (f"a model: {model['n_parameters']:,} parameters, {model['n_layer']} layers of width {model['n_embd']}, "
            f"{model['n_vocab']:,} tokens, context {model['n_ctx']:,}")


def _memory(memory: dict[str, object]) -> str:
    fixed = memory["weight_bytes"] + memory["buffer_bytes"]
    total = fixed + memory["kv_bytes"]
    free = memory["free_bytes"]
    fits = "yes" if total <= free else f"with a shorter context (-c; {size(fixed)} without any)" if fixed <= free else "no"
    lines = [f"memory: {size(total)} = weights {size(memory['weight_bytes'])} + keys and values {size(memory['kv_bytes'])} "
             f"(context {memory['n_ctx']:,}; -c sets another) + buffers {size(memory['buffer_bytes'])}",
             f"fits this machine: {fits}; {size(free)} free"]
    if memory["held_as_float32"]:
        types = ", ".join(f"{name} ({n} tensors)" for name, n in memory["held_as_float32"].items())
        lines.append(f"no kernels for {types}: held as float32, 4 bytes a weight (counted above)")
    return "\n".join(lines)


def _layers(layers: list[dict[str, object]]) -> str:
    rows = []
    for layer in layers:
        source = "own" if layer["kv_from"] == layer["layer"] else f"layer {layer['kv_from']}"
        if layer["values_are_keys"] and source == "own":
            source += ", values = keys"
        ffn = f"{layer['n_ff']}"
        if "n_expert" in layer:
            ffn += f" + {layer['n_expert_used']} of {layer['n_expert']} experts of {layer['n_ff_expert']}"
        rows.append((layer["layer"], layer["attention"], layer["n_head"], layer["n_kv"], layer["head_dim"], layer["window"] or "all",
                     source, ffn))
    return table(("layer", "attention", "heads", "kv heads", "head dim", "window", "keys and values", "feed-forward"), rows, left=(1, 6, 7))


def _types(described: dict[str, object]) -> str:
    """The type mix, largest first, and what is ignored."""
    types = sorted(described["types"].items(), key=lambda item: -item[1]["bytes"])
    total = sum(entry["bytes"] for _, entry in types) or 1
    rows = [(name, entry["tensors"], size(entry["bytes"]), f"{entry['bytes'] / total:.1%}") for name, entry in types]
    ignored = Counter(described.get("ignored", {}).values())
    notes = [f"ignored: {n} tensors, {reason}" for reason, n in ignored.items()]
    return "\n".join([table(("type", "tensors", "bytes", "share"), rows), *notes])


def _metadata(metadata: dict[str, object]) -> str:
    lines = []
    for key, value in metadata.items():
        shown = f"{value['length']} entries, first {value['first'][:4]}" if isinstance(value, dict) else repr(value)
        lines.append(f"{key} = {shown if len(shown) <= 100 else shown[:97] + '...'}")
    return "\n".join(lines)


def grid_text(described: dict[str, object]) -> str:
    """The result of `files.qat_grid.describe_grid`."""
    columns = ("rows sampled", "on grid", "error, best scale", "by the rule", "moved")

    def row(name: str, found: dict[str, object], of: str = "") -> tuple[object, ...]:
        return (name, f"{found['rows_sampled']}{of}", f"{found['on_grid']:.2%}", f"{found['grid_rms']:.3%}", f"{found['rule_rms']:.3%}",
                f"{found['moved_by_rule']:.2%}")

    roles = [row(name, found) for name, found in described["roles"].items()] + [row("all together", described["all"])]
    tensors = [row(t["name"], t, f" of {t['rows']}") for t in described["tensors"]]
    return "\n\n".join([described["path"], table(("role", *columns), roles), table(("tensor", *columns), tensors), "\n".join(GRID_NOTES)])
