"""What the maths must give: float64, plain loops, written from the cited equations.

Imports math and numpy only, shares no line with the library and knows nothing of rows:
a response is read alone, after its own copy of the prompt. Slow on purpose.
"""

import math

import numpy as np

# --- one distribution over the vocabulary ---------------------------------------------


def log_sum_exp(values) -> float:
    """log sum_v exp(x_v), with the largest taken out so that nothing overflows."""
    values = [float(x) for x in values]
    top = max(values)
    if top == -math.inf:
        return -math.inf
    return top + math.log(sum(math.exp(x - top) for x in values))


def log_softmax(logits) -> np.ndarray:
    """f64[V]: x_v - log sum_u exp(x_u)."""
    total = log_sum_exp(logits)
    return np.array([float(x) - total for x in logits])


def token_stats(logits, target: int) -> dict[str, float]:
    """What a distribution says of its target and of itself.

    With p = softmax(x) and target y:

        logp          log p_y
        logsumexp     log sum_v exp(x_v)
        chosen_logit  x_y
        entropy       - sum_v p_v log p_v
        log_sum_sq    log sum_v p_v^2
    """
    logps = log_softmax(logits)
    return {
        "logp": float(logps[target]),
        "logsumexp": log_sum_exp(logits),
        "chosen_logit": float(logits[target]),
        "entropy": -sum(math.exp(x) * x for x in logps if x > -math.inf),
        "log_sum_sq": log_sum_exp([2.0 * x for x in logps]),
    }


def soft_cap(logits, cap: float) -> np.ndarray:
    """cap * tanh(x / cap), Gemma 2's bound on logits."""
    return np.array([cap * math.tanh(float(x) / cap) for x in logits])


def kl_divergence(logits, other_logits) -> float:
    """KL(p || q) = sum_v p_v (log p_v - log q_v), exactly, in nats."""
    p, q = log_softmax(logits), log_softmax(other_logits)
    return sum(
        math.exp(a) * (a - b) for a, b in zip(p, q, strict=True) if a > -math.inf
    )


def filter_logits(
    logits, *, temperature: float = 1.0, top_k: int | None = None, top_p: float = 1.0
) -> np.ndarray:
    """f64[V]: the log-probs that a token is drawn with.

    Divide by the temperature; keep the k largest; of what is left, renormalised, keep
    the shortest run of most likely tokens whose probabilities reach p (the token that
    reaches it is kept, so one always stays); renormalise. Nucleus sampling: Holtzman
    et al., arXiv:1904.09751, section 3.1; top-k: Fan et al., arXiv:1805.04833.
    """
    scaled = [float(x) / temperature for x in logits]
    order = sorted(range(len(scaled)), key=lambda v: (-scaled[v], v))
    kept = order[:top_k] if top_k is not None else order
    logps = log_softmax([scaled[v] for v in kept])
    nucleus, before = [], 0.0
    for v, logp in zip(kept, logps, strict=True):
        if nucleus and before >= top_p:
            break
        nucleus.append(v)
        before += math.exp(logp)
    total = log_sum_exp([scaled[v] for v in nucleus])
    out = np.full(len(scaled), -math.inf)
    for v in nucleus:
        out[v] = scaled[v] - total
    return out


# --- a small decoder-only model -------------------------------------------------------
#
# Llama (arXiv:2302.13971, section 2.2) with grouped queries (arXiv:2305.13245):
#   h = h + attention(norm(h)),  h = h + mlp(norm(h)),  mlp(x) = (silu(x G) * x U) D
# Weights: `embedding [V, D]`, `final_norm [D]`, `unembedding [D, V]`, and a layer's
# `attention_norm [D]`, `q [D, H, d]`, `k [D, KV, d]`, `v [D, KV, d]`, `o [H, d, D]`,
# `mlp_norm [D]`, `gate [D, F]`, `up [D, F]`, `down [F, D]`.


def rms_norm(x, scale, eps: float) -> np.ndarray:
    """x / sqrt(mean(x^2) + eps) * scale (arXiv:1910.07467, equation 4)."""
    mean_square = sum(float(a) * float(a) for a in x) / len(x)
    return np.array(
        [a / math.sqrt(mean_square + eps) * s for a, s in zip(x, scale, strict=True)]
    )


