"""Tables of what was measured of the library: speed, memory, data, mutants, TPUs."""

from __future__ import annotations

from table_parts import interval, markdown, where_run

GPU_RECORD = "benchmark_gpu"
PEAK_RECORD = "benchmark_peak"
_NUM_COSTS = 6  # of a step, that are listed
_PEER_COSTS = ("time", "cpu")


def benchmarks(records) -> str:
    """Ratios of the benchmark cases."""
    rows = []
    for name, record in records.items():
        if not name.startswith("benchmark_") or "parts" in record:
            continue
        if name in (GPU_RECORD, PEAK_RECORD):  # have tables of their own
            continue
        ways = [f"{k} ({way['shape']})" for k, way in record["variants"].items()]
        ratios = [record.get(key) for key in ("time_ratio", "temp_bytes_ratio")]
        first = next(iter(record["variants"].values()))
        rates = [key for key in first if key.endswith("_rate")]
        rows.append(
            [
                record["name"],
                ways[0],
                ways[1] if ways[1:] else "not run",
                *("-" if ratio is None else f"{ratio:.2f}" for ratio in ratios),
                ", ".join(f"{_round(first[rate])} {rate[:-5]}/s" for rate in rates),
                record["environment"]["device"],
            ]
        )
    if not rows:
        return "not run\n"
    columns = [
        "case",
        "A",
        "B",
        "time B / A",
        "temporary bytes B / A",
        "A alone",
        "device",
    ]
    return markdown(columns, rows)


def _round(rate: float) -> str:
    return f"{rate:.0f}" if rate >= 10 else f"{rate:.2g}"


def loading(records) -> str:
    """Time and memory of loading a checkpoint."""
    record = records.get("benchmark_load")
    if record is None:
        return "not run\n"
    rows = []
    for name, way in record["variants"].items():
        low, high = way["iqr_seconds"]
        share = way["device_over_kept"]
        rows.append(
            [
                name,
                way["shape"],
                f"{way['median_seconds']:.1f} [{low:.1f}, {high:.1f}]",
                f"{way['kept_bytes'] / 1e9:.2f}",
                f"{way['peak_over_kept']:.2f}",
                "-" if share is None else f"{share:.3f}",
            ]
        )
    columns = ["loader", "checkpoint", "seconds [quartiles]", "kept, GB"]
    columns += ["peak / kept", "largest device / kept"]
    return markdown(columns, rows)


def gpu_benchmark(records) -> str:
    """DPO of a billion parameters on one GPU, by us and by TRL."""
    record = records.get(GPU_RECORD)
    if record is None:
        return "not run\n"
    rows = []
    for name, way in record["variants"].items():
        if way.get("status") == "not run":
            rows.append([name, f"not run: {way['reason']}", *5 * ["-"]])
            continue
        low, high = way["iqr_seconds"]
        mfu, peak = way["mfu"], way["peak_bytes"]
        rows.append(
            [
                name,
                way["shape"],
                f"{way['median_seconds']:.2f} [{low:.2f}, {high:.2f}]",
                f"{way['pairs_rate']:.1f}",
                f"{way['real_tokens_rate']:.0f}",
                "-" if mfu is None else f"{100 * mfu:.1f} %",
                "-" if peak is None else f"{peak / 1e9:.1f}",
            ]
        )
    columns = ["", "shape", "seconds a step [quartiles]", "pairs/s", "real tokens/s"]
    columns += ["MFU", "peak memory, GB"]
    environment, ours = record["environment"], record["variants"]["pref_jax"]
    text = f"\n{record['pairs_per_step']} pairs a step on {ours['device_kind']}"
    text += f", jax {environment['versions']['jax']}"
    versions = record["variants"]["TRL"].get("versions")
    if versions:
        text += f"; TRL {versions['trl']} with torch {versions['torch']}"
    return markdown(columns, rows) + f"{text}; commit {environment['commit'][:12]}.\n"


def loss_benchmarks(records) -> str:
    """Every loss with its gradient: alone, and TRL's time over ours."""
    record = records.get("benchmark_losses")
    if record is None:
        return "not run\n"
    rows = []
    for part in record["parts"]:
        ours = part["variants"]["pref_jax"]
        times = (ours["median_seconds"], *ours["iqr_seconds"])
        median, low, high = (f"{1e3 * seconds:.2f}" for seconds in times)
        ratio = f"{part['time_ratio']:.1f}" if "time_ratio" in part else "-"
        shape = ours["shape"]
        rows.append([part["name"], shape, f"{median} [{low}, {high}]", ratio])
    environment = record["environment"]
    versions = environment["versions"]
    text = f"\nOn {environment['device']}, jax {versions['jax']}"
    if "trl" in versions:
        text += f"; TRL {versions['trl']} with torch {versions['torch']}"
    columns = ["loss", "shape", "pref_jax, ms [quartiles]", "time TRL / pref_jax"]
    return markdown(columns, rows) + f"{text}.\n"


