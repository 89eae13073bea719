"""What the losses, targets, rewards and anchors must give: float64, plain loops.

One function a library function and under its name, for ONE pair, list or response;
losses that couple a batch take the batch. Written from the cited equations, with math
and numpy and no line of the library. Pairs hold [chosen, rejected]. `where` is a list
of bools: what it drops does not count, whatever it holds, and is 0 in what comes back.
"""

import math

import numpy as np

from oracles import log_sigmoid, log_sum_exp, sigmoid


def _keep(where, n: int) -> list[int]:
    """The places that count."""
    return [i for i in range(n) if where is None or bool(where[i])]


def _keep_all(where, values) -> list[int]:
    """The places that count in what is read row by row."""
    return _keep(None if where is None else np.ravel(where), np.size(values))


def _margin(rewards) -> float:
    """h = r_w - r_l."""
    return float(rewards[0]) - float(rewards[1])


def _log_ratios(logps, anchor_logps) -> list[float]:
    """log pi(y) / pi_ref(y) of each response."""
    return [float(p) - float(a) for p, a in zip(logps, anchor_logps, strict=True)]


def _means(logps, lengths) -> list[float]:
    """log pi(y) / |y| of each response, |y| at least 1."""
    return [float(p) / max(float(n), 1.0) for p, n in zip(logps, lengths, strict=True)]


# --- pairs: losses/pairwise.py --------------------------------------------------------


def pair_accuracy(rewards) -> float:
    """1 where the chosen reward is higher, 1/2 for a tie."""
    h = _margin(rewards)
    return 1.0 if h > 0 else 0.5 if h == 0 else 0.0


def logistic_loss(rewards, *, label_smoothing=0.0, margin=None) -> float:
    """-(1 - e) log s(h - m) - e log s(m - h).

    DPO, arXiv:2305.18290, equation 7, on rewards; e: cDPO; m: Llama 2,
    arXiv:2307.09288, equation 2, and ODPO, arXiv:2402.10571.
    """
    h = _margin(rewards) - (0.0 if margin is None else float(margin))
    return -(1.0 - label_smoothing) * log_sigmoid(h) - label_smoothing * log_sigmoid(-h)


def dpo_loss(logps, *, anchor_logps, beta: float, label_smoothing=0.0) -> float:
    """The logistic loss of beta log pi(y) / pi_ref(y), arXiv:2305.18290, equation 7."""
    rewards = [beta * x for x in _log_ratios(logps, anchor_logps)]
    return logistic_loss(rewards, label_smoothing=label_smoothing)


def robust_loss(rewards, *, flip_rate: float) -> float:
    """[(1 - e) l(h) - e l(-h)] / (1 - 2 e), l(h) = -log s(h): arXiv:2403.00409."""
    h = _margin(rewards)
    kept, flipped = -log_sigmoid(h), -log_sigmoid(-h)
    return ((1.0 - flip_rate) * kept - flip_rate * flipped) / (1.0 - 2.0 * flip_rate)


def ipo_loss(log_ratios, *, beta: float) -> float:
    """(h - 1 / (2 beta))^2, h of log ratios without beta: arXiv:2310.12036, eq. 17."""
    return (_margin(log_ratios) - 1.0 / (2.0 * beta)) ** 2


def hinge_loss(rewards, *, margin: float) -> float:
    """max(0, m - h): SLiC-HF, arXiv:2305.10425; RSO, arXiv:2309.06657."""
    return max(0.0, margin - _margin(rewards))


def thresholded_loss(rewards, *, threshold: float) -> float:
    """max(m, -L_L + L_R) with the improvements as rewards: arXiv:2510.18353, eq. 15."""
    improvement, other = float(rewards[0]), float(rewards[1])
    return max(threshold, -improvement + other)


def length_regularized_loss(rewards, *, lengths, alpha: float) -> float:
    """-log s(h + alpha |y_w| - alpha |y_l|): R-DPO, arXiv:2403.19159.

    The optimum for r(x, y) - alpha |y| has r = beta log(pi / pi_ref) + alpha |y| + c.
    """
    lengths = [max(float(n), 1.0) for n in lengths]
    return -log_sigmoid(_margin(rewards) + alpha * lengths[0] - alpha * lengths[1])


