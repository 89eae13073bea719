"""The table of `loss_cases.py` goes on: demonstrations, rewards, policies, pictures."""

import math

import numpy as np

import loss_oracles
import more_loss_oracles
from losses.loss_cases import (
    ANCHORED,
    AS_GIVEN,
    MARGINS,
    RESPONSE_FLAGS,
    RESPONSE_REWARDS,
    REWARDS,
    STATISTIC,
    Case,
    Input,
    both,
    of_items,
    of_pair,
    pair,
    uniform,
    with_terms,
)
from pref_jax import losses

DIVERGENCES = (
    losses.TOTAL_VARIATION,
    losses.CHI_SQUARED,
    losses.SQUARED_HELLINGER,
    losses.JENSEN_SHANNON,
    losses.FORWARD_KL,
    losses.REVERSE_KL,
)
ENTRY_LOGPS = uniform(-9, -0.5, of_responses=False)
ENTRIES = {name: ENTRY_LOGPS for name in ANCHORED}
ERRORS = {"errors": uniform(0, 2), "anchor_errors": uniform(0, 2)}
RESPONSE_ERRORS = {
    name: uniform(0, 2, of_responses=False) for name in ("errors", "anchor_errors")
}


def some_succeed(rng, shape):
    """Half of a list, in any order: every list has both outcomes."""
    half = np.arange(shape[-1]) % 2 == 0
    return rng.permuted(np.broadcast_to(half, shape), axis=-1)


def entry(name, inputs, metrics, *, stopped=False, oracle=None, **options):
    """A loss of single numbers, which broadcast along nothing."""
    return Case(
        name,
        inputs,
        options,
        lambda x, kept: metrics(x),
        kind="response",
        differences=False,
        stopped=stopped,
        oracle=oracle,
    )


# --- what the metrics are -------------------------------------------------------------


def weight(x):
    return {"sft/weight": more_loss_oracles.fsft_weight(x.pop("logps"), **x)}


def of_labels(x):
    sign = x["rewards"] * (2 * x["labels"] - 1)
    return {
        "rewards/response": x["rewards"],
        "rewards/accuracy": loss_oracles.pair_accuracy([sign, 0.0]),
    }


def of_outcomes(*, matched):
    def metrics(x, kept):
        options = {"success": x["success"], "where": np.broadcast_to(kept, 4)}
        options["matched"] = matched
        chosen, rejected = more_loss_oracles.outcome_pairs_means(x["scores"], **options)
        accuracy = more_loss_oracles.outcome_pairs_accuracy(x["scores"], **options)
        return {
            "pairs/count": more_loss_oracles.outcome_pairs_count(**options),
            "rewards/chosen": chosen,
            "rewards/rejected": rejected,
            "rewards/margin": chosen - rejected,
            "rewards/accuracy": accuracy,
        }

    return metrics


def of_ratio(x):
    """Which clip holds the gradient back."""
    clip = {k: x[k] for k in ("advantages", "clip_low", "clip_high")}
    log_ratio, bad = x["log_ratios"], x["advantages"] < 0
    clipped = more_loss_oracles.surrogate_is_clipped(log_ratio, **clip)
    metrics = {
        "ratio/value": math.exp(log_ratio),
        "ratio/clipped_low": clipped if bad else 0.0,
        "ratio/clipped_high": 0.0 if bad else clipped,
    }
    if "dual_clip" in x:
        over = bad and math.exp(log_ratio) > x["dual_clip"]
        metrics["ratio/clipped_dual"] = float(over)
    return metrics


def of_value(x):
    held = min(max(x["values"], x["old_values"] - 0.5), x["old_values"] + 0.5)
    decides = abs(held - x["returns"]) > abs(x["values"] - x["returns"])
    return {"values/clipped": float(decides)}


def _gain(x, k):
    return x["anchor_errors"][k] - x["errors"][k]


HALVED = of_pair(both(lambda x, k: x["beta"] / 2 * _gain(x, k)))
GAINS = of_pair(both(_gain))


def is_active(x):
    return {"loss/active": float(_gain(x, 1) - _gain(x, 0) > x["threshold"])}


def of_image(x):
    reward = x["beta"] * (x["anchor_errors"] - x["errors"])
    return {
        "rewards/response": reward,
        "rewards/accuracy": loss_oracles.unpaired_accuracy(
            reward, desirable=x["desirable"], against=x["kl"]
        ),
    }


def kto_of_image(errors, *, kl, beta, **options):
    """The oracle's `kl` is in the unit of the error, ours in that of the reward."""
    return more_loss_oracles.diffusion_kto_loss(
        errors, kl=kl / beta, beta=beta, **options
    )


# --- the table ------------------------------------------------------------------------

SURROGATE = {
    "log_ratios": uniform(-1, 2, of_responses=False),
    "advantages": uniform(-2, 2, of_responses=False),
}

CASES = [
    entry(
        "dft_loss",
        {"token_logps": ENTRY_LOGPS},
        lambda x: {"sft/weight": math.exp(x["token_logps"])},
        stopped=True,
    ),
    *(
        entry("fsft_loss", ENTRIES, weight, beta=0.3, divergence=divergence)
        for divergence in DIVERGENCES
    ),
    *(
        entry(
            "fsft_solved_loss",
            ENTRIES | {"partition": STATISTIC},
            weight,
            beta=0.3,
            divergence=divergence,
        )
        for divergence in DIVERGENCES
    ),
    *(
        pair(
            "reward_model_loss",
            {"rewards": REWARDS} | more,
            with_terms(
                AS_GIVEN,
                lambda x: {
                    "loss/preference": loss_oracles.logistic_loss(
                        x["rewards"], margin=x.get("margin")
                    ),
                    "loss/centering": sum(x["rewards"]) ** 2,
                },
            ),
            differences=False,
            centering=0.05,
        )
        for more in ({}, {"margin": MARGINS})
    ),
    entry(
        "binary_outcome_loss",
        {"rewards": RESPONSE_REWARDS, "labels": STATISTIC},
        of_labels,
    ),
    *(
        of_items(
            name,
            {"scores": REWARDS, "success": Input(some_succeed)},
            of_outcomes(matched=matched),
        )
        for name, matched in (
            ("outcome_pairs_loss", False),
            ("matched_outcomes_loss", True),
        )
    ),
    entry("clipped_surrogate_loss", SURROGATE, of_ratio, clip_low=0.2, clip_high=0.3),
    entry(
        "clipped_surrogate_loss",
        SURROGATE,
        of_ratio,
        clip_low=0.2,
        clip_high=0.3,
        dual_clip=1.5,
    ),
    entry(
        "value_loss",
        {
            "values": RESPONSE_REWARDS,
            "returns": RESPONSE_REWARDS,
            "old_values": RESPONSE_REWARDS,
        },
        of_value,
        clip=0.5,
    ),
    entry(
        "coefficient_loss",
        {"logps": ENTRY_LOGPS, "coefficients": RESPONSE_REWARDS},
        lambda x: {},
    ),
    entry("denoising_loss", {"errors": RESPONSE_ERRORS["errors"]}, lambda x: {}),
    pair("diffusion_dpo_loss", ERRORS, HALVED, beta=3.0),
    entry(
        "diffusion_kto_loss",
        RESPONSE_ERRORS | {"desirable": RESPONSE_FLAGS, "kl": STATISTIC},
        of_image,
        oracle=kto_of_image,
        beta=0.5,
        desirable_weight=1.4,
        undesirable_weight=0.6,
    ),
    pair(
        "diffusion_dro_loss",
        ERRORS,
        with_terms(GAINS, is_active),
        threshold=-0.4,
    ),
]