def growth(records) -> str:
    """Time of a token and memory of a step while one size grows."""
    record = records.get("benchmark_growth")
    if record is None:
        return "not run\n"
    rows = []
    for part in record["parts"]:
        times = {
            size: 1e6 / way["real_tokens_rate"]
            for size, way in part["variants"].items()
        }
        first = next(iter(times.values()))
        for size, way in part["variants"].items():
            rows.append(
                [
                    part["name"],
                    size,
                    way["shape"],
                    f"{times[size]:.0f}",
                    f"{times[size] / first:.2f}",
                    f"{way['temp_bytes'] / 1e6:.0f}",
                ]
            )
    columns = ["what grows", "size", "rows", "microseconds a token", "over the first"]
    columns += ["temporary, MB"]
    return markdown(columns, rows) + where_run(record)


def share_of_peak(records) -> str:
    """Useful flops of a step over those of the best matrix product."""
    record = records.get(PEAK_RECORD)
    if record is None:
        return "not run\n"
    rows = [
        [
            name,
            way["shape"],
            f"{way['median_seconds']:.2f}",
            f"{way['useful_flops'] / 1e9:.0f}",
            f"{100 * way['share_of_peak']:.0f} %",
        ]
        for name, way in record["variants"].items()
    ]
    columns = ["model", "rows", "seconds a step", "useful, Gflop", "share of the peak"]
    peak = record["peak_flops_per_second"] / 1e9
    text = f"\nThe peak is {peak:.0f} Gflop/s. Useful flops: `{record['formula']}`.\n"
    return markdown(columns, rows) + text + where_run(record)


def step_profile(records) -> str:
    """The parts of a step that take most time."""
    record = records.get(PEAK_RECORD)
    if record is None:
        return "not run\n"
    rows = [
        [name, part["part"], part["kind"], f"{100 * part['share']:.0f} %"]
        for name, way in record["variants"].items()
        for part in way["profile"][:_NUM_COSTS]
    ]
    columns = ["model", "part of the step", "what", "share of busy time"]
    return markdown(columns, rows) + where_run(record)


def peers(records) -> str:
    """The DPO steps of other libraries beside ours: rate, memory, ratios."""
    record = records.get("peers")
    if record is None:
        return "not run\n"
    contestants = record["contestants"]
    compared = {of for found in contestants.values() for of in found["ratios"]}
    ours = [name for name in contestants if name in compared]
    rows = []
    for name, found in contestants.items():
        shape = f"{found['shape']}, {100 * found['fill']:.0f} %"
        row = [name, shape, f"{found['pairs_per_second']:.2f}"]
        row.append(f"{found['cpu_seconds_per_pair']:.2f}")
        row.append(f"{found['peak_bytes'] / 1e9:.1f}")
        for of in ours:
            ratios = found["ratios"].get(of)
            row += [interval(ratios[key], 2) if ratios else "-" for key in _PEER_COSTS]
        row.append(f"{found['start_seconds']:.0f} + {found['warm_up_seconds']:.0f}")
        rows.append(row)
    short = [of.removeprefix("pref_jax, ") for of in ours]
    columns = ["contestant", "positions, filled", "pairs/s", "CPU s / pair", "peak, GB"]
    columns += [f"{key} / ours, {of}" for of in short for key in _PEER_COSTS]
    columns.append("start + warm up, s")
    config, data, agreement = (record[k] for k in ("config", "data", "agreement"))
    versions = {}
    for found in contestants.values():
        versions |= found["versions"]
    named = ("jax", "trl", "torch", "google-tunix")
    environment = record["environment"]
    text = (
        f"\n{config['rounds']} rounds of {config['steps']} steps of "
        f"{config['pairs_per_step']} pairs; lengths {data['lengths']}, means "
        f"{' + '.join(f'{n:.0f}' for n in data['mean_tokens'][:2])} / "
        f"{data['mean_tokens'][2]:.0f} tokens; {record['parameters'] / 1e6:.1f} "
        f"million parameters; {config['threads']} processors; "
        f"{', '.join(f'{name} {versions[name]}' for name in named if name in versions)}"
        f"; commit {environment['commit'][:12]}. First losses lie within "
        f"{agreement['first_loss_from_log_2']:.0e} of log 2, all losses of a step "
        f"within {agreement['losses_apart']:.0e} of each other.\n"
    )
    return markdown(columns, rows) + text


