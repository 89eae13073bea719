"""Q, V and token rewards: arithmetic, telescoping, gaps, and a model's own logits."""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fixtures
import loss_oracles
from pref_jax import q_values

NAN = math.nan


# --- logits in memory -----------------------------------------------------------------


def test_the_values_of_logits_are_arithmetic():
    logits = jnp.array([[0.0, math.log(3)], [math.log(5), math.log(5)]])
    got = q_values.logit_values(logits, beta=0.5)
    np.testing.assert_allclose(got.q, 0.5 * logits, rtol=1e-6)
    expected = [0.5 * math.log(4), 0.5 * math.log(10)]
    np.testing.assert_allclose(got.value, expected, rtol=1e-6)
    shares = [[0.25, 0.75], [0.5, 0.5]]
    np.testing.assert_allclose(got.advantage, 0.5 * np.log(shares), rtol=1e-5)


def test_the_values_of_logits_are_the_oracles():
    logits = np.random.default_rng(0).normal(size=(4, 6)).astype(np.float32)
    got = q_values.logit_values(logits, beta=0.3)
    for i, row in enumerate(logits):
        q, value, advantage = loss_oracles.logit_values(row, beta=0.3)
        np.testing.assert_allclose(got.q[i], q, rtol=1e-5)
        np.testing.assert_allclose(got.value[i], value, rtol=1e-5)
        np.testing.assert_allclose(got.advantage[i], advantage, rtol=1e-5)


def test_a_number_on_all_logits_moves_q_and_v_but_no_advantage():
    logits = jnp.array([0.5, -1.0, 2.0])
    before, after = (q_values.logit_values(x, beta=0.5) for x in (logits, logits + 4))
    np.testing.assert_allclose(after.advantage, before.advantage, rtol=1e-5)
    np.testing.assert_allclose(after.value - before.value, 2.0, rtol=1e-5)
    np.testing.assert_allclose(after.q - before.q, 2.0, rtol=1e-5)


def test_huge_and_narrow_logits_are_valued_in_float32():
    got = q_values.logit_values(jnp.array([1e4, -1e4]), beta=1.0)
    assert (float(got.value), got.advantage.tolist()) == (1e4, [0.0, -2e4])
    narrow = jnp.array([1.5, 2.0, -3.0], jnp.bfloat16)
    got = q_values.logit_values(narrow, beta=0.3)
    expected = q_values.logit_values(narrow.astype(jnp.float32), beta=0.3)
    jax.tree.map(np.testing.assert_array_equal, got, expected)
    assert {x.dtype for x in jax.tree.leaves(got)} == {jnp.dtype(jnp.float32)}


# --- token rewards --------------------------------------------------------------------

WHERE = np.array([[False, True, True, False, True], [True] * 5])
ARRAYS = {
    "logps": np.array([[NAN, -1.0, -2.0, NAN, -3.0], [-1.0, -1.0, -2.0, -3.0, -5.0]]),
    "anchor_logps": np.array([[NAN, -2.0, -2.5, NAN, -1.0], [-2.0] * 5]),
    "values": np.array([[NAN, 4.0, 7.0, NAN, 1.0], [1.0, 2.0, 4.0, 8.0, 16.0]]),
}
ARRAYS = {name: x.astype(np.float32) for name, x in ARRAYS.items()}
# Of the first response: tokens 1, 2 and 4; each hands over to the next that counts.
REWARDS = [
    [0, 0.5 * 1 + 4 - 7, 0.5 * 0.5 + 7 - 1, 0, 0.5 * -2 + 1 - 10],
    [0.5 + 1 - 2, 0.5 + 2 - 4, 4 - 8, -0.5 + 8 - 16, -1.5 + 16 - 20],
]
TERMINAL = np.array([10.0, 20.0], np.float32)


def token_rewards(**change):
    arrays = ARRAYS | {"beta": 0.5, "where": WHERE} | change
    return q_values.token_rewards(arrays.pop("logps"), **arrays)


def test_a_token_hands_over_to_the_next_one_that_counts():
    got = token_rewards(terminal_value=TERMINAL)
    np.testing.assert_allclose(got, REWARDS, rtol=1e-6)
    # One terminal value for all, 0 unless told.
    got = token_rewards()
    np.testing.assert_allclose(got[:, -1] - np.array(REWARDS)[:, -1], [10, 20])
    np.testing.assert_array_equal(got, token_rewards(terminal_value=0.0))
    np.testing.assert_allclose(token_rewards(terminal_value=3.0)[1, -1], 11.5)


