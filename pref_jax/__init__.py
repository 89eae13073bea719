"""Preference optimisation in JAX: rewards, losses and the method that joins them.

The names below are imported when they are first used, so that `import pref_jax` costs
nothing and a notebook that needs one loss loads only the maths behind it.
"""

from importlib import import_module

__version__ = "0.1.0"

_EXPORTS = {
    "CHOSEN": "pref_jax.types",
    "Method": "pref_jax.method",
    "REJECTED": "pref_jax.types",
    "ResponseBatch": "pref_jax.types",
    "TokenGroup": "pref_jax.types",
    "adpo_loss": "pref_jax.losses.listwise",
    "alpha_divergence_reward": "pref_jax.rewards",
    "aot_loss": "pref_jax.losses.batch_coupled",
    "aot_unpaired_loss": "pref_jax.losses.batch_coupled",
    "apo_down_loss": "pref_jax.losses.pairwise",
    "apo_zero_loss": "pref_jax.losses.pairwise",
    "bco_loss": "pref_jax.losses.unpaired",
    "cpo_loss": "pref_jax.losses.reference_free",
    "discopop_loss": "pref_jax.losses.pairwise",
    "dpo_loss": "pref_jax.losses.pairwise",
    "exo_loss": "pref_jax.losses.pairwise",
    "forward_kl_reward": "pref_jax.rewards",
    "hinge_loss": "pref_jax.losses.pairwise",
    "implicit_reward": "pref_jax.rewards",
    "ipo_loss": "pref_jax.losses.pairwise",
    "irpo_loss": "pref_jax.losses.listwise",
    "irpo_mean_loss": "pref_jax.losses.listwise",
    "jensen_shannon_reward": "pref_jax.rewards",
    "kto_loss": "pref_jax.losses.unpaired",
    "length_desensitized_weights": "pref_jax.logps",
    "length_normalized_dpo_loss": "pref_jax.losses.pairwise",
    "length_regularized_loss": "pref_jax.losses.pairwise",
    "lipo_lambda_loss": "pref_jax.losses.listwise",
    "listnet_loss": "pref_jax.losses.listwise",
    "listwise_cross_entropy": "pref_jax.losses.listwise",
    "logistic_loss": "pref_jax.losses.pairwise",
    "logit_values": "pref_jax.q_values",
    "mean_kl": "pref_jax.losses.batch_coupled",
    "nca_loss": "pref_jax.losses.pairwise",
    "nll_loss": "pref_jax.losses.supervised",
    "orpo_loss": "pref_jax.losses.reference_free",
    "plackett_luce_loss": "pref_jax.losses.listwise",
    "response_mean": "pref_jax.logps",
    "response_sum": "pref_jax.logps",
    "reward_aware_loss": "pref_jax.losses.pairwise",
    "reward_shift": "pref_jax.losses.batch_coupled",
    "robust_loss": "pref_jax.losses.pairwise",
    "rpo_loss": "pref_jax.losses.pairwise",
    "sdpo_loss": "pref_jax.losses.listwise",
    "shift_targets": "pref_jax.logps",
    "simpo_loss": "pref_jax.losses.reference_free",
    "soft_bellman_residual": "pref_jax.q_values",
    "sppo_loss": "pref_jax.losses.pairwise",
    "step_rewards": "pref_jax.rewards",
    "thresholded_loss": "pref_jax.losses.pairwise",
    "token_logps": "pref_jax.logps",
    "token_rewards": "pref_jax.q_values",
    "wpo_weights": "pref_jax.logps",
    "xpo_loss": "pref_jax.losses.pairwise",
}

_MODULES = ("anchors", "losses", "q_values", "rewards", "targets")

__all__ = ["__version__", *_EXPORTS, *_MODULES]


def __getattr__(name: str) -> object:
    if name in _MODULES:
        return import_module(f"pref_jax.{name}")
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_EXPORTS[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