def rpo_loss(logps, *, anchor_logps, lengths, beta: float, alpha: float) -> float:
    """DPO - alpha log pi(y_w) / |y_w|: arXiv:2404.19733, equation 1."""
    nll = -float(logps[0]) / max(float(lengths[0]), 1.0)
    return dpo_loss(logps, anchor_logps=anchor_logps, beta=beta) + alpha * nll


def reward_aware_loss(rewards, *, grades, eta: float) -> float:
    """KL(Bernoulli(s(eta (g_w - g_l))) || Bernoulli(s(h))).

    Nemotron-4, arXiv:2406.11704, reward-aware preference optimisation:
    D[a || b] = s(b) log(s(b) / s(a)) + (1 - s(b)) log((1 - s(b)) / (1 - s(a))).
    """
    a, b = _margin(rewards), eta * _margin(grades)
    return sigmoid(b) * (log_sigmoid(b) - log_sigmoid(a)) + sigmoid(-b) * (
        log_sigmoid(-b) - log_sigmoid(-a)
    )


def nca_loss(rewards) -> float:
    """-log s(r_w) - 1/2 sum_k log s(-r_k), two responses: arXiv:2402.05369."""
    loss = -log_sigmoid(rewards[0])
    for r in rewards:
        loss -= 0.5 * log_sigmoid(-float(r))
    return loss


def apo_zero_loss(rewards) -> float:
    """1 - s(r_w) + s(r_l): arXiv:2408.06266, equation 7, plus 1."""
    return sigmoid(-float(rewards[0])) + sigmoid(rewards[1])


def apo_down_loss(rewards) -> float:
    """s(r_w) + 1 - s(r_w - r_l): arXiv:2408.06266, equation 8, plus 1."""
    return sigmoid(rewards[0]) + sigmoid(-_margin(rewards))


def exo_loss(rewards, *, label_smoothing: float) -> float:
    """KL of (s(h), s(-h)) from (1 - e, e): EXO-pref, arXiv:2402.00856, equation 16."""
    h, e = _margin(rewards), label_smoothing
    return sigmoid(h) * (log_sigmoid(h) - math.log(1.0 - e)) + sigmoid(-h) * (
        log_sigmoid(-h) - math.log(e)
    )


def sppo_loss(log_ratios, *, beta: float, win_rates=(1.0, 0.0)) -> float:
    """sum_k (log pi / pi_ref(y_k) - (P_k - 1/2) / beta)^2.

    SPPO, arXiv:2405.00675, equation 4.7, whose eta is 1 / beta.
    """
    return sum(
        (float(x) - (float(p) - 0.5) / beta) ** 2
        for x, p in zip(log_ratios, win_rates, strict=True)
    )


def discopop_loss(rewards, *, tau: float) -> float:
    """(1 - s(h / tau)) (-log s(h)) + s(h / tau) exp(-h): arXiv:2406.08414, equation 5.

    The second product by its logarithm: for very negative h it is 0 times infinity.
    """
    h = _margin(rewards)
    exponential = math.exp(log_sigmoid(h / tau) - h)
    return sigmoid(-h / tau) * -log_sigmoid(h) + exponential


def length_normalized_dpo_loss(
    logps, *, anchor_logps, lengths, beta: float, label_smoothing=0.0
) -> float:
    """DPO of log ratios divided by the length of their response."""
    means = _means(_log_ratios(logps, anchor_logps), lengths)
    return logistic_loss([beta * x for x in means], label_smoothing=label_smoothing)


def xpo_loss(logps, *, anchor_logps, explore, beta: float, alpha: float) -> float:
    """DPO + alpha sum of log pi(y~) over explored y~: arXiv:2405.21046, Algorithm 1."""
    bonus = xpo_bonus(logps, explore=explore)
    return dpo_loss(logps, anchor_logps=anchor_logps, beta=beta) + alpha * bonus


def xpo_bonus(logps, *, explore) -> float:
    """The policy's log-probs of explored responses: not ratios, not divided."""
    return sum(float(p) for p, on in zip(logps, explore, strict=True) if on)


