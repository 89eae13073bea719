r"""A token MDP that is solved exactly, and what of it preferences can tell.

Why: DPO is said to fit Q* and V* of a KL-regularised token MDP, and the logits of a
policy to be Q and their log-sum-exp V. In a tree so small that all responses can be
listed, every such sentence has a number beside it:

    python -m experiments.worlds.token_mdp

trains tables of logits by DPO and by SFT, reads the quantities off them and prints how
far they are from the truth (seconds on a laptop).

The MDP. A state is a prompt and the tokens so far, an action is the next one of V
tokens, and the next state is the string that results. Token `END` ends the response; so
does any token at `max_length`. The reference policy and the reward of every token are
tables, drawn from a seed. With terminal V* = 0:

    Q*(s, a) = r(s, a) + V*(s')
    V*(s)    = beta log sum_a pi_ref(a|s) exp(Q*(s, a) / beta)
    pi*(a|s) = pi_ref(a|s) exp((Q*(s, a) - V*(s)) / beta)

A sum of Q* - V* over the response telescopes, since transitions are deterministic:

    beta log(pi*(y) / pi_ref(y)) = r(y) - V*(s_1)

Source: Rafailov et al., "From r to Q*", arXiv:2404.12358; XPO, arXiv:2405.21046.

What is identified. Preferences see the differences of r(y) within a prompt. A potential
F moves reward between tokens, and all the responses of a prompt up or down alike,

    r'(s, a) = r(s, a) + F(s') - F(s),    F = 0 at the end,
    so that Q*' = Q* - F(s), V*' = V* - F(s), r'(y) = r(y) - F(s_1),

and leaves all preferences and pi* as they were. What differs between two such worlds
no data of this kind can tell. Q* - V* is the same in both, V* alone is not. But where
all of the reward is known to come at the end, only F(s_1) is free, and

    V*(s) - V*(s_1) = beta log(pi*(prefix s) / pi_ref(prefix s)),

so that the true reward of one response of a prompt fixes V* in the whole of its tree.
The logits tell no more than the policy: a shift of all logits of a state changes their
log-sum-exp and nothing else. The gradient sums to zero over the tokens, so that descent
leaves the mean of a state's logits where it started, wherever that is.

Trap: all of this needs every response to stand in some pair. Among responses that are
not compared, the start decides; even those that are compared then get their rewards
only up to a constant that is no longer V*(s_1).

Names of axes: P prompts, S states of a prompt in which a token is chosen, V tokens,
N responses of a prompt, H tokens of the longest. State 0 is the prompt itself.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from rich import box
from rich.console import Console
from rich.table import Table

from pref_jax import checks
from pref_jax.losses.pairwise import dpo_loss
from pref_jax.losses.reward_models import outcome_pairs_loss
from pref_jax.rewards import implicit_reward, step_rewards

END = 0
"""The token that ends a response."""

_SAME = 1e-6  # numbers no further apart are apart by rounding
_GRADIENT_NORM = 1e-12  # where training ends


@dataclasses.dataclass(frozen=True)
class TokenMDP:
    """A tree of strings for each prompt, with a reference policy and a reward.

    All prompts share the tree; its states are numbered level by level.
    """

    anchor_logps: np.ndarray  # f64[P, S, V], nats: the reference policy
    rewards: np.ndarray  # f64[P, S, V], of each token
    next_states: np.ndarray  # i64[S, V]; S where the response ends
    states: np.ndarray  # i64[N, H], where each token of each response is chosen
    tokens: np.ndarray  # i64[N, H], the responses; -1 after the last token


@dataclasses.dataclass(frozen=True)
class Solution:
    """The optimum of reward minus beta times the divergence from the reference."""

    q: np.ndarray  # f64[P, S, V], Q*
    value: np.ndarray  # f64[P, S], V*
    logps: np.ndarray  # f64[P, S, V], nats: log pi*


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """How good a policy is, exactly; each f64[P]."""

    reward: np.ndarray  # expected
    kl: np.ndarray  # KL(policy || reference), nats
    objective: np.ndarray  # J = reward - beta * kl
    regret: np.ndarray  # J of the best policy, V*(s_1), minus J


@dataclasses.dataclass(frozen=True)
class Fit:
    """Logits at which a training came to rest, or gave up."""

    logits: np.ndarray  # f64[P, S, V]
    num_steps: int  # of L-BFGS
    gradient_norm: float  # at most 1e-12, unless the steps ran out


def make_mdp(
    seed: int, *, num_prompts: int, num_tokens: int, max_length: int
) -> TokenMDP:
    """Draws a token MDP: logits of the reference and rewards are standard normal.

    Args:
      seed: of all draws, non-negative.
      num_prompts: P.
      num_tokens: V, with `END`.
      max_length: H. There are (V - 1)^H + sum_{h < H} (V - 1)^h responses.

    Returns:
      A `TokenMDP`.

    Raises:
      ValueError: a size is too small.

    >>> mdp = make_mdp(0, num_prompts=1, num_tokens=3, max_length=2)
    >>> mdp.tokens.tolist()
    [[0, -1], [1, 0], [1, 1], [1, 2], [2, 0], [2, 1], [2, 2]]
    """
    sizes = {
        "num_prompts": (num_prompts, 1),
        "num_tokens": (num_tokens, 2),
        "max_length": (max_length, 1),
    }
    for name, (size, least) in sizes.items():
        if size < least:
            raise ValueError(f"`{name}` must be at least {least}; got {size}.")
    num_states = sum((num_tokens - 1) ** h for h in range(max_length))
    # Level by level, the children of s are s (V - 1) + 1 .. s (V - 1) + V - 1.
    a = np.arange(num_tokens)
    children = np.arange(num_states)[:, None] * (num_tokens - 1) + a
    ends = (a == END) | (children >= num_states)
    next_states = np.where(ends, num_states, children)
    prefixes: list[tuple] = [()] * num_states
    responses = []
    for (s, a), next_state in np.ndenumerate(next_states):
        path = (*prefixes[s], (s, a))
        if next_state == num_states:
            responses.append(path + ((0, -1),) * (max_length - len(path)))
        else:
            prefixes[next_state] = path
    states, tokens = np.moveaxis(np.array(responses), -1, 0)
    rng = np.random.default_rng(seed)
    logits, rewards = rng.normal(size=(2, num_prompts, num_states, num_tokens))
    return TokenMDP(_log_softmax(logits), rewards, next_states, states, tokens)


def response_sum(mdp: TokenMDP, token_values):
    """Adds up what the tokens of each response are worth.

    Args:
      mdp: the tree.
      token_values: f64[P, S, V], of NumPy or JAX: rewards, logps, advantages.

    Returns:
      f64[P, N].

    >>> mdp = make_mdp(0, num_prompts=1, num_tokens=3, max_length=2)
    >>> response_sum(mdp, np.ones((1, 3, 3))).tolist()
    [[1.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0]]
    """
    return (token_values[:, mdp.states, mdp.tokens] * (mdp.tokens >= 0)[None]).sum(-1)


def prefix_sum(mdp: TokenMDP, token_values) -> np.ndarray:
    """Adds up what the tokens that lead to each state are worth.

    Args:
      mdp: the tree.
      token_values: f64[P, S, V].

    Returns:
      f64[P, S], 0 for the prompt.

    >>> mdp = make_mdp(0, num_prompts=1, num_tokens=3, max_length=2)
    >>> prefix_sum(mdp, np.ones((1, 3, 3))).tolist()
    [[0.0, 1.0, 1.0]]
    """
    sums = np.zeros((len(token_values), len(mdp.next_states) + 1))
    for (s, a), next_state in np.ndenumerate(mdp.next_states):
        sums[:, next_state] = sums[:, s] + token_values[:, s, a]
    return sums[:, :-1]


def shape_rewards(mdp: TokenMDP, potential) -> TokenMDP:
    """Moves reward between tokens; no preference within a prompt changes.

        r'(s, a) = r(s, a) + F(s') - F(s),    F = 0 where the response ends

    Source: Ng, Harada and Russell (1999), "Policy invariance under reward
    transformations".

    Args:
      mdp: the world.
      potential: f64[P, S], F. The rewards of a response change by -F(s_1).

    Returns:
      The world with the new rewards.

    >>> mdp = make_mdp(0, num_prompts=1, num_tokens=3, max_length=2)
    >>> other = shape_rewards(mdp, np.array([[0.5, 3.0, -7.0]]))
    >>> change = response_sum(other, other.rewards) - response_sum(mdp, mdp.rewards)
    >>> bool(np.allclose(change, -0.5))
    True
    """
    following = _next_values(mdp, potential)
    rewards = mdp.rewards + following - potential[..., None]
    return dataclasses.replace(mdp, rewards=rewards)


def delay_rewards(mdp: TokenMDP) -> TokenMDP:
    """The same rewards of responses, all of it given with the last token.

    It is `shape_rewards` with minus the rewards so far as potential.

    Args:
      mdp: the world.

    Returns:
      The world with the new rewards.

    >>> mdp = delay_rewards(make_mdp(0, num_prompts=1, num_tokens=3, max_length=2))
    >>> np.abs(mdp.rewards[0, 0]).round(9).tolist()[1:]  # go on after the prompt
    [0.0, 0.0]
    """
    return shape_rewards(mdp, -prefix_sum(mdp, mdp.rewards))


def solve(mdp: TokenMDP, *, beta: float) -> Solution:
    """Soft-optimal Q*, V* and policy, by dynamic programming from the leaves.

        Q*(s, a) = r(s, a) + V*(s')
        V*(s)    = beta log sum_a pi_ref(a|s) exp(Q*(s, a) / beta)
        pi*(a|s) = pi_ref(a|s) exp((Q*(s, a) - V*(s)) / beta)

    Source: Rafailov et al., "From r to Q*", arXiv:2404.12358; XPO, arXiv:2405.21046.
    Differs from the first: its Q* has beta log pi_ref in it, ours has not.

    Args:
      mdp: the world.
      beta: reward per nat, positive.

    Returns:
      The solution.

    Raises:
      ValueError: `beta` is not positive.

    >>> mdp = make_mdp(0, num_prompts=1, num_tokens=3, max_length=1)
    >>> bool(np.all(solve(mdp, beta=0.5).q == mdp.rewards))  # the last token
    True
    """
    if not beta > 0:
        raise ValueError(f"`beta` must be positive; got {beta}.")
    q, value = np.empty_like(mdp.rewards), np.zeros(mdp.rewards.shape[:2])
    for s in reversed(range(len(mdp.next_states))):  # children stand after parents
        q[:, s] = mdp.rewards[:, s] + _next_values(mdp, value)[:, s]
        weighted = mdp.anchor_logps[:, s] + q[:, s] / beta
        value[:, s] = beta * np.logaddexp.reduce(weighted, axis=-1)
    return Solution(q, value, mdp.anchor_logps + (q - value[..., None]) / beta)


def evaluate(mdp: TokenMDP, logps, *, beta: float) -> Evaluation:
    """Reward, divergence, objective and regret of a policy, summed over all responses.

        J(pi) = E_pi[r(y)] - beta KL(pi || pi_ref),   regret = V*(s_1) - J(pi)

    Source: XPO, arXiv:2405.21046, the KL-regularised objective.

    Args:
      mdp: the world.
      logps: f64[P, S, V], nats: the policy.
      beta: reward per nat, positive.

    Returns:
      The evaluation.

    Raises:
      ValueError: `beta` is not positive.

    >>> mdp = make_mdp(0, num_prompts=2, num_tokens=3, max_length=2)
    >>> evaluate(mdp, mdp.anchor_logps, beta=0.5).kl.tolist()
    [0.0, 0.0]
    >>> best = evaluate(mdp, solve(mdp, beta=0.5).logps, beta=0.5)
    >>> float(abs(best.regret).max().round(9))
    0.0
    """
    probabilities = np.exp(response_sum(mdp, logps))
    reward = (probabilities * response_sum(mdp, mdp.rewards)).sum(-1)
    kl = (probabilities * response_sum(mdp, logps - mdp.anchor_logps)).sum(-1)
    objective = reward - beta * kl
    return Evaluation(
        reward, kl, objective, solve(mdp, beta=beta).value[:, 0] - objective
    )


def decomposed_regret(mdp: TokenMDP, logps, *, probabilities, beta: float):
    """The regret of a policy, by way of any distribution nu over the responses.

        J(pi*) - J(pi) = E_nu[beta log pi(y) - beta log pi*(y)]
                         + E_pi[beta log(pi(y) / pi_ref(y)) - r(y)]
                         - E_nu[beta log(pi(y) / pi_ref(y)) - r(y)]

    XPO's bonus makes the first term small, with the sampler of the comparisons as nu;
    the pairs make the rest small.

    Source: derived, in the setting of XPO, arXiv:2405.21046: put the telescoped sum of
    the module's docstring for beta log pi*, and all that has nu in it cancels but V*.

    Args:
      mdp: the world.
      logps: f64[P, S, V], nats: the policy.
      probabilities: f64[P, N], nu; each row sums to 1.
      beta: reward per nat, positive.

    Returns:
      f64[P], equal to `evaluate(...).regret`.

    Raises:
      ValueError: `beta` is not positive.

    >>> mdp = make_mdp(0, num_prompts=1, num_tokens=3, max_length=1)
    >>> policy, nu = mdp.anchor_logps, np.array([[0.2, 0.3, 0.5]])
    >>> regret = decomposed_regret(mdp, policy, probabilities=nu, beta=0.5)
    >>> bool(np.allclose(regret, evaluate(mdp, policy, beta=0.5).regret))
    True
    """
    best = response_sum(mdp, solve(mdp, beta=beta).logps)
    sequence_logps = response_sum(mdp, logps)
    error = beta * (sequence_logps - response_sum(mdp, mdp.anchor_logps))
    error -= response_sum(mdp, mdp.rewards)
    optimism = beta * (probabilities * (sequence_logps - best)).sum(-1)
    return optimism + ((np.exp(sequence_logps) - probabilities) * error).sum(-1)


def preference_probabilities(mdp: TokenMDP) -> np.ndarray:
    """Bradley-Terry: how often each response is chosen over each other one.

        P(y > y') = sigmoid(r(y) - r(y'))

    Source: DPO, arXiv:2305.18290v3, equation 1.

    Args:
      mdp: the world.

    Returns:
      f64[P, N, N], the chosen response first.

    >>> mdp = make_mdp(0, num_prompts=1, num_tokens=3, max_length=2)
    >>> p = preference_probabilities(mdp)
    >>> float(p[0, 4, 4]), bool(np.allclose(p + p.swapaxes(1, 2), 1))
    (0.5, True)
    """
    rewards = response_sum(mdp, mdp.rewards)
    margins = rewards[:, :, None] - rewards[:, None, :]
    return np.exp(-np.logaddexp(0.0, -margins))


def train_dpo(mdp: TokenMDP, *, beta: float, weights, start) -> Fit:
    """Fits a table of logits to pairs of responses, all of them in one batch.

        loss = sum_{i,j} w_ij dpo_loss(y_i over y_j) / sum_{i,j} w_ij

    With `preference_probabilities` as weights, the loss is DPO's on endless data in
    which every pair is drawn equally often, and its minimum is pi*.

    Source: DPO, arXiv:2305.18290v3, equation 7.

    Args:
      mdp: the tree and the reference; the rewards are not read.
      beta: reward per nat, positive.
      weights: f64[P, N, N], of the pairs, the chosen response first.
      start: f64[P, S, V], the first logits.

    Returns:
      The fit.

    Raises:
      ValueError: `beta` is not positive, or a shape does not fit.

    >>> mdp = make_mdp(0, num_prompts=1, num_tokens=3, max_length=1)
    >>> pairs = preference_probabilities(mdp)
    >>> fit = train_dpo(mdp, beta=0.5, weights=pairs, start=mdp.anchor_logps)
    >>> best = np.exp(solve(mdp, beta=0.5).logps)
    >>> bool(np.allclose(jax.nn.softmax(fit.logits), best, atol=1e-5))
    True
    """

    def loss(logits):
        logps = response_sum(mdp, jax.nn.log_softmax(logits))
        anchor_logps = jnp.asarray(response_sum(mdp, mdp.anchor_logps))
        losses, _ = dpo_loss(
            _pairs(logps), anchor_logps=_pairs(anchor_logps), beta=beta
        )
        checks.check_same_shape("weights", weights, like=losses, of="the pairs")
        return jnp.sum(weights * losses) / np.sum(weights)

    return _minimise(mdp, loss, start)


def process_rewards(mdp: TokenMDP, logps, *, beta: float, step_length: int):
    """What a process reward model says of each step of each response.

        r(s, step) = beta sum over its tokens of log(pi(a|s) / pi_ref(a|s))

    The reference is the policy that acted. For pi* the sum telescopes to the soft
    advantage of the step: Q*(s, step) - V*(s), Q* being the rewards of the step and V*
    of the state after it.

    Source: OPRL, arXiv:2509.19199v1, equation 1.

    Args:
      mdp: the tree and the reference.
      logps: f64[P, S, V], nats: of the process reward model.
      beta: reward per nat, positive.
      step_length: tokens of a step; the last step of a response may be shorter.

    Returns:
      f64[P, N, T], T the steps of the longest response; 0 for a step that is not there.

    Raises:
      ValueError: `beta` is not positive, or a shape does not fit.

    >>> mdp = make_mdp(0, num_prompts=1, num_tokens=3, max_length=2)
    >>> process_rewards(mdp, mdp.anchor_logps, beta=0.5, step_length=1).shape
    (1, 7, 2)
    """
    token_rewards = implicit_reward(logps, anchor_logps=mdp.anchor_logps, beta=beta)
    steps = np.arange(mdp.tokens.shape[1]) // step_length + 1
    return step_rewards(
        token_rewards[:, mdp.states, mdp.tokens],
        step_ids=steps,
        num_steps=int(steps[-1]),
        where=mdp.tokens >= 0,
    )


def train_process_reward(
    mdp: TokenMDP, *, beta: float, step_length: int, weights, start
) -> Fit:
    """Fits a process reward model to outcomes of whole responses, as OPRL does.

        loss = sum_{i,j} w_ij outcome_pairs_loss(scores of y_i, y_j) / sum_{i,j} w_ij

    with y_i the one that succeeded, and the sum of `process_rewards` as score.

    Source: OPRL, arXiv:2509.19199v1, equation 2.

    Args:
      mdp: the tree, and the policy that acted as its reference; the rewards are not
        read.
      beta: reward per nat, positive.
      step_length: as in `process_rewards`.
      weights: f64[P, N, N], how often y_i succeeds where y_j fails.
      start: f64[P, S, V], the first logits.

    Returns:
      The fit.

    Raises:
      ValueError: `beta` is not positive, or a shape does not fit.

    >>> mdp = make_mdp(0, num_prompts=1, num_tokens=3, max_length=1)
    >>> pairs = preference_probabilities(mdp)
    >>> fit = train_process_reward(
    ...     mdp, beta=0.5, step_length=1, weights=pairs, start=mdp.anchor_logps
    ... )
    >>> best = np.exp(solve(mdp, beta=0.5).logps)
    >>> bool(np.allclose(jax.nn.softmax(fit.logits), best, atol=1e-5))
    True
    """
    success = np.array([True, False])

    def loss(logits):
        of_steps = process_rewards(
            mdp, jax.nn.log_softmax(logits), beta=beta, step_length=step_length
        )
        losses, _ = outcome_pairs_loss(_pairs(of_steps.sum(-1)), success=success)
        checks.check_same_shape("weights", weights, like=losses, of="the pairs")
        return jnp.sum(weights * losses) / np.sum(weights)

    return _minimise(mdp, loss, start)


def _pairs(values):
    """[P, N] -> [P, N, N, 2], the value of the first index in slot 0."""
    both = jnp.broadcast_arrays(values[:, :, None], values[:, None, :])
    return jnp.stack(both, axis=-1)


def train_sft(mdp: TokenMDP, *, weights, start) -> Fit:
    """Fits a table of logits to demonstrations, all of them in one batch.

        loss = -sum_i w_i log pi(y_i) / sum_i w_i

    With the probabilities of pi* as weights, its minimum is pi*: SFT on endless
    samples. A response that pi* hardly ever gives hardly moves the loss: its logp, and
    with it its reward, comes last and least exactly, the more so the smaller beta is.

    Source: "Implicit Reward as the Bridge", arXiv:2507.00018, whose reading of logits
    as Q and of their log-sum-exp as V is put to the test here.

    Args:
      mdp: the tree; reference and rewards are not read.
      weights: f64[P, N], of the responses: a distribution, or counts.
      start: f64[P, S, V], the first logits.

    Returns:
      The fit.

    Raises:
      ValueError: a shape does not fit.

    >>> mdp = make_mdp(0, num_prompts=1, num_tokens=3, max_length=1)
    >>> shares = np.array([[0.2, 0.3, 0.5]])
    >>> fit = train_sft(mdp, weights=shares, start=mdp.anchor_logps)
    >>> [round(float(p), 6) for p in jax.nn.softmax(fit.logits)[0, 0]]
    [0.2, 0.3, 0.5]
    """

    def loss(logits):
        logps = response_sum(mdp, jax.nn.log_softmax(logits))
        checks.check_same_shape("weights", weights, like=logps, of="the responses")
        return -jnp.sum(weights * logps) / np.sum(weights)

    return _minimise(mdp, loss, start)


@dataclasses.dataclass(frozen=True)
class Row:
    """One quantity: what training recovers of it, and whether data could tell it."""

    quantity: str
    dpo_error: float  # largest, of DPO from either start
    sft_error: float  # largest, of SFT on endless samples of pi*
    runs_apart: float  # largest difference of DPO's two readings
    worlds_apart: float  # largest difference in two worlds of the same preferences
    why: str

    @property
    def identified(self) -> bool:
        """Whether worlds with the same preferences have it in common."""
        return self.worlds_apart < _SAME


def recover(mdp: TokenMDP, *, beta: float, seed: int) -> list[Row]:
    """Trains on a world and compares what the logits say with the truth.

    What is read off the logits l of a state s, with pi = softmax(l):

        Q*(s, a) - V*(s)           beta log(pi(a|s) / pi_ref(a|s))
        r(y) - V*(s_1), r(y)       its sum over the response
        V*(s) - V*(s_1)            its sum over the tokens that lead to s
        V*(s)                      beta logsumexp(l(s, .))
        Q*(s, a)                   beta (l(s, a) - log pi_ref(a|s))
        r(s, a)                    the last two: Q*(s, a) - V*(s')

    DPO starts twice from the reference, as it is and with all logits of each state
    shifted by a random number: the same policy. The second world, which shares all
    preferences with the first, is the first one under a random potential.

    Args:
      mdp: the world.
      beta: reward per nat, positive.
      seed: of the shifts and the potential, non-negative.

    Returns:
      A row for each quantity.

    Raises:
      ValueError: `beta` is not positive, or the world has a single prompt.

    >>> mdp = make_mdp(0, num_prompts=2, num_tokens=3, max_length=2)
    >>> [row.quantity for row in recover(mdp, beta=0.5, seed=0) if row.identified][:2]
    ['pi*(a|s)', 'Q*(s, a) - V*(s)']
    """
    if len(mdp.rewards) < 2:
        raise ValueError("`mdp` must have two prompts, whose rewards are compared.")
    rng = np.random.default_rng(seed)
    potential, shift = rng.normal(size=(2, *mdp.rewards.shape[:2]))
    best = solve(mdp, beta=beta).logps
    pairs = preference_probabilities(mdp)
    starts = mdp.anchor_logps, mdp.anchor_logps + shift[..., None]
    fits = [train_dpo(mdp, beta=beta, weights=pairs, start=start) for start in starts]
    samples = np.exp(response_sum(mdp, best))
    fits.append(train_sft(mdp, weights=samples, start=mdp.anchor_logps))
    dpo, shifted_dpo, sft = (_readings(mdp, fit.logits, beta) for fit in fits)
    truth = _truths(mdp, beta)
    other_truth = _truths(shape_rewards(mdp, potential), beta)

    def apart(a, b):
        return float(np.abs(a - b).max())

    return [
        Row(
            quantity=name,
            dpo_error=max(apart(dpo[name], true), apart(shifted_dpo[name], true)),
            sft_error=apart(sft[name], true),
            runs_apart=apart(dpo[name], shifted_dpo[name]),
            worlds_apart=apart(true, other_truth[name]),
            why=why,
        )
        for (name, why), true in zip(_WHY.items(), truth.values(), strict=True)
    ]


_WHY = {
    "pi*(a|s)": "every response stands in a pair",
    "Q*(s, a) - V*(s)": "beta log(pi / pi_ref); no potential changes it",
    "r(y) - V*(s_1)": "its sum over the response, which telescopes",
    "r(y) - r(y'), same prompt": "V*(s_1) cancels",
    "V*(s) - V*(s_1), reward at the end": "its sum over the tokens that lead to s",
    "V*(s) - V*(s_1), reward at each token": "that sum has their rewards in it, too",
    "r(y) - r(y'), two prompts": "V*(s_1) does not cancel; no pair compares them",
    "V*(s)": "beta logsumexp of logits: any shift gives the same policy",
    "Q*(s, a)": "beta (logits - log pi_ref): the same shift",
    "r(s, a)": "Q - V of the next state: any potential fits",
}


def _truths(mdp: TokenMDP, beta: float) -> dict[str, np.ndarray]:
    """The quantities of `_WHY`, in its order, as they are."""
    solution, delayed = solve(mdp, beta=beta), solve(delay_rewards(mdp), beta=beta)
    rewards = response_sum(mdp, mdp.rewards)
    values = (
        np.exp(solution.logps),
        solution.q - solution.value[..., None],
        rewards - solution.value[:, :1],
        rewards[:, :, None] - rewards[:, None, :],
        delayed.value - delayed.value[:, :1],
        solution.value - solution.value[:, :1],
        rewards.reshape(-1, 1) - rewards.reshape(1, -1),
        solution.value,
        solution.q,
        mdp.rewards,
    )
    return dict(zip(_WHY, values, strict=True))


def _readings(mdp: TokenMDP, logits, beta: float) -> dict[str, np.ndarray]:
    """The quantities of `_WHY`, in its order, as logits and reference give them."""
    logps = _log_softmax(logits)
    advantages = beta * (logps - mdp.anchor_logps)
    rewards = response_sum(mdp, advantages)
    value = beta * np.logaddexp.reduce(logits, axis=-1)
    q = beta * (logits - mdp.anchor_logps)
    values = (
        np.exp(logps),
        advantages,
        rewards,
        rewards[:, :, None] - rewards[:, None, :],
        prefix_sum(mdp, advantages),
        prefix_sum(mdp, advantages),
        rewards.reshape(-1, 1) - rewards.reshape(1, -1),
        value,
        q,
        q - _next_values(mdp, value),
    )
    return dict(zip(_WHY, values, strict=True))


def _next_values(mdp: TokenMDP, values) -> np.ndarray:
    """What each token leads to: f64[P, S] -> f64[P, S, V], 0 at the end."""
    return np.pad(values, ((0, 0), (0, 1)))[:, mdp.next_states]


def _log_softmax(logits) -> np.ndarray:
    return logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)


def _minimise(mdp: TokenMDP, loss: Callable, start, *, max_steps: int = 5000) -> Fit:
    """L-BFGS in float64, down to a gradient of norm `_GRADIENT_NORM`."""
    optimizer = optax.lbfgs(memory_size=100)
    value_and_grad = optax.value_and_grad_from_state(loss)

    def go_on(carry):
        _, _, num_steps, norm = carry
        return (num_steps < max_steps) & (norm > _GRADIENT_NORM)

    def step(carry):
        logits, state, num_steps, _ = carry
        value, grad = value_and_grad(logits, state=state)
        updates, state = optimizer.update(
            grad, state, logits, value=value, grad=grad, value_fn=loss
        )
        logits = optax.apply_updates(logits, updates)
        return logits, state, num_steps + 1, optax.tree.norm(grad)

    @jax.jit
    def run(logits):
        carry = logits, optimizer.init(logits), 0, jnp.inf
        return jax.lax.while_loop(go_on, step, carry)

    checks.check_same_shape("start", start, like=mdp.rewards, of="mdp.rewards")
    with jax.enable_x64(True):
        logits, _, num_steps, norm = run(jnp.asarray(start, jnp.float64))
        return Fit(np.asarray(logits), int(num_steps), float(norm))


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of the world that the table is about."""

    num_prompts: int = 2  # ours
    num_tokens: int = 4  # with the one that ends a response; ours
    max_length: int = 3  # tokens of the longest response; ours
    beta: float = 0.5  # reward per nat; ours
    seed: int = 0  # of the world, the potential and the shifts


def main() -> None:
    """The command line: prints the table of `recover`."""
    config = tyro.cli(Config, description=__doc__)
    mdp = make_mdp(
        config.seed,
        num_prompts=config.num_prompts,
        num_tokens=config.num_tokens,
        max_length=config.max_length,
    )
    num_responses = len(mdp.tokens)
    table = Table(
        title=f"What logits tell of {config.num_prompts} prompts with "
        f"{num_responses} responses each; beta {config.beta:g}",
        caption="Error: the largest after training on all pairs (DPO) or on endless "
        "samples of pi* (SFT). Runs: DPO from two starts of one policy. Worlds: two "
        "rewards with the same preferences. Identified: what such worlds share.",
        box=box.SIMPLE,
    )
    table.add_column("quantity, and why")
    for name in ("DPO\nerror", "SFT\nerror", "runs\napart", "worlds\napart"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("identified", no_wrap=True)
    for row in recover(mdp, beta=config.beta, seed=config.seed):
        numbers = row.dpo_error, row.sft_error, row.runs_apart, row.worlds_apart
        table.add_row(
            f"{row.quantity}\n  [dim]{row.why}[/dim]",
            *(f"{number:.1g}" for number in numbers),
            "yes" if row.identified else "no",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
