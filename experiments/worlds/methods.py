"""Methods on rows that several experiments use: SFT, DPO, ADPO; on stored logps."""

from __future__ import annotations

import dataclasses
import functools
import math

import jax.numpy as jnp

from pref_jax import anchors, rewards, targets
from pref_jax.logps import response_scores
from pref_jax.losses.batch_coupled import solve_partition
from pref_jax.losses.listwise import listwise_cross_entropy
from pref_jax.losses.pairwise import logistic_loss
from pref_jax.losses.supervised import (
    CHI_SQUARED,
    FORWARD_KL,
    JENSEN_SHANNON,
    REVERSE_KL,
    SQUARED_HELLINGER,
    TOTAL_VARIATION,
    Divergence,
    fsft_loss,
    fsft_solved_loss,
    nll_loss,
)
from pref_jax.method import Method, on_rewards, on_token_logps, token_weight
from pref_jax.train.stage import StageConfig


def make_sft() -> Method:
    """Supervised fine-tuning: the mean negative log-likelihood of trained tokens."""
    return Method(
        name="SFT",
        anchor=anchors.none(),
        reward=rewards.log_likelihood,
        loss=on_token_logps(nll_loss),
        weight=token_weight,
        couples_responses=False,
    )


DIVERGENCES = {
    "total-variation": TOTAL_VARIATION,
    "chi-squared": CHI_SQUARED,
    "hellinger": SQUARED_HELLINGER,
    "jensen-shannon": JENSEN_SHANNON,
    "forward-kl": FORWARD_KL,
    "reverse-kl": REVERSE_KL,
}
"""Of SFT, by the names that configs call them."""


@dataclasses.dataclass(frozen=True)
class FsftConfig:
    """How SFT by a divergence keeps near the model before it."""

    beta: float = 0.1  # reward per nat; ours: the paper's is not verified
    level: str = "token"  # token or sequence: what has a reward
    partition: str = "zero"  # zero or solve: the constant of the rewards

    def __post_init__(self):
        if not self.beta > 0:
            raise ValueError(f"`beta` must be positive; got {self.beta}.")
        _check_fsft(self.level, self.partition)


def _check_fsft(level, partition):
    for name, value, options in (
        ("level", level, ("token", "sequence")),
        ("partition", partition, ("zero", "solve")),
    ):
        if value not in options:
            raise ValueError(f"`{name}` must be {' or '.join(options)}; got {value!r}.")


def find_divergence(name: str) -> Divergence:
    """A divergence by its name.

    Raises:
      ValueError: there is none of this name.
    """
    if name not in DIVERGENCES:
        raise ValueError(
            f"`divergence` must be one of {', '.join(DIVERGENCES)}; got {name!r}."
        )
    return DIVERGENCES[name]


def check_divergence(name: str | None, fsft: FsftConfig, stage: StageConfig) -> None:
    """What a config says of SFT by a divergence must fit together.

    Args:
      name: of the divergence; None: SFT is plain.
      fsft: how it keeps near.
      stage: how it trains.

    Raises:
      ValueError: it does not.
    """
    if name is None:
        if fsft != FsftConfig():
            raise ValueError("`fsft` belongs to `divergence`; give --divergence too.")
        return
    find_divergence(name)
    if fsft.partition == "solve" and stage.num_microbatches > 1:
        raise ValueError(
            f"`partition` solve looks across the batch, which `num_microbatches` "
            f"{stage.num_microbatches} cuts; use one of them."
        )


def make_fsft(
    divergence: Divergence,
    beta: float,
    *,
    level: str = "token",
    partition: str = "zero",
) -> Method:
    """SFT by an f-divergence that keeps near the model before it.

    That model's logps are carried by the batch, which holds one response a prompt.

    Args:
      divergence: of `losses.supervised`, such as `CHI_SQUARED`.
      beta: reward per nat.
      level: "token": a reward for each token; "sequence": one for each response.
      partition: "zero": left out; "solve": one number for the batch, solved.

    Source: arXiv:2507.00018; level and divergences of the paper are not verified.

    Raises:
      ValueError: there is no such level or partition.
    """
    _check_fsft(level, partition)

    def reward(scores, anchor_scores, batch):
        log_ratio = scores.logp - anchor_scores.logp
        if level == "token":
            return log_ratio
        return jnp.where(batch.loss_mask, log_ratio, 0.0).sum(-1)

    def weight(batch):
        if level == "token":
            return token_weight(batch)
        return (batch.loss_mask.any(-1) & batch.valid).astype(jnp.float32)

    def loss(log_ratio, scores, batch):
        del scores
        counted = weight(batch)
        options = {
            "anchor_logps": jnp.zeros_like(log_ratio),
            "beta": beta,
            "divergence": divergence,
            "where": counted > 0,
        }
        if partition == "zero":
            values, metrics = fsft_loss(log_ratio, **options)
        else:
            values, metrics = fsft_solved_loss(
                log_ratio, partition=solve_partition(log_ratio, **options), **options
            )
        return values, {name: (value, counted) for name, value in metrics.items()}

    return Method(
        name="f-SFT",
        anchor=anchors.fixed(),
        reward=reward,
        loss=loss,
        weight=weight,
        requires=frozenset({"anchor_logps"}),
        couples_responses=False,
        paper="arXiv:2507.00018",
    )


