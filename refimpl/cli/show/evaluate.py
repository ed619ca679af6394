"""Results of `eval` as text."""

from collections.abc import Mapping

from refimpl.cli.show.table import table


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