def test_token_rewards_add_up_to_the_log_ratio_and_the_value_of_the_prompt():
    ratio = np.where(WHERE, ARRAYS["logps"] - ARRAYS["anchor_logps"], 0).sum(-1)
    got = token_rewards(terminal_value=TERMINAL).sum(-1)
    np.testing.assert_allclose(got, 0.5 * ratio + [4.0, 1.0] - TERMINAL, rtol=1e-5)


def test_a_response_without_tokens_has_no_rewards():
    got = token_rewards(where=np.zeros((2, 5), bool), terminal_value=TERMINAL)
    assert not np.asarray(got).any()


def test_the_shape_of_the_mask_may_be_that_of_one_response():
    wide = {name: x[1:] for name, x in ARRAYS.items()}
    for where in (WHERE[0], WHERE[:1]):
        got = token_rewards(**wide, where=where)
        full = token_rewards(**{name: x[0] for name, x in wide.items()}, where=WHERE[0])
        np.testing.assert_array_equal(got[0], full)


def random_arrays(names, shape=(2, 3, 6), seed=0):
    rng = np.random.default_rng(seed)
    arrays = {name: rng.normal(size=shape).astype(np.float32) for name in names}
    where = rng.random(shape) < 0.6
    where[0, 0] = False
    return arrays, where, rng.normal(size=shape[:-1]).astype(np.float32)


@pytest.mark.parametrize(
    ("function", "first", "names"),
    [
        ("token_rewards", "logps", ("logps", "anchor_logps", "values")),
        (
            "soft_bellman_residual",
            "q",
            ("q", "rewards", "anchor_logps", "values"),
        ),
    ],
)
def test_token_functions_are_the_oracles(function, first, names):
    arrays, where, terminal = random_arrays(names)
    spoiled = {name: np.where(where, x, np.nan) for name, x in arrays.items()}

    def call(function, arrays, where, terminal):
        others = {name: x for name, x in arrays.items() if name != first}
        options = {"beta": 0.4, "where": where, "terminal_value": terminal}
        return function(arrays[first], **others, **options)

    got = call(getattr(q_values, function), spoiled, where, terminal)
    assert got.dtype == jnp.float32 and got.shape == (2, 3, 6)
    for index in np.ndindex(2, 3):
        one = {name: x[index] for name, x in arrays.items()}
        expected = call(
            getattr(loss_oracles, function), one, where[index], terminal[index]
        )
        np.testing.assert_allclose(got[index], expected, rtol=1e-5, atol=1e-5)
    with jax.enable_x64(True):
        wide = {name: jnp.asarray(x, jnp.float64) for name, x in spoiled.items()}
        got = call(getattr(q_values, function), wide, where, 0.0)
        assert got.dtype == jnp.float64


def test_what_does_not_count_reaches_no_gradient():
    arrays = {name: jnp.asarray(x) for name, x in ARRAYS.items()}

    def total(arrays, terminal):
        return token_rewards(**arrays, terminal_value=terminal).sum()

    gradients, of_terminal = jax.grad(total, argnums=(0, 1))(arrays, TERMINAL)
    np.testing.assert_allclose(gradients["logps"], 0.5 * WHERE)
    np.testing.assert_allclose(gradients["anchor_logps"], -0.5 * WHERE)
    # The first value stays of the sum, whichever token is the first that counts.
    expected = [[0, 1, 0, 0, 0], [1, 0, 0, 0, 0]]
    np.testing.assert_allclose(gradients["values"], expected, atol=1e-6)
    np.testing.assert_allclose(of_terminal, [-1.0, -1.0])


def test_tokens_of_bfloat16_are_valued_in_float32():
    """0.3 (2 - 1.0078125) + 256 - 255.5 needs more than eight bits."""
    narrow = [
        jnp.array(x, jnp.bfloat16) for x in ([-1.0078125], [-2.0], [256.0], [0.5])
    ]
    options = {"beta": 0.3, "where": jnp.array([True]), "terminal_value": 255.5}

    def run(arrays):
        first, anchor, values, rewards = arrays
        options_ = options | {"anchor_logps": anchor, "values": values}
        return (
            q_values.token_rewards(first, **options_),
            q_values.soft_bellman_residual(first, rewards=rewards, **options_),
        )

    got = run(narrow)
    assert {x.dtype for x in got} == {jnp.dtype(jnp.float32)}
    expected = run([x.astype(jnp.float32) for x in narrow])
    jax.tree.map(np.testing.assert_array_equal, got, expected)
    assert float(got[0][0]) == pytest.approx(0.79765625, abs=5e-5)  # near 256


# --- the residual ---------------------------------------------------------------------