# --- without a reference: losses/reference_free.py ------------------------------------


def simpo_loss(
    logps, *, lengths, beta: float, gamma: float, label_smoothing=0.0
) -> float:
    """-log s(beta log pi(y_w) / |y_w| - beta log pi(y_l) / |y_l| - gamma).

    SimPO, arXiv:2405.14734, equation 6: gamma is outside beta.
    """
    rewards = [beta * m for m in _means(logps, lengths)]
    return logistic_loss(rewards, label_smoothing=label_smoothing, margin=gamma)


def _log_odds(mean_logp: float) -> float:
    """log(p / (1 - p))."""
    return mean_logp - math.log(-math.expm1(mean_logp))


def orpo_odds_ratio(logps, *, lengths) -> float:
    """-log s(log(odds_w / odds_l)), odds = p / (1 - p): arXiv:2403.07691, equation 7.

    log p is a mean over tokens, held at -1e-7 so that the odds are finite.
    """
    means = [min(m, -1e-7) for m in _means(logps, lengths)]
    return -log_sigmoid(_log_odds(means[0]) - _log_odds(means[1]))


def orpo_loss(logps, *, lengths, lambda_: float) -> float:
    """L_SFT + lambda L_OR, means over the response: arXiv:2403.07691, equation 6."""
    nll = -min(_means(logps, lengths)[0], -1e-7)
    return nll + lambda_ * orpo_odds_ratio(logps, lengths=lengths)


def cpo_loss(logps, *, beta: float, alpha: float, label_smoothing=0.0) -> float:
    """-log s(beta log pi(y_w) - beta log pi(y_l)) - alpha log pi(y_w), sums.

    CPO, arXiv:2401.08417, equations 3 to 5, where alpha is 1.
    """
    rewards = [beta * float(p) for p in logps]
    loss = logistic_loss(rewards, label_smoothing=label_smoothing)
    return loss - alpha * float(logps[0])


# --- one response: losses/unpaired.py -------------------------------------------------


def kto_loss(
    rewards, *, desirable, kl, desirable_weight=1.0, undesirable_weight=1.0
) -> float:
    """lambda_y - v(x, y): KTO, arXiv:2402.01306, section 4.1.

    v is lambda_D s(r - z) for a desirable response, lambda_U s(z - r) for another;
    1 - s(x) is written s(-x), which does not cancel.
    """
    r, z = float(rewards), float(kl)
    if desirable:
        return desirable_weight * sigmoid(z - r)
    return undesirable_weight * sigmoid(r - z)


def bco_loss(rewards, *, desirable, delta) -> float:
    """-log s(r - d) for a desirable response, -log s(-(r - d)) for another.

    BCO, arXiv:2404.04656.
    """
    shifted = float(rewards) - float(delta)
    return -log_sigmoid(shifted if desirable else -shifted)


def unpaired_accuracy(reward, *, desirable, against) -> float:
    """1 where the reward is on the label's side of what it is held against, 1/2 on it.

    Of KTO against kl, of BCO against delta.
    """
    return pair_accuracy([reward, against] if desirable else [against, reward])


# --- batches: losses/batch_coupled.py -------------------------------------------------


def mean_kl(rewards, *, where=None) -> float:
    """max(0, mean r) over a batch: z_0 of KTO, arXiv:2402.01306, section 4.1."""
    kept = _keep_all(where, rewards)
    total = sum(float(np.ravel(rewards)[i]) for i in kept)
    return max(0.0, total / len(kept)) if kept else 0.0


def reward_shift(rewards, *, desirable, where=None) -> float:
    """delta = (E[r | desirable] + E[r | undesirable]) / 2: BCO, arXiv:2404.04656.

    For a batch that holds both; the paper says nothing of others.
    """
    values, labels = np.ravel(rewards), np.ravel(desirable)
    kept = _keep_all(where, rewards)
    wanted = [float(values[i]) for i in kept if labels[i]]
    unwanted = [float(values[i]) for i in kept if not labels[i]]
    return 0.5 * (sum(wanted) / len(wanted) + sum(unwanted) / len(unwanted))


