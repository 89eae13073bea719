"""What demonstrations, reward models, policy gradients and diffusion must give.

As in `loss_oracles.py`: float64, plain loops, one function a library function and
under its name, for ONE token, pair, group, row of turns or picture; what couples a
batch takes the batch. `where` is a list of bools: what it drops does not count,
whatever it holds, and is 0 in what comes back.
"""

import math

import numpy as np

from loss_oracles import (
    _exp,
    _keep,
    _keep_all,
    _spread,
    logistic_loss,
    pair_accuracy,
    response_mean,
    step_sum,
    thresholded_loss,
)
from oracles import log_sigmoid, sigmoid

# --- demonstrations: losses/supervised.py ---------------------------------------------
#
# The dual of imitation with KL to the base (arXiv:2507.00018):
#   min_pi D_f(mu || pi) + beta KL(pi || pi_0) = max_{pi, c} E_mu[h(v)] - c
# with v = beta log(pi / pi_0) + c and h the inverse of f*. Here h(0) = 0 and h'(0) = 1:
# for the two KLs c and r are moved together, which changes neither side nor the policy.


def _total_variation(v: float) -> tuple[float, float]:
    """f(u) = |u - 1| / 2, f*(t) = t on its box, which is dropped."""
    return v, 1.0


def _chi_squared(v: float) -> tuple[float, float]:
    """f(u) = (u - 1)^2, f*(t) = t + t^2 / 4; the root above -2, without cancelling."""
    root = math.sqrt(1.0 + v)
    return 2.0 * v / (root + 1.0), 1.0 / root


def _squared_hellinger(v: float) -> tuple[float, float]:
    """f(u) = (sqrt(u) - 1)^2, f*(t) = t / (1 - t)."""
    return v / (1.0 + v), (1.0 + v) ** -2.0


def _jensen_shannon(v: float) -> tuple[float, float]:
    """f(u) = u log u - (u + 1) log((u + 1) / 2), f*(t) = -log(2 - exp(t))."""
    return math.log1p(-math.expm1(-v)), math.exp(-v) / (2.0 - math.exp(-v))


def _forward_kl(v: float) -> tuple[float, float]:
    """KL(mu || pi), f(u) = u log u: h = 1 + log(v + 1) with c + 1, and r without 1."""
    return math.log1p(v), 1.0 / (1.0 + v)


def _reverse_kl(v: float) -> tuple[float, float]:
    """KL(pi || mu), f(u) = -log u: h = -exp(-1 - (v - 1)) with c - 1, and r plus 1."""
    return -math.expm1(-v), math.exp(-v)


# (h, h') and the place below which h is its tangent: 0.1 above where h ends, or where
# h' is 100.
DIVERGENCES = {
    "total_variation": (_total_variation, -math.inf),
    "chi_squared": (_chi_squared, -1.0 + 0.1),
    "squared_hellinger": (_squared_hellinger, -1.0 + 0.1),
    "jensen_shannon": (_jensen_shannon, -math.log(2.0) + 0.1),
    "forward_kl": (_forward_kl, -1.0 + 0.1),
    "reverse_kl": (_reverse_kl, -math.log(100.0)),
}


def divergence_h(v: float, *, divergence: str) -> float:
    """h(v), and h(v0) + h'(v0) (v - v0) below v0."""
    function, lowest = DIVERGENCES[divergence]
    if v > lowest:
        return function(float(v))[0]
    value, slope = function(lowest)
    return value + slope * (float(v) - lowest)


def divergence_slope(v: float, *, divergence: str) -> float:
    """h'(v), constant below v0: the weight of a demonstration."""
    function, lowest = DIVERGENCES[divergence]
    return function(max(float(v), lowest))[1]


def dft_loss(token_logp) -> float:
    """-sg[pi(a|s)] log pi(a|s) of a token: dynamic fine-tuning, arXiv:2508.05629."""
    return -math.exp(float(token_logp)) * float(token_logp)


def dft_slope(token_logp) -> float:
    """d loss / d log pi of `dft_loss`: the probability is a weight, not a variable."""
    return -math.exp(float(token_logp))


def fsft_loss(logps, *, anchor_logps, beta: float, divergence: str) -> float:
    """-h(v) / beta, v = beta log(pi / pi_0): c left out.

    arXiv:2507.00018; divided by beta, its slope at pi = pi_0 is that of fine-tuning.
    """
    return fsft_solved_loss(
        logps,
        anchor_logps=anchor_logps,
        beta=beta,
        divergence=divergence,
        partition=0.0,
    )


