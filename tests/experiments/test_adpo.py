"""ADPO: the facts of the method, the suite's arms, its command."""

import dataclasses
import json
import os
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from etils import epath

import tiny_stage
from experiments.adpo import distillation, language, online, suite, verdicts
from experiments.adpo.__main__ import make_jobs
from experiments.adpo.arms import (
    ADPO,
    ALL_PAIRS,
    ANCHORS,
    ARMS,
    LIST,
    ONE_PAIR,
    SAME_PAIRS,
    Setting,
)
from experiments.adpo.config import SMALL, SMOKE
from experiments.worlds import bandits
from experiments.worlds.methods import AdaptiveTau, make_adpo
from pref_jax import anchors, targets
from pref_jax.data import sources
from pref_jax.losses.pairwise import dpo_loss
from pref_jax.method import objective
from pref_jax.train.state import init_state
from pref_jax.train.step import make_train_step
from pref_jax.types import Scores

WORLD = dataclasses.replace(
    SMOKE.bandits.world, num_train=64, num_validation=32, num_test=32, hidden=8
)
CONFIG = dataclasses.replace(
    SMOKE.bandits, world=WORLD, num_steps=6, num_tuning_seeds=1, runs_at_once=4
)
SETTING = Setting(tau=0.7, temperature=0.4, learning_rate=1e-3)


# --- facts of the method, on tables of logits -----------------------------------------


class Table:
    """One context whose log-probabilities are a table."""

    def logps(self, params, context, items):
        del items
        return jnp.broadcast_to(jax.nn.log_softmax(params), (len(context), len(params)))


LABELS = jnp.array([1.0, -0.5, 0.3, 0.0])
START = jnp.array([0.2, -0.1, 0.4, -0.6])


def optimise(anchor, *, start, tau, num_steps, anchor_params=None, make_targets=None):
    """The table after full training; the anchor starts at `anchor_params`."""
    if make_targets is None:
        make_targets = lambda labels: targets.softmax(labels, temperature=1.0)  # noqa: E731
    method = bandits.make_list_method(
        "list", anchor, beta=1 / tau, make_targets=make_targets
    )
    optimizer = optax.sgd(tau**2)
    step = jax.jit(make_train_step(method, Table(), optimizer))
    anchor_params = start if anchor_params is None else anchor_params
    state = init_state(start, optimizer, rng=jax.random.key(0), anchor=anchor_params)
    batch = bandits.make_batch(
        jnp.zeros((1, 1)), jnp.zeros((1, 4, 1)), LABELS[None], bandits.all_pairs(4)
    )
    for _ in range(num_steps):
        state, _ = step(state, batch)
    return jax.nn.softmax(state.params)


def power(anchor_logits, tau):
    """pi_anchor q^tau, normalised."""
    return jax.nn.softmax(jax.nn.log_softmax(anchor_logits) + tau * LABELS)


@pytest.mark.parametrize("tau", [0.5, 1.0, 2.0])
def test_the_optimum_is_the_anchor_times_the_target_to_the_power_of_tau(tau):
    found = optimise(ANCHORS["fixed"], start=START, tau=tau, num_steps=400)
    np.testing.assert_allclose(found, power(START, tau), rtol=1e-4)


def test_without_an_anchor_the_optimum_is_the_target():
    found = optimise(ANCHORS["none"], start=START, tau=1.0, num_steps=400)
    np.testing.assert_allclose(found, jax.nn.softmax(LABELS), rtol=1e-4)


def test_every_renewal_of_the_anchor_multiplies_by_the_target_again():
    every = anchors.snapshot(every=400, score=bandits.score)
    found = optimise(every, start=START, tau=0.5, num_steps=3 * 400)
    np.testing.assert_allclose(found, power(START, 3 * 0.5), rtol=1e-3)
    assert not np.allclose(found, power(START, 0.5), rtol=1e-2)


