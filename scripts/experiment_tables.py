"""Tables of the experiments: models, verdicts, arms, sweeps."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from table_parts import interval, markdown, over_seeds

ADPO_RECORD = "adpo"
ADPO_CONTROL_RECORD = "adpo_control"
BRIDGE_RECORD = "sft_bridge"
BRIDGE_TEXT_RECORD = "sft_bridge_text"


def sweep_means(record, over: str, titles: Mapping[str, str]) -> str:
    """Metrics of a sweep, means over one of its fields, and paired differences.

    Each other combination is held against the first one, value by value of `over`.

    Args:
      record: of `kept_records.make_record`.
      over: the field whose values are repetitions, such as a seed.
      titles: of the metrics that are shown; of an interval its mean is taken.

    Raises:
      ValueError: the sweep was run without one of them, or not over that field.
    """
    found = record["results"]
    missing = [metric for metric in titles if metric not in found["metrics"]]
    if missing or over not in found["fields"]:
        raise ValueError(
            f"this table needs a sweep over {over}, with --metrics {' '.join(titles)}; "
            f"that of the record is over {', '.join(found['fields'])} and lacks "
            f"{', '.join(missing) or 'no metric'}. `sweep.py --table` with all of them "
            f"reads finished runs again."
        )
    fields = [field for field in found["fields"] if field != over]
    groups: dict[str, dict[str, dict]] = {}
    for row in found["rows"]:
        name = ", ".join(row[field] for field in fields)
        groups.setdefault(name, {})[row[over]] = row

    def numbers(name, metric, keys):
        values = [groups[name][key][metric] for key in keys]
        return np.array([v[0] if isinstance(v, list) else v for v in values])

    first, *others = groups
    lines = [
        [name, len(rows), *(over_seeds(numbers(name, m, rows)) for m in titles)]
        for name, rows in groups.items()
    ]
    for name in others:
        both = [key for key in groups[first] if key in groups[name]]
        cells = (numbers(name, m, both) - numbers(first, m, both) for m in titles)
        lines.append([f"{name} less {first}", len(both), *map(over_seeds, cells)])
    columns = [", ".join(field.split(".")[-1] for field in fields), f"{over}s"]
    table = markdown([*columns, *titles.values()], lines)
    return table + f"\nMeans with 95 % intervals of Student's t over {over}s.\n"


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


def _effect(values) -> str:
    """Small effects with a digit more, so that what excludes zero is seen to."""
    return interval(values, digits=3 if abs(values[0]) >= 0.1 else 4)


def _made(record, seeds) -> str:
    environment = record["environment"]
    return (
        f"\n{seeds}; {record['seconds'] / 60:.0f} minutes on "
        f"{environment['device']}; commit {environment['commit'][:12]}.\n"
    )


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
                interval(differences["SFT"]["right"]),
                interval(differences["control"]["right"]),
                interval(differences["SFT"]["reward"]),
                interval(models["DPO"]["kl"]),
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
            *(interval(found[part], digits=0) for part in ("returned", "likeliest")),
            *(interval(found[part], digits=2) for part in ("share", "kl", "ndcg")),
            found["temperature"],
        ]
        for found in record["results"]["distillation"]
    ]
    columns = ["task", "student", "return", "at likeliest actions", "of our teacher"]
    columns += ["KL, nats", "NDCG", "T"]
    made = f"{record['config']['distillation']['num_seeds']} paired seeds"
    students = markdown(columns, rows)
    return students + "\n" + _verdicts(record) + _made(record, made)


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
                interval([100 * x for x in row[key]], digits=1)
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
            interval(arm["sft_loss"]),
            *(interval(arm["sft"][part]) for part in ("kl", "reward")),
            interval(arm["sft_accuracy"]),
            *(interval(arm["dpo"][part]) for part in ("reward", "right", "wins")),
        ]
        for arm in found["arms"]
    ]
    columns = ["arm", "validation loss of SFT", "KL of SFT to the base"]
    columns += ["reward after SFT", "preference accuracy of SFT", "reward after DPO"]
    columns += ["right after DPO", "win rate over the expert"]
    return markdown(columns, rows)


def bridge_choices(records) -> str:
    """What each arm has chosen on the tuning seeds, and of what for DPO."""
    found = _bridge(records, "stages")
    if found is None:
        return "not run\n"
    told = "at_ends" in found["arms"][0]
    rows = []
    for arm in found["arms"]:
        setting = arm["setting"]
        knob = "-" if setting["knob"] is None else f"{setting['knob']:g}"
        row = [arm["arm"], knob, *(f"{setting[k]:g}" for k in ("dpo_beta", "dpo_rate"))]
        rows.append([*row, *([", ".join(arm["at_ends"])] if told else [])])
    stages = records[BRIDGE_RECORD]["config"]["stages"]

    def listed(values):
        return ", ".join(f"{value:g}" for value in values)

    joint = [found["rate"] * fraction for fraction in stages["joint_rates"]]
    text = (
        f"\nTried: beta {listed(stages['dpo_betas'])}; learning rates "
        f"{listed(stages['dpo_rates'])}, of joint training {listed(joint)}. An arm "
        f"with a number of its own tries its values at one beta.\n"
    )
    columns = ["arm", "its own number", "DPO's beta", "DPO's learning rate"]
    columns += ["at an end of what it tried"] if told else []
    return markdown(columns, rows) + text


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
        [row["signal"], *(interval(row[key]) for key in measures)]
        for row in found["signals"]
    ]
    made = (
        f"{record['config']['values']['num_seeds']} seeds; the SFT model wins "
        f"{interval(found['won'])} of the rooms, pi* "
        f"{interval(found['won_by_best'])}"
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
