"""What SFT leaves for DPO: its learning rate, its divergence, or both losses at once.

For every seed a small model is pre-trained on text of the embedded world and on what
its crowd of annotators writes; an expert, good but narrow, writes demonstrations; and
pairs of the crowd's responses are judged by the true reward, with Bradley-Terry noise.
Every arm goes from the base through SFT to DPO against its own SFT model, on the same
demonstrations and pairs in the same order. What it is worth is the true reward of its
answers, at temperature 1, to prompts that no stage has seen.

    rates           plain SFT at 1, 1/2, 1/4, 1/10 and 1/20 of the rate whose
                    validation loss is the lowest: a curve
    reduced rate    plain SFT that chooses among these fractions of the rate
    early stop      at the whole rate, stopped at the validation loss of the reduced
                    rate: the same fit, another way there
    KL, decay       at the whole rate, held at the base by beta KL(pi || pi_0) on the
                    demonstrations, or by weight decay to its parameters
    no SFT          DPO from the base
    f-divergences   `fsft_loss` at the whole rate
    joint           SFT + lambda DPO / beta on both data sets at once, with the updates
                    of both stages together and at least their examples

Each arm chooses among twelve settings by validation prompts of one seed that is not
reported: of an arm with a number of its own (a fraction, a beta, a weight, a lambda)
four of it by three learning rates of DPO, at the beta of DPO that the whole rate has
chosen; of the others four betas by three rates. The joint arm's rates are a half, one
and two times the whole rate of SFT, since it has one stage.

Source: arXiv:2507.00018; the design of this test is ours, the paper's is not verified.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from experiments.worlds import instructions, methods
from experiments.worlds.jobs import Job
from experiments.worlds.models import DecoderSizes, make_model
from experiments.worlds.pipeline import (
    Grade,
    Pipeline,
    eval_step,
    measure_preferences,
    measure_responses,
    store_anchor,
)
from experiments.worlds.sampled import prefers, sample_pairs
from experiments.worlds.short_runs import ShortRuns, adamw, method_loss, towards
from experiments.worlds.tasks import world_task
from pref_jax import processes
from pref_jax.axes import whole
from pref_jax.data import records, sources
from pref_jax.evals.preference import wins
from pref_jax.logps import token_kl
from pref_jax.method import objective
from pref_jax.train import sharding
from pref_jax.train.optimizer import OptimizerConfig, make_schedule
from pref_jax.train.stage import StageConfig
from pref_jax.train.step import evaluate
from pref_jax.types import PyTree, TokenGroup

_TUNING_SEED = 10_000
PLAIN, RATE, KL, DECAY = "plain", "rate", "KL", "decay"
NO_SFT, JOINT = "no SFT", "joint"
DIVERGENCES = ("chi-squared", "hellinger", "jensen-shannon")


@dataclasses.dataclass(frozen=True)
class StagesConfig:
    """The part on SFT and DPO; all numbers are ours."""

    base: StageConfig  # on text and on what the crowd writes
    world: instructions.World = instructions.World(  # its crowd
        wrong_rate=0.3, sloppy_rate=0.6, wordy_rate=0.6
    )
    expert: instructions.World = instructions.World(  # good, and nearly always wordy
        wrong_rate=0.1, sloppy_rate=0.1, wordy_rate=0.9
    )
    decoder: DecoderSizes = DecoderSizes(
        width=96, num_layers=4, num_heads=4, num_kv_heads=4, mlp_width=288
    )
    num_documents: int = 18_000
    num_crowd: int = 18_000  # prompts with responses of the crowd
    crowd_share: float = 0.1  # of them in the groups that the base learns
    num_demonstrations: int = 1_600
    num_pairs: int = 4_000
    label_temperature: float = 0.1  # of the judge, in reward
    groups_per_step: int = 32  # of SFT and of DPO
    sft_steps: int = 150  # three epochs
    dpo_steps: int = 125  # one epoch
    warmup: float = 0.1  # share of a stage
    sft_rates: tuple[float, ...] = (7.5e-5, 1.5e-4, 3e-4, 6e-4, 1.2e-3)
    fractions: tuple[float, ...] = (0.5, 0.25, 0.1, 0.05)  # of the best of them
    dpo_betas: tuple[float, ...] = (0.01, 0.03, 0.1, 0.3)
    dpo_rates: tuple[float, ...] = (1e-4, 2e-4, 4e-4)
    kl_weights: tuple[float, ...] = (0.1, 0.3, 1.0, 3.0)
    decay_weights: tuple[float, ...] = (10.0, 30.0, 100.0, 300.0)  # times the rate
    divergence_betas: tuple[float, ...] = (0.03, 0.1, 0.3, 1.0)
    joint_weights: tuple[float, ...] = (0.03, 0.1, 0.3, 1.0)  # lambda
    joint_rates: tuple[float, ...] = (0.5, 1.0, 2.0)  # of the best of `sft_rates`
    stop_every: int = 2  # updates between two looks at the loss to stop at
    num_heldout: int = 320  # demonstrations and pairs
    num_eval_prompts: int = 300
    num_tuning_prompts: int = 200
    eval_samples: int = 4
    max_new_tokens: int = 32
    num_seeds: int = 5

    @property
    def joint_steps(self) -> int:
        """Updates of the joint stage: those of both others."""
        return self.sft_steps + self.dpo_steps

    def __post_init__(self):
        if not 1 <= self.num_seeds < _TUNING_SEED:
            raise ValueError(
                f"`num_seeds` must lie in [1, {_TUNING_SEED}); got {self.num_seeds}."
            )
        rates = ("wrong_rate", "sloppy_rate", "wordy_rate")
        same = {name: getattr(self.world, name) for name in rates}
        if dataclasses.replace(self.expert, **same) != self.world:
            raise ValueError(
                f"`world` and `expert` may differ in {', '.join(rates)} alone: they "
                f"need the same splits and the same reward."
            )
        budgets = {
            "dpo_betas": self.dpo_betas,
            "fractions": self.fractions,
            "kl_weights": self.kl_weights,
            "decay_weights": self.decay_weights,
            "divergence_betas": self.divergence_betas,
            "joint_weights": self.joint_weights,
        }
        if len(set(map(len, budgets.values()))) > 1 or len(self.joint_rates) != len(
            self.dpo_rates
        ):
            raise ValueError(
                f"every arm needs the same number of settings: {', '.join(budgets)} "
                f"are to have one length, and `dpo_rates` and `joint_rates` one."
            )
        if not 0 < self.crowd_share < 1:
            raise ValueError(
                f"`crowd_share` must lie in (0, 1); got {self.crowd_share}."
            )
        if not all(0 < fraction < 1 for fraction in self.fractions):
            raise ValueError(
                f"`fractions` are of the whole rate, which is an arm of its own: each "
                f"must lie in (0, 1); got {self.fractions}."
            )


# --- arms -----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Arm:
    """A way through SFT, without the numbers that are chosen.

    Attributes:
      name: in tables.
      kind: `PLAIN`, `RATE`, `KL`, `DECAY`, `NO_SFT`, `JOINT` or one of `DIVERGENCES`.
      fraction: of the whole learning rate; of `RATE` it is the knob.
      knobs: values of its own number; None alone: it has none.
      stops: whether SFT ends at the validation loss of the reduced rate.
    """

    name: str
    kind: str = PLAIN
    fraction: float = 1.0
    knobs: tuple[float | None, ...] = (None,)
    stops: bool = False


@dataclasses.dataclass(frozen=True)
class Setting:
    """What an arm chooses."""

    knob: float | None  # its own number, if it has one
    dpo_beta: float
    dpo_rate: float


WHOLE = Arm("whole rate")
REDUCED = "reduced rate"
EARLY = Arm("early stop", stops=True)


def make_arms(config: StagesConfig) -> list[Arm]:
    """All arms; those that others need come first."""
    return [
        WHOLE,
        *(Arm(f"{x:g} of the rate", fraction=x) for x in config.fractions),
        Arm(REDUCED, RATE, knobs=config.fractions),
        EARLY,
        Arm("explicit KL", KL, knobs=config.kl_weights),
        Arm("decay to the base", DECAY, knobs=config.decay_weights),
        Arm("no SFT", NO_SFT),
        *(Arm(name, name, knobs=config.divergence_betas) for name in DIVERGENCES),
        Arm("joint", JOINT, knobs=config.joint_weights),
    ]


def settings_of(
    arm: Arm, config: StagesConfig, results: Mapping[str, dict]
) -> list[Setting]:
    """The settings that an arm chooses among; those of one knob together.

    Args:
      arm: what is trained.
      config: the values.
      results: of the rates and of the whole rate's choice, if the arm has a number of
        its own.
    """
    betas, rates = config.dpo_betas, config.dpo_rates
    if arm.knobs != (None,):
        betas = (chosen_setting(results, WHOLE, config).dpo_beta,)
    if arm.kind == JOINT:
        best = best_rate(results, config)
        rates = tuple(fraction * best for fraction in config.joint_rates)
    return [
        Setting(knob, beta, rate)
        for knob in arm.knobs
        for beta in betas
        for rate in rates
    ]


# --- data -----------------------------------------------------------------------------

_TEST_USE, _VALIDATION_USE, _PAIRS_USE = 1, 2, 3  # draws of samples


def judged_pairs(world, prompts, num: int, temperature: float, seed: int) -> list[dict]:
    """Two responses of the crowd to each prompt, as a noisy judge orders them.

    Pairs of equal rewards are left out.

    Args:
      world: its annotators write, its reward judges.
      prompts: of the language, more than `num`.
      num: pairs.
      temperature: of the judge.
      seed: of responses and judgements.

    Raises:
      ValueError: too few pairs are left.
    """
    rng = np.random.default_rng([seed, 11])
    sides = [instructions.annotate(world, prompts, seed=2 * seed + k) for k in (0, 1)]
    found = []
    for prompt, *pair in zip(prompts, *sides, strict=True):
        first, second = (
            instructions.grade(prompt, r, world=world).reward for r in pair
        )
        if first != second:
            if not prefers(first, second, temperature, rng):
                pair.reverse()
            found.append({"prompt": prompt, "chosen": pair[0], "rejected": pair[1]})
    if len(found) < num:
        raise ValueError(
            f"{len(prompts)} prompts gave {len(found)} pairs of unequal rewards, and "
            f"{num} are asked for; give more prompts."
        )
    return found[:num]


@dataclasses.dataclass(frozen=True)
class Prepared:
    """What all arms of a seed share.

    Attributes:
      pipeline: of the seed, with its order and its draws.
      grade: the true reward.
      base: parameters before SFT.
      demonstrations: of the expert, with the base's logps.
      heldout_demonstrations: likewise.
      pairs: of the crowd, judged.
      heldout_pairs: likewise, with the base's logps.
      pair_prompts: whose responses are compared.
      validation: prompts that settings are chosen on.
      test: prompts that are reported.
      expert_rewards: f[test], of one response of the expert to each.
    """

    pipeline: Pipeline
    grade: Grade
    base: PyTree
    demonstrations: Sequence[TokenGroup]
    heldout_demonstrations: Sequence[TokenGroup]
    pairs: Sequence[TokenGroup]
    heldout_pairs: Sequence[TokenGroup]
    pair_prompts: list[str]
    validation: list[str]
    test: list[str]
    expert_rewards: np.ndarray


def prepare(config: StagesConfig, folder, guard, seed: int) -> Prepared:
    """Data and base model of a seed; goes on with what the folder holds."""
    world, mesh = config.world, sharding.make_mesh()
    task = world_task(
        world,
        seed=seed,
        num_documents=config.num_documents,
        num_demonstrations=config.num_crowd,
        num_pair_prompts=2 * config.num_pairs,
        num_eval_prompts=config.num_eval_prompts,
    )
    encoder = task.encoder
    model, params = make_model(
        config.decoder, mesh, vocab_size=task.vocab_size, seed=seed
    )
    pipeline = Pipeline(
        folder=folder / f"seed{seed}",
        guard=guard,
        mesh=mesh,
        model=model,
        encoder=encoder,
        seed=seed,
        max_new_tokens=config.max_new_tokens,
    )

    def encode(rows):
        return encoder.encode_all(records.from_objects(rows))

    text = [
        sources.Mixture(parts, [1 - config.crowd_share, config.crowd_share])
        for parts in zip(task.documents, task.demonstrations, strict=True)
    ]
    base, _ = pipeline.train(
        "base", methods.make_sft(), params, *text, config.base, unit="documents"
    )
    shown = config.num_demonstrations
    written = encode(
        # Of another stream than the crowd's, whose instructions would be the same.
        instructions.demonstrations(
            config.expert, shown + config.num_heldout, seed=seed + 1
        )
    )
    rows = judged_pairs(
        world,
        task.pair_prompts[0],
        config.num_pairs + config.num_heldout,
        config.label_temperature,
        seed,
    )
    judged = encode(rows)

    def with_base(name, groups):
        return store_anchor(pipeline, name, base, groups, config.base)

    answers = instructions.annotate(config.expert, task.eval_prompts, seed=seed)
    graded = zip(task.eval_prompts, answers, strict=True)
    return Prepared(
        pipeline=pipeline,
        grade=task.grade,
        base=base,
        demonstrations=with_base("demonstrations", written[:shown]),
        heldout_demonstrations=with_base("held_out", written[shown:]),
        pairs=judged[: config.num_pairs],
        heldout_pairs=with_base("held_out_pairs", judged[config.num_pairs :]),
        pair_prompts=[row["prompt"] for row in rows[: config.num_pairs]],
        validation=task.pair_prompts[1][: config.num_tuning_prompts],
        test=task.eval_prompts,
        expert_rewards=np.array([task.grade(*pair)["reward"] for pair in graded]),
    )


# --- training -------------------------------------------------------------------------


def _batches(prepared: Prepared, groups, num_steps: int, per_step: int):
    """Batches of a stage, in the order of the seed."""
    pipeline = prepared.pipeline
    groups, row_length = pipeline.fit(groups)
    return pipeline.own_rows(
        sources.training_batches(
            groups,
            groups_per_step=per_step,
            num_steps=num_steps,
            row_length=row_length,
            seed=pipeline.seed,
            rows_multiple=sharding.num_row_shards(pipeline.mesh),
        )
    )


@functools.cache  # over seeds: their models have one shape
def _runs(config: StagesConfig, model, mesh, kind: str) -> ShortRuns:
    """SFT of a kind, "dpo", or both at once."""

    def plain(params, anchor, batch, setting):
        del anchor, setting
        return method_loss(methods.make_sft(), model, params, (), batch)

    def with_kl(params, anchor, batch, setting):
        kl = token_kl(model, params, batch, anchor_params=anchor)
        where = batch.loss_mask
        mean = jnp.where(where, kl, 0.0).sum() / where.sum()
        return plain(params, (), batch, setting) + setting["knob"] * mean

    def by_divergence(params, anchor, batch, setting):
        del anchor
        method = methods.make_fsft(methods.DIVERGENCES[kind], setting["knob"])
        return method_loss(method, model, params, (), batch)

    def dpo(params, anchor, batch, setting):
        del anchor
        method = methods.make_dpo(setting["beta"])
        return method_loss(method, model, params, (), batch)

    def joint(params, anchor, batch, setting):
        shown, pairs = batch
        weight = setting["knob"] / setting["beta"]
        return plain(params, anchor, shown, setting) + weight * dpo(
            params, anchor, pairs, setting
        )

    losses = {PLAIN: plain, DECAY: plain, KL: with_kl, "dpo": dpo, JOINT: joint}
    lengths = {"dpo": config.dpo_steps, JOINT: config.joint_steps}
    num_steps = lengths.get(kind, config.sft_steps)
    shape = make_schedule(
        OptimizerConfig(learning_rate=1.0, warmup_steps=int(config.warmup * num_steps)),
        num_steps,
    )

    def optimizer(setting, anchor):
        decay = [towards(anchor, setting["knob"])] if kind == DECAY else []
        return adamw(lambda number: setting["rate"] * shape(number), *decay)

    return ShortRuns(mesh, losses.get(kind, by_divergence), optimizer)


_LIKELIHOOD = methods.make_sft()


class Trainer:
    """All arms of a seed; each loss is compiled once.

    Args:
      config: sizes.
      prepared: what the arms share.
    """

    def __init__(self, config: StagesConfig, prepared: Prepared):
        self._config, self._prepared = config, prepared
        self._demonstrations = _batches(
            prepared,
            prepared.demonstrations,
            config.sft_steps,
            config.groups_per_step,
        )
        self._heldout = _placed(prepared, prepared.heldout_demonstrations, config)

    def _runs(self, kind: str) -> ShortRuns:
        pipeline = self._prepared.pipeline
        return _runs(self._config, pipeline.model, pipeline.mesh, kind)

    def validation_loss(self, params) -> float:
        """Mean of -log p over tokens of the held-out demonstrations, nats."""
        pipeline = self._prepared.pipeline
        step = eval_step(_LIKELIHOOD, pipeline.model, pipeline.mesh)
        with jax.set_mesh(pipeline.mesh):
            return evaluate(step, params, (), self._heldout)["loss"]

    def sft(
        self,
        arm: Arm,
        rate: float,
        knob: float | None,
        *,
        stop_at: float | None = None,
        watch: Callable | None = None,
    ) -> tuple[PyTree, int]:
        """Parameters after SFT, and the updates that it took.

        Args:
          arm: neither without SFT nor joint.
          rate: of Adam, at its highest.
          knob: the number of the arm, if it has one.
          stop_at: validation loss at which SFT ends.
          watch: (updates done, parameters), called as SFT goes.
        """
        updates = 0

        def look(number, params):
            nonlocal updates
            updates = number
            if watch is not None:
                watch(number, params)
            due = stop_at is not None and number % self._config.stop_every == 0
            return due and self.validation_loss(params) <= stop_at

        kind = PLAIN if arm.kind == RATE else arm.kind
        params = self._runs(kind).train(
            self._prepared.base,
            self._demonstrations,
            {"rate": rate, "knob": knob},
            anchor=self._prepared.base if arm.kind in (KL, DECAY) else (),
            watch=look,
        )
        return params, updates

    def dpo(self, params, groups, setting: Setting) -> PyTree:
        """Parameters after DPO against the logps that the pairs carry."""
        config = self._config
        batches = _batches(
            self._prepared, groups, config.dpo_steps, config.groups_per_step
        )
        numbers = {"rate": setting.dpo_rate, "beta": setting.dpo_beta}
        return self._runs("dpo").train(params, batches, numbers)

    def joint(self, groups, setting: Setting) -> PyTree:
        """Parameters after both losses at once, on at least the examples of both."""
        config = self._config
        num_steps = config.joint_steps
        sides = [
            _batches(
                self._prepared,
                part,
                num_steps,
                -(-config.groups_per_step * steps // num_steps),
            )
            for part, steps in (
                (self._prepared.demonstrations, config.sft_steps),
                (groups, config.dpo_steps),
            )
        ]
        numbers = {
            "rate": setting.dpo_rate,
            "beta": setting.dpo_beta,
            "knob": setting.knob,
        }
        return self._runs(JOINT).train(
            self._prepared.base, zip(*sides, strict=True), numbers
        )


def _placed(prepared: Prepared, groups, config: StagesConfig) -> list:
    pipeline = prepared.pipeline
    groups, row_length = pipeline.fit(groups)
    stage = dataclasses.replace(config.base, groups_per_step=len(groups))
    batches = pipeline.batches(groups, row_length, stage)
    return [sharding.place_batch(pipeline.mesh, batch) for batch in batches]


# --- measuring ------------------------------------------------------------------------


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
        _log_ratio_method(),
        {"SFT": params},
        prepared.heldout_pairs,
        config.base,
    )
    return found["SFT"]["accuracy"].mean()


@functools.cache
def _log_ratio_method():
    return methods.make_dpo(1.0)


@functools.cache
def _slopes(model, name: str):
    """(params, batch, beta) -> h'(v) of every token, and which count."""

    def slopes(params, batch, beta):
        method = methods.make_fsft(methods.DIVERGENCES[name], beta)
        return whole(objective(method, model, params, (), batch)[2]["sft/weight"])

    return jax.jit(slopes)