def test_the_residual_is_arithmetic():
    got = q_values.soft_bellman_residual(
        jnp.array([2.0, NAN, 3.0]),
        rewards=jnp.array([1.0, NAN, 0.25]),
        anchor_logps=jnp.array([-0.5, NAN, -1.0]),
        values=jnp.array([5.0, NAN, 4.0]),
        beta=2.0,
        where=jnp.array([True, False, True]),
        terminal_value=1.5,
    )
    # 2 - (1 - 1 + 4), and 3 - (1/4 - 2 + 3/2).
    assert got.tolist() == [-2.0, 0.0, 3.25]


def test_after_the_last_token_nothing_is_to_come_unless_told():
    arrays = {name: jnp.zeros(1) for name in ("anchor_logps", "values")}
    options = arrays | {"beta": 1.0, "where": jnp.array([True])}
    residual = q_values.soft_bellman_residual(
        jnp.zeros(1), rewards=jnp.zeros(1), **options
    )
    assert residual.tolist() == [0.0]
    assert q_values.token_rewards(jnp.zeros(1), **options).tolist() == [0.0]


@pytest.mark.parametrize("kind", [q_values.LogitValues, q_values.ResponseValues])
def test_values_cannot_be_changed(kind):
    values = kind(*(jnp.zeros(1) for _ in dataclasses.fields(kind)))
    with pytest.raises(dataclasses.FrozenInstanceError):
        values.q = None


def test_the_rewards_of_a_policy_leave_no_residual():
    """Logits are Q / beta: r = Q - beta log pi_0 - V' for every token that counts."""
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(2, 6, 5)).astype(np.float32)
    tokens = rng.integers(0, 5, (2, 6, 1))
    values = q_values.logit_values(logits, beta=0.3)
    arrays, where, terminal = random_arrays(["anchor_logps"], shape=(2, 6))
    where[0, 2] = True
    options = {
        "anchor_logps": arrays["anchor_logps"],
        "values": values.value,
        "beta": 0.3,
        "where": where,
        "terminal_value": terminal,
    }
    logps = np.take_along_axis(np.asarray(values.advantage) / 0.3, tokens, -1)[..., 0]
    q = np.take_along_axis(np.asarray(values.q), tokens, -1)[..., 0]
    rewards = q_values.token_rewards(logps.astype(np.float32), **options)
    residual = q_values.soft_bellman_residual(q, rewards=rewards, **options)
    np.testing.assert_allclose(residual, 0.0, atol=1e-6)
    more = q_values.soft_bellman_residual(q, rewards=rewards + 1, **options)
    np.testing.assert_allclose(more, np.where(where, -1.0, 0.0), atol=1e-5)


# --- the logits of a model ------------------------------------------------------------


def dense_values(params, groups, beta):
    """Q, V and terminal V of each response from all logits of its padded text."""
    pairs = [(group.prompt, r) for group in groups for r in group.responses]
    out = []
    for first in range(0, len(pairs), 7):
        part = pairs[first : first + 7]
        texts = [np.concatenate(pair) for pair in part]
        texts += [[]] * (7 - len(texts))
        layout = fixtures.padded_layout(texts, 20)
        logits = np.asarray(fixtures.logits_of_texts()(params, *layout), np.float64)
        for row, (prompt, response) in zip(logits, part, strict=False):
            at = len(prompt) - 1 + np.arange(len(response))
            logsumexp = np.log(np.exp(row).sum(-1))
            last = len(prompt) + len(response) - 1
            q, value = beta * row[at, response], beta * logsumexp[at]
            out.append((q, value, beta * logsumexp[last]))
    return out


def test_the_values_along_responses_are_those_of_all_logits():
    params = fixtures.random_params(0)
    groups = fixtures.random_groups(2, 7, 2, prompt=(1, 5))
    batch = fixtures.pack_all(groups, 48, rows_multiple=3, spare_groups=1)
    assert not batch.valid.all() and len(batch.tokens) > 1
    got = jax.jit(
        lambda params, batch: q_values.response_values(
            fixtures.decoder(), params, batch, beta=0.7, chunk=4
        )
    )(params, batch)
    q, value, advantage = (
        fixtures.by_response(getattr(got, name), batch, groups)
        for name in ("q", "value", "advantage")
    )
    terminal = np.asarray(got.terminal_value)
    slots = {int(r): b for b, r in enumerate(batch.record) if r >= 0}
    ends = [terminal[slots[g.record], k] for g in groups for k in range(2)]
    masks = fixtures.loss_masks(groups)
    expected = dense_values(params, groups, 0.7)
    for i, (its_q, its_value, end) in enumerate(expected):
        close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=2e-5)
        close(q[i], np.where(masks[i], its_q, 0))
        close(value[i], np.where(masks[i], its_value, 0))
        close(advantage[i], np.where(masks[i], its_q - its_value, 0))
        close(ends[i], end)
    assert not terminal[~batch.valid].any()
    outside = ~batch.loss_mask
    for x in (got.q, got.value, got.advantage):
        assert not np.asarray(x)[outside].any()


