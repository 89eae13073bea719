"""Sections of a report that experiments share: rewards, behaviour, stages, samples."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from experiments.worlds.pipeline import Measured, prompt_text
from pref_jax import report
from pref_jax.evals import preference
from pref_jax.evals.preference import bootstrap_interval, wins
from pref_jax.train.loop import Fitted


def estimate(values, interval: Callable = bootstrap_interval) -> report.Estimate:
    """Mean of values, one a prompt or a seed, with its 95 % interval."""
    return report.Estimate(*interval(values))


def series(
    name: str,
    x: Sequence[float],
    values: Sequence,
    interval: Callable = bootstrap_interval,
) -> report.Series:
    """A line of means with a band of 95 % intervals.

    Args:
      name: of the line.
      x: where the points stand.
      values: f64[points, seeds].
      interval: values -> (mean, low, high).
    """
    found = [interval(at_point) for at_point in values]
    means, lows, highs = zip(*found, strict=True)
    return report.Series(name, tuple(map(float, x)), means, lows, highs)


def reward_table(measured: Mapping[str, Measured], *, against: str) -> report.Table:
    """True reward and its parts by model, and the win rate over one of them."""
    parts = list(measured[against].parts)
    base = measured[against].per_prompt("reward")
    table = []
    for name, m in measured.items():
        cells = [estimate(m.per_prompt(part)) for part in parts]
        won = None if name == against else estimate(wins(m.per_prompt("reward"), base))
        table.append((name, *cells, won))
    return report.Table(
        "True reward",
        columns=(
            report.Column("model"),
            *(report.Column(part, digits=3) for part in parts),
            report.Column(f"win rate over {against}", digits=1, percent=True),
        ),
        rows=tuple(table),
        note="Means over held-out prompts, with 95 % intervals. A tie is half a win.",
    )


def difference_table(
    measured: Mapping[str, Measured], name: str, others: Sequence[str]
) -> report.Table:
    """A model's true reward minus others', paired over prompts."""
    parts = list(measured[name].parts)

    def difference(other, part):
        return measured[name].per_prompt(part) - measured[other].per_prompt(part)

    return report.Table(
        "Paired differences in true reward",
        columns=(
            report.Column("comparison"),
            *(report.Column(part, digits=3) for part in parts),
        ),
        rows=tuple(
            (f"{name} - {other}", *(estimate(difference(other, p)) for p in parts))
            for other in others
        ),
        note="Paired over prompts, with 95 % intervals.",
    )


def behaviour_table(
    measured: Mapping[str, Measured],
    preferences: Mapping[str, Mapping[str, np.ndarray]],
    *,
    reference: str,
) -> report.Table:
    """Length, KL to the reference, and implicit-reward accuracy by model."""
    table = []
    for name, m in measured.items():
        pairs = preferences.get(name)
        table.append(
            (
                name,
                estimate(m.length.mean(axis=1)),
                float(m.ended.mean()),
                estimate(m.kl),
                None if pairs is None else estimate(pairs["accuracy"]),
                None if pairs is None else estimate(pairs["margin"]),
            )
        )
    return report.Table(
        "Behaviour",
        columns=(
            report.Column("model"),
            report.Column("length", digits=1, unit="tokens"),
            report.Column("ended", digits=1, percent=True),
            report.Column(f"KL to {reference}", digits=4, unit="nats / token"),
            report.Column("preference accuracy", digits=1, percent=True),
            report.Column("reward margin", digits=3, unit="nats"),
        ),
        rows=tuple(table),
        note="KL is exact, over the whole vocabulary, on the model's own responses. "
        "Accuracy and margin are of the implicit reward on held-out pairs.",
    )


def cells_table(
    accuracy: np.ndarray,
    margin: np.ndarray,
    lengths: np.ndarray,
    fields: Mapping[str, Sequence],
) -> report.Table:
    """Accuracy of an implicit reward by length and by the fields of the rows.

    Args:
      accuracy: f[N], of each held-out pair.
      margin: f[N], nats.
      lengths: [N, 2], tokens.
      fields: name -> one value a pair.
    """
    rewards = np.stack([margin, np.zeros_like(margin)], axis=1)
    named = [("all", preference.Cell("", bootstrap_interval(accuracy), len(accuracy)))]
    named += [
        (f"chosen is {cell.name}", cell)
        for cell in preference.accuracy_by_length(rewards, lengths=lengths)
    ]
    for name, values in fields.items():
        named += [
            (f"{name} = {cell.name}", cell)
            for cell in preference.by_field(accuracy, field=values)
        ]
    error = preference.calibration(margin).error
    return report.Table(
        "Held-out pairs in groups",
        columns=(
            report.Column("pairs"),
            report.Column("number"),
            report.Column("preference accuracy", digits=1, percent=True),
        ),
        rows=tuple(
            (name, cell.count, cell.interval and report.Estimate(*cell.interval))
            for name, cell in named
        ),
        note=f"Accuracy of DPO's implicit reward, with 95 % intervals. Over all pairs "
        f"its log loss is {preference.log_loss(margin).mean():.3f} nats (an undecided "
        f"one has 0.693), its Brier score {preference.brier_score(margin).mean():.3f} "
        f"(0.25), its expected calibration error {error:.3f}.",
    )


def stage_table(stages: Mapping[str, Fitted]) -> report.Table:
    """Updates and time of each stage."""
    return report.Table(
        "Stages",
        columns=(
            report.Column("stage"),
            report.Column("updates"),
            report.Column("best validation at"),
            report.Column("time", digits=0, unit="s"),
        ),
        rows=tuple(
            (name, fitted.steps, fitted.best_step, float(fitted.seconds))
            for name, fitted in stages.items()
        ),
        note="Time in updates: sampling and evaluation are not in it.",
    )


def training_curves(folder: pathlib.Path, stages: Sequence[str]) -> report.Curves:
    """Loss, and accuracy and margin where a stage has them, from its metrics."""
    panels = []
    for stage in stages:
        metrics = report.read_metrics(folder / stage / "metrics.jsonl")
        for name, label in (
            ("loss", "loss, nats"),
            ("rewards/accuracy", "reward accuracy"),
            ("rewards/margin", "reward margin, nats"),
        ):
            series = tuple(
                report.Series(shown, *(tuple(x.tolist()) for x in metrics[key]))
                for key, shown in (
                    (name, "training"),
                    (f"validation/{name}", "held out"),
                )
                if key in metrics
            )
            if series:
                title = f"{stage}: {name.split('/')[-1]}"
                panels.append(report.Panel(title, "update", label, series))
    return report.Curves("Training", tuple(panels))


def sample_table(
    measured: Mapping[str, Measured], prompts: Sequence, *, num_shown: int = 8
) -> report.Samples:
    """The first response of each model to the first prompts."""

    def response(m: Measured, i: int) -> report.Response:
        scores = {part: float(values[i, 0]) for part, values in m.parts.items()}
        return report.Response(
            m.texts[i][0],
            verdict=", ".join(f"{part} {value:.2f}" for part, value in scores.items()),
            right=bool(scores["right"]) if "right" in scores else None,
        )

    return report.Samples(
        "Responses side by side",
        columns=tuple(measured),
        rows=tuple(
            report.Sample(
                prompt_text(prompt), tuple(response(m, i) for m in measured.values())
            )
            for i, prompt in enumerate(prompts[:num_shown])
        ),
        note="The first response of each model to the first held-out prompts.",
    )
