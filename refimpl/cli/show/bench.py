"""Results of `bench` as text."""

from refimpl.cli.show.table import size, table


def as_text(result: dict[str, object]) -> str:
    """The result of `lab.bench.bench.bench`."""
    model, machine, plan, opponent = (result[key] for key in ("model", "machine", "plan", "opponent"))
    lines = [f"{model['name']}: {model['parameters']:,} parameters, {size(model['bytes'])}",
             f"{machine['cpu']}, {machine['isa']}, {machine['threads']} of {machine['physical_cores']} cores, "
             f"threads by {machine['threading_layer']}; {plan['backend']}, {plan['arithmetic']}"]
    if opponent:
        lines.append(f"against {opponent['name']} (llama-cpp-python {opponent['version']}), threads: {opponent['n_threads']}")
    rows, limits, bandwidth = [], [], result["bandwidth"]
    for test in result["tests"]:
        title = f"{test['test']} {test['tokens']}" + (f" after {test['depth']}" if test["depth"] else "")
        for engine, run in test["engines"].items():
            speed = run["tokens_per_second"]
            predicted = f"{run['predicted_tokens_per_second']:.2f}" if "predicted_tokens_per_second" in run else ""
            share = f"{100 * run['share_of_bandwidth']:.1f} %" if "share_of_bandwidth" in run else ""
            rows.append((title, engine, *(f"{speed[key]:.2f}" for key in ("median", "min", "max")), f"{run['ms_per_token']:.3f}", predicted,
                         share))
            if "bytes_per_token" in run:
                weights, kv = size(run["bytes_per_token"]["weights"]), size(int(run["bytes_per_token"]["kv"]))
                limits.append(f"{engine}: a new token reads {weights} of weights and {kv} of keys and values; "
                              f"at {bandwidth['bytes_per_second'] / 1e9:.1f} GB/s at most {run['tokens_per_second_at_most']:.1f} tokens/s")
        if "ratio" in test:
            rows.append((title, "ratio", *(f"{test['ratio'][key]:.3f}" for key in ("of_medians", "min", "max")), "", "", ""))
    columns = ("test", "engine", "tokens/s", "lowest", "highest", "ms/token", "predicted", "of bandwidth")
    return "\n".join([*lines, "", table(columns, rows, left=(0, 1)), "", *limits,
                      f"runs: {plan['repetitions']}, their median; bandwidth: best of {len(bandwidth['passes'])} passes over "
                      f"{size(bandwidth['buffer_bytes'])}, threads: {bandwidth['threads']}"])


def draft_text(result: dict[str, object]) -> str:
    """The result of `lab.bench.draft_bench.draft_bench`."""
    plan, machine = result["plan"], result["machine"]
    lines = [f"{result['model']['name']} with {result['drafter']['path']}",
             f"{machine['cpu']}, {machine['isa']}, threads: {machine['threads']}; {plan['n_new']} tokens, "
             f"runs of each: {plan['repetitions']}, in turn"]
    if plan["simulated_acceptance"] is not None:
        lines.append("SIMULATION: drafting and verifying at their real cost, random tokens in the rows, accepted with the chances "
                     + ", ".join(f"{chance:g}" for chance in plan["simulated_acceptance"]))
    rows, accepted = [], []
    for way, run in result["decode"].items():
        speed = f"{run['tokens_per_second']['median']:.2f}"
        if "draft" not in run:
            rows.append((way, speed, *[""] * 7))
            continue
        draft, rounds = run["draft"], max(run["draft"]["rounds"], 1)
        rows.append((way, speed, *(f"{run['ratio'][key]:.3f}" for key in ("of_medians", "min", "max")), f"{draft['tokens_per_round']:.2f}",
                     f"{1000 * draft['draft_seconds'] / max(draft['proposed'], 1):.2f}",
                     f"{1000 * draft['verify_seconds'] / rounds:.2f}", f"{draft['experts_per_layer']:.1f}"))
        if draft["acceptance"]:
            accepted.append(f"{way}: accepted by position " + ", ".join(f"{100 * share:.0f} %" for share in draft["acceptance"]))
    columns = ("draft length", "tokens/s", "ratio", "lowest", "highest", "tokens/round", "ms/draft token", "ms/verify", "experts")
    return "\n".join([*lines, "", table(columns, rows), *accepted])


def kernels_text(result: dict[str, object]) -> str:
    """The result of `lab.bench.kernels_bench.measure_kernels`."""
    machine, plan = result["machine"], result["plan"]
    bits, rows = {entry["type"]: f"{entry['bits']:g}" for entry in result["types"]}, []
    for entry in result["products"]:
        of_bandwidth = f"{100 * entry['share_of_bandwidth']:.0f} %" if "share_of_bandwidth" in entry else ""
        rows.append((entry["type"], bits[entry["type"]], entry["threads"], entry["rows"], f"{entry['multiply_adds_per_second'] / 1e9:.1f}",
                     f"{100 * entry['share_of_peak']:.0f} %", f"{entry['weight_bytes_per_second'] / 1e9:.1f}", of_bandwidth,
                     f"{entry['ratio']:.2f}"))
    columns = ("type", "bits", "threads", "rows", "10^9 multiply-adds/s", "of peak", "GB/s of weights", "of bandwidth", "to Q4_0")
    return "\n".join([f"{machine['cpu']}, {machine['isa']}, {machine['physical_cores']} cores, threads by {machine['threading_layer']}; q8",
                      "", table(columns, rows), "", f"medians of {plan['repetitions']} rounds in turn"])


def servers_text(result: dict[str, object]) -> str:
    """The result of `lab.bench.servers_bench.servers_bench`. Ratios are to one answer at a time of the same server."""
    plan, rows = result["plan"], []
    alone = {entry["url"]: entry["writing"] for entry in result["medians"] if entry["streams"] == 1}
    for entry in result["medians"]:
        rows.append((entry["url"], entry["streams"], f"{entry['first_token']:.3f}", f"{entry['tokens_per_second']:.2f}",
                     f"{entry['writing']:.2f}", f"{entry['writing'] / alone[entry['url']]:.2f}" if entry["url"] in alone else ""))
    columns = ("server", "answers at a time", "first token, s", "new tokens/s in all", "while all write", "of one")
    return "\n".join([table(columns, rows, left=(0,)), "", f"prompts of {plan['n_prompt']} tokens, answers of {plan['n_new']}; medians of "
                      f"{plan['repetitions']} rounds in turn"])
