"""SFT before DPO: every arm is what it says, is tuned alike, and may lose."""

import collections
import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from experiments.sft_bridge import page, stages, verdicts
from experiments.sft_bridge.arms import (
    DECAY,
    DIVERGENCES,
    EARLY,
    KL,
    REDUCED,
    WHOLE,
    Arm,
    Setting,
    at_ends,
    chosen_setting,
    make_arms,
    reduced_arm,
    settings_of,
    tuning_seeds,
)
from experiments.sft_bridge.config import SMALL, SMOKE
from experiments.sft_bridge.prepared import judged_pairs, prepare
from experiments.sft_bridge.trainer import SlopeWatch, Trainer
from experiments.worlds import instructions
from experiments.worlds.claims import FAILS, HOLDS, NOT_TESTABLE
from experiments.worlds.pipeline import store_anchor
from pref_jax.train import sharding
from pref_jax.train.checkpoint import PreemptionGuard

CONFIG = SMOKE.stages
ARMS = {arm.name: arm for arm in make_arms(SMALL.stages)}
TUNING = tuning_seeds(SMALL.stages)


def gap(first, second):
    difference = jax.tree.map(lambda x, y: float(jnp.abs(x - y).max()), first, second)
    return max(jax.tree.leaves(difference))


# --- pairs ----------------------------------------------------------------------------


def test_a_judge_errs_as_often_as_bradley_and_terry_say():
    world, temperature = CONFIG.world, 0.2
    prompts = instructions.prompts(world, "train", 3000, seed=0)
    pairs = judged_pairs(world, prompts, 2000, temperature, seed=0)
    assert len(pairs) == 2000
    margins = np.array(
        [
            instructions.grade(row["prompt"], row["chosen"], world=world).reward
            - instructions.grade(row["prompt"], row["rejected"], world=world).reward
            for row in pairs
        ]
    )
    assert (margins != 0).all()
    expected = 1 / (1 + np.exp(-np.abs(margins) / temperature))
    assert 0.02 < (margins < 0).mean() < 0.3
    assert (margins > 0).mean() == pytest.approx(expected.mean(), abs=0.025)


def test_too_few_pairs_of_unequal_rewards_are_an_error():
    prompts = instructions.prompts(CONFIG.world, "train", 50, seed=0)
    with pytest.raises(ValueError, match=r"50 prompts gave \d+ pairs .* 50 are asked"):
        judged_pairs(CONFIG.world, prompts, 50, 0.1, seed=0)


# --- arms -----------------------------------------------------------------------------


def chosen(arm, index):
    """Results in which this setting is the best on both tuning seeds together."""
    losses = [0.5, 0.4, 0.3, None, 0.5]
    found = {f"stages/tune{seed}/rates": {"losses": losses} for seed in TUNING}
    for seed, other in zip(TUNING, (0, 1), strict=True):
        rewards = [0.1] * 12
        rewards[other], rewards[index] = 0.6, 0.5  # another is best on each of them
        found[f"stages/tune{seed}/{arm}"] = {"rewards": rewards}
    return found


def test_every_arm_chooses_among_twelve_settings():
    config = SMALL.stages
    results = chosen("whole rate", 5)  # the second beta and rate
    budgets = collections.Counter()
    for arm in ARMS.values():
        settings = settings_of(arm, config, results)
        assert len(set(settings)) == len(settings), arm
        budgets[REDUCED if arm.fraction < 1 else arm.name] += len(settings)
        counts = collections.Counter(setting.knob for setting in settings)
        assert list(counts) == list(arm.knobs)
        if arm.knobs != (None,) or arm.fraction < 1:
            assert {s.dpo_beta for s in settings} == {config.dpo_betas[1]}
    assert set(budgets.values()) == {12}
    assert chosen_setting(results, ARMS["whole rate"], config) == Setting(
        None, config.dpo_betas[1], config.dpo_rates[1]
    )
    # The one stage of both losses has rates of SFT; a rate that diverged is not best.
    rates = {s.dpo_rate for s in settings_of(ARMS["joint"], config, results)}
    assert rates == {x * config.sft_rates[2] for x in config.joint_rates}


