"""What SFT leaves for DPO: its learning rate, its divergence, or both losses at once.

For every seed a small model is pre-trained on text of the embedded world and on what
its crowd of annotators writes; an expert, good but narrow, writes demonstrations; and
pairs of the crowd's responses are judged by the true reward, with Bradley-Terry noise.
Every arm goes from the base through SFT to DPO against its own SFT model, on the same
demonstrations and pairs in the same order. What it is worth is the true reward of its
answers, at temperature 1, to prompts that no stage has seen.

    rates           plain SFT at 1, 1/2, 1/4 and 1/10 of the rate whose validation loss
                    is the lowest: a curve, whose best fraction is the reduced rate
    early stop      at the whole rate, stopped at the validation loss of the reduced
                    rate: the same fit, another way there
    KL, decay       at the whole rate, held at the base by beta KL(pi || pi_0) on the
                    demonstrations, or by weight decay to its parameters
    no SFT          DPO from the base
    f-divergences   `fsft_loss` at the whole rate
    joint           SFT + lambda DPO / beta on both data sets at once, with the updates
                    of both stages together and at least their examples

Each arm chooses among twelve settings, by the mean over validation prompts of seeds
that are not reported: of an arm with a number of its own (a fraction, which all reduced
rates choose together, a beta, a weight, a lambda) three of it by four learning rates of
DPO, at the beta of DPO that the whole rate has chosen; of the others three betas by
four rates. The joint arm's rates are fractions of the whole rate of SFT, since it has
one stage. That two arms differ by their DPO and not by their SFT is looked at apart:
the reduced rate also takes the settings that the whole rate has chosen for DPO.

Source: arXiv:2507.00018; the design of this test is ours, the paper's is not verified.
"""

from __future__ import annotations

import functools

import numpy as np
from etils import epath

from experiments.sft_bridge.arms import (
    DIVERGENCES,
    JOINT,
    NO_SFT,
    PLAIN,
    RATE,
    RATES,
    REDUCED,
    WHOLE,
    Arm,
    Setting,
    StagesConfig,
    best_rate,
    chosen_setting,
    make_arms,
    reduced_arm,
    seeds_of,
    settings_of,
    tuning_seeds,
)
from experiments.sft_bridge.prepared import Prepared, prepare
from experiments.sft_bridge.trainer import SlopeWatch, Trainer
from experiments.worlds import methods
from experiments.worlds.jobs import Job
from experiments.worlds.pipeline import (
    measure_preferences,
    measure_responses,
    store_anchor,
)
from experiments.worlds.sampled import sample_pairs
from pref_jax import processes
from pref_jax.evals.preference import wins

_LOG_RATIO = methods.make_dpo(1.0)
_TEST_USE, _VALIDATION_USE, _PAIRS_USE = 1, 2, 3  # draws of samples


def _measure(prepared: Prepared, config: StagesConfig, params, prompts, use):
    return measure_responses(
        prepared.pipeline,
        params,
        prompts,
        prepared.grade,
        reference=prepared.base,
        num_samples=config.eval_samples,
        use=use,
        stage=config.base,
    )


def _reported(prepared: Prepared, config: StagesConfig, params) -> dict:
    """Means over the test prompts."""
    found = _measure(prepared, config, params, prepared.test, _TEST_USE)
    rewards = found.parts["reward"]
    expert = np.broadcast_to(prepared.expert_rewards[:, None], rewards.shape)
    distinct = [len(set(texts)) / len(texts) for texts in found.texts]
    return {
        "reward": rewards.mean(),
        "right": found.parts["right"].mean(),
        "wins": wins(rewards, expert).mean(),
        "kl": found.kl.mean(),
        "entropy": found.entropy.mean(),
        "length": found.length.mean(),
        "distinct": np.mean(distinct),
    }