def test_an_anchor_that_is_renewed_each_update_still_trains_and_collapses():
    first, later, last = (
        optimise(ANCHORS["on policy"], start=START, tau=1.0, num_steps=n)
        for n in (1, 20, 400)
    )
    best = int(LABELS.argmax())
    assert jax.nn.softmax(START)[best] < first[best] < later[best] < last[best]
    assert last[best] > 0.99


def test_a_teacher_as_anchor_and_target_gives_more_than_the_teacher():
    teacher = jnp.array([0.5, 0.1, -0.3, 0.8])
    found = optimise(
        ANCHORS["fixed"],
        start=START,
        tau=2.0,
        num_steps=800,
        anchor_params=teacher,
        make_targets=lambda labels: jax.nn.softmax(teacher)[None],
    )
    np.testing.assert_allclose(found, jax.nn.softmax(3.0 * teacher), rtol=1e-3)


# --- arms -----------------------------------------------------------------------------


def draw(one_pair=False, world=WORLD):
    noise = bandits.Noise(gaussian=0.5)
    data = bandits.draw_data(jax.random.key(3), world, noise)
    train = data.train
    if one_pair:
        train = dataclasses.replace(train, pairs=data.one_pair)
    policy = bandits.Policy(world.size, world.hidden)
    params, anchor = (policy.init(jax.random.key(i)) for i in (0, 1))
    return train, policy, params, anchor


def gradient(arm, batch, policy, params, anchor, setting=SETTING):
    def mean(params):
        loss, weight, _ = objective(arm.method(setting), policy, params, anchor, batch)
        assert loss.shape == weight.shape == (len(batch.labels),)
        return loss.mean()

    return jax.grad(mean)(params)


def close(found, expected):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
        found,
        expected,
    )


@pytest.mark.slow
@pytest.mark.parametrize("one_pair", [True, False])
def test_the_arm_of_dpo_is_dpo_with_beta_one_over_tau(one_pair):
    batch, policy, params, anchor = draw(one_pair)

    def dpo(params):
        logps, anchor_logps = (
            policy.logps(p, batch.context, batch.items) for p in (params, anchor)
        )
        losses = []
        for m in range(batch.pairs.shape[1]):
            first, second = batch.pairs[:, m, 0], batch.pairs[:, m, 1]
            here = jnp.arange(len(first))
            better = batch.labels[here, first] > batch.labels[here, second]
            order = jnp.where(better, first, second), jnp.where(better, second, first)
            slots = jnp.stack(order, axis=-1)
            pairs = (jnp.take_along_axis(x, slots, 1) for x in (logps, anchor_logps))
            chosen, reference = pairs
            options = {"anchor_logps": reference, "beta": 1 / SETTING.tau}
            losses.append(dpo_loss(chosen, **options)[0])
        return jnp.stack(losses).mean()

    name = f"DPO, {ONE_PAIR if one_pair else ALL_PAIRS}"
    found = gradient(ARMS[name], batch, policy, params, anchor)
    close(found, jax.grad(dpo)(params))


@pytest.mark.slow
@pytest.mark.parametrize(("with_anchor", "without"), SAME_PAIRS)
def test_arms_of_a_pair_differ_in_their_anchor_alone(with_anchor, without):
    batch, policy, params, anchor = draw()
    uniform = jax.tree.map(jnp.zeros_like, anchor)
    close(
        gradient(ARMS[with_anchor], batch, policy, params, uniform),
        gradient(ARMS[without], batch, policy, params, anchor),
    )
    assert ARMS[with_anchor].grid == ARMS[without].grid
    assert ARMS[with_anchor].sees == ARMS[without].sees


def expected_advantage(policy, batch, params):
    labels = batch.labels - batch.labels.mean(-1, keepdims=True)
    advantages = labels / (batch.labels.std(-1, keepdims=True, ddof=1) + 1e-6)
    logps = policy.logps(params, batch.context, batch.items)
    return (jnp.exp(logps) * advantages).sum(-1).mean()


