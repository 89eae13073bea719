"""The methods that the suite compares, as compositions of the library's parts.

An arm is what it may look at, what it fits, and what it is anchored to; a setting is
its numbers, which every arm chooses from nine on clean validation contexts.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from experiments.worlds import bandits
from pref_jax import anchors, targets
from pref_jax.losses.listwise import listwise_cross_entropy
from pref_jax.losses.policy_gradient import clipped_surrogate_loss, group_advantages
from pref_jax.method import Method
from pref_jax.rewards import sequence_reward

ONE_PAIR, ALL_PAIRS, LIST = "one pair", "all pairs", "list"
"""What an arm sees of a context: a random pair, every pair, or all labels at once."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Setting:
    """The numbers of an arm; a pytree, so that a grid is mapped over.

    Attributes:
      tau: nats a reward: beta = 1 / tau. Of the KL-penalised gradient, the weight of
        its penalty.
      temperature: of the targets (the paper's beta_r), in the unit of the labels. Of
        PPO, its clip.
      learning_rate: of AdamW.
    """

    tau: jax.Array | float = 1.0  # the paper's default where it has one; ours here
    temperature: jax.Array | float = 1.0  # ours
    learning_rate: jax.Array | float = 5e-4  # the paper's


@dataclasses.dataclass(frozen=True, eq=False)
class Arm:
    """A method without its numbers.

    Attributes:
      name: in tables.
      sees: `ONE_PAIR`, `ALL_PAIRS` or `LIST`.
      make: (setting, anchor) -> Method.
      anchor: of `pref_jax.anchors`.
      grid: values of each field of `Setting` to choose among; nine settings in all.
      targets: (labels f32[B, K], setting) -> f32[B, K], what a listwise arm fits; None:
        it fits pairs, or no distribution.
    """

    name: str
    sees: str
    make: Callable[[Setting, anchors.Anchor], Method]
    anchor: anchors.Anchor
    grid: dict[str, tuple[float, ...]]
    targets: Callable | None = None

    def method(self, setting: Setting) -> Method:
        """With these numbers."""
        return dataclasses.replace(self.make(setting, self.anchor), name=self.name)

    def settings(self) -> list[Setting]:
        """The whole grid; what it does not name is as `Setting` has it."""
        return [
            Setting(**dict(zip(self.grid, values, strict=True)))
            for values in itertools.product(*self.grid.values())
        ]


def _method(anchor, beta, loss_fn) -> Method:
    """Of a loss (rewards f32[B, K], scores, batch) -> f32[B], without metrics."""

    def reward(scores, anchor_scores, batch):
        return sequence_reward(scores, anchor_scores, batch, beta=beta)

    def loss(rewards, scores, batch):
        return loss_fn(rewards, scores, batch), {}

    return Method(name="", anchor=anchor, reward=reward, loss=loss, score=bandits.score)


def _of_pairs(values, pairs):
    """f32[B, K] at pairs i32[B, M, 2] of its entries: f32[B, M, 2]."""
    flat = pairs.reshape(len(values), -1)
    return jnp.take_along_axis(values, flat, axis=1).reshape(pairs.shape)


def _pairwise(make_targets):
    """The mean over the pairs that are shown; a pair is a list of two."""

    def make(setting: Setting, anchor) -> Method:
        def loss(rewards, scores, batch):
            del scores
            labels = _of_pairs(batch.labels, batch.pairs)
            values, _ = listwise_cross_entropy(
                _of_pairs(rewards, batch.pairs), targets=make_targets(labels, setting)
            )
            return values.mean(-1)

        return _method(anchor, 1 / setting.tau, loss)

    return make


def _hard(labels, setting):
    del setting
    return targets.hard(labels)


def _softmax(labels, setting):
    return targets.softmax(labels, temperature=setting.temperature)


def _kde(labels, setting):
    return targets.kde(labels, temperature=setting.temperature)


hard_pairs = _pairwise(_hard)
"""DPO: the logistic loss of each pair, the higher label chosen; a tie is half each."""

soft_pairs = _pairwise(_softmax)
"""DPO with the Bradley-Terry probability of each pair as its target."""


