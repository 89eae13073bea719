"""Preference optimisation in JAX: rewards, losses and the method that joins them.

The names below are imported when they are first used, so that `import pref_jax` costs
nothing and a notebook that needs one loss loads only the maths behind it.
"""

from importlib import import_module

__version__ = "0.1.0"

_NAMES = {
    "types": (
        "CHOSEN",
        "REJECTED",
        "ResponseBatch",
        "TokenGroup",
    ),
    "method": ("Method",),
    "logps": (
        "episode_sum",
        "length_desensitized_weights",
        "response_mean",
        "response_sum",
        "shift_targets",
        "spread_steps",
        "step_mean",
        "step_sum",
        "token_logps",
        "wpo_weights",
    ),
    "rewards": (
        "adaptive_beta",
        "alpha_divergence_reward",
        "denoising_error",
        "denoising_reward",
        "forward_kl_reward",
        "implicit_reward",
        "jensen_shannon_reward",
        "step_rewards",
    ),
    "q_values": (
        "logit_values",
        "soft_bellman_residual",
        "token_rewards",
    ),
    "losses": (
        "CHI_SQUARED",
        "FORWARD_KL",
        "JENSEN_SHANNON",
        "REVERSE_KL",
        "SQUARED_HELLINGER",
        "TOTAL_VARIATION",
        "Divergence",
        "adpo_loss",
        "aot_loss",
        "aot_unpaired_loss",
        "apo_down_loss",
        "apo_zero_loss",
        "bco_loss",
        "binary_outcome_loss",
        "centered_advantages",
        "clipped_surrogate_loss",
        "cluster_advantages",
        "coefficient_loss",
        "combined_advantages",
        "cpo_loss",
        "denoising_loss",
        "dft_loss",
        "diffusion_dpo_loss",
        "diffusion_dro_loss",
        "diffusion_kto_loss",
        "discopop_loss",
        "discounted_returns",
        "dpo_loss",
        "dspo_loss",
        "exo_loss",
        "fsft_loss",
        "fsft_solved_loss",
        "gae",
        "group_advantages",
        "hinge_loss",
        "ipo_loss",
        "irpo_loss",
        "irpo_mean_loss",
        "kl_k1",
        "kl_k2",
        "kl_k3",
        "kto_loss",
        "leave_one_out_advantages",
        "length_normalized_dpo_loss",
        "length_regularized_loss",
        "lipo_lambda_loss",
        "listnet_loss",
        "listwise_cross_entropy",
        "logistic_loss",
        "matched_outcomes_loss",
        "mean_kl",
        "nca_loss",
        "nll_loss",
        "orpo_loss",
        "outcome_pairs_loss",
        "plackett_luce_loss",
        "reward_aware_loss",
        "reward_model_loss",
        "reward_shift",
        "robust_loss",
        "rpo_loss",
        "score_coefficients",
        "sdpo_loss",
        "sequence_log_ratios",
        "simpo_loss",
        "solve_partition",
        "sppo_loss",
        "step_advantages",
        "thresholded_loss",
        "value_loss",
        "whitened_advantages",
        "xpo_loss",
    ),
}
_HOMES = {name: module for module, names in _NAMES.items() for name in names}
_MODULES = ("anchors", "logps", "losses", "q_values", "rewards", "targets")

__all__ = ["__version__", *_HOMES, *_MODULES]


def __getattr__(name: str) -> object:
    if name in _MODULES:
        return import_module(f"pref_jax.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"pref_jax.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
