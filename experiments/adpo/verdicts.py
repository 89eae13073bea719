"""The claims of the paper, what each would have to show here, and whether it does.

A claim is judged by differences between runs of one seed, averaged over scenarios
where it speaks of several, with a bootstrap interval over seeds. What a claim needs to
hold was written before anything was run. With ten seeds, percentile intervals are a
little narrow.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np

from experiments.adpo import distillation, language, online
from experiments.adpo.arms import ADPO, ALL_PAIRS, ARMS, LIST, ONE_PAIR, SAME_PAIRS
from experiments.worlds import bandits
from experiments.worlds.claims import FAILS, HOLDS, NOT_TESTABLE, Verdict
from pref_jax.evals.preference import Interval, bootstrap_interval

_BEST_IN = 9  # scenarios of the first claim; the paper's
_LEAST_GAIN = 0.12  # over DPO; the abstract's lower end
_DYNAMIC_GAIN = 0.05  # of a moving anchor; the abstract's lower end
_HEAVIEST = "cauchy, heavy"
DYNAMIC = "snapshot, every 50"
"""The moving anchor that the fourth claim is judged by, chosen beforehand."""


@dataclasses.dataclass(frozen=True)
class Student:
    """A distilled policy, with intervals over seeds.

    Attributes:
      task: name of the task.
      name: of the student.
      temperature: that it was reported at.
      returned: mean return of an episode.
      likeliest: the same where the likeliest action is taken.
      gain: the return as a share of the teacher's, both less that of an untrained
        policy. Returns may be negative, and none is what nobody has learnt.
      share: the return as a share of the teacher's, as the paper's text has it.
      kl: KL(teacher || student), nats.
      ndcg: of the student's order of the candidates.
    """

    task: str
    name: str
    temperature: float
    returned: Interval
    likeliest: Interval
    gain: Interval
    share: Interval
    kl: Interval
    ndcg: Interval


class Measured:
    """Results of the jobs as arrays.

    Args:
      results: of `run_jobs`, by name.
    """

    def __init__(self, results: Mapping[str, dict]):
        self._results = results

    def has(self, part: str) -> bool:
        """Whether this part was run: "bandits", "online" and so on."""
        return any(name.startswith(f"{part}/") for name in self._results)

    def of(self, job: str, measure: str = "win_mass") -> np.ndarray:
        """f64[scenarios, seeds]; of a sweep the scenarios of medium severity."""
        return np.array(self._results[f"bandits/{job}"][measure], float)

    def arm(self, name: str, measure: str = "win_mass") -> np.ndarray:
        """Of an arm on the twelve scenarios: f64[scenarios, seeds]."""
        return self.of(f"test/{name}", measure)

    @property
    def flip_rates(self) -> list[float]:
        """Shares of wrong labels of the language-model part, in order."""
        ours = [name for name in self._results if name.endswith(f"/{language.ADPO}")]
        rates = {n.split("/")[1] for n in ours if n.startswith("language/")}
        return sorted(map(float, rates))

    def language(self, rate: float, name: str, measure: str = "reward") -> np.ndarray:
        """Of an arm of the language-model part: f64[seeds]."""
        return np.array(self._results[f"language/{rate}/{name}"][measure], float)

    def distillation(self, task: str, student: str, measure: str) -> np.ndarray:
        """Of a student: f64[seeds]."""
        return np.array(self._results[f"distillation/{task}/{student}"][measure], float)

    @property
    def tasks(self) -> list[str]:
        """Tasks of the distillation, in order."""
        found = (name.split("/") for name in self._results)
        return list(dict.fromkeys(p[1] for p in found if p[0] == "distillation"))

    def teacher(self, task: str) -> tuple[float, float, float]:
        """Returns of a task's teacher, of no training, of its likeliest actions."""
        found = self._results[f"distillation/{task}/{distillation.TEACHER}"]
        return found["return"], found["untrained"], found["likeliest"]

    def students(self) -> list[Student]:
        """Every student of every task."""
        return [
            self._student(task, name)
            for task in self.tasks
            for name in distillation.STUDENTS
        ]

    def _student(self, task: str, name: str) -> Student:
        found = {
            part: self.distillation(task, name, part)
            for part in ("return", "likeliest", "kl", "ndcg")
        }
        returned, (full, none, _) = found["return"], self.teacher(task)
        return Student(
            task=task,
            name=name,
            temperature=self._results[f"distillation/{task}/{name}"]["temperature"],
            returned=bootstrap_interval(returned),
            likeliest=bootstrap_interval(found["likeliest"]),
            gain=bootstrap_interval((returned - none) / (full - none)),
            share=bootstrap_interval(returned / full),
            kl=bootstrap_interval(found["kl"]),
            ndcg=bootstrap_interval(found["ndcg"]),
        )

    def online(self, anchor: str) -> np.ndarray:
        """Win mass along the way: f64[scenarios, seeds, points]."""
        return np.array(self._results[f"online/{anchor}"]["win_mass"], float)