def fsft_weight(logps, *, anchor_logps, beta: float, divergence: str, partition=0.0):
    """h'(v): minus the slope of the loss in log pi."""
    v = beta * (float(logps) - float(anchor_logps)) + float(partition)
    return divergence_slope(v, divergence=divergence)


def fsft_solved_loss(
    logps, *, anchor_logps, beta: float, divergence: str, partition
) -> float:
    """-(h(v) - c) / beta, v = beta log(pi / pi_0) + c: -J / beta of one response."""
    c = float(partition)
    v = beta * (float(logps) - float(anchor_logps)) + c
    return -(divergence_h(v, divergence=divergence) - c) / beta


# --- batches: losses/batch_coupled.py -------------------------------------------------


def solve_partition(
    logps, *, anchor_logps, beta: float, divergence: str, where=None
) -> float:
    """c where J is stationary in it: E_mu[h'(beta log(pi / pi_0) + c)] = 1.

    h' falls and h'(0) = 1, so that c is between -max and -min of the log ratios. For
    total variation every c is, and 0 is taken.
    """
    kept = _keep_all(where, logps)
    if divergence == "total_variation" or not kept:
        return 0.0
    policy, anchor = np.ravel(logps), np.ravel(anchor_logps)
    v = [beta * (float(policy[i]) - float(anchor[i])) for i in kept]
    low, high = -max(v), -min(v)
    for _ in range(200):
        c = (low + high) / 2.0
        slopes = [divergence_slope(x + c, divergence=divergence) for x in v]
        low, high = (c, high) if sum(slopes) > len(v) else (low, c)
    return (low + high) / 2.0


def whitened_advantages(advantages, *, where=None) -> list[float]:
    """(A - mean) / sqrt(var + 1e-8) over a batch, flat: REINFORCE++, arXiv:2501.03262.

    The variance is that of the entries, divided by their number.
    """
    flat = np.ravel(advantages)
    kept = _keep_all(where, advantages)
    values = _centered([float(flat[i]) for i in kept])
    variance = sum(x * x for x in values) / max(len(values), 1)
    return _spread([x / math.sqrt(variance + 1e-8) for x in values], kept, len(flat))


# --- scores: losses/reward_models.py --------------------------------------------------


def reward_model_loss(rewards, *, centering: float, margin=None) -> float:
    """-log s(r_w - r_l - m) + eta (r_w + r_l)^2: arXiv:2312.09244, the centred form."""
    total = float(rewards[0]) + float(rewards[1])
    return logistic_loss(rewards, margin=margin) + centering * total**2


def binary_outcome_loss(rewards, *, labels) -> float:
    """-y log s(r) - (1 - y) log s(-r), of one reward: PRIME, arXiv:2502.01456."""
    r, y = float(rewards), float(labels)
    return -y * log_sigmoid(r) - (1.0 - y) * log_sigmoid(-r)


def _outcome_pairs(scores, success, where, matched) -> list[list[float]]:
    """[S(tau+), S(tau-)] of each pair of a success and a failure of one group."""
    kept = _keep(where, len(scores))
    best = [float(scores[i]) for i in kept if success[i]]
    worst = [float(scores[j]) for j in kept if not success[j]]
    if matched:
        return [[best[n], worst[n]] for n in range(min(len(best), len(worst)))]
    return [[x, y] for x in best for y in worst]


def outcome_pairs_loss(scores, *, success, where=None, matched=False) -> float:
    """Mean of -log s(S(tau+) - S(tau-)) over all pairs of a group, 0 without a pair.

    arXiv:2509.19199, equation 2.
    """
    pairs = _outcome_pairs(scores, success, where, matched)
    return sum(logistic_loss(p) for p in pairs) / max(len(pairs), 1)


def matched_outcomes_loss(scores, *, success, where=None) -> float:
    """The same over pairs of the n-th success and the n-th failure."""
    return outcome_pairs_loss(scores, success=success, where=where, matched=True)


def outcome_pairs_count(*, success, where=None, matched=False) -> float:
    """Successes times failures, or the fewer of them."""
    return float(len(_outcome_pairs([0.0] * len(success), success, where, matched)))


