"""Losses: arrays in, (loss, metrics) out; one function each, unreduced."""

from pref_jax.losses.batch_coupled import (
    aot_loss,
    aot_unpaired_loss,
    mean_kl,
    reward_shift,
)
from pref_jax.losses.listwise import (
    adpo_loss,
    irpo_loss,
    irpo_mean_loss,
    lipo_lambda_loss,
    listnet_loss,
    listwise_cross_entropy,
    plackett_luce_loss,
    sdpo_loss,
)
from pref_jax.losses.pairwise import (
    apo_down_loss,
    apo_zero_loss,
    discopop_loss,
    dpo_loss,
    exo_loss,
    hinge_loss,
    ipo_loss,
    length_normalized_dpo_loss,
    length_regularized_loss,
    logistic_loss,
    nca_loss,
    reward_aware_loss,
    robust_loss,
    rpo_loss,
    sppo_loss,
    thresholded_loss,
    xpo_loss,
)
from pref_jax.losses.reference_free import (
    cpo_loss,
    orpo_loss,
    simpo_loss,
)
from pref_jax.losses.supervised import (
    nll_loss,
)
from pref_jax.losses.unpaired import (
    bco_loss,
    kto_loss,
)

__all__ = [
    "adpo_loss",
    "aot_loss",
    "aot_unpaired_loss",
    "apo_down_loss",
    "apo_zero_loss",
    "bco_loss",
    "cpo_loss",
    "discopop_loss",
    "dpo_loss",
    "exo_loss",
    "hinge_loss",
    "ipo_loss",
    "irpo_loss",
    "irpo_mean_loss",
    "kto_loss",
    "length_normalized_dpo_loss",
    "length_regularized_loss",
    "lipo_lambda_loss",
    "listnet_loss",
    "listwise_cross_entropy",
    "logistic_loss",
    "mean_kl",
    "nca_loss",
    "nll_loss",
    "orpo_loss",
    "plackett_luce_loss",
    "reward_aware_loss",
    "reward_shift",
    "robust_loss",
    "rpo_loss",
    "sdpo_loss",
    "simpo_loss",
    "sppo_loss",
    "thresholded_loss",
    "xpo_loss",
]