@dataclasses.dataclass(frozen=True)
class Bigram:
    """A model of which the logits of u after t are embedding[t] @ embedding[u]."""

    vocab_size: int
    logit_softcap: float | None = None

    def hidden(self, params, tokens, position, end):
        return params[tokens]

    def unembedding(self, params):
        return params


@pytest.mark.parametrize(
    ("chunk", "softcap"), [(None, None), (2, None), (100, None), (2, 1.5)]
)
def test_chunks_change_no_value(chunk, softcap):
    groups = fixtures.random_groups(0, 5, 2)
    batch = fixtures.pack_all(groups, 40, rows_multiple=2, spare_groups=1)
    params = jnp.asarray(np.random.default_rng(0).normal(size=(37, 3)), jnp.float32)
    model = Bigram(37, softcap)
    got = q_values.response_values(model, params, batch, beta=0.5, chunk=chunk)
    all_logits = np.asarray(params) @ np.asarray(params).T
    if softcap is not None:
        all_logits = softcap * np.tanh(all_logits / softcap)
    all_logits *= 0.5
    values = np.log(np.exp(2 * all_logits).sum(-1)) / 2
    for b, k in np.ndindex(batch.valid.shape):
        if not batch.valid[b, k]:
            assert got.terminal_value[b, k] == 0
            continue
        row = batch.tokens[b // (len(batch.valid) // len(batch.tokens))]
        start, n = batch.start[b, k], batch.length[b, k]
        before, after = row[start : start + n], row[start + 1 : start + n + 1]
        kept = batch.loss_mask[b, k, :n]
        close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
        close(got.q[b, k, :n], np.where(kept, all_logits[before, after], 0))
        close(got.value[b, k, :n], np.where(kept, values[before], 0))
        close(got.terminal_value[b, k], values[row[start + n]])
    program = str(
        jax.make_jaxpr(
            lambda p: q_values.response_values(model, p, batch, beta=0.5, chunk=chunk)
        )(params)
    )
    assert bool(re.search(r"\blength=19\b", program)) == (chunk == 2)


# --- errors ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"beta": 0.0}, ValueError, "`beta` must be positive and finite; got 0.0"),
        (
            {"logps": np.ones((2, 5), int)},
            TypeError,
            "`logps` needs floating-point numbers",
        ),
        (
            {"values": np.ones((2, 5), int)},
            TypeError,
            "`values` needs floating-point numbers",
        ),
        (
            {"anchor_logps": np.ones(5)},
            ValueError,
            r"`anchor_logps` needs the shape of `logps`, f32\[2, 5\]; got f\d+\[5\]",
        ),
        ({"where": np.ones((2, 5))}, TypeError, "`where` is inclusion and needs boole"),
        (
            {"where": np.ones(4, bool)},
            ValueError,
            r"`where` needs a shape that broadcasts to \(2, 5\), that of `logps`",
        ),
        ({"terminal_value": np.ones(3)}, ValueError, "broadcast"),
    ],
)
def test_the_arguments_of_token_rewards_are_named(change, error, message):
    with pytest.raises(error, match=message):
        token_rewards(**change)


def test_the_arguments_of_a_residual_are_named():
    options = {name: np.zeros(3) for name in ("rewards", "anchor_logps", "values")}
    options |= {"beta": 1.0, "where": np.ones(3, bool)}
    residual = q_values.soft_bellman_residual
    with pytest.raises(ValueError, match="`beta` must be positive and finite; got -1"):
        residual(np.zeros(3), **options | {"beta": -1.0})
    with pytest.raises(TypeError, match="`q` needs floating-point numbers"):
        residual(np.zeros(3, int), **options)
    with pytest.raises(ValueError, match="`rewards` needs the shape of `q`"):
        residual(np.zeros(3), **options | {"rewards": np.zeros(2)})


def test_values_need_a_positive_beta_and_floats():
    with pytest.raises(ValueError, match="`beta` must be positive and finite; got 0"):
        q_values.logit_values(np.zeros(3), beta=0.0)
    with pytest.raises(TypeError, match="`logits` needs floating-point numbers"):
        q_values.logit_values(np.zeros(3, int), beta=1.0)
    with pytest.raises(ValueError, match="`beta` must be positive and finite; got -1"):
        q_values.response_values(None, None, None, beta=-1.0)