def outcome_pairs_means(scores, *, success, where=None, matched=False):
    """Mean score of the successes, and of the failures, over pairs; 0 without one."""
    pairs = _outcome_pairs(scores, success, where, matched)
    return [sum(pair[k] for pair in pairs) / max(len(pairs), 1) for k in (0, 1)]


def outcome_pairs_accuracy(scores, *, success, where=None, matched=False) -> float:
    """Share of pairs with the success above, ties 1/2; 0 without a pair."""
    pairs = _outcome_pairs(scores, success, where, matched)
    return sum(pair_accuracy(p) for p in pairs) / len(pairs) if pairs else 0.0


# --- advantages: losses/policy_gradient.py --------------------------------------------


def _centered(values) -> list[float]:
    """x - mean of all."""
    mean = sum(values) / max(len(values), 1)
    return [x - mean for x in values]


def _standardised(values, epsilon: float) -> list[float]:
    """(x - mean) / (std + eps), the std of n - 1; 0 for fewer than two."""
    centered = _centered(values)
    std = math.sqrt(sum(x * x for x in centered) / max(len(values) - 1, 1))
    return [x / (std + epsilon) for x in centered]


def group_advantages(rewards, *, where=None, epsilon=1e-6) -> list[float]:
    """(r - mean) / std of a group: GRPO, arXiv:2402.03300, section 4.1.2.

    The std is that of n - 1; the epsilon beside it is of implementations.
    """
    kept = _keep(where, len(rewards))
    values = _standardised([float(rewards[i]) for i in kept], epsilon)
    return _spread(values, kept, len(rewards))


def centered_advantages(rewards, *, where=None) -> list[float]:
    """r - mean of a group: Dr. GRPO, arXiv:2503.20783."""
    kept = _keep(where, len(rewards))
    return _spread(_centered([float(rewards[i]) for i in kept]), kept, len(rewards))


def leave_one_out_advantages(rewards, *, where=None) -> list[float]:
    """r_i - mean of the others: RLOO, arXiv:2402.14740; 0 where there is no other."""
    kept = _keep(where, len(rewards))
    out = [0.0] * len(rewards)
    for i in kept:
        others = [float(rewards[j]) for j in kept if j != i]
        if others:
            out[i] = float(rewards[i]) - sum(others) / len(others)
    return out


def step_advantages(step_rewards, *, where, epsilon=1e-6) -> list[list[float]]:
    """(r - mean R_s) / std R_s, R_s every turn of every episode of the group.

    arXiv:2509.19199, equation 4: [episode][turn].
    """
    flat = [(i, t) for i, row in enumerate(where) for t, w in enumerate(row) if w]
    values = _standardised([float(step_rewards[i][t]) for i, t in flat], epsilon)
    out = [[0.0] * len(row) for row in step_rewards]
    for (i, t), x in zip(flat, values, strict=True):
        out[i][t] = x
    return out


def cluster_advantages(returns, *, cluster_ids, where=None) -> list[float]:
    """R - mean over turns at the same state: GiGPO, arXiv:2505.10978, without std."""
    kept = _keep(where, len(returns))
    out = [0.0] * len(returns)
    for i in kept:
        same = [float(returns[j]) for j in kept if cluster_ids[j] == cluster_ids[i]]
        out[i] = float(returns[i]) - sum(same) / len(same)
    return out


def discounted_returns(rewards, *, discount: float, where=None) -> list[float]:
    """sum_k discount^k r_{t+k} over what counts: what is dropped takes no time."""
    kept = _keep(where, len(rewards))
    out = [0.0] * len(rewards)
    for n, t in enumerate(kept):
        out[t] = sum(
            discount**k * float(rewards[later]) for k, later in enumerate(kept[n:])
        )
    return out


def gae(
    rewards,
    *,
    values,
    discount: float,
    gae_lambda: float,
    where=None,
    last_value=0.0,
) -> tuple[list[float], list[float]]:
    """(A, A + V): arXiv:1506.02438, equations 11 and 16, of a finite row.

    delta_t = r_t + discount V_{t+1} - V_t, A_t = sum_k (discount lambda)^k delta_{t+k},
    over what counts; V after the last of it is the last value.
    """
    kept = _keep(where, len(rewards))
    v = [float(values[t]) for t in kept]
    after = [*v[1:], float(last_value)]
    deltas = [
        float(rewards[t]) + discount * after[n] - v[n] for n, t in enumerate(kept)
    ]
    decay = discount * gae_lambda
    advantages = [
        sum(decay**k * x for k, x in enumerate(deltas[n:])) for n in range(len(kept))
    ]
    returns = [a + x for a, x in zip(advantages, v, strict=True)]
    size = len(rewards)
    return _spread(advantages, kept, size), _spread(returns, kept, size)