def _same_rank(values, others) -> list[float]:
    """For each value the one of `others` that is as many places from the lowest."""
    order = sorted(range(len(values)), key=lambda i: (values[i], i))
    out = [0.0] * len(values)
    for i, other in zip(order, sorted(others), strict=True):
        out[i] = other
    return out


def aot_loss(
    logps, *, anchor_logps, beta: float, label_smoothing=0.0, where=None
) -> list[float]:
    """Policy gaps against the anchor gaps of their rank: AOT paired, arXiv:2406.05882.

    Sorted, log pi(y_w) / pi(y_l) has to exceed log pi_ref(y_w) / pi_ref(y_l) at every
    quantile; for one sorted pair, the logistic loss of beta times the excess.
    """
    kept = _keep(where, len(logps))
    gaps = [_margin(logps[i]) for i in kept]
    anchors = _same_rank(gaps, [_margin(anchor_logps[i]) for i in kept])
    out = [0.0] * len(logps)
    for i, gap, anchor in zip(kept, gaps, anchors, strict=True):
        rewards = [beta * gap, beta * anchor]
        out[i] = logistic_loss(rewards, label_smoothing=label_smoothing)
    return out


def aot_unpaired_loss(rewards, *, label_smoothing=0.0, where=None) -> list[float]:
    """Chosen rewards against the rejected ones of their rank: arXiv:2406.05882."""
    kept = _keep(where, len(rewards))
    chosen = [float(rewards[i][0]) for i in kept]
    rejected = _same_rank(chosen, [float(rewards[i][1]) for i in kept])
    out = [0.0] * len(rewards)
    for i, w, l_ in zip(kept, chosen, rejected, strict=True):
        out[i] = logistic_loss([w, l_], label_smoothing=label_smoothing)
    return out


# --- lists: losses/listwise.py --------------------------------------------------------


def _log_softmax(values) -> list[float]:
    """x_i - log sum_j exp(x_j)."""
    total = log_sum_exp(values)
    return [float(x) - total for x in values]


def _shares(targets, kept) -> list[float]:
    """q of the items that count, summing to 1 over them."""
    total = sum(float(targets[i]) for i in kept)
    return [float(targets[i]) / total for i in kept]


def listwise_cross_entropy(rewards, *, targets, where=None) -> float:
    """-sum_i q_i log softmax(u)_i, q over the items that count: arXiv:2510.18913."""
    kept = _keep(where, len(rewards))
    if not kept:
        return 0.0
    logps = _log_softmax([rewards[i] for i in kept])
    q = _shares(targets, kept)
    return -sum(a * b for a, b in zip(q, logps, strict=True) if a > 0)


def targets_entropy(targets, *, where=None) -> float:
    """-sum_i q_i log q_i."""
    kept = _keep(where, len(targets))
    return -sum(q * math.log(q) for q in _shares(targets, kept) if q > 0)


def targets_kl(rewards, *, targets, where=None) -> float:
    """KL(q || softmax(u)) = sum_i q_i (log q_i - log softmax(u)_i)."""
    kept = _keep(where, len(rewards))
    if not kept:
        return 0.0
    logps = _log_softmax([rewards[i] for i in kept])
    q = _shares(targets, kept)
    return sum(a * (math.log(a) - b) for a, b in zip(q, logps, strict=True) if a > 0)


def list_accuracy(rewards, *, targets, where=None) -> float:
    """Share of pairs with q_i > q_j and u_i > u_j; a tie of rewards counts 1/2.

    1/2 where the targets order no pair.
    """
    kept = _keep(where, len(rewards))
    hits = [
        pair_accuracy([rewards[i], rewards[j]])
        for i in kept
        for j in kept
        if float(targets[i]) > float(targets[j])
    ]
    return sum(hits) / len(hits) if hits else 0.5


def adpo_loss(logps, *, anchor_logps, targets, beta: float, where=None) -> float:
    """Cross-entropy of q with softmax((log pi - log pi_ref) / tau), beta = 1 / tau.

    ADPO, arXiv:2510.18913.
    """
    kept = _keep(where, len(logps))
    rewards = [beta * (float(logps[i]) - float(anchor_logps[i])) for i in kept]
    return listwise_cross_entropy(rewards, targets=[targets[i] for i in kept])


