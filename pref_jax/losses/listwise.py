"""Losses of K responses to one prompt, or of the K items of one list.

`rewards` is f32[..., K], already scaled by beta. `where` is bool[..., K]: an item that
it drops is no competitor, has no target, and gets no gradient.

    s          rewards
    p          softmax(s) over the items that are there
    log s(x)   log sigmoid(x)
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pref_jax import checks
from pref_jax import targets as distributions
from pref_jax.losses.entries import fill, inclusion, read_constant
from pref_jax.numerics import at_least_float32
from pref_jax.rewards import implicit_reward


def _read_list(name, array, where):
    """f32[..., K] with 0 in dropped items, and bool[..., K], True where an item is."""
    checks.check_floating(name, array)
    array = at_least_float32(array)
    if not array.ndim or array.shape[-1] < 2:
        raise ValueError(
            f"`{name}` needs a last axis of at least 2 responses; got "
            f"{checks.describe(array)}."
        )
    where = inclusion(where, shape=array.shape, of=name)
    there = jnp.ones(array.shape, bool) if where is None else where
    return fill(array, there), there


def _logsumexp(values, include):
    """log sum of exp over the last axis, of all if nothing is included.

    Unlike `jax.nn.logsumexp(where=)` it is finite, and so is its gradient.
    """
    include = include | ~include.any(-1, keepdims=True)
    top = jax.lax.stop_gradient(jnp.where(include, values, -jnp.inf).max(-1))
    below = jnp.where(include, values - top[..., None], -jnp.inf)
    return top + jnp.log(jnp.exp(below).sum(-1))


def _log_softmax(rewards, there):
    """Of the items that are there; finite elsewhere. What is shared costs no digits."""
    top = jnp.where(there, rewards, -jnp.inf).max(-1, keepdims=True)
    rewards = jnp.where(there, rewards - jax.lax.stop_gradient(top), 0.0)
    return rewards - _logsumexp(rewards, there)[..., None]


def _competitors(rewards):
    """rewards[j] - rewards[i]: f32[..., K, K], item i before its competitor j."""
    return rewards[..., None, :] - rewards[..., :, None]


def _others(there):
    """bool[..., K, K]: item j is there and is not item i."""
    shape = (*there.shape, there.shape[-1])
    others = jnp.broadcast_to(~jnp.eye(there.shape[-1], dtype=bool), shape)
    return others & there[..., None, :]


def _list_accuracy(rewards, order, there):
    """Share of the pairs with order[i] > order[j] whose rewards agree: f32[...].

    A tie of rewards counts one half, and so does a list without an ordered pair.
    """
    wanted = order[..., :, None] > order[..., None, :]
    wanted &= there[..., :, None] & there[..., None, :]
    agree = jnp.heaviside(rewards[..., :, None] - rewards[..., None, :], 0.5)
    number = wanted.sum((-2, -1))
    share = jnp.where(wanted, agree, 0.0).sum((-2, -1)) / jnp.maximum(number, 1)
    return jnp.where(number > 0, share, 0.5)


def listwise_cross_entropy(rewards, *, targets, where=None):
    """Fits the softmax of the rewards of a list to a target distribution.

        loss = -sum_i targets[i] log softmax(rewards)[i]

    with the targets divided by their sum over the items that are there. The gradient
    with respect to the rewards is softmax(rewards) - targets.

    Source: ADPO, arXiv:2510.18913v6, the anchored cross-entropy (the numbers of its
    equations are not verified); as InfoNCA, arXiv:2402.05369, with softmax targets.
    Convention: the value is a cross-entropy. Values for different targets compare by
    the metric `targets/kl`.
    Reduces to: `logistic_loss` with `label_smoothing` s at K = 2 and targets
    (1 - s, s); `sdpo_loss` at a one-hot target on slot 0.
    Checked: one source for the whole; the authors' code as read; `logistic_loss` at
    K = 2.

    Args:
      rewards: f32[..., K], nats; already scaled by beta.
      targets: f32, broadcastable to `rewards`, non-negative (`pref_jax.targets`). No
        gradient reaches them.
      where: bool, broadcastable to `rewards`. False: the item is not in the list.

    Returns:
      loss, f32[...], not reduced, 0 for a list without items or targets; metrics
      `targets/kl`, KL(targets || softmax(rewards)), `targets/entropy`, and
      `rewards/accuracy`, the share of pairs that targets order and rewards order alike
      (ties, and a list without such a pair, count one half), each f32[...].

    Raises:
      ValueError: K is less than 2, or a shape does not fit.
      TypeError: `rewards` is not floating-point or `where` is not boolean.

    >>> loss, metrics = listwise_cross_entropy(
    ...     jnp.zeros(4), targets=jnp.array([0.5, 0.5, 0.0, 0.0])
    ... )
    >>> round(float(loss), 4), round(float(metrics["targets/kl"]), 4)
    (1.3863, 0.6931)
    """
    rewards, there = _read_list("rewards", rewards, where)
    targets = read_constant("targets", targets, like=rewards, of="rewards", where=there)
    total = targets.sum(-1, keepdims=True)
    targets = targets / jnp.where(total == 0, 1.0, total)
    loss = -(targets * _log_softmax(rewards, there)).sum(-1)
    entropy = jax.scipy.special.entr(targets).sum(-1)
    metrics = {
        "targets/kl": loss - entropy,
        "targets/entropy": entropy,
        "rewards/accuracy": _list_accuracy(rewards, targets, there),
    }
    return _of_lists(loss, metrics, there)


def _of_lists(loss, metrics, there):
    """Exactly 0 for a list without items."""
    some = there.any(-1)
    return fill(loss, some), {name: fill(x, some) for name, x in metrics.items()}


def adpo_loss(logps, *, anchor_logps, targets, beta: float, where=None):
    """Anchored direct preference optimisation of a list.

        loss = -sum_i targets[i] log softmax(beta (logps - anchor_logps))[i]

    Source: ADPO, arXiv:2510.18913v6, whose tau_anc is 1 / beta (the numbers of its
    equations are not verified).
    Convention: `logps` are summed over the tokens, as in the authors' TRL trainer; for
    the length-normalised form pass means.
    Reduces to: `dpo_loss` at K = 2 and a one-hot target on slot 0.
    Checked: one source; the authors' TRL trainer as read; `dpo_loss` at K = 2.

    Args:
      logps: f32[..., K], nats: the policy's log-probability of each response.
      anchor_logps: as `logps`, of the anchor. No gradient reaches it.
      targets: as in `listwise_cross_entropy`.
      beta: reward per nat, positive.
      where: as in `listwise_cross_entropy`.

    Returns:
      As `listwise_cross_entropy`.

    Raises:
      ValueError, TypeError: as `implicit_reward` and `listwise_cross_entropy`.

    >>> logps = jnp.array([-1.0, -2.0, -4.0])
    >>> anchor_logps = jnp.array([-1.0, -2.0, -3.0])
    >>> targets = jnp.array([0.5, 0.5, 0.0])
    >>> loss, _ = adpo_loss(logps, anchor_logps=anchor_logps, targets=targets, beta=1.0)
    >>> round(float(loss), 4)
    0.862
    """
    rewards = implicit_reward(
        logps, anchor_logps=jax.lax.stop_gradient(anchor_logps), beta=beta
    )
    return listwise_cross_entropy(rewards, targets=targets, where=where)


def plackett_luce_loss(rewards, *, ranks, where=None):
    """Likelihood of a ranking: the best is chosen first, then the best of the rest.

        loss = -sum_i (s[i] - logsumexp of s[j] over j with ranks[j] >= ranks[i])

    Source: Plackett-Luce for DPO, arXiv:2305.18290v3, appendix A.3, equation 20 (the
    numbers are not verified).
    Convention: items of one rank stand in each other's sums (Breslow's rule).
    Reduces to: `logistic_loss` at K = 2 and ranks (1, 2).
    Checked: one source, the paper's equation.

    Args:
      rewards: f32[..., K], nats; already scaled by beta.
      ranks: numbers, broadcastable to `rewards`. The lowest is the best.
      where: bool, broadcastable to `rewards`. False: the item is not in the list.

    Returns:
      loss, f32[...], not reduced; metric `rewards/accuracy` as in
      `listwise_cross_entropy`.

    Raises:
      ValueError, TypeError: as `listwise_cross_entropy`.

    >>> loss, _ = plackett_luce_loss(jnp.zeros(3), ranks=jnp.array([2, 1, 3]))
    >>> round(float(loss), 4)
    1.7918
    """
    rewards, there = _read_list("rewards", rewards, where)
    ranks = read_constant("ranks", ranks, like=rewards, of="rewards")
    left = (ranks[..., None, :] >= ranks[..., :, None]) & there[..., None, :]
    terms = _logsumexp(_competitors(rewards), left)
    loss = jnp.where(there, terms, 0.0).sum(-1)
    metrics = {"rewards/accuracy": _list_accuracy(rewards, -ranks, there)}
    return _of_lists(loss, metrics, there)


def irpo_loss(rewards, *, weights, where=None):
    """Every item of a list against the sum of the others, weighted by its position.

        loss = -sum_i weights[i] log s(-log sum_{j != i} exp(s[j] - s[i]))
             = -sum_i weights[i] log softmax(s)[i]

    Source: IRPO, arXiv:2504.15477, its preference model with NDCG weights (the numbers
    of its equations, and whether its sum includes j = i, are not verified).
    Convention: the sum over competitors, as printed; the authors' code takes
    their mean, `irpo_mean_loss`.
    Reduces to: `dpo_loss` for two items of which one is relevant; `sdpo_loss` for one
    relevant item of weight 1.
    Checked: two sources, the paper's preference model and the authors' code as
    read; no outside value.

    Args:
      rewards: f32[..., K], nats; already scaled by beta. One entry an item.
      weights: broadcastable to `rewards`, 0 or more: as a rule
        `targets.ndcg_weights`. No gradient reaches them.
      where: bool, broadcastable to `rewards`. False: the item is not in the list.

    Returns:
      loss, f32[...], not reduced; metric `rewards/accuracy` as in
      `listwise_cross_entropy`, by weights.

    Raises:
      ValueError, TypeError: as `listwise_cross_entropy`.

    >>> loss, _ = irpo_loss(jnp.zeros(4), weights=jnp.array([2.0, 0.0, 0.0, 0.0]))
    >>> round(float(loss), 4)
    2.7726
    """
    rewards, there = _read_list("rewards", rewards, where)
    weights = read_constant("weights", weights, like=rewards, of="rewards", where=there)
    loss = -(weights * _log_softmax(rewards, there)).sum(-1)
    metrics = {"rewards/accuracy": _list_accuracy(rewards, weights, there)}
    return _of_lists(loss, metrics, there)


def irpo_mean_loss(rewards, *, weights, where=None):
    """`irpo_loss` against the mean of the others, averaged over the items.

        z[i] = s[i] + log(n - 1) - logsumexp of s[j] over j != i
        loss = -1/n sum_i weights[i] log s(z[i]),  n the number of items

    Source: the code released with IRPO, arXiv:2504.15477, with its constant of -100 on
    the diagonal, which leaks for a small beta, replaced by leaving j = i out.
    Convention: the authors' code adds up lists; here each list is an entry.
    Reduces to: `irpo_loss` / 2 for two items.
    Checked: two sources, the paper and the authors' code as read, and one value
    computed from it.

    Args:
      rewards: f32[..., K], nats; already scaled by beta. One entry an item.
      weights: as in `irpo_loss`.
      where: as in `irpo_loss`.

    Returns:
      As `irpo_loss`; a list of fewer than two items has loss 0.

    Raises:
      ValueError, TypeError: as `irpo_loss`.

    >>> loss, _ = irpo_mean_loss(jnp.zeros(4), weights=jnp.array([2.0, 0.0, 0.0, 0.0]))
    >>> round(float(loss), 4)
    0.3466
    """
    rewards, there = _read_list("rewards", rewards, where)
    weights = read_constant("weights", weights, like=rewards, of="rewards", where=there)
    number = jnp.maximum(there.sum(-1), 2).astype(rewards.dtype)
    others = _logsumexp(_competitors(rewards), _others(there))
    z = jnp.log(number - 1)[..., None] - others
    loss = -(weights * jax.nn.log_sigmoid(z)).sum(-1) / number
    metrics = {"rewards/accuracy": _list_accuracy(rewards, weights, there)}
    loss = jnp.where(there.sum(-1) < 2, 0.0, loss)
    return _of_lists(loss, metrics, there)


def sdpo_loss(rewards, *, where=None):
    """Softmax-DPO: one chosen response against the sum of all others.

        loss = -log s(s[0] - logsumexp of s[k] over k > 0)

    Source: S-DPO, arXiv:2406.09215, equation 9 (the number is not verified).
    Reduces to: `logistic_loss` at K = 2.
    Checked: one source, the paper's equation.

    Args:
      rewards: f32[..., K], nats; already scaled by beta. Chosen in slot 0.
      where: bool, broadcastable to `rewards`. False: the response is not in the list;
        without the chosen one, or without any other, the loss is 0.

    Returns:
      loss, f32[...], not reduced; metric `rewards/accuracy`, the share of the others
      that the chosen response beats (a tie counts one half).

    Raises:
      ValueError, TypeError: as `listwise_cross_entropy`.

    >>> loss, _ = sdpo_loss(jnp.zeros(4))
    >>> round(float(loss), 4)
    1.3863
    """
    rewards, there = _read_list("rewards", rewards, where)
    first = jnp.arange(rewards.shape[-1]) == 0
    first = jnp.broadcast_to(first, there.shape)
    # Without the chosen response nothing is left of the list.
    there &= there[..., :1]
    loss = -_log_softmax(rewards, there)[..., 0]
    order = first.astype(rewards.dtype)
    metrics = {"rewards/accuracy": _list_accuracy(rewards, order, there)}
    return _of_lists(loss, metrics, there)


def lipo_lambda_loss(rewards, *, labels, where=None):
    """All pairs of a list, weighted by what swapping the two would do to DCG.

        loss = sum over i, j with labels[i] > labels[j] of
               |G[i] - G[j]| |1 / D[i] - 1 / D[j]| log(1 + exp(-(s[i] - s[j])))
        G = 2^labels - 1,  D = log(1 + rank),  rank by the rewards as they are, 1 first

    The weights carry no gradient; of equal rewards the lower slot ranks first.

    Source: LiPO-lambda, arXiv:2402.01878, equations 9 and 10 (the numbers are not
    verified).
    Convention: the published sign. IRPO's released code has it reversed, unbounded
    below.
    Checked: one source, the paper's equation.

    Args:
      rewards: f32[..., K], nats; already scaled by beta.
      labels: broadcastable to `rewards`, graded relevance psi, 0 or more.
      where: bool, broadcastable to `rewards`. False: the response is not in the list.

    Returns:
      loss, f32[...], not reduced; metric `rewards/accuracy` as in
      `listwise_cross_entropy`, by labels.

    Raises:
      ValueError, TypeError: as `listwise_cross_entropy`.

    >>> loss, _ = lipo_lambda_loss(jnp.zeros(2), labels=jnp.array([1.0, 0.0]))
    >>> round(float(loss), 4)
    0.3691
    """
    rewards, there = _read_list("rewards", rewards, where)
    labels = read_constant("labels", labels, like=rewards, of="rewards", where=there)
    order = jnp.argsort(jnp.where(there, rewards, -jnp.inf), descending=True)
    rank = 1 + jnp.argsort(order)
    discount = 1 / jnp.log1p(rank.astype(rewards.dtype))

    def difference(x):
        return x[..., :, None] - x[..., None, :]

    # The 1 that is taken from each gain cancels.
    delta = jnp.abs(difference(jnp.exp2(labels)) * difference(discount))
    wanted = (difference(labels) > 0) & there[..., :, None] & there[..., None, :]
    terms = -delta * jax.nn.log_sigmoid(difference(rewards))
    loss = jnp.where(wanted, terms, 0.0).sum((-2, -1))
    metrics = {"rewards/accuracy": _list_accuracy(rewards, labels, there)}
    return _of_lists(loss, metrics, there)


def listnet_loss(rewards, *, labels, where=None):
    """Cross-entropy against the softmax of the labels: `listwise_cross_entropy`.

        loss = -sum_i softmax(labels)[i] log softmax(rewards)[i]

    Source: ListNet, Cao et al., ICML 2007, its top-one probabilities.
    Checked: one source, the paper's equation.

    Args:
      rewards: f32[..., K], nats; already scaled by beta.
      labels: broadcastable to `rewards`, graded relevance.
      where: bool, broadcastable to `rewards`. False: the response is not in the list.

    Returns:
      As `listwise_cross_entropy`.

    Raises:
      ValueError, TypeError: as `listwise_cross_entropy`.

    >>> loss, _ = listnet_loss(jnp.zeros(2), labels=jnp.array([1.0, 0.0]))
    >>> round(float(loss), 4)
    0.6931
    """
    rewards, there = _read_list("rewards", rewards, where)
    labels = read_constant("labels", labels, like=rewards, of="rewards")
    targets = distributions.softmax(labels, temperature=1.0, where=there)
    return listwise_cross_entropy(rewards, targets=targets, where=there)
