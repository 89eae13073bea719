"""Run records -> tables: every figure in README and docs is written by this script.

    python scripts/tables.py                         rewrite the tables
    python scripts/tables.py --check                 fail if a table is not up to date
    python scripts/tables.py --add runs/quickstart/001 --name quickstart_seed0
                                                     keep a run's record, then rewrite
    python scripts/tables.py --add runs/rates --name sft_bridge_text
                                                     likewise a sweep, in one record

A table stands between `<!-- table: NAME -->` and `<!-- end of table -->` in README.md
or a page of docs/; NAME is one of `TABLES` below. Records are small JSON files in
docs/records: numbers, config, versions; no paths and no host names.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import re
import sys
from collections.abc import Callable, Mapping

ROOT = pathlib.Path(__file__).resolve().parent.parent
RECORDS = "docs/records"
GPU_RECORD = "benchmark_gpu"
PEAK_RECORD = "benchmark_peak"
_NUM_COSTS = 6  # of a step, that are listed
_PEER_COSTS = ("time", "cpu")
_KEPT = ("experiment", "results", "config", "environment", "seconds")
_SLOT = re.compile(r"(<!-- table: ([\w-]+) -->\n).*?(<!-- end of table -->)", re.DOTALL)


def read_records(root: pathlib.Path) -> dict[str, dict]:
    """Name -> record, of all files in docs/records."""
    files = sorted((root / RECORDS).glob("*.json"))
    return {path.stem: json.loads(path.read_text()) for path in files}


def add_record(root: pathlib.Path, run: pathlib.Path, name: str) -> None:
    """Keep the numbers of a finished run, or of a finished sweep.

    Raises:
      ValueError: the run is not finished, or its record lacks a part.
    """
    sweep = run / "sweep.json"
    kept = _kept_sweep(sweep) if sweep.is_file() else _kept(run / "record.json")
    target = root / RECORDS / f"{name}.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(kept, indent=1) + "\n")


def _kept(path: pathlib.Path) -> dict:
    if not path.is_file():
        raise ValueError(f"{path.parent} has no record.json; finish the run first.")
    record = json.loads(path.read_text())
    missing = [key for key in _KEPT if key not in record]
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}; it cannot be kept.")
    kept = {key: record[key] for key in _KEPT}
    return kept | {"config": _without_folders(record["config"])}


def _kept_sweep(path: pathlib.Path) -> dict:
    """Rows of all runs, and what their first one says of itself."""
    rows = json.loads(path.read_text())
    left = sum(row["status"] != "finished" for row in rows)
    if left:
        raise ValueError(f"{path}: {left} of {len(rows)} runs are not finished.")
    first = _kept(min(path.parent.glob("*/record.json")))
    names = list(rows[0])
    place = names.index("status")
    results = {
        "fields": names[:place],
        "metrics": [name for name in names[place + 1 :] if name != "seconds"],
        "rows": _without_folders(rows),
    }
    seconds = sum(row["seconds"] for row in rows)
    return first | {"results": results, "seconds": seconds}


def _without_folders(values):
    """Plain values whose absolute paths are cut to their last names."""
    if isinstance(values, dict):
        return {key: _without_folders(value) for key, value in values.items()}
    if isinstance(values, list):
        return [_without_folders(value) for value in values]
    if isinstance(values, str) and values.startswith("/"):
        return pathlib.PurePath(values).name
    return values


def sweep_means(record, over: str, titles: Mapping[str, str]) -> str:
    """Metrics of a sweep, means over one of its fields.

    Args:
      record: of `add_record`.
      over: the field whose values are repetitions, such as a seed.
      titles: of the metrics that are shown; of an interval its mean is taken.
    """
    found = record["results"]
    fields = [field for field in found["fields"] if field != over]
    groups: dict[tuple, list[dict]] = {}
    for row in found["rows"]:
        groups.setdefault(tuple(row[field] for field in fields), []).append(row)
    lines = []
    for values, rows in groups.items():
        cells = []
        for metric in titles:
            numbers = [
                row[metric][0] if isinstance(row[metric], list) else row[metric]
                for row in rows
            ]
            mean = sum(numbers) / len(numbers)
            cells.append(f"{mean:.3f} [{min(numbers):.3f}, {max(numbers):.3f}]")
        lines.append([*values, len(rows), *cells])
    columns = [*(field.split(".")[-1] for field in fields), f"{over}s"]
    table = markdown([*columns, *titles.values()], lines)
    return table + f"\nMeans, and the lowest and highest of the {over}s.\n"


def markdown(columns, rows) -> str:
    """A Markdown table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


