"""Results of `fit` as text."""

from refimpl.cli.show.table import size, table
from refimpl.lab.bench.fit import FLUENT, FROM_DISK, NO, best_of

COLUMNS = ("model", "file", "size", "fits", "memory", "context at most", "prompt", "new", "context full", "first start", "later", "name")


def as_text(result: dict[str, object]) -> str:
    """The result of `lab.bench.fit.fit`."""
    machine, room, asked, rows = (result[key] for key in ("machine", "room", "asked", "rows"))
    disk = "" if room["reading"] is None else f", read at {size(room['reading'])}/s"
    lines = [f"{machine['cpu']}, {machine['isa']}, {machine['threads']} of {machine['physical_cores']} cores; memory: "
             f"{size(room['memory'])} free, read at {size(room['bandwidth'])}/s; disk: {size(room['disk'])} free{disk}", "",
             table(COLUMNS, list(map(_row, rows)), left=(0, 1, 3, 11)), "", _about(asked)]
    if any(row["fits"] == FROM_DISK for row in rows):
        lines.append(f"{FROM_DISK}: memory cannot hold all weights; those that are missing are read when they are needed, at these speeds")
    if len(rows) == 1:
        lines += [_memory(rows[0]), *([f"type: {rows[0]['type']}"] if rows[0]["fits"] != NO else [])]
    elif best := best_of(rows):
        how = (f"the largest that makes {FLUENT:.0f} new tokens/s" if best["decode"] >= FLUENT else
               f"the fastest; none makes {FLUENT:.0f} new tokens/s, about as fast as people read")
        lines.append(f"best here: {best['model']}, {how}: {best['type']}")
    else:
        lines.append("none fits; close other programs, or take a shorter context (-c)")
    return "\n".join(lines)


def _row(row: dict[str, object]) -> tuple[str, ...]:
    memory = row["memory"]
    start = (row["model"] or "", row["file"], size(memory["file"]), row["fits"], size(memory["total"]), f"{memory['most_context']:,}")
    if row["fits"] == NO:
        return (*start, *[""] * 5, row["name"])
    load = row["load"]
    later = f"{load['next']:.0f} s" if load["cold"] == load["next"] else f"{load['next']:.0f} to {load['cold']:.0f} s"
    return (*start, *(f"{row[key]:.1f}" for key in ("prompt", "decode", "decode_full")), f"{load['first']:.0f} s", later, row["name"])


def _about(asked: dict[str, object]) -> str:
    context = f"{asked['n_ctx']:,} tokens"
    users = "" if asked["users"] == 1 else f" of {asked['users']} users together"
    drafts = f"; drafts accepted with the chances {', '.join(f'{chance:g}' for chance in asked['chances'])}" if asked["chances"] else ""
    return (f"prompt: tokens/s of one of {asked['n_prompt']}; new: tokens/s{users}, at the beginning and after {context}{drafts}; memory: "
            f"with {context}{users} (-c)\nfirst start: weights are read and rearranged; later: they are still in memory, or on the disk")


def _memory(row: dict[str, object]) -> str:
    parts = {"weights": "weights", "cache": "keys and values", "buffers": "buffers", "process": "the process", "extras": "beside it"}
    return "memory: " + " + ".join(f"{what} {size(row['memory'][key])}" for key, what in parts.items() if row["memory"][key])


def check_text(result: dict[str, object]) -> str:
    """The result of `lab.bench.fit_check.check`."""
    rows = [(entry["file"], entry["what"], *(f"{entry[key]:.{entry['digits']}f}" for key in ("predicted", "measured", "low", "high")),
             f"{100 * entry['error']:+.1f} %", f"{100 * entry['bound']:.0f} %") for entry in result["errors"]]
    columns = ("file", "what", "predicted", "measured", "lowest", "highest", "error", "bound")
    machine = result["machine"]
    return "\n".join([f"{machine['cpu']}, {machine['isa']}, threads: {machine['threads']}", "", table(columns, rows, left=(0, 1))])