def test_before_the_first_update_ppo_follows_the_expected_advantage():
    batch, policy, params, _ = draw()
    found = gradient(ARMS["PPO"], batch, policy, params, params)
    expected = jax.grad(lambda p: -expected_advantage(policy, batch, p))(params)
    close(found, expected)


def test_the_penalty_of_the_policy_gradient_is_the_exact_divergence():
    batch, policy, params, anchor = draw()

    def objective_of(params):
        logps, anchor_logps = (
            policy.logps(p, batch.context, batch.items) for p in (params, anchor)
        )
        kl = (jnp.exp(logps) * (logps - anchor_logps)).sum(-1).mean()
        return SETTING.tau * kl - expected_advantage(policy, batch, params)

    found = gradient(ARMS["KL-penalised gradient"], batch, policy, params, anchor)
    close(found, jax.grad(objective_of)(params))


def test_every_arm_has_nine_settings_and_says_what_it_sees():
    for arm in ARMS.values():
        settings = arm.settings()
        assert len(settings) == 9 == len({dataclasses.astuple(s) for s in settings})
        assert arm.sees in (ONE_PAIR, ALL_PAIRS, LIST)
        assert arm.method(SETTING).name == arm.name


# --- the suite ------------------------------------------------------------------------


def cases(*seeds):
    settings = [SETTING, Setting(tau=2.0)]
    return [
        suite.Case(name, seed, setting)
        for name in ("gaussian, medium", "shift, heavy")
        for setting in settings
        for seed in seeds
    ]


@pytest.mark.slow
def test_runs_do_not_depend_on_what_is_computed_beside_them():
    options = {"num_steps": 4, "runs_at_once": 3}
    together = suite.run(ARMS[ADPO], WORLD, cases(0, 1), **options)
    alone = suite.run(ARMS[ADPO], WORLD, cases(1)[-1:], **options)
    assert together["test/win_mass"].shape == (8,)
    np.testing.assert_allclose(
        together["test/win_mass"][-1], alone["test/win_mass"][0], rtol=1e-4
    )
    # Another seed, scenario and setting are other runs.
    assert len(set(together["test/win_mass"].tolist())) == 8


@pytest.mark.slow
def test_arms_of_one_seed_start_from_one_reference():
    options = {"num_steps": 4, "runs_at_once": 2}
    still = dataclasses.replace(SETTING, learning_rate=0.0)
    lone = suite.Case("cauchy, light", 5, still)
    reference = suite.run(None, WORLD, [lone], **options)
    for name in ("DPO, one pair", ADPO):
        found = suite.run(ARMS[name], WORLD, [lone], **options)
        np.testing.assert_allclose(
            found["test/win_mass"], reference["test/win_mass"], rtol=1e-5
        )
        assert abs(found["test/kl"][0]) < 1e-6


@pytest.mark.slow
def test_training_on_clean_labels_finds_the_best_items():
    world = dataclasses.replace(WORLD, num_train=512, hidden=32)
    case = suite.Case("cauchy, light", 0, dataclasses.replace(SETTING, tau=1.0))
    options = {"num_steps": 150, "runs_at_once": 1}
    reference = suite.run(None, world, [case], **options)["test/win_mass"]
    for name in ("DPO, all pairs", ADPO, "PPO", "KL-penalised gradient"):
        setting = Setting(tau=1.0, temperature=0.25, learning_rate=3e-3)
        case = dataclasses.replace(case, setting=setting)
        found = suite.run(ARMS[name], world, [case], **options)["test/win_mass"]
        assert found[0] > reference[0] + 0.03, name