# --- surrogates: losses/policy_gradient.py --------------------------------------------


def _clip(x: float, low: float, high: float) -> float:
    return min(max(x, low), high)


def clipped_surrogate_loss(
    log_ratios, *, advantages, clip_low: float, clip_high: float, dual_clip=None
) -> float:
    """-min(rho A, clip(rho, 1 - low, 1 + high) A): PPO, arXiv:1707.06347, equation 7.

    Two bounds: DAPO, arXiv:2503.14476. With a dual clip c, for A < 0, minus
    max(min(...), c A): arXiv:1912.09729, equation 5.
    """
    rho, a = _exp(float(log_ratios)), float(advantages)
    objective = min(rho * a, _clip(rho, 1.0 - clip_low, 1.0 + clip_high) * a)
    if dual_clip is not None and a < 0:
        objective = max(objective, dual_clip * a)
    return -objective


def surrogate_is_clipped(
    log_ratios, *, advantages, clip_low: float, clip_high: float
) -> float:
    """1 where the clipped term is the smaller one: above for A > 0, below for A < 0."""
    rho, a = math.exp(float(log_ratios)), float(advantages)
    if a > 0:
        return float(rho > 1.0 + clip_high)
    return float(a < 0 and rho < 1.0 - clip_low)


def sequence_log_ratios(token_log_ratios, *, where) -> float:
    """(1 / |y|) sum_t log ratio_t: the log of GSPO's ratio, arXiv:2507.18071, eq. 7."""
    return response_mean(token_log_ratios, where=where)


def turn_log_ratios(token_log_ratios, *, step_ids, num_steps: int, where=None):
    """Log of the product of a turn's ratios: arXiv:2509.19199, equation 6."""
    config = {"step_ids": step_ids, "num_steps": num_steps, "where": where}
    return step_sum(token_log_ratios, **config)


def value_loss(values, *, returns, old_values, clip: float) -> float:
    """max((V - R)^2, (clip(V, V_old - c, V_old + c) - R)^2) / 2: PPO's value clip."""
    v, target, old = float(values), float(returns), float(old_values)
    held = _clip(v, old - clip, old + clip)
    return 0.5 * max((v - target) ** 2, (held - target) ** 2)


# With x = log policy - log anchor of a sample of the policy, r = exp(-x): estimates of
# KL(policy || anchor) by J. Schulman, "Approximating KL divergence" (2020).


def kl_k1(log_ratio) -> float:
    """-log r."""
    return float(log_ratio)


def kl_k2(log_ratio) -> float:
    """(log r)^2 / 2."""
    return float(log_ratio) ** 2 / 2.0


def kl_k3(log_ratio) -> float:
    """(r - 1) - log r."""
    return math.expm1(-float(log_ratio)) + float(log_ratio)


def coefficient_loss(logps, *, coefficients) -> float:
    """sg[coefficient] log pi: its slope in log pi is the coefficient."""
    return float(coefficients) * float(logps)


def score_coefficients(scores, *, loss_fn) -> list[float]:
    """d loss / d score_i of a loss of several scores, by differences of two widths.

    `loss_fn` takes a list and gives a number; the error is of the fourth order.
    """
    out = []
    for i in range(len(scores)):

        def slope(width, i=i):
            ends = [
                loss_fn([float(x) + h * (i == j) for j, x in enumerate(scores)])
                for h in (width, -width)
            ]
            return (ends[0] - ends[1]) / (2.0 * width)

        out.append((4.0 * slope(5e-4) - slope(1e-3)) / 3.0)
    return out


# --- pictures: rewards.py and losses/diffusion.py -------------------------------------
#
# g = e(eps_ref, eps) - e(eps_phi, eps), e the mean of squares: positive where the model
# is closer to the noise than the reference.


def denoising_error(prediction, *, target) -> float:
    """Mean of (prediction - target)^2 over a picture."""
    a, b = np.ravel(prediction), np.ravel(target)
    return sum((float(x) - float(y)) ** 2 for x, y in zip(a, b, strict=True)) / len(a)