def plackett_luce_loss(rewards, *, ranks, where=None) -> float:
    """-sum_i [u_i - log sum_{j: rank_j >= rank_i} exp(u_j)].

    Plackett-Luce, the best first; ties share a denominator (Breslow, 1974).
    """
    kept = _keep(where, len(rewards))
    loss = 0.0
    for i in kept:
        left = [rewards[j] for j in kept if ranks[j] >= ranks[i]]
        loss -= float(rewards[i]) - log_sum_exp(left)
    return loss


def irpo_loss(rewards, *, weights, where=None) -> float:
    """-sum_i w_i log s(-log sum_{j != i} exp(s_j - s_i)).

    In-context ranking preference optimisation, arXiv:2504.15477, the preference model
    of a list: the sum is over competitors. s(-log A) = 1 / (1 + A).
    """
    kept = _keep(where, len(rewards))
    loss = 0.0
    for i in kept:
        others = [float(rewards[j]) - float(rewards[i]) for j in kept if j != i]
        if others:
            loss -= float(weights[i]) * log_sigmoid(-log_sum_exp(others))
    return loss


def irpo_mean_loss(rewards, *, weights, where=None) -> float:
    """-(1/n) sum_i w_i log s(-log mean_{j != i} exp(s_j - s_i)).

    The released code of arXiv:2504.15477, the item itself left out exactly.
    """
    kept = _keep(where, len(rewards))
    n = len(kept)
    if n < 2:
        return 0.0
    loss = 0.0
    for i in kept:
        others = [float(rewards[j]) - float(rewards[i]) for j in kept if j != i]
        mean = log_sum_exp(others) - math.log(n - 1)
        loss -= float(weights[i]) * log_sigmoid(-mean) / n
    return loss


def sdpo_loss(rewards, *, where=None) -> float:
    """-log s(-log sum_{k > 0} exp(s_k - s_0)): S-DPO, arXiv:2406.09215."""
    kept = _keep(where, len(rewards))
    others = [float(rewards[k]) - float(rewards[0]) for k in kept if k > 0]
    if 0 not in kept or not others:
        return 0.0
    return -log_sigmoid(-log_sum_exp(others))


def lipo_lambda_loss(rewards, *, labels, where=None) -> float:
    """sum_{psi_i > psi_j} D_ij log(1 + exp(-(s_i - s_j))): arXiv:2402.01878.

    D_ij = |G_i - G_j| |1 / D(t_i) - 1 / D(t_j)|, G = 2^psi - 1, D(t) = log(1 + t),
    t the rank by s now, 1 the highest; ties in the order of the slots.
    """
    kept = _keep(where, len(rewards))
    order = sorted(kept, key=lambda i: (-float(rewards[i]), i))
    discount = {i: math.log(1.0 + t) for t, i in enumerate(order, start=1)}
    gain = {i: 2.0 ** float(labels[i]) - 1.0 for i in kept}
    loss = 0.0
    for i in kept:
        for j in kept:
            if float(labels[i]) > float(labels[j]):
                change = abs(1.0 / discount[i] - 1.0 / discount[j])
                weight = abs(gain[i] - gain[j]) * change
                loss -= weight * log_sigmoid(float(rewards[i]) - float(rewards[j]))
    return loss


def listnet_loss(rewards, *, labels, where=None) -> float:
    """Cross-entropy of top-one probabilities, softmax of both: ListNet (Cao, 2007)."""
    targets = softmax(labels, temperature=1.0, where=where)
    return listwise_cross_entropy(rewards, targets=targets, where=where)


# --- targets.py -----------------------------------------------------------------------


def _spread(values, kept, n: int) -> list[float]:
    """The values at the places that count, 0 at the others."""
    out = [0.0] * n
    for i, x in zip(kept, values, strict=True):
        out[i] = float(x)
    return out


def hard(grades, *, where=None) -> list[float]:
    """1 on the best item, in equal shares where several are."""
    kept = _keep(where, len(grades))
    best = max((float(grades[i]) for i in kept), default=None)
    winners = [float(grades[i]) == best for i in kept]
    return _spread([w / sum(winners) for w in winners], kept, len(grades))