class SlopeWatch:
    """Quantiles of h'(v) on held-out demonstrations, as SFT goes.

    Args:
      prepared: what the arms share.
      config: sizes.
      name: of `DIVERGENCES`.
      beta: reward per nat.
      num: looks, evenly spaced from the first update to the last.

    Attributes:
      steps: updates done at each look.
      quantiles: f[looks, 5], at 5, 25, 50, 75 and 95 %.
    """

    LEVELS = (0.05, 0.25, 0.5, 0.75, 0.95)

    def __init__(self, prepared, config, name: str, beta: float, num: int = 8):
        self.steps: list[int] = []
        self.quantiles: list[np.ndarray] = []
        self._model, self._name, self._beta = prepared.pipeline.model, name, beta
        self._due = set(np.linspace(0, config.sft_steps, num).astype(int).tolist())
        self._batches = _placed(prepared, prepared.heldout_demonstrations, config)

    def __call__(self, number: int, params) -> None:
        """Look, if a look is due after this number of updates."""
        if number not in self._due:
            return
        found = []
        for batch in self._batches:
            slope, counted = _slopes(self._model, self._name)(params, batch, self._beta)
            found.append(np.asarray(slope)[np.asarray(counted) > 0])
        self.steps.append(number)
        self.quantiles.append(np.quantile(np.concatenate(found), self.LEVELS))


