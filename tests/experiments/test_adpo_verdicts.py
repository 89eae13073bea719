"""ADPO's claims: each can hold and can fail, and is judged by what was run."""

import numpy as np
import pytest

from experiments.adpo import distillation, language, online, verdicts
from experiments.adpo.arms import ADPO, ARMS
from experiments.worlds import bandits

SEEDS = np.linspace(-0.01, 0.01, 10)


def results(**win_mass):
    """Results in which every method has 0.3 but for what is given."""
    found = {}
    for name in ARMS:
        mass = np.full((12, 10), win_mass.get(name, 0.3)) + SEEDS
        found[f"bandits/test/{name}"] = {"win_mass": mass.tolist()}
    for name in online.ANCHORS:
        mass = np.full((4, 10, 3), win_mass.get(f"online {name}", 0.5))
        found[f"online/{name}"] = {"win_mass": mass.tolist()}
    for task in ("CartPole", "Hopper-v5"):
        teacher = {"return": 200.0, "untrained": -50.0, "likeliest": 220.0}
        found[f"distillation/{task}/{distillation.TEACHER}"] = teacher
        for name in distillation.STUDENTS:
            start = {"return": 100.0 + 100 * SEEDS[:5], "kl": 0.5 + SEEDS[:5]}
            values = {
                part: (value + win_mass.get(f"{name} {part}", 0.0)).tolist()
                for part, value in start.items()
            }
            values |= {"likeliest": [150.0] * 5}
            values |= {"ndcg": [0.9] * 5, "temperature": 2.0}
            found[f"distillation/{task}/{name}"] = values
    for rate in (0.0, 0.2, 0.4):
        for arm in language.ARMS:
            reward = win_mass.get(f"language {arm.name}", 0.6) + SEEDS[:5] - rate
            found[f"language/{rate}/{arm.name}"] = {"reward": reward.tolist()}
    return found


def verdict(found, start):
    (only,) = (v for v in verdicts.judge(found) if v.claim.startswith(start))
    return only


def test_the_best_of_all_informed_methods_is_a_claim_that_can_fail():
    claim = "The listwise form is the best"
    assert verdict(results(**{ADPO: 0.4}), claim).verdict == verdicts.HOLDS
    assert verdict(results(), claim).verdict == verdicts.FAILS
    beaten = results(**{ADPO: 0.4, "DPO, all pairs": 0.5})
    found = verdict(beaten, claim)
    assert found.verdict == verdicts.FAILS
    assert found.effect.mean == pytest.approx(-0.1)
    assert "in 0 of 12 scenarios. Strongest rivals: DPO, all pairs (12)" in found.note
    # A method with one pair is no rival at equal information, and an own variant none.
    other = results(**{ADPO: 0.4, "DPO, one pair": 0.5, f"{ADPO}, EMA": 0.5})
    assert verdict(other, claim).verdict == verdicts.HOLDS
    assert verdict(other, "The same against").verdict == verdicts.FAILS


def test_gains_are_relative_to_the_rival_and_needed_in_every_scenario():
    claim = "Gains of 12 to 93 % over standard DPO in all 12 scenarios (DPO, one"
    found = verdict(results(**{ADPO: 0.36}), claim)
    assert found.verdict == verdicts.HOLDS
    assert found.effect.mean == pytest.approx(0.2, rel=0.01)
    assert verdict(results(**{ADPO: 0.33}), claim).verdict == verdicts.FAILS
    one_less = results(**{ADPO: 0.36})
    one_less[f"bandits/test/{ADPO}"]["win_mass"][7] = (0.31 + SEEDS).tolist()
    assert verdict(one_less, claim).verdict == verdicts.FAILS


def test_an_anchor_helps_if_the_interval_is_above_zero():
    claim = "Anchoring helps on the same data: DPO, one pair"
    assert verdict(results(), claim).verdict == verdicts.FAILS
    better = verdict(results(**{"DPO, one pair": 0.31}), claim)
    assert better.verdict == verdicts.HOLDS
    assert better.note == "above zero in 12 scenarios, below in 0"