def denoising_reward(error, *, anchor_error, beta: float) -> float:
    """beta g."""
    return beta * (float(anchor_error) - float(error))


def _improvements(errors, anchor_errors) -> list[float]:
    return [float(a) - float(e) for e, a in zip(errors, anchor_errors, strict=True)]


def denoising_loss(errors) -> float:
    """The error itself: arXiv:2006.11239, equation 14."""
    return float(errors)


def diffusion_dpo_loss(errors, *, anchor_errors, beta: float) -> float:
    """-log s(beta (g_w - g_l) / 2): arXiv:2311.12908, T omega in beta, as released."""
    return logistic_loss([0.5 * beta * g for g in _improvements(errors, anchor_errors)])


def diffusion_kto_loss(
    errors,
    *,
    anchor_errors,
    desirable,
    beta: float,
    kl,
    desirable_weight=1.0,
    undesirable_weight=1.0,
) -> float:
    """w (1 - s(y beta (g - Q))), y = 1 or -1, Q in the units of g: arXiv:2404.04465."""
    away = beta * (float(anchor_errors) - float(errors) - float(kl))
    if desirable:
        return desirable_weight * sigmoid(-away)
    return undesirable_weight * sigmoid(away)


def dspo_loss(predictions, *, target, anchor_predictions, rewards, beta: float):
    """Mean of ((e_phi - e) - beta (1 - s) (e_phi - e_ref))^2 over the winner's picture.

    DSPO (ICLR 2025), s = s((r_w - r_l) / 2) with r = beta g; its gradient goes through
    s too.
    """
    pull = beta * sigmoid((float(rewards[1]) - float(rewards[0])) / 2.0)
    rows = (np.ravel(x) for x in (predictions, target, anchor_predictions))
    squares = [
        ((float(p) - float(t)) - pull * (float(p) - float(a))) ** 2
        for p, t, a in zip(*rows, strict=True)
    ]
    return sum(squares) / len(squares)


def diffusion_dro_loss(errors, *, anchor_errors, threshold: float) -> float:
    """max(m, -L_L + L_R), demonstration first: arXiv:2510.18353, equation 15."""
    return thresholded_loss(_improvements(errors, anchor_errors), threshold=threshold)


# --- lists: evals/ranking.py ----------------------------------------------------------


def _ranking(scores, where) -> list[int]:
    """Places from the highest score down; equals in the order of the slots."""
    return sorted(_keep(where, len(scores)), key=lambda i: (-float(scores[i]), i))


def ndcg(scores, relevance, *, k: int, where=None) -> float:
    """DCG of the first k over that of the best order, 0 where nothing is relevant.

    DCG = sum_r (2^y - 1) / log2(1 + r) (Burges et al., 2005; Järvelin and Kekäläinen,
    2002), the ideal of the same list.
    """

    def dcg(order) -> float:
        gains = [2.0 ** float(relevance[i]) - 1.0 for i in order[:k]]
        return sum(x / math.log2(1.0 + r) for r, x in enumerate(gains, start=1))

    ideal = dcg(_ranking(relevance, where))
    return dcg(_ranking(scores, where)) / ideal if ideal else 0.0


def recall(scores, relevance, *, k: int, where=None) -> float:
    """Relevant items (y > 0) in the first k over all that are; 0 without any."""
    hits = [float(relevance[i]) > 0 for i in _ranking(scores, where)]
    return sum(hits[:k]) / sum(hits) if any(hits) else 0.0


def reciprocal_rank(scores, relevance, *, where=None) -> float:
    """1 / rank of the first relevant item, 0 without any."""
    for rank, i in enumerate(_ranking(scores, where), start=1):
        if float(relevance[i]) > 0:
            return 1.0 / rank
    return 0.0


def mean_relevance(scores, relevance, *, k: int, where=None) -> float:
    """Mean y of the first k, or of all where there are fewer."""
    first = [float(relevance[i]) for i in _ranking(scores, where)[:k]]
    return sum(first) / max(len(first), 1)


def win_mass(probabilities, grades, *, where=None) -> float:
    """pi(i*), i* the item of the highest grade, first of equals: arXiv:2510.18913."""
    order = _ranking(grades, where)
    return float(probabilities[order[0]]) if order else 0.0