def make_dpo(beta: float) -> Method:
    """DPO against the logps of a fixed model, which the batch carries.

    Args:
      beta: reward per nat.

    Source: arXiv:2305.18290v3, equation 7.
    """
    return Method(
        name="DPO",
        anchor=anchors.fixed(),
        reward=functools.partial(rewards.sequence_reward, beta=beta),
        loss=on_rewards(logistic_loss),
        requires=frozenset({"anchor_logps"}),
        paper="arXiv:2305.18290v3",
    )


@dataclasses.dataclass(frozen=True)
class AdaptiveTau:
    """How ADPO's tau follows the policy's entropy and the grades of a list."""

    entropy_weight: float = 1.0  # alpha of the December text
    quality_weight: float = 1.0  # ours: not verified
    worst_grade: float = 0.0  # of the labels: quality 0
    best_grade: float = 1.0  # of the labels: quality 1
    low: float = 0.1  # least tau; the authors' trainer
    high: float = 5.0  # largest tau; the authors' trainer

    def __post_init__(self):
        if not self.worst_grade < self.best_grade:
            raise ValueError(
                f"`worst_grade` must be below `best_grade`; got {self.worst_grade} and "
                f"{self.best_grade}."
            )


def make_adpo(
    beta: float, temperature: float, adaptive: AdaptiveTau | None = None
) -> Method:
    """Listwise ADPO against the logps of a fixed model, which the batch carries.

        loss = KL(q || softmax_K(beta log_ratio)) + H(q)
        q = softmax_K(labels / temperature)

    Prompts whose list is not whole are fitted over the responses that are there.

    Args:
      beta: reward per nat, the paper's 1 / tau_anc.
      temperature: of the targets, in the unit of the labels; the paper's beta_r.
      adaptive: how tau differs from prompt to prompt, 1 / beta being its least; None:
        it does not. Grades beyond its range count as its ends.

    Source: ADPO, arXiv:2510.18913v6 (the numbers of its equations are not verified).
    """

    def loss(values, scores, batch):
        del scores
        fitted, metrics = listwise_cross_entropy(
            values,
            targets=targets.softmax(
                batch.labels, temperature=temperature, where=batch.valid
            ),
            where=batch.valid,
        )
        weight = _has_list(batch)
        return fitted, {name: (value, weight) for name, value in metrics.items()}

    reward, score = functools.partial(rewards.sequence_reward, beta=beta), {}
    if adaptive is not None:
        reward = functools.partial(_adaptive_reward, beta=beta, adaptive=adaptive)
        score = {"score": _with_entropy_share}
    return Method(
        name="ADPO",
        anchor=anchors.fixed(),
        reward=reward,
        loss=loss,
        **score,
        weight=_has_list,
        requires=frozenset({"anchor_logps"}),
        paper="arXiv:2510.18913v6",
    )


def _with_entropy_share(model, params, batch):
    """Scores whose entropy is a share of the largest: that over log V."""
    scores = response_scores(model, params, batch, want=("logp", "entropy"))
    largest = math.log(model.unembedding(params).shape[0])
    return dataclasses.replace(scores, entropy=scores.entropy / largest)


def _adaptive_reward(scores, anchor_scores, batch, *, beta, adaptive: AdaptiveTau):
    """The implicit reward with a beta of its own for each prompt: f32[B, K]."""
    where = batch.loss_mask & batch.valid[..., None]
    entropy = jnp.where(where, scores.entropy, 0.0).sum((1, 2))
    entropy /= jnp.maximum(where.sum((1, 2)), 1)
    there = batch.valid.sum(-1)
    grades = jnp.where(batch.valid, batch.labels, 0.0).sum(-1) / jnp.maximum(there, 1)
    quality = (grades - adaptive.worst_grade) / (
        adaptive.best_grade - adaptive.worst_grade
    )
    betas = rewards.adaptive_beta(
        entropy,
        jnp.clip(quality, 0.0, 1.0),
        beta=beta,
        entropy_weight=adaptive.entropy_weight,
        quality_weight=adaptive.quality_weight,
        low=adaptive.low,
        high=adaptive.high,
    )
    log_ratios = rewards.sequence_reward(scores, anchor_scores, batch, beta=1.0)
    return betas[:, None] * log_ratios


def _has_list(batch):
    """A prompt counts if two of its responses can be compared: f32[B]."""
    return (batch.valid.sum(axis=-1) > 1).astype(jnp.float32)