def _interval(values, digits: int = 3) -> str:
    mean, low, high = (f"{value:.{digits}f}" for value in values)
    return f"{mean} [{low}, {high}]"


def _quickstarts(records) -> list[dict]:
    found = [r for name, r in records.items() if name.startswith("quickstart_seed")]
    return sorted(found, key=lambda record: record["config"]["seed"])


def quickstart_differences(records) -> str:
    """DPO against SFT and the control, seed by seed."""
    runs = _quickstarts(records)
    if not runs:
        return "not run\n"
    rows = []
    for record in runs:
        results = record["results"]
        models, differences = results["models"], results["differences"]
        rows.append(
            [
                record["config"]["seed"],
                *(f"{models[m]['right'][0]:.3f}" for m in ("SFT", "control", "DPO")),
                _interval(differences["SFT"]["right"]),
                _interval(differences["control"]["right"]),
                _interval(differences["SFT"]["reward"]),
                _interval(models["DPO"]["kl"]),
            ]
        )
    above = [
        sum(r["results"]["differences"][other]["right"][1] > 0 for r in runs)
        for other in ("SFT", "control")
    ]
    columns = [
        "seed",
        "right, SFT",
        "right, control",
        "right, DPO",
        "DPO - SFT, right",
        "DPO - control, right",
        "DPO - SFT, reward",
        "KL(DPO, SFT), nats / token",
    ]
    return (
        markdown(columns, rows)
        + f"\nDPO's `right` is above SFT's, the interval excluding zero, in {above[0]} "
        f"of {len(runs)} seeds, and above the control's in {above[1]} of {len(runs)}.\n"
    )


def quickstart_models(records) -> str:
    """Means over seeds of every measured part, by model."""
    runs = _quickstarts(records)
    if not runs:
        return "not run\n"
    parts = list(runs[0]["results"]["models"]["SFT"])
    rows = []
    for model in runs[0]["results"]["models"]:
        means = [
            [record["results"]["models"][model][part][0] for record in runs]
            for part in parts
        ]
        rows.append([model, *(f"{sum(m) / len(m):.3f}" for m in means)])
    return markdown(["model", *parts], rows) + f"\nMeans over {len(runs)} seeds.\n"


def quickstart_setting(records) -> str:
    """How the records were made."""
    runs = _quickstarts(records)
    if not runs:
        return "not run\n"
    minutes = [record["seconds"] / 60 for record in runs]
    first = runs[0]["environment"]
    commits = sorted({record["environment"]["commit"][:12] for record in runs})
    return (
        f"{len(runs)} seeds, run once each; commit {', '.join(commits)}; jax "
        f"{first['versions']['jax']} on {first['device']}; {min(minutes):.1f} to "
        f"{max(minutes):.1f} minutes each.\n"
    )


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
    return markdown(columns, rows) + _where_run(record)


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
    return markdown(columns, rows) + text + _where_run(record)


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
    return markdown(columns, rows) + _where_run(record)


def _where_run(record) -> str:
    environment = record["environment"]
    versions = environment["versions"]
    return (
        f"\nOn {environment['device']}, jax {versions['jax']}; commit "
        f"{environment['commit'][:12]}.\n"
    )


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
            row += [_interval(ratios[key], 2) if ratios else "-" for key in _PEER_COSTS]
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


ADPO_RECORD = "adpo"
ADPO_CONTROL_RECORD = "adpo_control"


def _verdicts(record, of: Callable[[str], bool] = lambda claim: True) -> str:
    """The verdicts of a record, or of some of its claims."""
    rows = [
        [
            found["claim"],
            f"**{found['verdict']}**",
            "" if found["effect"] is None else _effect(found["effect"]),
            found["unit"],
            found["needed"],
            found["note"],
        ]
        for found in record["results"]["verdicts"]
        if of(found["claim"])
    ]
    columns = ["claim", "verdict", "effect", "of what", "needed", "remarks"]
    return markdown(columns, rows)