def test_the_controls_of_the_paper_file_are_there():
    names = list(ARMS)
    assert {"early stop", "explicit KL", "decay to the base", "no SFT"} < set(names)
    assert {"chi-squared", "hellinger", "jensen-shannon", "joint"} < set(names)
    assert [arm.fraction for arm in ARMS.values() if arm.fraction < 1] == [
        *(0.5, 0.25, 0.1)
    ]
    # What an arm needs of others stands before it.
    assert names.index("whole rate") < names.index("0.5 of the rate")
    assert names.index("0.1 of the rate") < names.index("early stop")


def test_the_reduced_rate_is_the_fraction_that_is_best_over_the_tuning_seeds():
    found = results({}, reduced="0.25 of the rate")
    assert reduced_arm(found, SMALL.stages).fraction == 0.25
    found["stages/tune10000/0.5 of the rate"] = {"rewards": [1.3, 0.1, 0.1, 0.1]}
    assert reduced_arm(found, SMALL.stages).fraction == 0.5
    found["stages/tune10001/0.5 of the rate"] = {"rewards": [-0.2, 0.1, 0.1, 0.1]}
    assert reduced_arm(found, SMALL.stages).fraction == 0.25  # 0.5 falls apart on one


def test_a_choice_at_an_end_of_its_grid_is_told():
    tried = [Setting(None, b, r) for b in (0.1, 0.3, 1.0) for r in (1e-4, 2e-4)]
    assert at_ends(tried[3], tried) == ["highest learning rate"]
    assert at_ends(tried[0], tried) == ["lowest beta", "lowest learning rate"]


def test_runs_are_counted_and_seed_zero_is_not_reported():
    jobs = stages.jobs(SMALL.stages, epath.Path("nowhere"), None)
    names = [job.name for job in jobs]
    assert names[:2] == [f"stages/tune{seed}/rates" for seed in TUNING]
    tuned = [name for name in names if name.startswith("stages/tune")]
    assert len(tuned) == len(set(tuned)) == 2 * (len(ARMS) + 1)
    assert names[: len(tuned)] == tuned  # before what is reported
    seeds = {name.split("/")[1] for name in names if name.startswith("stages/seed")}
    assert seeds == {f"seed{n}" for n in range(1, 6)}
    runs = {job.name: job.num_runs for job in jobs}
    assert runs["stages/tune10000/whole rate"] == 1 + 12
    assert runs["stages/tune10001/explicit KL"] == 3 + 12
    assert runs["stages/tune10001/0.1 of the rate"] == 1 + 4
    assert runs["stages/tune10000/joint"] == runs["stages/tune10000/no SFT"] == 12
    assert runs["stages/seed1/whole rate"] == 3  # base, SFT, DPO
    assert runs["stages/seed1/0.5 of the rate"] == 2
    assert runs["stages/seed1/joint"] == 1
    assert runs["stages/seed1/again/whole rate"] == 2  # its own pairs
    assert runs["stages/seed1/again/reduced rate"] == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fractions": (1.0, 0.5, 0.1)}, r"each must lie in \(0, 1\)"),
        ({"num_seeds": 1}, r"`num_seeds` must lie in \[2, 10000\); got 1"),
        ({"num_tuning_seeds": 0}, "`num_tuning_seeds` must be 1 or more; got 0"),
        ({"crowd_share": 1.0}, r"`crowd_share` must lie in \(0, 1\)"),
        ({"kl_weights": (0.1,)}, "every arm needs the same number of settings"),
        ({"joint_rates": (1.0,)}, "`dpo_rates` and `joint_rates` one"),
        ({"expert": instructions.World(test_rate=0.2)}, "differ in wrong_rate, sloppy"),
    ],
)
def test_a_bad_config_is_an_error(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL.stages, **change)


# --- training -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = epath.Path(tmp_path_factory.mktemp("stages"))
    one = sharding.make_mesh(devices=jax.devices()[:1])
    with PreemptionGuard() as guard, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "make_mesh", lambda: one)  # of eight it is slow
        yield prepare(CONFIG, folder, guard, 0)


@pytest.fixture(scope="module")
def trainer(prepared):
    return Trainer(CONFIG, prepared)


RATE = 3e-3