def implicit_accuracy(prepared: Prepared, config: StagesConfig, params) -> float:
    """How often log(pi / pi_0) puts the chosen response of a held-out pair first."""
    found = measure_preferences(
        prepared.pipeline,
        _LOG_RATIO,
        {"SFT": params},
        prepared.heldout_pairs,
        config.base,
    )
    return found["SFT"]["accuracy"].mean()


class _Seed:
    """Everything of one seed that a job asks for, made once."""

    def __init__(self, config: StagesConfig, folder, guard, seed: int):
        self.config, self.seed = config, seed
        self.prepared = prepare(config, folder, guard, seed)
        self.trainer = Trainer(config, self.prepared)

    def sft(self, arm: Arm, results, knob: float | None, watch=None):
        """Parameters before DPO, and what SFT was."""
        if arm.kind in (NO_SFT, JOINT):
            return self.prepared.base, 0
        stop_at = None
        if arm.stops:
            reduced = reduced_arm(results, self.config).name
            if self.seed in tuning_seeds(self.config):
                (stop_at,) = results[f"stages/tune{self.seed}/{reduced}"]["sft_loss"]
            else:
                stop_at = results[f"stages/seed{self.seed}/{reduced}"]["sft_loss"]
        rate = arm.fraction * best_rate(results, self.config)
        return self.trainer.sft(arm, rate, knob, stop_at=stop_at, watch=watch)

    def with_anchor(self, name: str, params, groups):
        """Groups with the logps of the model that DPO starts from.

        What a job that was stopped has left is not that model's to the last bit.
        """
        pipeline = self.prepared.pipeline
        left = epath.Path(pipeline.disk_folder) / "anchor_logps" / name
        processes.on_first(lambda: left.rmtree(missing_ok=True))
        return store_anchor(pipeline, name, params, groups, self.config.base)

    def align(self, arm: Arm, params, groups, setting: Setting):
        """DPO, or the joint stage."""
        if arm.kind == JOINT:
            return self.trainer.joint(groups, setting)
        return self.trainer.dpo(params, groups, setting)


def _rates(seed: _Seed) -> dict:
    """Validation loss of plain SFT at each rate."""
    losses = []
    for rate in seed.config.sft_rates:
        params, _ = seed.trainer.sft(WHOLE, rate, None)
        losses.append(seed.trainer.validation_loss(params))
    return {"losses": np.array(losses)}


def _tune(seed: _Seed, arm: Arm, results) -> dict:
    """Reward on validation prompts of every setting; of every SFT its loss and KL."""
    config, prepared = seed.config, seed.prepared
    found = {"rewards": [], "sft_loss": [], "sft_kl": [], "slopes": []}
    settings = settings_of(arm, config, results)
    for knob in arm.knobs:
        watch = None
        if arm.kind in DIVERGENCES:
            watch = SlopeWatch(prepared, config, arm.kind, knob)
        params, _ = seed.sft(arm, results, knob, watch)
        prompts = prepared.validation
        if arm.kind not in (NO_SFT, JOINT):
            after = _measure(prepared, config, params, prompts, _VALIDATION_USE)
            found["sft_loss"].append(seed.trainer.validation_loss(params))
            found["sft_kl"].append(after.kl.mean())
        if watch is not None:
            found["slopes"].append({"steps": watch.steps, "at": watch.quantiles})
        groups = seed.with_anchor(f"{arm.name} {knob}", params, prepared.pairs)
        for setting in settings:
            if setting.knob != knob:
                continue
            trained = seed.align(arm, params, groups, setting)
            measured = _measure(prepared, config, trained, prompts, _VALIDATION_USE)
            found["rewards"].append(measured.per_prompt("reward").mean())
    return found


def _report(seed: _Seed, arm: Arm, results) -> dict:
    """What the chosen setting leaves after SFT and after DPO, on test prompts."""
    config, prepared = seed.config, seed.prepared
    setting = chosen_setting(results, arm, config)
    params, updates = seed.sft(arm, results, setting.knob)
    groups = seed.with_anchor(arm.name, params, prepared.pairs)
    return {
        "sft": _reported(prepared, config, params),
        "sft_loss": seed.trainer.validation_loss(params),
        "sft_accuracy": implicit_accuracy(prepared, config, params),
        "sft_updates": updates,
        "dpo": _reported(prepared, config, seed.align(arm, params, groups, setting)),
    }