def test_a_setting_is_chosen_on_validation_and_never_on_tests(monkeypatch):
    arm, seen = ARMS[ADPO], []

    def run(arm, world, cases, **options):
        seen.extend(cases)
        settings = arm.settings()
        score = [settings.index(case.setting) == 4 for case in cases]
        worst = [settings.index(case.setting) == 0 for case in cases]
        return {
            "validation/win_mass": np.array(score, float),
            "test/win_mass": np.array(worst, float),
        }

    monkeypatch.setattr(suite, "run", run)
    found = suite._tune(arm, dataclasses.replace(CONFIG, num_tuning_seeds=2))
    assert found == dict.fromkeys(
        bandits.SCENARIOS, dataclasses.asdict(arm.settings()[4])
    )
    assert {case.seed for case in seen} == set(suite.tuning_seeds(2))
    assert not set(suite.tuning_seeds(2)) & set(range(CONFIG.num_seeds))
    assert len(seen) == 12 * 9 * 2


def test_a_setting_that_diverged_is_not_chosen():
    settings = ARMS[ADPO].settings()[:3]
    values = [[0.2, 0.2], [np.nan, 0.9], [0.3, 0.2]]
    assert suite.best_setting(settings, values) == settings[2]


def test_the_calibration_of_a_policy_at_its_optimum_is_equal():
    arm, batch = ARMS[ADPO], draw()[0]
    anchor_logps = jax.nn.log_softmax(batch.labels[:, ::-1])
    q = arm.targets(batch.labels, SETTING)
    logps = anchor_logps + SETTING.tau * jnp.log(q)
    counts, said, meant = suite._calibration(
        arm, SETTING, logps, anchor_logps, batch.labels
    ).T
    assert counts.sum() == batch.labels.size
    np.testing.assert_allclose(said, meant, rtol=1e-5, atol=1e-6)
    assert np.allclose(said.sum(), len(batch.labels))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_steps": 0}, "`num_steps` must be 1"),
        ({"num_seeds": 10**4}, "below 10000"),
    ],
)
def test_sizes_of_the_suite_are_checked(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **change)


# --- online ---------------------------------------------------------------------------


def test_candidates_are_drawn_by_the_policy_without_replacement():
    logps = jnp.log(jnp.array([0.5, 0.3, 0.15, 0.05]))
    keys = jax.random.split(jax.random.key(0), 4)
    many = jnp.broadcast_to(logps, (20000, 4))
    drawn = np.asarray(online.draw_candidates(keys[0], many, 2))
    assert (drawn[:, 0] != drawn[:, 1]).all()
    first = np.bincount(drawn[:, 0], minlength=4) / len(drawn)
    np.testing.assert_allclose(first, jnp.exp(logps), atol=0.012)
    # The second is by what is left.
    after = drawn[drawn[:, 0] == 0, 1]
    second = np.bincount(after, minlength=4) / len(after)
    np.testing.assert_allclose(second, [0, 0.6, 0.3, 0.1], atol=0.02)


@pytest.mark.slow
def test_anchors_part_ways_once_they_move(monkeypatch):
    config = dataclasses.replace(
        SMOKE.online, world=WORLD, num_steps=8, measure_every=2, runs_at_once=2
    )
    setting = Setting(tau=1.0, temperature=0.5, learning_rate=5e-3)
    later = anchors.snapshot(every=4, score=bandits.score)
    never = anchors.snapshot(every=100, score=bandits.score)
    monkeypatch.setattr(
        online, "ANCHORS", online.ANCHORS | {"later": later, "never": never}
    )
    cases = [suite.Case("gaussian, medium", seed, setting) for seed in (0, 1)]
    curves = {
        name: online.run(name, config, cases)["test"]
        for name in ("fixed", "later", "never")
    }
    assert curves["fixed"].shape == (2, 5)
    np.testing.assert_allclose(curves["fixed"], curves["never"], rtol=1e-4)
    np.testing.assert_allclose(
        curves["fixed"][:, :3], curves["later"][:, :3], rtol=1e-4
    )
    assert (np.abs(curves["fixed"] - curves["later"])[:, 3:] > 1e-6).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_drawn": 1}, "2 <= num_drawn <= num_offered; got 1 and 32"),
        ({"num_steps": 601}, "multiple of `measure_every`; got 601 and 50"),
    ],
)
def test_sizes_of_the_online_part_are_checked(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL.online, **change)