def strongest(measured: Measured, rivals) -> list[str]:
    """The rival of the highest mean win mass in each scenario."""
    means = np.stack([measured.arm(name).mean(-1) for name in rivals])
    return [rivals[i] for i in means.argmax(0)]


def informed(sees: tuple[str, ...]) -> list[str]:
    """Arms that see this and do not fit a distribution over the list."""
    return [a.name for a in ARMS.values() if a.sees in sees and a.targets is None]


def _best_of_twelve(measured: Measured, sees, claim, needed) -> Verdict:
    rivals = informed(sees)
    ours = measured.arm(ADPO)
    differences = np.stack([ours - measured.arm(name) for name in rivals])
    lows = [
        min(bootstrap_interval(of_rival[i]).low for of_rival in differences)
        for i in range(len(ours))
    ]
    num_best = sum(low > 0 for low in lows)
    best = strongest(measured, rivals)
    effect = np.stack([ours[i] - measured.arm(n)[i] for i, n in enumerate(best)])
    return Verdict(
        claim=claim,
        needed=needed,
        effect=bootstrap_interval(effect.mean(0)),
        unit="win mass over the strongest rival, mean of 12 scenarios",
        verdict=HOLDS if num_best >= _BEST_IN else FAILS,
        note=f"{ADPO} is above every rival, the interval excluding zero, in {num_best} "
        f"of {len(ours)} scenarios. Strongest rivals: "
        + ", ".join(f"{name} ({best.count(name)})" for name in dict.fromkeys(best))
        + ".",
    )


def _listwise_best(measured: Measured) -> Verdict:
    return _best_of_twelve(
        measured,
        (ALL_PAIRS, LIST),
        "The listwise form is the best in most scenarios, at equal information.",
        f"above every rival that sees all labels of a list, in {_BEST_IN} of 12",
    )


def _listwise_best_of_one_pair(measured: Measured) -> Verdict:
    return _best_of_twelve(
        measured,
        (ONE_PAIR,),
        "The same against methods that see one pair of the list, which is no "
        "comparison of losses.",
        f"above every rival that sees one pair, in {_BEST_IN} of 12",
    )


def _gain(measured: Measured, rival: str) -> Verdict:
    ours, theirs = measured.arm(ADPO), measured.arm(rival)
    gains = (ours - theirs) / theirs
    lows = [bootstrap_interval(of_scenario).low for of_scenario in gains]
    means = gains.mean(-1)
    return Verdict(
        claim=f"Gains of 12 to 93 % over standard DPO in all 12 scenarios ({rival}).",
        needed=f"at least {_LEAST_GAIN:.0%} in each, the interval excluding zero",
        effect=bootstrap_interval(gains.mean(0)),
        unit="relative gain in win mass, mean of 12 scenarios",
        verdict=HOLDS if min(lows) > 0 and means.min() >= _LEAST_GAIN else FAILS,
        note=f"from {means.min():.1%} to {means.max():.1%} over the scenarios",
    )


def _anchored(measured: Measured, with_anchor: str, without: str) -> Verdict:
    difference = measured.arm(with_anchor) - measured.arm(without)
    effect = bootstrap_interval(difference.mean(0))
    above = sum(bootstrap_interval(d).low > 0 for d in difference)
    below = sum(bootstrap_interval(d).high < 0 for d in difference)
    return Verdict(
        claim=f"Anchoring helps on the same data: {with_anchor} against {without}.",
        needed="a mean difference whose interval is above zero",
        effect=effect,
        unit="win mass, mean of 12 scenarios",
        verdict=HOLDS if effect.low > 0 else FAILS,
        note=f"above zero in {above} scenarios, below in {below}",
    )


def _ranks(measured: Measured) -> Verdict:
    place = list(bandits.SCENARIOS).index(_HEAVIEST)
    difference = measured.arm(f"{ADPO}, KDE") - measured.arm(ADPO)
    effect = bootstrap_interval(difference[place])
    return Verdict(
        claim="Smoothed ranks beat raw labels under heavy tails.",
        needed=f"a difference above zero in {_HEAVIEST}",
        effect=effect,
        unit="win mass",
        verdict=HOLDS if effect.low > 0 else FAILS,
    )