def _effect(interval) -> str:
    """Small effects with a digit more, so that what excludes zero is seen to."""
    return _interval(interval, digits=3 if abs(interval[0]) >= 0.1 else 4)


def _made(record, seeds) -> str:
    environment = record["environment"]
    return (
        f"\n{seeds}; {record['seconds'] / 60:.0f} minutes on "
        f"{environment['device']}; commit {environment['commit'][:12]}.\n"
    )


def adpo_claims(records) -> str:
    """The paper's claims with their verdicts, and how they were reached."""
    if ADPO_RECORD not in records:
        return "not run\n"
    record = records[ADPO_RECORD]
    suite = record["config"]["bandits"]
    made = f"{suite['num_seeds']} paired seeds, {suite['num_steps']} updates"
    return _verdicts(record) + _made(record, made)


def adpo_scenarios(records) -> str:
    """Mean win mass of every method in every scenario."""
    if ADPO_RECORD not in records:
        return "not run\n"
    results = records[ADPO_RECORD]["results"]
    rows = [
        [
            name,
            *(f"{value:.3f}" for value in values),
            f"{sum(values) / len(values):.3f}",
        ]
        for name, values in results["win_mass"].items()
    ]
    return markdown(["method", *results["scenarios"], "mean"], rows)


def adpo_control(records) -> str:
    """Students of the simulated tasks, and what became of the claims."""
    if ADPO_CONTROL_RECORD not in records:
        return "not run\n"
    record = records[ADPO_CONTROL_RECORD]
    rows = [
        [
            *(found["task"], found["name"]),
            *(_interval(found[part], digits=0) for part in ("returned", "likeliest")),
            *(_interval(found[part], digits=2) for part in ("share", "kl", "ndcg")),
            found["temperature"],
        ]
        for found in record["results"]["distillation"]
    ]
    columns = ["task", "student", "return", "at likeliest actions", "of our teacher"]
    columns += ["KL, nats", "NDCG", "T"]
    made = f"{record['config']['distillation']['num_seeds']} paired seeds"
    students = markdown(columns, rows)
    return students + "\n" + _verdicts(record) + _made(record, made)


BRIDGE_RECORD = "sft_bridge"
BRIDGE_TEXT_RECORD = "sft_bridge_text"


def _bridge(records, part: str) -> dict | None:
    """What the record of the bridge says of a part; None: it was not run."""
    return records.get(BRIDGE_RECORD, {"results": {}})["results"].get(part)


def _of_values(claim: str) -> bool:
    return claim.startswith("V of ")


def bridge_claims(records) -> str:
    """What became of the claims on SFT before DPO."""
    found = _bridge(records, "stages")
    if found is None:
        return "not run\n"
    record = records[BRIDGE_RECORD]
    verdicts = _verdicts(record, lambda claim: not _of_values(claim))
    made = (
        f"{record['config']['stages']['num_seeds']} paired seeds; the whole rate is "
        f"{found['rate']:g}; with the part on V"
    )
    return verdicts + _made(record, made)


def bridge_headline(records) -> str:
    """The figures of the paper's abstract, and ours."""
    found = _bridge(records, "stages")
    if found is None:
        return "not run\n"
    rows = [
        [
            *(row["what"], row["paper"]),
            *(
                _interval([100 * x for x in row[key]], digits=1)
                for key in ("relative", "points")
            ),
        ]
        for row in found["headline"]
    ]
    columns = ["after DPO, less plain SFT at the whole rate", "paper"]
    columns += ["reward here, relative, %", "win rate here, points"]
    return markdown(columns, rows)


def bridge_arms(records) -> str:
    """Every arm after SFT and after DPO."""
    found = _bridge(records, "stages")
    if found is None:
        return "not run\n"
    rows = [
        [
            arm["arm"],
            _interval(arm["sft_loss"]),
            *(_interval(arm["sft"][part]) for part in ("kl", "reward")),
            _interval(arm["sft_accuracy"]),
            *(_interval(arm["dpo"][part]) for part in ("reward", "right", "wins")),
        ]
        for arm in found["arms"]
    ]
    columns = ["arm", "validation loss of SFT", "KL of SFT to the base"]
    columns += ["reward after SFT", "preference accuracy of SFT", "reward after DPO"]
    columns += ["right after DPO", "win rate over the expert"]
    return markdown(columns, rows)