def soft(grades, *, temperature: float, where=None) -> list[float]:
    """(s, 1 - s), s = s((R_0 - R_1) / t): ADPO, arXiv:2510.18913; of one item 1."""
    kept = _keep(where, 2)
    if len(kept) < 2:
        return _spread([1.0] * len(kept), kept, 2)
    d = _margin(grades) / temperature
    return [sigmoid(d), sigmoid(-d)]


def softmax(grades, *, temperature: float, where=None) -> list[float]:
    """exp(R_i / t) / sum_j exp(R_j / t)."""
    kept = _keep(where, len(grades))
    if not kept:
        return [0.0] * len(grades)
    logps = _log_softmax([float(grades[i]) / temperature for i in kept])
    return _spread([math.exp(x) for x in logps], kept, len(grades))


def smoothed(targets, *, smoothing: float, where=None) -> list[float]:
    """(1 - e) q_i + e / n over the n items that count."""
    kept = _keep(where, len(targets))
    n = len(kept)
    q = _shares(targets, kept) if kept else []
    mixed = [(1.0 - smoothing) * x + smoothing / n for x in q]
    return _spread(mixed, kept, len(targets))


def _median(values) -> float:
    """The middle value, or the mean of the two in the middle."""
    ordered = sorted(values)
    half = len(ordered) // 2
    if len(ordered) % 2:
        return ordered[half]
    return (ordered[half - 1] + ordered[half]) / 2.0


def kde(grades, *, temperature: float, bandwidth=None, where=None) -> list[float]:
    """softmax(logit(F) / t) of smoothed ranks, for ADPO's noisy rewards.

        F_i = mean_j Phi((R_i - R_j) / h), kept in [1e-3, 1 - 1e-3]
        h = 1.06 sigma P^(-1/5), sigma = max(1.4826 median |R - median R|, 1e-6)

    The bandwidth is Silverman's (1986); j = i counts too.
    """
    kept = _keep(where, len(grades))
    values = [float(grades[i]) for i in kept]
    if bandwidth is None and values:
        middle = _median(values)
        sigma = max(1.4826 * _median([abs(x - middle) for x in values]), 1e-6)
        bandwidth = 1.06 * sigma * len(values) ** -0.2
    scores = []
    for a in values:
        below = [0.5 * math.erfc(-(a - b) / bandwidth / math.sqrt(2)) for b in values]
        f = min(max(sum(below) / len(values), 1e-3), 1.0 - 1e-3)
        scores.append(math.log(f / (1.0 - f)))
    shares = softmax(scores, temperature=temperature)
    return _spread(shares, kept, len(grades))


def ndcg_weights(relevance, *, ranks) -> list[float]:
    """(2^y - 1) / log2(1 + k): arXiv:2504.15477, gain over discount."""
    return [
        (2.0 ** float(y) - 1.0) / math.log2(1.0 + k)
        for y, k in zip(relevance, ranks, strict=True)
    ]


def position_weights(ranks) -> list[float]:
    """1 / log2(1 + k)."""
    return [1.0 / math.log2(1.0 + k) for k in ranks]


def reciprocal_rank_weights(relevance, *, ranks) -> list[float]:
    """(2^y - 1) / k."""
    return [(2.0 ** float(y) - 1.0) / k for y, k in zip(relevance, ranks, strict=True)]


# --- rewards.py -----------------------------------------------------------------------


def implicit_reward(logps, *, anchor_logps, beta: float) -> float:
    """beta log u, u = pi / pi_ref: f'(u) of u log u, without its 1."""
    return beta * (float(logps) - float(anchor_logps))


def _exp(y: float) -> float:
    """exp(y); beyond 30 its tangent there, by convention of the library."""
    return math.exp(y) if y <= 30.0 else math.exp(30.0) * (1.0 + (y - 30.0))


def forward_kl_reward(logps, *, anchor_logps, beta: float) -> float:
    """beta (1 - 1 / u): f'(u) of -log u, plus 1: f-DPO, arXiv:2309.16240."""
    return beta * (1.0 - _exp(float(anchor_logps) - float(logps)))


