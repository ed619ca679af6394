"""Results of `eval` and `sweep` as text."""

from collections.abc import Mapping

from refimpl.cli.show.table import size, table


def as_text(result: Mapping[str, object]) -> str:
    """The result of `lab.evaluate.evaluate.evaluate`."""
    counted = f"the {result['count']} of" if result["count"] == "second-half" else f"every token once, a window every {result['stride']} of"
    lines = [f"{result['model']}, {result['form']} text",
             f"{result['tokens']:,} tokens, {result['bytes']:,} bytes; windows: {result['windows']}, {counted} {result['n_ctx']}"]
    rows = [("perplexity", f"{result['perplexity']:.4f} +- {result['perplexity_error']:.4f}")]
    if result["bits_per_byte"] is not None:
        rows.append(("bits per byte", f"{result['bits_per_byte']:.4f}"))
    lines += ["", table(("this model", ""), rows, left=(0, 1))]
    if "comparison" in result:
        base = result["against"] or f"{result['base']['path']}: {result['base']['model']}, {result['base']['n_top']} tokens a position"
        lines += ["", table(("against", base), _comparison(result["comparison"]), left=(0, 1))]
    if result["output"]:
        lines += ["", f"saved in {result['output']}"]
    return "\n".join(lines)


def _comparison(c: Mapping[str, object]) -> list[tuple[str, str]]:
    mean = f"{c['kl_low']:.6f} +- {c['kl_low_error']:.6f}"
    if not c["kl_exact"]:
        mean = f"between {mean} and {c['kl_high']:.6f} +- {c['kl_high_error']:.6f}"
    percentiles = [f"{share} %: {_percentile(c, share)}" for share in c["kl_low_percentiles"] if share != "100"]
    return [("its perplexity", f"{c['base_perplexity']:.4f}"),
            ("log ratio", f"{c['log_ratio']:+.6f} +- {c['log_ratio_error']:.6f}"),
            ("KL divergence", f"{mean} nats"),
            ("  percentiles", f"{', '.join(percentiles)}, largest {_percentile(c, '100')}"),
            ("same top-1", f"{100 * c['same_top']:.2f} +- {100 * c['same_top_error']:.2f} %"),
            (f"shared top-{c['top']}", f"{100 * c['shared_top']:.2f} +- {100 * c['shared_top_error']:.2f} %")]


def _percentile(c: Mapping[str, object], share: str) -> str:
    low, high = c["kl_low_percentiles"][share], c["kl_high_percentiles"][share]
    return f"{low:.5f}" if c["kl_exact"] else f"{low:.5f} to {high:.5f}"


def as_table(result: Mapping[str, object]) -> str:
    """The result of `lab.evaluate.sweep.sweep`: columns that are the same in all rows stand above the table."""
    rows = result["rows"]
    columns = {"file": lambda r: r["file"], "engine": lambda r: ":".join(filter(None, (r["engine"], r["arithmetic"]))),
               "text": lambda r: r["text"], "against": lambda r: r["against"] or "nothing"}
    shown = {name: cell for name, cell in columns.items() if name == "file" or len({cell(row) for row in rows}) > 1}
    lines = [f"{name}: {cell(rows[0])}" for name, cell in columns.items() if name not in shown]
    lines.append(f"windows of {rows[0]['n_ctx']} tokens; tokens/s: reading windows, logits included")
    compared = any(row["against"] for row in rows)
    heads = [*shown, "size", "bits/weight", "perplexity", *(["KL, nats", "99 %", "same top-1"] if compared else []), "tokens/s"]
    body = [[*(cell(row) for cell in shown.values()), size(row["bytes"]), f"{row['bits_per_weight']:.2f}", *_figures(row, compared)]
            for row in rows]
    lines += ["", table(heads, body, left=range(len(shown)))]
    return "\n".join(lines + ([f"\nsaved in {result['output']}"] if result["output"] else []))


def _figures(row: Mapping[str, object], compared: bool) -> list[str]:
    if row["error"] is not None:
        return ["failed", *["-"] * (4 if compared else 1)]
    distance = ["-"] * 3 if row["kl"] is None else [f"{row['kl']:.5f} +- {row['kl_error']:.5f}", f"{row['kl_99']:.4f}",
                                                     f"{100 * row['same_top']:.2f} %"]
    return [f"{row['perplexity']:.4f} +- {row['perplexity_error']:.4f}", *(distance if compared else []),
            f"{row['tokens_per_second']:.0f}"]