def _dynamic(measured: Measured) -> Verdict:
    def gains(name):
        fixed, moving = (measured.online(n)[..., -1] for n in (online.FIXED, name))
        return ((moving - fixed) / fixed).mean(0)

    effect = bootstrap_interval(gains(DYNAMIC))
    others = [name for name in online.ANCHORS if name not in (online.FIXED, DYNAMIC)]
    return Verdict(
        claim="Online, a moving anchor beats the fixed one by 5 to 11 %.",
        needed=f"{DYNAMIC}: at least {_DYNAMIC_GAIN:.0%}, the interval above zero",
        effect=effect,
        unit="relative gain in win mass, mean of 4 scenarios",
        verdict=HOLDS if effect.low > 0 and effect.mean >= _DYNAMIC_GAIN else FAILS,
        note="; ".join(
            f"{name}: {mean:.1%} [{low:.1%}, {high:.1%}]"
            for name in others
            for mean, low, high in [bootstrap_interval(gains(name))]
        ),
    )


def _language(measured: Measured, rival: str) -> Verdict:
    rate = max(measured.flip_rates)
    ours, theirs = (measured.language(rate, n) for n in (language.ADPO, rival))
    effect = bootstrap_interval(ours - theirs)
    return Verdict(
        claim=f"On a language model with wrong labels, the listwise form beats {rival} "
        f"(the paper's claim for bandits, carried over).",
        needed=f"{rate:.0%} of the lists negated: a difference above zero",
        effect=effect,
        unit="true reward",
        verdict=HOLDS if effect.low > 0 else FAILS,
        note="; ".join(
            f"{other:.0%} negated: {mean:.3f} [{low:.3f}, {high:.3f}]"
            for other in measured.flip_rates
            if other != rate
            for mean, low, high in [
                bootstrap_interval(
                    measured.language(other, language.ADPO)
                    - measured.language(other, rival)
                )
            ]
        ),
    )


def _distillation(measured: Measured, task: str, student: str, part: str) -> Verdict:
    def over_kd(part):
        ours, kd = (
            measured.distillation(task, name, part)
            for name in (student, distillation.KD)
        )
        return bootstrap_interval(kd - ours if part == "kl" else ours - kd)

    effect = over_kd(part)
    what, unit = {
        "kl": ("stays nearer to its teacher", "KL of plain distillation less its own"),
        "return": ("returns more", "return less that of plain distillation"),
    }[part]
    means = (
        measured.distillation(task, name, part).mean()
        for name in (student, distillation.KD)
    )
    note = "{:.4g} against {:.4g}, means".format(*means)
    if part == "return":
        control = over_kd("likeliest")
        note += "; at the likeliest actions {:.4g} [{:.4g}, {:.4g}]".format(*control)
    return Verdict(
        claim=f"Distilled on {task}, the student {student} {what} than plain "
        f"distillation at its best temperature.",
        needed="a difference above zero",
        effect=effect,
        unit=unit + ", nats" * (part == "kl"),
        verdict=HOLDS if effect.low > 0 else FAILS,
        note=note,
    )


_PUBLISHED = Verdict(
    claim="Distillation: 279.3 against -309.0 on HalfCheetah, and 4 to 49 times less "
    "divergence.",
    needed="the unpublished teacher",
    effect=None,
    unit="",
    verdict=NOT_TESTABLE,
    note="279.3 is the return of a student anchored to its own start, 3.3 % of its "
    "teacher's 8476.5, and -309.0 that of plain distillation (December text).",
)

CLAIMS: Mapping[str, tuple[Callable[[Measured], Verdict], ...]] = {
    "bandits": (
        _listwise_best,
        _listwise_best_of_one_pair,
        lambda measured: _gain(measured, "DPO, one pair"),
        lambda measured: _gain(measured, "DPO, all pairs"),
        *(lambda measured, arms=a: _anchored(measured, *arms) for a in SAME_PAIRS),
        _ranks,
    ),
    "online": (_dynamic,),
    "language": tuple(
        lambda measured, rival=arm.name: _language(measured, rival)
        for arm in language.ARMS
        if arm.name != language.ADPO
    ),
}
"""What is claimed of each part; of the distillation, for each of its tasks."""

_OF_STUDENTS = ("self-anchor", "return"), ("self-anchor EMA", "kl")


def judge(results: Mapping[str, dict]) -> list[Verdict]:
    """Every claim about what was run, by the results of all jobs."""
    measured = Measured(results)
    found = [
        claim(measured)
        for part, claims in CLAIMS.items()
        if measured.has(part)
        for claim in claims
    ]
    if measured.has("distillation"):
        found += [
            _distillation(measured, task, *of)
            for task in measured.tasks
            for of in _OF_STUDENTS
        ]
        found.append(_PUBLISHED)
    return found