def bridge_values(records) -> str:
    """What each signal tells of a state, and what became of the claims."""
    found = _bridge(records, "values")
    if found is None:
        return "not run\n"
    record = records[BRIDGE_RECORD]
    measures = {
        "correlation": "Spearman's correlation with V*",
        "at_move": "the same among states after as many moves",
        "auc": "AUC for a later win",
        "drop": "share of wrong moves that it falls at",
    }
    measures = {key: x for key, x in measures.items() if key in found["signals"][0]}
    rows = [
        [row["signal"], *(_interval(row[key]) for key in measures)]
        for row in found["signals"]
    ]
    made = (
        f"{record['config']['values']['num_seeds']} seeds; the SFT model wins "
        f"{_interval(found['won'])} of the rooms, pi* "
        f"{_interval(found['won_by_best'])}"
    )
    signals = markdown(["signal", *measures.values()], rows)
    return signals + "\n" + _verdicts(record, _of_values) + _made(record, made)


def bridge_text(records) -> str:
    """Learning rates of SFT on real text."""
    if BRIDGE_TEXT_RECORD not in records:
        return "not run\n"
    record = records[BRIDGE_TEXT_RECORD]
    table = sweep_means(
        record,
        "seed",
        {
            "results.SFT.loss": "loss on demonstrations after SFT",
            "results.SFT.accuracy_from_base": "accuracy of log(SFT / base)",
            "results.DPO.accuracy": "accuracy of log(DPO / SFT)",
            "results.DPO.accuracy_from_base": "accuracy of log(DPO / base)",
        },
    )
    return table + _made(record, f"{len(record['results']['rows'])} runs")


TABLES: Mapping[str, Callable[[Mapping[str, dict]], str]] = {
    "quickstart-differences": quickstart_differences,
    "quickstart-models": quickstart_models,
    "quickstart-setting": quickstart_setting,
    "benchmarks": benchmarks,
    "gpu-benchmark": gpu_benchmark,
    "growth": growth,
    "share-of-peak": share_of_peak,
    "step-profile": step_profile,
    "loading": loading,
    "loss-benchmarks": loss_benchmarks,
    "peers": peers,
    "data-sets": data_sets,
    "mutants": mutants,
    "surviving-mutants": surviving_mutants,
    "tpu": tpu,
    "adpo-claims": adpo_claims,
    "adpo-scenarios": adpo_scenarios,
    "adpo-control": adpo_control,
    "sft-bridge-claims": bridge_claims,
    "sft-bridge-headline": bridge_headline,
    "sft-bridge-arms": bridge_arms,
    "sft-bridge-values": bridge_values,
    "sft-bridge-text": bridge_text,
}


def rewrite(text: str, records: Mapping[str, dict], where: str) -> str:
    """A page with its tables made anew.

    Raises:
      ValueError: a table is not known.
    """

    def table(match):
        name = match[2]
        if name not in TABLES:
            raise ValueError(
                f"{where}: table {name!r} is not known; there are {', '.join(TABLES)}."
            )
        return match[1] + TABLES[name](records) + match[3]

    return _SLOT.sub(table, text)


def main(args=None, root: pathlib.Path = ROOT) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--check", action="store_true", help="change nothing")
    parser.add_argument("--add", type=pathlib.Path, help="folder of a finished run")
    parser.add_argument("--name", help="of the record that --add keeps")
    options = parser.parse_args(args)
    if (options.add is None) != (options.name is None):
        parser.error("--add and --name belong together")
    if options.add is not None:
        add_record(root, options.add, options.name)
    records = read_records(root)
    stale = []
    for page in [root / "README.md", *sorted((root / "docs").glob("*.md"))]:
        text = page.read_text()
        new = rewrite(text, records, page.name)
        if new != text and options.check:
            stale.append(page.name)
        elif new != text:
            page.write_text(new)
    for name in stale:
        print(f"{name}: a table is not that of docs/records; run scripts/tables.py")
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