def test_ranks_are_judged_in_the_heaviest_tails_alone():
    claim = "Smoothed ranks beat raw labels"
    found = results()
    place = list(bandits.SCENARIOS).index("cauchy, heavy")
    rows = found[f"bandits/test/{ADPO}, KDE"]["win_mass"]
    rows[:] = [(0.2 + SEEDS).tolist()] * 12
    assert verdict(found, claim).verdict == verdicts.FAILS
    rows[place] = (0.4 + SEEDS).tolist()
    assert verdict(found, claim).verdict == verdicts.HOLDS


def test_a_moving_anchor_must_gain_five_per_cent_at_the_end():
    claim = "Online, a moving anchor"
    for mass, expected in ((0.53, verdicts.HOLDS), (0.51, verdicts.FAILS)):
        found = verdict(results(**{f"online {verdicts.DYNAMIC}": mass}), claim)
        assert found.verdict == expected
        assert found.effect.mean == pytest.approx(mass / 0.5 - 1)
    assert "EMA: 0.0% [0.0%, 0.0%]" in found.note


def test_a_language_model_is_judged_where_most_labels_are_wrong():
    claim = "On a language model with wrong labels, the listwise form beats DPO"
    assert verdict(results(), claim).verdict == verdicts.FAILS
    found = verdict(results(**{"language ADPO list": 0.7}), claim)
    assert found.verdict == verdicts.HOLDS
    assert found.effect.mean == pytest.approx(0.1)
    assert found.needed.startswith("40% of the lists")
    assert "0% negated: 0.100 [0.100, 0.100]; 20% negated" in found.note


def test_students_are_judged_by_what_they_return_and_how_far_they_are():
    claims = {
        "return": "Distilled on CartPole, the student self-anchor returns more",
        "kl": "Distilled on CartPole, the student self-anchor EMA stays nearer",
    }
    for claim in claims.values():
        assert verdict(results(), claim).verdict == verdicts.FAILS
    more = results(**{"self-anchor return": 9.0})
    assert verdict(more, claims["return"]).verdict == verdicts.HOLDS
    nearer = verdict(results(**{"self-anchor EMA kl": -0.2}), claims["kl"])
    assert nearer.verdict == verdicts.HOLDS
    assert nearer.effect.mean == pytest.approx(0.2)


def test_distillation_is_quoted_and_never_as_ours():
    found = verdict(results(), "Distillation: 279.3")
    assert (found.verdict, found.effect) == (verdicts.NOT_TESTABLE, None)


def test_only_what_was_run_is_judged():
    everything = results()
    claims = [v.claim for v in verdicts.judge(everything)]
    assert len(claims) == sum(map(len, verdicts.CLAIMS.values())) + 2 * 2 + 1
    for part in ("bandits", "online", "language", "distillation"):
        alone = {k: v for k, v in everything.items() if k.startswith(f"{part}/")}
        found = [v.claim for v in verdicts.judge(alone)]
        assert found == [claim for claim in claims if claim in found] != []
        claims = [claim for claim in claims if claim not in found]
    assert claims == []


def test_a_student_is_a_share_of_its_teacher_and_of_what_it_learnt():
    first, *_, last = verdicts.Measured(results()).students()
    assert (first.task, first.name) == ("CartPole", distillation.KD)
    assert (last.task, last.name) == ("Hopper-v5", "teacher-anchor")
    assert first.returned.mean == pytest.approx(99.44, abs=0.01)
    assert first.share.mean == pytest.approx(99.44 / 200, abs=1e-4)
    assert first.gain.mean == pytest.approx(149.44 / 250, abs=1e-4)
    assert (first.temperature, first.ndcg.mean) == (2.0, pytest.approx(0.9))
