"""Preference optimisation in JAX: rewards, losses and the method that joins them.

The names below are imported when they are first used, so that `import pref_jax` costs
nothing and a notebook that needs one loss loads only the maths behind it.
"""

from importlib import import_module

__version__ = "0.1.0"

_EXPORTS = {
    "CHOSEN": "pref_jax.types",
    "REJECTED": "pref_jax.types",
    "Method": "pref_jax.method",
    "ResponseBatch": "pref_jax.types",
    "TokenGroup": "pref_jax.types",
    "dpo_loss": "pref_jax.losses.pairwise",
    "implicit_reward": "pref_jax.rewards",
    "logistic_loss": "pref_jax.losses.pairwise",
    "nll_loss": "pref_jax.losses.supervised",
}

__all__ = ["__version__", *_EXPORTS]


def __getattr__(name: str) -> object:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_EXPORTS[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