# --- jobs -----------------------------------------------------------------------------


def seeds_of(config: StagesConfig) -> range:
    """The reported seeds: from 1 on, since sizes were set by trials of seed 0."""
    return range(1, config.num_seeds + 1)


def best_rate(results: Mapping[str, dict], config: StagesConfig) -> float:
    """The learning rate whose SFT has the lowest validation loss."""
    losses = np.array(results["stages/rates"]["losses"], float)
    return config.sft_rates[int(np.nanargmin(losses))]


def tuned(results: Mapping[str, dict], arm: Arm) -> float:
    """Reward of an arm's chosen setting, on the seed that settings are chosen on."""
    return max(results[f"stages/tune/{arm.name}"]["rewards"])


def chosen_setting(results, arm: Arm, config: StagesConfig) -> Setting:
    """The setting with the highest reward on the tuning seed."""
    rewards = results[f"stages/tune/{arm.name}"]["rewards"]
    return settings_of(arm, config, results)[int(np.argmax(rewards))]


class _Seed:
    """Everything of one seed that a job asks for, made once."""

    def __init__(self, config: StagesConfig, folder, guard, seed: int):
        self.config, self.seed = config, seed
        self.arms = {arm.name: arm for arm in make_arms(config)}
        self.prepared = prepare(config, folder, guard, seed)
        self.trainer = Trainer(config, self.prepared)

    def sft(self, arm: Arm, results, knob: float | None, watch=None):
        """Parameters before DPO, and what SFT was."""
        if arm.kind in (NO_SFT, JOINT):
            return self.prepared.base, 0
        stop_at = None
        if arm.stops:
            if self.seed == _TUNING_SEED:
                chosen = chosen_setting(results, self.arms[REDUCED], self.config)
                place = self.config.fractions.index(chosen.knob)
                stop_at = results[f"stages/tune/{REDUCED}"]["sft_loss"][place]
            else:
                stop_at = results[f"stages/seed{self.seed}/{REDUCED}"]["sft_loss"]
        fraction = knob if arm.kind == RATE else arm.fraction
        rate = fraction * best_rate(results, self.config)
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
    found = {
        "sft": _reported(prepared, config, params),
        "sft_loss": seed.trainer.validation_loss(params),
        "sft_accuracy": implicit_accuracy(prepared, config, params),
        "sft_updates": updates,
        "dpo": _reported(prepared, config, seed.align(arm, params, groups, setting)),
    }
    if arm.name in (WHOLE.name, REDUCED):
        path = prepared.pipeline.folder / f"{arm.name.replace(' ', '_')}.jsonl"
        processes.on_first(lambda: path.unlink(missing_ok=True))
        own = sample_pairs(
            prepared.pipeline,
            params,
            prepared.pair_prompts,
            prepared.grade,
            num_samples=2,
            use=_PAIRS_USE,
            path=path,
            temperature=config.label_temperature,
        )
        own = seed.with_anchor(f"own pairs, {arm.name}", params, own)
        trained = seed.align(arm, params, own, setting)
        found["own"] = _reported(prepared, config, trained)
        found["own_pairs"] = len(own)
    return found