@pytest.mark.slow
def test_the_data_of_a_seed_are_disjoint_and_carry_the_base(prepared):
    assert len(prepared.demonstrations) == CONFIG.num_demonstrations
    assert len(prepared.pairs) == CONFIG.num_pairs
    for groups in (prepared.demonstrations, prepared.heldout_pairs):
        assert all("anchor_logps" in group.extras for group in groups)
    assert not any("anchor_logps" in group.extras for group in prepared.pairs)
    for prompt, group in zip(prepared.pair_prompts, prepared.pairs, strict=True):
        assert prepared.pipeline.encode_prompt(prompt).tolist() == group.prompt.tolist()
    assert not set(prepared.test) & set(prepared.pair_prompts)
    assert not set(prepared.test) & set(prepared.validation)
    assert len(prepared.expert_rewards) == len(prepared.test)


@pytest.mark.slow
def test_without_its_weight_an_arm_is_plain_sft_and_with_it_nearer_the_base(
    prepared, trainer
):
    plain, updates = trainer.sft(WHOLE, RATE, None)
    moved = gap(plain, prepared.base)
    assert updates == CONFIG.sft_steps and moved > 1e-3
    for kind, strong in ((KL, 100.0), (DECAY, 300.0)):
        arm = Arm(kind, kind)
        none, _ = trainer.sft(arm, RATE, 0.0)
        assert gap(none, plain) < 1e-5
        held, _ = trainer.sft(arm, RATE, strong)
        norms = [
            sum(
                float(jnp.square(x - y).sum())
                for x, y in zip(*map(jax.tree.leaves, (p, prepared.base)), strict=True)
            )
            for p in (held, plain)
        ]
        assert norms[0] < 0.7 * norms[1], kind


@pytest.mark.slow
def test_a_small_beta_of_a_divergence_is_plain_sft(trainer):
    plain, _ = trainer.sft(WHOLE, RATE, None)
    for name in DIVERGENCES:
        found, _ = trainer.sft(Arm(name, name), RATE, 1e-4)
        assert gap(found, plain) < 1e-4
    far, _ = trainer.sft(Arm("x", "hellinger"), RATE, 3.0)
    assert gap(far, plain) > 1e-4


@pytest.mark.slow
def test_an_early_stop_ends_at_the_loss_that_it_is_told(trainer):
    arm = dataclasses.replace(EARLY)
    losses = {}

    def watch(number, params):
        losses[number] = trainer.validation_loss(params)

    _, updates = trainer.sft(arm, RATE, None, watch=watch)
    assert updates == CONFIG.sft_steps and losses[0] > losses[4] > losses[6]
    target = (losses[2] + losses[4]) / 2
    params, updates = trainer.sft(arm, RATE, None, stop_at=target)
    assert updates == 4  # looked at after 0, 2 and 4
    assert trainer.validation_loss(params) <= target
    _, updates = trainer.sft(arm, RATE, None, stop_at=losses[0] + 1)
    assert updates == 0


@pytest.mark.slow
def test_both_losses_at_once_go_towards_each_of_them(prepared, trainer):
    pairs = store_anchor(
        prepared.pipeline, "of_base", prepared.base, prepared.pairs, CONFIG.base
    )

    def accuracy(params):
        return stages.implicit_accuracy(prepared, CONFIG, params)

    little = trainer.joint(pairs, Setting(1e-6, 0.1, RATE))
    much = trainer.joint(pairs, Setting(10.0, 0.1, RATE))
    base = trainer.validation_loss(prepared.base)
    assert trainer.validation_loss(little) < base
    assert trainer.validation_loss(little) < trainer.validation_loss(much)
    assert accuracy(prepared.base) == 0.5  # undecided
    assert accuracy(much) > accuracy(little)


@pytest.mark.slow
def test_slopes_are_watched_from_the_first_update_to_the_last(prepared, trainer):
    watch = SlopeWatch(prepared, CONFIG, "hellinger", 1.0, num=3)
    trainer.sft(Arm("x", "hellinger"), RATE, 1.0, watch=watch)
    assert watch.steps == [0, 3, 6]
    first, _, last = watch.quantiles
    np.testing.assert_allclose(first, 1.0, rtol=1e-4)  # at the base
    assert last[0] < 0.999 and (np.diff(last) >= 0).all()


# --- verdicts -------------------------------------------------------------------------


