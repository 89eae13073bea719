"""Every loss on arrays of one size, and TRL's same loss, for `scripts/benchmark.py`."""

from __future__ import annotations

import dataclasses
import importlib.util
import pathlib
import sys
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from pref_jax import losses, targets

NUM_PAIRS = 4096
NUM_LISTS, LIST_LENGTH = 512, 32
TRL_LOSSES = pathlib.Path(__file__).parents[1] / "tests" / "parity" / "trl_losses.py"


@dataclasses.dataclass(frozen=True)
class Case:
    """One loss.

    Attributes:
      array: f32[4096, 2] or f32[512, 32]: what the loss is differentiated by.
      call: array -> (loss, metrics), as ours.
      trl: (the module of TRL's losses, a torch tensor like `array`) -> mean loss; None
        where TRL has no such loss.
    """

    array: jax.Array
    call: Callable
    trl: Callable | None = None


def cases(seed: int) -> dict[str, Case]:
    """Name -> case, on drawn log-probabilities."""
    rng = np.random.default_rng(seed)
    shape = (NUM_PAIRS, 2)
    logps = jnp.asarray(-rng.exponential(20.0, shape), jnp.float32)
    anchor = jnp.asarray(-rng.exponential(20.0, shape), jnp.float32)
    lengths = jnp.asarray(rng.integers(5, 60, shape))
    rewards = 0.1 * (logps - anchor)
    desirable = jnp.asarray(rng.random(shape) < 0.5)
    explore = jnp.asarray(rng.random(shape) < 0.5)
    lists = jnp.asarray(rng.normal(size=(NUM_LISTS, LIST_LENGTH)), jnp.float32)
    order = rng.permuted(np.tile(np.arange(LIST_LENGTH), (NUM_LISTS, 1)), axis=1)
    ranks = jnp.asarray(1 + order)
    relevance = jnp.asarray(np.maximum(3 - order, 0), jnp.float32)
    weights = targets.ndcg_weights(relevance, ranks=ranks)
    target = targets.softmax(relevance, temperature=1.0)
    of_anchor = np.asarray(anchor)
    mismatched = np.asarray(-rng.exponential(20.0, (2, shape[0] * 2)), np.float32)

    def dpo(*loss_types: str, **options):
        """TRL's DPO trainer on sums: responses of one token."""

        def run(trl, tensor):
            token_logps, mask = trl.as_tokens(tensor)
            anchor_logps, _ = trl.as_tokens(tensor.new_tensor(of_anchor))
            kinds = {
                "loss_types": [*loss_types],
                "loss_weights": [1.0] * len(loss_types),
            }
            return trl.dpo(
                token_logps, anchor_logps, mask, beta=0.1, **kinds, **options
            )

        return run

    def of_rewards(loss_fn, **options):
        """A loss on rewards as a function of log-probabilities."""
        return lambda x: loss_fn(0.1 * (x - anchor), **options)

    def of_ratios(loss_fn, **options):
        return lambda x: loss_fn(x - anchor, beta=0.1, **options)

    def on_pairs(loss_fn, **options):
        return Case(rewards, lambda x: loss_fn(x, **options))

    def on_logps(loss_fn, **options):
        return Case(logps, lambda x: loss_fn(x, **options))

    def on_lists(loss_fn, **options):
        return Case(lists, lambda x: loss_fn(x, **options))

    def on_errors(loss_fn, **options):
        errors = -0.01 * logps
        return Case(
            errors, lambda x: loss_fn(x, anchor_errors=-0.01 * anchor, **options)
        )

    def bco_pair(rewards):
        desirable = jnp.array([[True, False]])
        loss, metrics = losses.bco_loss(rewards, desirable=desirable, delta=0.0)
        return loss.sum(-1), metrics

    def kto(logps):
        kl = losses.mean_kl(0.1 * (mismatched[0] - mismatched[1]))
        rewards = 0.1 * (logps - anchor)
        return losses.kto_loss(rewards, desirable=desirable, kl=kl)

    def trl_kto(trl, tensor):
        token_logps, mask = trl.as_tokens(tensor.flatten())
        anchor_logps, _ = trl.as_tokens(tensor.new_tensor(of_anchor).flatten())
        others = (trl.as_tokens(tensor.new_tensor(x))[0] for x in mismatched)
        return trl.kto(
            token_logps,
            anchor_logps,
            mask,
            desirable=trl.torch.tensor(np.array(desirable)).flatten(),
            beta=0.1,
            mismatched=(*others, mask),
        )

    def surrogate(log_ratios):
        return losses.clipped_surrogate_loss(
            log_ratios, advantages=advantages, dual_clip=3.0, **clip
        )

    def trl_surrogate(trl, tensor):
        token_logps, mask = trl.as_tokens(tensor.flatten())
        return trl.grpo(
            token_logps,
            mask,
            behaviour_logps=trl.torch.zeros_like(token_logps),
            advantages=tensor.new_tensor(np.array(advantages)).flatten(),
            loss_type="bnpo",
            delta=3.0,
            **clip,
        )

    advantages, clip = 0.1 * (lengths - 30.0), {"clip_low": 0.2, "clip_high": 0.28}
    anchored = {"anchor_logps": anchor, "beta": 0.1}
    single = anchored | {"lengths": 1}  # TRL is given responses of one token
    both = {
        "logistic_loss": (of_rewards(losses.logistic_loss), dpo("sigmoid")),
        "robust_loss": (
            of_rewards(losses.robust_loss, flip_rate=0.1),
            dpo("robust", label_smoothing=0.1),
        ),
        "ipo_loss": (of_ratios(losses.ipo_loss), dpo("ipo")),
        "hinge_loss": (of_rewards(losses.hinge_loss, margin=1.0), dpo("hinge")),
        "nca_loss": (of_rewards(losses.nca_loss), dpo("nca_pair")),
        "apo_zero_loss": (of_rewards(losses.apo_zero_loss), dpo("apo_zero")),
        "apo_down_loss": (of_rewards(losses.apo_down_loss), dpo("apo_down")),
        "exo_loss": (
            of_rewards(losses.exo_loss, label_smoothing=0.1),
            dpo("exo_pair", label_smoothing=0.1),
        ),
        "sppo_loss": (of_ratios(losses.sppo_loss), dpo("sppo_hard")),
        "discopop_loss": (
            of_rewards(losses.discopop_loss, tau=0.05),
            dpo("discopop"),
        ),
        "dpo_loss": (lambda x: losses.dpo_loss(x, **anchored), dpo("sigmoid")),
        "length_normalized_dpo_loss": (
            lambda x: losses.length_normalized_dpo_loss(x, **single),
            dpo("sigmoid_norm"),
        ),
        "aot_loss": (lambda x: losses.aot_loss(x, **anchored), dpo("aot")),
        "aot_unpaired_loss": (
            of_rewards(losses.aot_unpaired_loss),
            dpo("aot_unpaired"),
        ),
        "bco_loss": (of_rewards(bco_pair), dpo("bco_pair")),
        "kto_loss": (kto, trl_kto),
        "rpo_loss": (
            lambda x: losses.rpo_loss(x, alpha=1.0, **single),
            dpo("sigmoid", "sft"),
        ),
        "nll_loss": (lambda x: losses.nll_loss(x[:, :1]), dpo("sft")),
        "dft_loss": (
            losses.dft_loss,
            lambda trl, x: trl.sft(*trl.as_tokens(x.flatten()), loss_type="dft"),
        ),
        # Of these two TRL's method computes the preference alone.
        "cpo_loss": (
            lambda x: losses.cpo_loss(x, beta=0.1, alpha=1.0),
            lambda trl, x: trl.cpo(x, beta=0.1),
        ),
        "orpo_loss": (
            lambda x: losses.orpo_loss(x, lengths=1, lambda_=0.1),
            lambda trl, x: trl.orpo_odds_ratio(x, beta=0.1),
        ),
        "simpo_loss": (
            lambda x: losses.simpo_loss(x, lengths=1, beta=0.1, gamma=0.5),
            lambda trl, x: trl.cpo(x, beta=0.1, loss_type="simpo", simpo_gamma=0.5),
        ),
    }
    found = {name: Case(logps, *pair) for name, pair in both.items()}
    return found | {
        "thresholded_loss": on_pairs(losses.thresholded_loss, threshold=-0.001),
        "length_regularized_loss": on_pairs(
            losses.length_regularized_loss, lengths=lengths, alpha=0.01
        ),
        "reward_aware_loss": on_pairs(
            losses.reward_aware_loss, grades=0.1 * lengths, eta=1.0
        ),
        "xpo_loss": on_logps(losses.xpo_loss, alpha=1e-5, explore=explore, **anchored),
        "listwise_cross_entropy": on_lists(
            losses.listwise_cross_entropy, targets=target
        ),
        "adpo_loss": on_lists(
            losses.adpo_loss, anchor_logps=0.5 * lists, targets=target, beta=1.0
        ),
        "plackett_luce_loss": on_lists(losses.plackett_luce_loss, ranks=ranks),
        "irpo_loss": on_lists(losses.irpo_loss, weights=weights),
        "irpo_mean_loss": on_lists(losses.irpo_mean_loss, weights=weights),
        "sdpo_loss": on_lists(losses.sdpo_loss),
        "lipo_lambda_loss": on_lists(losses.lipo_lambda_loss, labels=relevance),
        "listnet_loss": on_lists(losses.listnet_loss, labels=relevance),
        "fsft_loss": on_logps(
            losses.fsft_loss, divergence=losses.CHI_SQUARED, **anchored
        ),
        "fsft_solved_loss": on_logps(
            losses.fsft_solved_loss,
            divergence=losses.CHI_SQUARED,
            partition=-0.5,
            **anchored,
        ),
        "reward_model_loss": Case(
            rewards,
            lambda x: losses.reward_model_loss(x, centering=0.01),
            lambda trl, x: trl.reward_model(x, centering=0.01),
        ),
        "binary_outcome_loss": on_pairs(losses.binary_outcome_loss, labels=desirable),
        "outcome_pairs_loss": on_lists(
            losses.outcome_pairs_loss, success=relevance > 0
        ),
        "matched_outcomes_loss": on_lists(
            losses.matched_outcomes_loss, success=relevance > 0
        ),
        "clipped_surrogate_loss": Case(rewards, surrogate, trl_surrogate),
        "value_loss": on_pairs(
            losses.value_loss, returns=0.1 * lengths, old_values=0.0, clip=0.2
        ),
        "coefficient_loss": on_logps(losses.coefficient_loss, coefficients=rewards),
        "denoising_loss": Case(-0.01 * logps, losses.denoising_loss),
        "diffusion_dpo_loss": on_errors(losses.diffusion_dpo_loss, beta=5000.0),
        "diffusion_dro_loss": on_errors(losses.diffusion_dro_loss, threshold=-0.001),
        "diffusion_kto_loss": on_errors(
            losses.diffusion_kto_loss, beta=5000.0, desirable=desirable, kl=0.0
        ),
    }


def value_and_gradient(case: Case) -> Callable:
    """Array -> ((mean loss, mean metrics), gradient)."""

    def total(array):
        loss, metrics = case.call(array)
        return loss.mean(), {name: x.mean() for name, x in metrics.items()}

    return jax.value_and_grad(total, has_aux=True)


def trl_value_and_gradient(case: Case, trl) -> Callable:
    """The same by TRL: array -> (mean loss, gradient). It logs its metrics too."""

    def run(array):
        tensor = trl.torch.tensor(array, requires_grad=True)
        loss = case.trl(trl, tensor)
        loss.backward()
        return loss.item(), tensor.grad

    return run


def trl_losses():
    """TRL's losses as functions, or None where torch or TRL is not installed."""
    if not all(importlib.util.find_spec(name) for name in ("torch", "trl")):
        return None
    spec = importlib.util.spec_from_file_location(TRL_LOSSES.stem, TRL_LOSSES)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