# --- language -------------------------------------------------------------------------


def test_pairs_of_a_list_stand_with_the_higher_label_first():
    values = jnp.array([[1.0, 2.0, 3.0]])
    pairs, unequal = language.ordered_pairs(values, jnp.array([[0.5, 0.9, 0.5]]))
    np.testing.assert_array_equal(unequal, [[True, False, True]])
    np.testing.assert_array_equal(pairs[0, [0, 2]], [[2, 1], [2, 3]])
    turned, _ = language.ordered_pairs(values, -jnp.array([[0.5, 0.9, 0.5]]))
    np.testing.assert_array_equal(turned[0, [0, 2]], [[1, 2], [3, 2]])


def list_batch():
    """Two whole lists of three answers, and what a step asks of a batch."""
    shape = (2, 3, 2)
    logp = jax.random.normal(jax.random.key(0), shape)
    labels = jnp.array([[0.2, 0.9, 0.4], [0.7, 0.7, 0.1]])
    batch = types.SimpleNamespace(
        labels=labels,
        valid=jnp.ones((2, 3), bool),
        loss_mask=jnp.ones(shape, bool),
        extras={"anchor_logps": jax.random.normal(jax.random.key(1), shape)},
    )
    return Scores(logp=logp), batch


@pytest.mark.parametrize("arm", language.ARMS, ids=lambda arm: arm.name)
def test_an_arm_is_its_loss_on_all_pairs_of_unequal_labels(arm):
    scores, batch = list_batch()
    setting, rate = Setting(tau=2.0, temperature=0.3), 0.2
    method = arm.make(setting, rate)
    anchor_scores = method.anchor.scores(None, (), batch, scores)
    rewards = method.reward(scores, anchor_scores, batch)
    loss, metrics = method.loss(rewards, scores, batch)
    ratios = np.float64((scores.logp - batch.extras["anchor_logps"]).sum(-1))
    labels = np.float64(batch.labels)

    def softplus(x):
        return np.log1p(np.exp(x))

    def of_pair(margin):
        h = margin / 2.0
        right, wrong = softplus(-h), softplus(h)
        return {
            "DPO": right,
            "cDPO": (1 - rate) * right + rate * wrong,
            "robust DPO": ((1 - rate) * right - rate * wrong) / (1 - 2 * rate),
            "IPO": (margin - 2.0 / 2) ** 2,
        }[arm.name]

    for b in range(2):
        if arm.name == language.ADPO:
            q = np.exp(labels[b] / 0.3) / np.exp(labels[b] / 0.3).sum()
            said = np.exp(ratios[b] / 2) / np.exp(ratios[b] / 2).sum()
            expected = -(q * np.log(said)).sum()
        else:
            terms = [
                of_pair(ratios[b, i] - ratios[b, j])
                for i in range(3)
                for j in range(3)
                if labels[b, i] > labels[b, j]
            ]
            expected = np.mean(terms)
        np.testing.assert_allclose(loss[b], expected, rtol=1e-4)
    assert metrics["rewards/accuracy"][0].shape == (2,)


def test_wrong_labels_grow_with_their_share_and_differ_by_seed():
    few, many = (language.wrong_labels(4000, rate, 1) for rate in (0.2, 0.4))
    assert few.mean() == pytest.approx(0.2, abs=0.02)
    assert many.mean() == pytest.approx(0.4, abs=0.02)
    assert not (few & ~many).any()
    assert (few != language.wrong_labels(4000, 0.2, 2)).any()
    assert not language.wrong_labels(4000, 0.0, 1).any()


def test_a_share_of_one_half_says_nothing():
    with pytest.raises(
        ValueError, match=r"`flip_rates` must lie in \[0, 0.5\); got 0.5"
    ):
        dataclasses.replace(SMOKE.language, flip_rates=(0.5,))