def results(rewards, own=(0.5, 0.5), matched=0.6, seeds=5, reduced="0.1 of the rate"):
    """Of an arm the reward after DPO, the same for every seed but for a little.

    `rewards` has that of the reduced rate by the name of its fraction, or as `REDUCED`.
    """
    found = chosen("", 0)
    rewards = {reduced if name == REDUCED else name: x for name, x in rewards.items()}
    for name, arm in ARMS.items():
        highest = 0.6 if name == reduced else 0.5
        num_settings = 4 if arm.fraction < 1 else 12
        for seed in TUNING:
            found[f"stages/tune{seed}/{name}"] = {
                "rewards": [0.1] * (num_settings - 1) + [highest]
            }
        for seed in range(1, 1 + seeds):
            reward = rewards.get(name, 0.6) + 0.001 * seed
            run = {"dpo": {"reward": reward, "wins": reward / 2}, "sft_loss": 0.4}
            found[f"stages/seed{seed}/{name}"] = run
    for seed in range(1, 1 + seeds):
        for name, reward in zip((WHOLE.name, REDUCED), own, strict=True):
            found[f"stages/seed{seed}/again/{name}"] = {
                "own": {"reward": reward + 0.001 * seed},
                "matched": {"reward": matched + 0.001 * seed},
            }
    return found


def measured(rewards, **options):
    config = dataclasses.replace(SMALL.stages, num_seeds=options.get("seeds", 5))
    return verdicts.StagesMeasured(results(rewards, **options), config)


def judged(rewards, **options):
    return verdicts.judge_stages(measured(rewards, **options))


def test_a_rate_that_helps_beyond_its_controls_holds():
    found = judged({REDUCED: 0.7, "joint": 0.5}, own=(0.5, 0.6), matched=0.65)
    assert [v.verdict for v in found[:6]] == [HOLDS] * 6
    assert [v.effect.mean for v in found[:3]] == pytest.approx([0.1, 0.05, 0.1])
    assert found[0].note == "chosen: 0.1 of the rate"
    # The divergences are as good as plain SFT: an interval at zero does not hold.
    same = [v for v in found if v.claim.endswith("at the same rate.")]
    assert [v.verdict for v in same] == [FAILS] * 3
    assert found[-1].verdict == HOLDS and found[-1].effect.mean == pytest.approx(0.1)


def test_a_control_that_does_the_same_and_a_joint_stage_that_is_better_are_seen():
    found = judged({REDUCED: 0.7, "early stop": 0.7, "joint": 0.65})
    assert found[0].verdict == HOLDS
    assert found[1].verdict == FAILS  # with the settings of the whole rate
    assert found[2].verdict == FAILS  # own pairs
    assert found[3].verdict == FAILS  # early stop
    assert found[4].verdict == HOLDS
    assert found[-1].verdict == FAILS and found[-1].effect.high < 0


def test_without_an_effect_there_is_nothing_to_explain():
    """Better than its controls, which are worse than what needs no control."""
    found = judged({REDUCED: 0.55, "early stop": 0.5, "explicit KL": 0.5})
    assert found[0].verdict == FAILS
    assert [v.verdict for v in found[3:6]] == [NOT_TESTABLE] * 3
    assert found[3].effect.low > 0 and found[3].note == "the first claim does not hold"


def test_a_divergence_is_held_against_plain_sft_at_both_rates():
    found = judged({REDUCED: 0.7, "hellinger": 0.65, "chi-squared": 0.5})
    of = [v for v in found if v.claim.startswith("SFT by hellinger")]
    assert [v.verdict for v in of] == [HOLDS, FAILS]
    of = [v for v in found if v.claim.startswith("SFT by chi-squared")]
    assert [v.verdict for v in of] == [FAILS, NOT_TESTABLE]


def test_few_seeds_judge_nothing():
    found = judged({REDUCED: 0.7}, seeds=2)
    assert {v.verdict for v in found} == {NOT_TESTABLE}
    assert found[0].note.startswith("2 seeds are too few")
    assert found[3].note == "the first claim is not testable"


def test_the_headline_is_a_share_of_the_whole_rate():
    first, *_, last = page.headline(measured({REDUCED: 0.7, "joint": 0.45}))
    mean = 0.603
    assert first["relative"].mean == pytest.approx(0.1 / mean)
    assert first["points"].mean == pytest.approx(0.05)
    assert last["relative"].mean == pytest.approx(-0.15 / mean)


def test_the_rate_of_the_lowest_validation_loss_is_the_whole_one():
    assert math.isclose(measured({}).rate, SMALL.stages.sft_rates[2])