def jensen_shannon_reward(logps, *, anchor_logps, beta: float) -> float:
    """beta log(2 u / (1 + u)): f'(u) of u log u - (u + 1) log((u + 1) / 2)."""
    return beta * (math.log(2.0) + log_sigmoid(float(logps) - float(anchor_logps)))


def alpha_divergence_reward(logps, *, anchor_logps, beta: float, alpha: float) -> float:
    """beta (1 - u^-a) / a with a = 1 - alpha.

    f'(u) of the a-divergence of f-DPO, arXiv:2309.16240, table 1, zero at u = 1:
    f(u) = (u^(1 - a) - (1 - a) u - a) / (a (a - 1)).
    """
    a = 1.0 - alpha
    return beta * (1.0 - _exp(-a * (float(logps) - float(anchor_logps)))) / a


def step_rewards(token_rewards, *, step_ids, num_steps: int, where=None) -> list[float]:
    """Sum of each step 1..S; tokens of step 0 are in none: arXiv:2509.19199, eq. 1."""
    return step_sum(token_rewards, step_ids=step_ids, num_steps=num_steps, where=where)


# --- logps.py -------------------------------------------------------------------------


def token_logps(logits, *, targets) -> list[float]:
    """log softmax(x_t)[y_t] at every position."""
    return [_log_softmax(x)[int(y)] for x, y in zip(logits, targets, strict=True)]


def shift_targets(ids, *, mask) -> tuple[list[int], list[bool]]:
    """What each position predicts, and whether that counts: the next id, the last none.

    The target of the last position means nothing.
    """
    targets = [int(x) for x in ids[1:]] + [0]
    return targets, [bool(m) for m in mask[1:]] + [False]


def response_sum(token_values, *, where, weights=None) -> float:
    """Weighted sum over the tokens that count."""
    return sum(
        float(token_values[t]) * (1.0 if weights is None else float(weights[t]))
        for t in _keep(where, len(token_values))
    )


def response_mean(token_values, *, where) -> float:
    """Mean over the tokens that count, 0 where none does."""
    total = response_sum(token_values, where=where)
    return total / max(len(_keep(where, len(token_values))), 1)


def step_sum(token_values, *, step_ids, num_steps: int, where=None) -> list[float]:
    """Sum over the tokens of each step 1..S."""
    out = [0.0] * num_steps
    for t in _keep(where, len(token_values)):
        if step_ids[t] > 0:
            out[step_ids[t] - 1] += float(token_values[t])
    return out


def step_mean(token_values, *, step_ids, num_steps: int, where=None) -> list[float]:
    """Mean over the tokens of each step 1..S, 0 for a step without."""
    config = {"step_ids": step_ids, "num_steps": num_steps, "where": where}
    sums = step_sum(token_values, **config)
    counts = step_sum([1.0] * len(token_values), **config)
    return [x / max(n, 1.0) for x, n in zip(sums, counts, strict=True)]


def length_desensitized_weights(where, *, alpha: float) -> list[list[float]]:
    """1 up to the public length, alpha after it: LD-DPO, arXiv:2409.06411, eqs. 8-11.

    The public length l_p is the count of tokens of the shorter response; a token's
    position is its number among those that count.
    """
    public = min(sum(bool(w) for w in row) for row in where)
    out = []
    for row in where:
        weights, position = [], 0
        for counts in row:
            position += bool(counts)
            full = 1.0 if position <= public else alpha
            weights.append(full if counts else 0.0)
        out.append(weights)
    return out


def wpo_weights(token_logps, *, log_sum_sq, where) -> float:
    """exp(mean_t [log p_t - log sum_v p_tv^2]): WPO, arXiv:2406.11827, equation 2.

    Of one response, aligned for sampling; a pair's is the product of its two.
    """
    ratios = [float(p) - float(s) for p, s in zip(token_logps, log_sum_sq, strict=True)]
    return math.exp(response_mean(ratios, where=where))


# --- anchors.py: fusion of log-probs per token, [response][source] --------------------