def test_an_adaptive_tau_follows_the_entropy_and_the_grades_of_a_list():
    scores, batch = list_batch()
    entropy = jnp.array([0.2, 0.6])[:, None, None] * jnp.ones((2, 3, 2))
    scores = dataclasses.replace(scores, entropy=entropy)
    adaptive = AdaptiveTau(quality_weight=2.0, worst_grade=-1.0, best_grade=1.0)
    method = make_adpo(0.5, 0.3, adaptive)
    anchor_scores = method.anchor.scores(None, (), batch, scores)
    found = method.reward(scores, anchor_scores, batch)
    plain = make_adpo(0.5, 0.3).reward(scores, anchor_scores, batch)
    for b, share in enumerate((0.2, 0.6)):
        quality = (float(batch.labels[b].mean()) + 1) / 2
        more = 1 + share + 2.0 * (1 - share) * (1 - quality)
        np.testing.assert_allclose(found[b], plain[b] / more, rtol=1e-5)


def test_the_entropy_of_an_adaptive_tau_is_a_share_of_the_largest():
    groups = tiny_stage.make_groups(6, seed=1, num_responses=3)
    (batch,) = sources.evaluation_batches(groups, groups_per_step=6, row_length=64)
    params = tiny_stage.make_params()
    method = make_adpo(0.5, 0.3, AdaptiveTau())
    scores = method.score(tiny_stage.MODEL, params, batch)
    flat = jax.tree.map(jnp.zeros_like, params)
    uniform = method.score(tiny_stage.MODEL, flat, batch)
    assert ((scores.entropy >= 0) & (scores.entropy < 1)).all()
    where = batch.loss_mask
    np.testing.assert_allclose(jnp.where(where, uniform.entropy, 1.0), 1.0, rtol=1e-5)


# --- the command ----------------------------------------------------------------------


def test_jobs_are_counted_before_they_run():
    jobs = make_jobs(SMALL, epath.Path("nowhere"), None)
    by_part = {
        part: sum(job.num_runs for job in jobs if job.name.startswith(part))
        for part in (
            "bandits/reference",
            "bandits/tuned",
            "bandits/test",
            "online",
            "distillation",
            "language",
        )
    }
    arms = len(ARMS)
    assert by_part == {
        "bandits/reference": 120,
        "bandits/tuned": arms * 12 * 9 * 2,
        "bandits/test": arms * 120,
        "online": len(online.ANCHORS) * 4 * (9 * 2 + 10),
        "distillation": 2 * (1 + len(distillation.STUDENTS) * (4 + 5)),
        "language": 2 + len(language.ARMS) * 3 * (4 + 5),
    }


@pytest.mark.slow
def test_the_smoke_command_makes_a_report_and_continues(tmp_path, pytestconfig):
    def run():
        result = subprocess.run(
            [sys.executable, "-m", "experiments.adpo", "--preset", "smoke"],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(pytestconfig.rootpath)},
            capture_output=True,
            text=True,
        )
        assert result.returncode == 0, result.stderr[-3000:]
        return result

    assert "report: runs/adpo/001/report.html" in run().stdout
    folder = tmp_path / "runs" / "adpo" / "001"
    page = (folder / "report.html").read_text()
    for part in ("The paper", "gaussian, light", "Anchors that move, online", ADPO):
        assert part in page
    record = json.loads((folder / "record.json").read_text())
    assert {row["verdict"] for row in record["results"]["verdicts"]} <= {
        verdicts.HOLDS,
        verdicts.FAILS,
        verdicts.NOT_TESTABLE,
    }
    assert len(record["results"]["distillation"]) == 2 * len(distillation.STUDENTS)
    # As if it had been killed before the last two jobs.
    (folder / "record.json").unlink()
    last = make_jobs(SMOKE, folder, None)[-1:]
    (folder / "results" / f"{last[0].name}.json").unlink()
    again = run()
    left = sum(job.num_runs for job in last)
    assert f"of which {left} runs are left" in again.stderr
    assert (folder / "report.html").exists()