def _report_again(seed: _Seed, arm: Arm, results) -> dict:
    """A rate's own pairs in the place of the crowd's, and the whole rate's settings."""
    config, prepared = seed.config, seed.prepared
    pipeline = prepared.pipeline
    params, _ = seed.sft(arm, results, None)
    path = pipeline.folder / f"{arm.name.replace(' ', '_')}.jsonl"
    processes.on_first(lambda: path.unlink(missing_ok=True))
    own = sample_pairs(
        pipeline,
        params,
        prepared.pair_prompts,
        prepared.grade,
        num_samples=2,
        use=_PAIRS_USE,
        path=path,
        temperature=config.label_temperature,
    )
    setting = chosen_setting(results, arm, config)
    matched = chosen_setting(results, WHOLE, config)

    def after(name, groups, setting):
        groups = seed.with_anchor(name, params, groups)
        return _reported(prepared, config, seed.align(arm, params, groups, setting))

    found = {
        "own": after(f"own pairs, {arm.name}", own, setting),
        "own_pairs": len(own),
    }
    if arm.kind == RATE:
        found["matched"] = after(f"{arm.name}, matched", prepared.pairs, matched)
    return found


def jobs(config: StagesConfig, folder, guard) -> list[Job]:
    """The whole rate, then every arm's choice, then every arm on every seed.

    Args:
      config: sizes.
      folder: of the models and pairs.
      guard: says when to stop.
    """

    @functools.lru_cache(maxsize=config.num_tuning_seeds)  # models of seeds in memory
    def seed_of(number: int) -> _Seed:
        return _Seed(config, folder, guard, number)

    arms = make_arms(config)
    base = 0.12 * config.base.loop.num_steps
    sft, dpo = 2 + 0.05 * config.sft_steps, 3 + 0.05 * config.dpo_steps
    measure = 1 + 0.01 * config.num_eval_prompts
    found = [
        Job(
            f"stages/tune{number}/{RATES}",
            1 + len(config.sft_rates),
            base + len(config.sft_rates) * sft,
            lambda results, number=number: _rates(seed_of(number)),
        )
        for number in tuning_seeds(config)
    ]
    for arm in arms:
        num_sft = len(arm.knobs) * (arm.kind not in (NO_SFT, JOINT))
        num_betas = len(config.dpo_betas) if arm.kind in (PLAIN, NO_SFT) else 1
        num_dpo = len(arm.knobs) * num_betas * len(config.dpo_rates)
        for number in tuning_seeds(config):
            found.append(
                Job(
                    f"stages/tune{number}/{arm.name}",
                    num_sft + num_dpo,
                    num_sft * (sft + measure) + num_dpo * (dpo + measure),
                    lambda results, arm=arm, number=number: _tune(
                        seed_of(number), arm, results
                    ),
                )
            )
    for number in seeds_of(config):
        for arm in arms:
            found.append(
                Job(
                    f"stages/seed{number}/{arm.name}",
                    (arm.kind not in (NO_SFT, JOINT)) + 1 + (arm is WHOLE),  # the base
                    sft + dpo + 3 * measure + base * (arm is WHOLE),
                    lambda results, arm=arm, number=number: _report(
                        seed_of(number), arm, results
                    ),
                )
            )
        for name, num_dpo in ((WHOLE.name, 1), (REDUCED, 2)):
            found.append(
                Job(
                    f"stages/seed{number}/again/{name}",
                    1 + num_dpo,
                    sft + num_dpo * (dpo + measure) + measure,
                    lambda results, name=name, number=number: _report_again(
                        seed_of(number),
                        WHOLE if name == WHOLE.name else reduced_arm(results, config),
                        results,
                    ),
                )
            )
    return found