def jobs(config: StagesConfig, folder, guard) -> list[Job]:
    """The whole rate, then every arm's choice, then every arm on every seed.

    Args:
      config: sizes.
      folder: of the models and pairs.
      guard: says when to stop.
    """

    @functools.lru_cache(maxsize=1)  # the models of one seed at a time
    def seed_of(number: int) -> _Seed:
        return _Seed(config, folder, guard, number)

    arms = make_arms(config)
    without = (NO_SFT, JOINT)
    num_sfts = {arm.name: len(arm.knobs) * (arm.kind not in without) for arm in arms}
    base = 0.12 * config.base.loop.num_steps
    sft, dpo = 2 + 0.05 * config.sft_steps, 3 + 0.05 * config.dpo_steps
    measure = 1 + 0.01 * config.num_eval_prompts
    found = [
        Job(
            "stages/rates",
            1 + len(config.sft_rates),
            base + len(config.sft_rates) * sft,
            lambda results: _rates(seed_of(_TUNING_SEED)),
        )
    ]
    for arm in arms:
        num_sft = num_sfts[arm.name]
        num_dpo = len(config.dpo_betas) * len(config.dpo_rates)
        found.append(
            Job(
                f"stages/tune/{arm.name}",
                num_sft + num_dpo,
                num_sft * (sft + measure) + num_dpo * (dpo + measure),
                lambda results, arm=arm: _tune(seed_of(_TUNING_SEED), arm, results),
            )
        )
    for number in seeds_of(config):
        for arm in arms:
            found.append(
                Job(
                    f"stages/seed{number}/{arm.name}",
                    min(1, num_sfts[arm.name])
                    + 1
                    + (arm is WHOLE)  # the base
                    + (arm.name in (WHOLE.name, REDUCED)),
                    sft + dpo + 3 * measure + base * (arm is WHOLE),
                    lambda results, arm=arm, number=number: _report(
                        seed_of(number), arm, results
                    ),
                )
            )
    return found