def clip_to_initial(source_logps, *, initial_logps) -> list[list[float]]:
    """Chosen: max(source, initial); rejected: min: arXiv:2505.13878, equation 11."""
    chosen, rejected = source_logps
    return [
        [max(float(x), float(initial_logps[0])) for x in chosen],
        [min(float(x), float(initial_logps[1])) for x in rejected],
    ]


def fuse_max_margin(source_logps, *, pivot_logps, where=None) -> list[float]:
    """The source whose probability is furthest from the pivot's, of each response.

    InfiFPO, arXiv:2505.13878, equation 12: probabilities, not logarithms; of equals
    the first.
    """
    out = []
    for sources, pivot in zip(source_logps, pivot_logps, strict=True):
        fused, furthest = 0.0, -1.0
        for i in _keep(where, len(sources)):
            margin = abs(math.exp(float(sources[i])) - math.exp(float(pivot)))
            if margin > furthest:
                fused, furthest = float(sources[i]), margin
        out.append(fused)
    return out


def fuse_average(source_logps, *, where=None) -> list[float]:
    """sum_i l_i / N: arXiv:2505.13878, appendix D."""
    return [response_mean(sources, where=where) for sources in source_logps]


def confidence_weights(sources, *, epsilon=1e-8, where=None) -> list[float]:
    """conf_i / sum_j conf_j, conf_i = 1 / (-l_i + eps): arXiv:2505.13878, appendix D.

    The ratio as printed; l held at 0.
    """
    kept = _keep(where, len(sources))
    confidences = [1.0 / (-min(float(sources[i]), 0.0) + epsilon) for i in kept]
    total = sum(confidences)
    return _spread([c / total for c in confidences], kept, len(sources))


def fuse_confidence(source_logps, *, epsilon=1e-8, where=None) -> list[float]:
    """sum_i gamma_i l_i with the confidence weights as gamma."""
    out = []
    for sources in source_logps:
        gamma = confidence_weights(sources, epsilon=epsilon, where=where)
        kept = _keep(where, len(sources))
        out.append(sum(gamma[i] * min(float(sources[i]), 0.0) for i in kept))
    return out


# --- q_values.py: logits as a soft Q of the token MDP ---------------------------------
#
# arXiv:2404.12358 and arXiv:2507.00018: Q(s, a) = r(s, a) + beta log pi_0(a|s) + V(s'),
# V(s) = beta log sum_a exp(Q(s, a) / beta), pi = exp((Q - V) / beta).


def logit_values(logits, *, beta: float) -> tuple[list[float], float, list[float]]:
    """(Q, V, A) of one position: Q = beta l, V = beta log sum exp l, A = Q - V."""
    q = [beta * float(x) for x in logits]
    value = beta * log_sum_exp([x / beta for x in q])
    return q, value, [x - value for x in q]


def _next_values(values, where, terminal_value: float) -> list[float]:
    """V of the next token that counts; after the last of them the terminal value."""
    out, following = [0.0] * len(values), float(terminal_value)
    for t in reversed(_keep(where, len(values))):
        out[t] = following
        following = float(values[t])
    return out


def token_rewards(
    logps, *, anchor_logps, values, beta: float, where, terminal_value=0.0
) -> list[float]:
    """r_t = beta log pi / pi_0 (a_t|s_t) + V(s_t) - V(s_{t+1}), 0 where not counted."""
    following = _next_values(values, where, terminal_value)
    out = [0.0] * len(logps)
    for t in _keep(where, len(logps)):
        ratio = float(logps[t]) - float(anchor_logps[t])
        out[t] = beta * ratio + float(values[t]) - following[t]
    return out


def soft_bellman_residual(
    q, *, rewards, anchor_logps, values, beta: float, where, terminal_value=0.0
) -> list[float]:
    """Q_t - (r_t + beta log pi_0(a_t|s_t) + V(s_{t+1})), 0 where not counted."""
    following = _next_values(values, where, terminal_value)
    out = [0.0] * len(q)
    for t in _keep(where, len(q)):
        backup = float(rewards[t]) + beta * float(anchor_logps[t]) + following[t]
        out[t] = float(q[t]) - backup
    return out