def rotate(x, position: int, base: float) -> np.ndarray:
    """Rotary embedding of one head (arXiv:2104.09864, equation 34), halves as pairs.

    Coordinates i and i + d/2 turn together by the angle position * base^(-2i / d).
    """
    half = len(x) // 2
    out = np.zeros(len(x))
    for i in range(half):
        angle = position * base ** (-2.0 * i / len(x))
        c, s = math.cos(angle), math.sin(angle)
        out[i] = x[i] * c - x[i + half] * s
        out[i + half] = x[i + half] * c + x[i] * s
    return out


def attention(q, k, v, *, window: int | None = None) -> np.ndarray:
    """Causal attention of one sequence: q f64[L, H, d], k and v [L, KV, d] -> as q.

        out_i = sum_j softmax_j(q_i . k_j / sqrt(d)) v_j   over j <= i, i - j < window

    Query head h reads key head h // (H / KV).
    """
    length, heads, width = q.shape
    shared = heads // k.shape[1]
    out = np.zeros_like(q, dtype=np.float64)
    for i in range(length):
        first = 0 if window is None else max(0, i - window + 1)
        for h in range(heads):
            seen = range(first, i + 1)
            logits = [
                float(q[i, h] @ k[j, h // shared]) / math.sqrt(width) for j in seen
            ]
            for j, logp in zip(seen, log_softmax(logits), strict=True):
                out[i, h] += math.exp(logp) * v[j, h // shared]
    return out


def decoder_hidden(
    weights: dict,
    tokens,
    *,
    eps: float,
    rope_bases: tuple[float, ...],
    windows: tuple[int | None, ...],
    embedding_scale: float,
) -> np.ndarray:
    """f64[L, D]: final hidden states of one sequence of ids, read from position 0.

    What is looked up is multiplied by `embedding_scale` (Gemma, arXiv:2403.08295);
    `rope_bases` and `windows` have an entry a layer.
    """
    w = {name: value for name, value in weights.items() if name != "layers"}
    states = np.array([embedding_scale * w["embedding"][t] for t in tokens])
    for number, layer in enumerate(weights["layers"]):
        normed = np.stack([rms_norm(x, layer["attention_norm"], eps) for x in states])
        q = np.einsum("ld,dhk->lhk", normed, layer["q"])
        k = np.einsum("ld,dhk->lhk", normed, layer["k"])
        v = np.einsum("ld,dhk->lhk", normed, layer["v"])
        for i in range(len(tokens)):
            q[i] = [rotate(head, i, rope_bases[number]) for head in q[i]]
            k[i] = [rotate(head, i, rope_bases[number]) for head in k[i]]
        mixed = attention(q, k, v, window=windows[number])
        states = states + np.einsum("lhk,hkd->ld", mixed, layer["o"])
        normed = np.stack([rms_norm(x, layer["mlp_norm"], eps) for x in states])
        gate = normed @ layer["gate"]
        gated = gate / (1.0 + np.exp(-gate)) * (normed @ layer["up"])
        states = states + gated @ layer["down"]
    return np.stack([rms_norm(x, w["final_norm"], eps) for x in states])


def response_stats(weights: dict, prompt, response, **config) -> list[dict[str, float]]:
    """The stats of each token of a response that stands alone after its prompt.

    The state at prompt + response[:t] predicts response[t]: nothing else is shifted.
    """
    tokens = [int(t) for t in prompt] + [int(t) for t in response]
    hidden = decoder_hidden(weights, tokens, **config)
    first = len(prompt) - 1
    return [
        token_stats(hidden[first + t] @ weights["unembedding"], int(target))
        for t, target in enumerate(response)
        if first + t >= 0  # without a prompt nothing predicts the first token
    ]


def greedy(weights: dict, prompt, steps: int, *, stop=(), **config) -> list[int]:
    """The most likely id, `steps` times, up to and with the first of `stop`."""
    tokens, out = [int(t) for t in prompt], []
    for _ in range(steps):
        hidden = decoder_hidden(weights, tokens, **config)[-1]
        token = int(np.argmax(hidden @ weights["unembedding"]))
        tokens.append(token)
        out.append(token)
        if token in stop:
            break
    return out


# --- losses and the one average -------------------------------------------------------


def log_sigmoid(x: float) -> float:
    """-log(1 + exp(-x)), on the side that does not overflow."""
    x = float(x)
    return -math.log1p(math.exp(-x)) if x >= 0 else x - math.log1p(math.exp(x))


def logistic_loss(chosen: float, rejected: float, *, label_smoothing=0.0) -> float:
    """-(1 - s) log sigmoid(c - r) - s log sigmoid(r - c).

    DPO, arXiv:2305.18290v3, equation 7, on rewards; s: cDPO, in the same notation.
    """
    margin = float(chosen) - float(rejected)
    return -(1.0 - label_smoothing) * log_sigmoid(margin) - label_smoothing * (
        log_sigmoid(-margin)
    )


def dpo_loss(logps, anchor_logps, *, beta: float, label_smoothing=0.0) -> list[float]:
    """Loss of each pair from summed logps [B][2], chosen first (equation 7)."""
    return [
        logistic_loss(
            beta * (policy[0] - anchor[0]),
            beta * (policy[1] - anchor[1]),
            label_smoothing=label_smoothing,
        )
        for policy, anchor in zip(logps, anchor_logps, strict=True)
    ]


def nll(token_logps, where) -> list[float]:
    """Minus the log-prob of each counted token, 0 elsewhere."""
    return [
        -float(x) if keep else 0.0 for x, keep in zip(token_logps, where, strict=True)
    ]


def weighted_mean(values, weights) -> float:
    """sum w x / sum w over every entry that has weight; no weight at all gives 0."""
    pairs = [
        (float(x), float(w))
        for x, w in zip(np.ravel(values), np.ravel(weights), strict=True)
        if w != 0
    ]
    total = sum(w for _, w in pairs)
    return sum(w * x for x, w in pairs) / total if total else 0.0


# --- evaluations of preferences -------------------------------------------------------


def sigmoid(x: float) -> float:
    """1 / (1 + exp(-x)), on the side that does not overflow."""
    return math.exp(log_sigmoid(x))


def brier_score(margins, labels) -> list[float]:
    """(sigmoid(m) - y)^2 of each pair (Brier, 1950)."""
    return [(sigmoid(m) - float(y)) ** 2 for m, y in zip(margins, labels, strict=True)]


def log_loss(margins, labels) -> list[float]:
    """-y log sigmoid(m) - (1 - y) log sigmoid(-m) of each pair."""
    return [
        -float(y) * log_sigmoid(m) - (1.0 - float(y)) * log_sigmoid(-m)
        for m, y in zip(margins, labels, strict=True)
    ]


def calibration(margins, labels, num_bins: int) -> list[tuple[float, float, int]]:
    """(predicted, observed, count) of each bin, for margins that all differ in size.

    The side with the higher probability is the prediction, as in Guo et al.,
    arXiv:1706.04599; with N pairs sorted by it, pair i falls into bin i * B // N.
    """
    pairs = []
    for m, y in zip(margins, labels, strict=True):
        first = sigmoid(m)
        side = (first, float(y)) if first >= 0.5 else (1.0 - first, 1.0 - float(y))
        pairs.append(side)
    pairs.sort()
    bins = [[] for _ in range(num_bins)]
    for i, pair in enumerate(pairs):
        bins[i * num_bins // len(pairs)].append(pair)
    return [
        (sum(p for p, _ in b) / len(b), sum(y for _, y in b) / len(b), len(b))
        for b in bins
        if b
    ]


def length_controlled_win_rate(outcomes, differences, penalty: float, std=None):
    """(win rate, theta, phi) of the regression of Dubois et al., arXiv:2404.04475.

        logit = theta + phi * tanh(d / std(d)),  penalty / 2 * phi^2 on the sum

    By bisection inside bisection: theta balances the outcomes for a given phi, and with
    that theta the slope of the objective rises with phi. Needs outcomes that are
    neither all 1 nor all 0, and a std (of N - 1; or given) that is not 0.
    """
    n = len(outcomes)
    if std is None:
        mean = sum(differences) / n
        std = math.sqrt(sum((d - mean) ** 2 for d in differences) / (n - 1))
    x = [math.tanh(d / std) for d in differences]

    def bisect(rising) -> float:
        low, high = -100.0, 100.0
        for _ in range(80):
            middle = (low + high) / 2
            low, high = (low, middle) if rising(middle) > 0 else (middle, high)
        return (low + high) / 2

    def excess(theta, phi, weights) -> float:
        return sum(
            w * (sigmoid(theta + phi * x[i]) - float(outcomes[i]))
            for i, w in enumerate(weights)
        )

    def best_theta(phi) -> float:
        return bisect(lambda theta: excess(theta, phi, [1.0] * n))

    phi = bisect(lambda phi: excess(best_theta(phi), phi, x) + penalty * phi)
    theta = best_theta(phi)
    return sigmoid(theta), theta, phi