def _listwise(make_targets):
    def make(setting: Setting, anchor) -> Method:
        return bandits.make_list_method(
            "",
            anchor,
            beta=1 / setting.tau,
            make_targets=lambda labels: make_targets(labels, setting),
        )

    return make


def ppo(setting: Setting, anchor) -> Method:
    """PPO's surrogate, its expectation over the items exact; the anchor is pi_old."""

    def loss(log_ratios, scores, batch):
        logps = jax.lax.stop_gradient(scores.logp[..., 0])
        old = jnp.exp(logps - jax.lax.stop_gradient(log_ratios))
        values = clipped_surrogate_loss(
            log_ratios,
            advantages=group_advantages(batch.labels),
            clip_low=setting.temperature,
            clip_high=setting.temperature,
        )[0]
        return (old * values).sum(-1)

    return _method(anchor, 1.0, loss)


def policy_gradient(setting: Setting, anchor) -> Method:
    """tau KL(policy || anchor) less the expected advantage, both exact over the items.

    Advantages are standardised within the list.
    """

    def loss(log_ratios, scores, batch):
        probability = jnp.exp(scores.logp[..., 0])
        advantages = group_advantages(batch.labels)
        return (probability * (setting.tau * log_ratios - advantages)).sum(-1)

    return _method(anchor, 1.0, loss)


# --- the arms -------------------------------------------------------------------------

_TAU = (0.5, 1.0, 2.0)
_TEMPERATURE = (0.25, 0.5, 1.0)
_RATE = (2.5e-4, 5e-4, 1e-3)
_CLIP = (0.1, 0.2, 0.4)
_PENALTY = (0.01, 0.1, 1.0)

ANCHORS = {
    "none": anchors.none(),
    "fixed": anchors.fixed(bandits.score),
    "snapshot": anchors.snapshot(every=100, score=bandits.score),
    "EMA": anchors.ema(decay=0.99, score=bandits.score),
    "on policy": anchors.snapshot(every=1, score=bandits.score),
}
"""Without an anchor it is the uniform one, which cancels among the items of a context.
"""

ADPO = "ADPO list"
"""The arm that stands for the paper's listwise method: chosen before anything was run.
"""


def _arms() -> dict[str, Arm]:
    hard = {"tau": _TAU, "learning_rate": _RATE}
    soft = {"tau": _TAU, "temperature": _TEMPERATURE}
    found = []
    for sees in (ONE_PAIR, ALL_PAIRS):
        for name, anchor in (("unanchored", "none"), ("DPO", "fixed")):
            arm = Arm(f"{name}, {sees}", sees, hard_pairs, ANCHORS[anchor], hard)
            found.append(arm)
        found.append(Arm(f"soft DPO, {sees}", sees, soft_pairs, ANCHORS["fixed"], soft))
    for name, anchor, make_targets in (
        ("unanchored list", "none", _softmax),
        (ADPO, "fixed", _softmax),
        (f"{ADPO}, KDE", "fixed", _kde),
        (f"{ADPO}, snapshot", "snapshot", _softmax),
        (f"{ADPO}, EMA", "EMA", _softmax),
        (f"{ADPO}, on policy", "on policy", _softmax),
    ):
        make = _listwise(make_targets)
        found.append(Arm(name, LIST, make, ANCHORS[anchor], soft, make_targets))
    old = anchors.snapshot(every=4, score=bandits.score)
    penalty = {"tau": _PENALTY, "learning_rate": _RATE}
    clip = {"temperature": _CLIP, "learning_rate": _RATE}
    found += [
        Arm("PPO", LIST, ppo, old, clip),
        Arm("KL-penalised gradient", LIST, policy_gradient, ANCHORS["fixed"], penalty),
    ]
    return {arm.name: arm for arm in found}


ARMS = _arms()
"""Every arm by its name."""

SAME_PAIRS = (
    ("DPO, one pair", "unanchored, one pair"),
    ("DPO, all pairs", "unanchored, all pairs"),
    (ADPO, "unanchored list"),
)
"""Arms that differ in their anchor alone: with it, and without."""