def data_sets(records) -> str:
    """Rows in, rows used, rows left out with the reason, of each surveyed source."""
    survey = records.get("data_sets")
    if survey is None:
        return "not run\n"
    rows = []
    for found in survey["sources"]:
        reasons = [f"{what}: {n}" for what, n in found["left_out"].items()]
        rows.append(
            [
                found["source"],
                found["responses"],
                found["rows"],
                found["used"],
                ", ".join(reasons) or "-",
                found["duplicates"],
                f"{100 * found['fill']:.0f} %",
            ]
        )
    columns = [
        *("source", "responses", "rows", "used", "left out", "repeated rows"),
        f"rows of {survey['row_length']} filled",
    ]
    return markdown(columns, rows)


def mutants(records) -> str:
    """How many changes of each file its tests notice."""
    record = records.get("mutants")
    if record is None:
        return "not run\n"
    counted = ("mutants", "caught", "equivalent", "gaps")
    files = {f"`{file}`": counts for file, counts in record["files"].items()}
    files["all"] = {k: sum(counts[k] for counts in files.values()) for k in counted}
    rows = []
    for file, counts in files.items():
        # One that no test can notice is none that the tests let pass.
        others = counts["mutants"] - counts["equivalent"]
        rate = f"{100 * counts['caught'] / others:.1f} %" if others else "-"
        commit = counts.get("commit", "")[:12]
        rows.append([file, *(counts[key] for key in counted), rate, commit])
    text = (
        f"\n{record['seconds_per_mutant']:.1f} s a mutant on "
        f"{record['environment']['device']}."
    )
    if record.get("confirmed"):
        text += f" A fresh process confirmed {record['confirmed']} that were drawn."
    if record["stale"]:
        text += f" Equivalents that are no more: {len(record['stale'])}."
    return markdown(["file", *counted, "kill rate", "commit"], rows) + text + "\n"


def surviving_mutants(records) -> str:
    """The changes that no test notices, and why."""
    record = records.get("mutants")
    if record is None:
        return "not run\n"

    def code(text):
        return f"`{text}`".replace("|", r"\|")  # it would end the cell

    rows = [
        [
            *(code(found[key]) for key in ("file", "function", "line", "change")),
            (found["reason"] or "**gap**").replace("|", r"\|"),
        ]
        for found in record["survivors"]
    ]
    if not rows:
        return "none\n"
    return markdown(["file", "function", "line", "change", "why it survives"], rows)


def tpu(records) -> str:
    """What programs cost that were compiled for TPUs and not run."""
    rows = []
    for name, record in records.items():
        if not name.startswith("tpu_"):
            continue
        limit = record["chip"]["hbm_bytes"]
        mesh = " x ".join(f"{size} {axis}" for axis, size in record["mesh"].items())
        for program in record["programs"]:
            total, seconds = program["memory"]["total"], program["seconds"]
            mfu = [
                100 * program["mfu"][f"{way}_overlap"] for way in ("without", "with")
            ]
            times = [seconds[f"{way}_overlap"] for way in ("with", "without")]
            sent = sum(part["bytes"] for part in program["sent"])
            rows.append(
                [
                    f"{record['experiment']} {record['preset']}, {program['name']}",
                    f"{record['topology']} ({mesh})",
                    f"{total / 2**30:.1f} of {limit / 2**30:.1f}"
                    + ("" if program["fits"] else ", **does not fit**"),
                    f"{program['flops'] / program['useful_flops']:.2f}",
                    f"{sent / 1e9:.3g}",
                    f"{times[0]:.3g} to {times[1]:.3g}",
                    f"{mfu[0]:.0f} to {mfu[1]:.0f} %",
                    seconds["limit"],
                ]
            )
    if not rows:
        return "not run\n"
    columns = ["program", "chips (mesh)", "GiB a chip", "flops / useful flops"]
    columns += ["sent, GB a chip", "seconds", "MFU", "longest"]
    text = "\nSeconds and MFU: estimate, not run.\n"
    return markdown(columns, rows) + text
