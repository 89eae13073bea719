"""Losses of diffusion models: compositions of denoising errors and losses of pairs.

`errors` are mean squared errors of the noise (`rewards.denoising_error`), of the
trained model; `anchor_errors` those of the frozen one on the same noised images.

    g = anchor_errors - errors: by how much the trained model is better than the anchor
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pref_jax import checks
from pref_jax.losses.entries import (
    LISTWISE,
    fill,
    inclusion,
    pair_metrics,
    read_pair,
    results,
)
from pref_jax.losses.pairwise import logistic_loss, thresholded_loss
from pref_jax.losses.unpaired import kto_loss
from pref_jax.numerics import at_least_float32
from pref_jax.rewards import denoising_error, denoising_reward
from pref_jax.types import CHOSEN, REJECTED


def denoising_loss(errors, *, where=None):
    """Fine-tuning on images: the denoising error itself.

        loss = errors

    Source: DDPM, arXiv:2006.11239, equation 14.
    Checked: one source, the definition.

    Args:
      errors: f32[...]. One entry an image.
      where: bool, broadcastable to `errors`. False: loss 0, gradient 0.

    Returns:
      loss, f32[...], not reduced; metrics: none.

    Raises:
      ValueError: `where` does not fit.
      TypeError: `errors` is not floating-point or `where` is not boolean.

    >>> loss, _ = denoising_loss(jnp.array([0.5, 9.0]), where=jnp.array([True, False]))
    >>> loss.tolist()
    [0.5, 0.0]
    """
    checks.check_floating("errors", errors)
    errors = at_least_float32(errors)
    where = inclusion(where, shape=errors.shape, of="errors")
    return results(fill(errors, where), {}, where)


def _pair_reward(errors, anchor_errors, beta):
    checks.check_pair("errors", errors, use_instead=LISTWISE)
    return _reward(errors, anchor_errors, beta)


def _reward(errors, anchor_errors, beta):
    for name, array in (("errors", errors), ("anchor_errors", anchor_errors)):
        checks.check_floating(name, array)
    checks.check_same_shape("anchor_errors", anchor_errors, like=errors, of="errors")
    anchor_errors = jax.lax.stop_gradient(anchor_errors)
    return denoising_reward(errors, anchor_error=anchor_errors, beta=beta)


def diffusion_dpo_loss(errors, *, anchor_errors, beta: float, where=None):
    """DPO of a diffusion model, on one time step and one noise for both images.

        loss = -log s(beta / 2 (g[w] - g[l]))

    Source: Diffusion-DPO, arXiv:2311.12908, equation 14 (the number is not verified),
    with the factors of the released code.
    Convention: the half, and a beta that holds the number of time steps (5000 in the
    launcher for Stable Diffusion 1.5), belong to errors that are means.
    Reduces to: `logistic_loss` of `denoising_reward` with half of beta.
    Checked: two sources, the paper and the authors' code as read; no outside value.

    Args:
      errors: f32[..., 2]. Preferred image in slot 0.
      anchor_errors: as `errors`, of the frozen model. No gradient reaches them.
      beta: reward per unit of the error, positive.
      where: bool[...]. False drops the pair: loss 0, gradient 0, whatever it holds.

    Returns:
      As `logistic_loss`.

    Raises:
      ValueError, TypeError: as `denoising_reward` and `logistic_loss`.

    >>> errors, anchor_errors = jnp.array([0.5, 0.5]), jnp.array([0.501, 0.499])
    >>> loss, _ = diffusion_dpo_loss(errors, anchor_errors=anchor_errors, beta=1000.0)
    >>> round(float(loss), 4)
    0.3133
    """
    rewards = _pair_reward(errors, anchor_errors, beta)
    return logistic_loss(rewards / 2, where=where)


def diffusion_kto_loss(
    errors,
    *,
    anchor_errors,
    desirable,
    beta: float,
    kl,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    where=None,
):
    """KTO of a diffusion model: single images, marked desirable or not.

        loss = weight (1 - s(+-(beta g - kl)))

    Source: Diffusion-KTO, arXiv:2404.04465, with the factors of the released code.
    Looks across the batch: through `kl`: beta times max(0, mean of g), by `mean_kl` of
    the rewards of the batch itself.
    Reduces to: `kto_loss` of `denoising_reward`.
    Checked: two sources, the paper and the authors' code as read; no outside value.

    Args:
      errors: f32[...]. One entry an image.
      anchor_errors: as `errors`, of the frozen model. No gradient reaches them.
      desirable: as in `kto_loss`.
      beta: reward per unit of the error, positive.
      kl: as in `kto_loss`, in the unit of beta g.
      desirable_weight: as in `kto_loss`.
      undesirable_weight: as in `kto_loss`.
      where: as in `kto_loss`.

    Returns:
      As `kto_loss`.

    Raises:
      ValueError, TypeError: as `denoising_reward` and `kto_loss`.

    >>> loss, _ = diffusion_kto_loss(
    ...     jnp.array([0.5]), anchor_errors=jnp.array([0.5]),
    ...     desirable=jnp.array([True]), beta=1000.0, kl=0.0,
    ... )
    >>> loss.tolist()
    [0.5]
    """
    return kto_loss(
        _reward(errors, anchor_errors, beta),
        desirable=desirable,
        kl=kl,
        desirable_weight=desirable_weight,
        undesirable_weight=undesirable_weight,
        where=where,
    )


def diffusion_dro_loss(errors, *, anchor_errors, threshold: float, where=None):
    """Ranks an expert's image above the policy's own state, up to a threshold.

        loss = max(threshold, -(g[w] - g[l]))

    Slot 0 holds the error on the noised expert, against the noise that was added; slot
    1 that on a state of the policy's own trajectory, against the noise that the policy
    predicted there, at the same time step.

    While the sampling policy is the trained one, slot 1 has no gradient: its error is 0
    at its minimum. It only moves the gate.

    Source: Diffusion-DRO, arXiv:2510.18353, equation 15.
    Convention: the paper's threshold of -0.001 belongs to errors that are means.
    Reduces to: `thresholded_loss` of `denoising_reward` with a beta of 1; plain
    fine-tuning on the expert, for a threshold below all values and a policy that is the
    trained one.
    Checked: two sources, the paper and the authors' code as read; no outside value.

    Args:
      errors: f32[..., 2].
      anchor_errors: as `errors`, of the frozen model. No gradient reaches them.
      threshold: as in `thresholded_loss`.
      where: bool[...]. False drops the pair: loss 0, gradient 0, whatever it holds.

    Returns:
      As `thresholded_loss`, and the metric `loss/active`, 1 where the threshold does
      not hold the gradient back.

    Raises:
      ValueError, TypeError: as `denoising_reward` and `thresholded_loss`.

    >>> errors, anchor_errors = jnp.array([0.25, 0.0]), jnp.array([0.5, 0.0])
    >>> loss, _ = diffusion_dro_loss(
    ...     errors, anchor_errors=anchor_errors, threshold=-0.125
    ... )
    >>> float(loss)
    -0.125
    """
    rewards = _pair_reward(errors, anchor_errors, beta=1.0)
    loss, metrics = thresholded_loss(rewards, threshold=threshold, where=where)
    _, where = read_pair("errors", errors, where)
    active = fill((loss != threshold).astype(loss.dtype), where)
    return loss, metrics | {"loss/active": active}


def dspo_loss(predictions, *, target, anchor_predictions, beta: float, where=None):
    """Moves the prediction for the preferred image by the score of the preference.

        p    = s(beta / 2 (g[w] - g[l]))
        move = beta (1 - p) (predictions[w] - anchor_predictions[w])
        loss = mean over the image of (predictions[w] - target[w] - move)^2

    The gradient flows through p too, as in the released code.

    Source: DSPO (ICLR 2025), as its released code has it for Stable Diffusion 1.5; the
    paper's equation is not verified.
    Reduces to: `denoising_loss` of the preferred image where the model is the anchor.
    Checked: one source, the authors' code as read.

    Args:
      predictions: [..., 2, H, W, C], of the noise. Preferred image in slot 0.
      target: as `predictions`: the noise that was added; no gradient.
      anchor_predictions: as `predictions`, of the frozen model; no gradient.
      beta: positive.
      where: bool[...]. False drops the pair: loss 0, gradient 0, whatever it holds.

    Returns:
      loss, f32[...], not reduced; the metrics of a pair of rewards beta / 2 g.

    Raises:
      ValueError: a shape does not fit, or `beta` is not positive.
      TypeError: an array is not floating-point or `where` is not boolean.

    >>> images = jnp.ones((2, 4, 4, 1))
    >>> loss, _ = dspo_loss(
    ...     images, target=0 * images, anchor_predictions=images, beta=0.01
    ... )
    >>> float(loss)
    1.0
    """
    if jnp.ndim(predictions) < 4 or jnp.shape(predictions)[-4] != 2:
        raise ValueError(
            f"`predictions` needs the shape [..., 2, H, W, C] (preferred, other); got "
            f"{checks.describe(predictions)}."
        )
    anchor_predictions = jax.lax.stop_gradient(anchor_predictions)
    for name, array in (
        ("predictions", predictions),
        ("target", target),
        ("anchor_predictions", anchor_predictions),
    ):
        checks.check_floating(name, array)
        checks.check_same_shape(name, array, like=predictions, of="predictions")
    where = inclusion(where, shape=jnp.shape(predictions)[:-4], of="predictions")
    predictions, target, frozen = (
        fill(at_least_float32(x), where)
        for x in (predictions, target, anchor_predictions)
    )
    errors, anchor_errors = (
        denoising_error(x, target=target) for x in (predictions, frozen)
    )
    rewards = _reward(errors, anchor_errors, beta) / 2
    share = beta * jax.nn.sigmoid(rewards[..., REJECTED] - rewards[..., CHOSEN])
    chosen, frozen, target = (
        x[..., CHOSEN, :, :, :] for x in (predictions, frozen, target)
    )
    moved = chosen - share[..., None, None, None] * (chosen - frozen)
    loss = denoising_error(moved, target=target)
    return results(loss, pair_metrics(rewards), where)
