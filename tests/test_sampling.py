"""Sampling: with the cache = without, greedy = argmax, draws = their distribution."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import fixtures
import oracles
from pref_jax import sampling
from pref_jax.sampling import SamplingConfig
from pref_jax.types import TokenGroup

STEPS, SAMPLES, STOPS = 7, 3, (4, 11, 30)
PROMPTS = [
    np.random.default_rng(0).integers(0, 37, length).astype(np.int32)
    for length in (8, 1, 5, 3, 6)
]


@functools.cache
def sampler(config: SamplingConfig, end_ids=STOPS):
    return sampling.make_sampler(fixtures.decoder(), config, end_ids=end_ids)


def draw(config, prompts, *, end_ids=STOPS, batch_size=2, seed=0, **kwargs):
    return sampling.sample_responses(
        sampler(config, end_ids),
        fixtures.random_params(0),
        prompts,
        key=jax.random.key(seed),
        batch_size=batch_size,
        **kwargs,
    )


@functools.cache
def weights():
    return fixtures.oracle_weights(fixtures.random_params(0))


@functools.cache
def next_logits(*text) -> np.ndarray:
    """f64[V]: logits after a text, by the oracle."""
    hidden = oracles.decoder_hidden(weights(), text, **fixtures.ORACLE)
    return hidden[-1] @ weights()["unembedding"]


FILTERED = SamplingConfig(
    num_samples=SAMPLES, max_new_tokens=STEPS, temperature=1.5, top_k=9, top_p=0.8
)


@pytest.fixture(scope="module")
def samples():
    return draw(FILTERED, PROMPTS)


def written(samples):
    """(prompt number, sample, ids) of every response."""
    for b, k in np.ndindex(samples.length.shape):
        yield b, k, samples.tokens[b, k, : samples.length[b, k]]


def test_logps_of_samples_equal_those_of_the_full_forward_pass(samples):
    """The cache and the rows say the same of the ids that were drawn."""
    groups = [
        TokenGroup(
            prompt,
            tuple(samples.tokens[b, k, :n] for k, n in enumerate(samples.length[b])),
            tuple(np.ones(n, bool) for n in samples.length[b]),
            (1.0,) * SAMPLES,
            b,
        )
        for b, prompt in enumerate(PROMPTS)
    ]
    batch = fixtures.pack_all(groups, 40)
    scores = fixtures.scorer()(fixtures.random_params(0), batch)
    full = fixtures.by_response(scores.logp, batch, groups)
    for (b, k, ids), expected in zip(written(samples), full, strict=True):
        got = samples.logps[b, k, : len(ids)]
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


def test_behaviour_logps_are_those_of_the_filtered_distribution(samples):
    compared = 0
    for b, k, ids in written(samples):
        for t, token in enumerate(ids[:3]):
            logits = next_logits(*PROMPTS[b], *ids[:t])
            of_drawn = oracles.filter_logits(
                logits, temperature=1.5, top_k=9, top_p=0.8
            )
            own = oracles.log_softmax(logits)
            assert samples.behaviour_logps[b, k, t] == pytest.approx(
                of_drawn[token], abs=2e-5
            )
            assert samples.logps[b, k, t] == pytest.approx(own[token], abs=2e-5)
            compared += abs(of_drawn[token] - own[token]) > 0.01
    assert compared > 20


def test_a_response_ends_with_its_first_end_token_or_at_the_limit(samples):
    assert samples.ended.any() and not samples.ended.all()
    ends = set()
    for b, k, ids in written(samples):
        stops = [t for t, token in enumerate(ids) if token in STOPS]
        assert samples.ended[b, k] == bool(stops)
        assert len(ids) == (stops[0] + 1 if stops else STEPS)
        ends |= {int(ids[t]) for t in stops}
        for values in (samples.tokens, samples.logps, samples.behaviour_logps):
            assert not values[b, k, len(ids) :].any()
    assert len(ends) > 1


def test_greedy_is_the_argmax_of_the_oracle_for_prompts_of_any_length():
    greedy = draw(
        SamplingConfig(num_samples=2, max_new_tokens=STEPS, temperature=0.0), PROMPTS
    )
    for b, _, ids in written(greedy):
        expected = oracles.greedy(
            weights(), PROMPTS[b], STEPS, stop=STOPS, **fixtures.ORACLE
        )
        assert ids.tolist() == expected
    assert not greedy.behaviour_logps.any()  # drawn with probability one
    assert (greedy.logps[:, :, 0] < 0).all()


def test_each_prompt_of_a_batch_draws_as_it_does_alone(samples):
    """By the sampler itself: no neighbour, no padding. The longest and the shortest."""
    key = jax.random.key(0)
    for b, prompt in enumerate(PROMPTS[:2]):
        alone = sampler(FILTERED)(
            fixtures.random_params(0),
            prompt[None],
            np.array([len(prompt)]),
            jax.random.fold_in(key, b)[None],
        )
        np.testing.assert_array_equal(alone.tokens[0], samples.tokens[b])
        np.testing.assert_allclose(alone.logps[0], samples.logps[b], atol=1e-5)


def test_draws_do_not_depend_on_the_batch_size(samples):
    """Five prompts two by two, the last with one to fill up, and one by one."""
    done = []
    other = draw(FILTERED, PROMPTS, batch_size=1, on_batch=done.append)
    np.testing.assert_array_equal(other.tokens, samples.tokens)
    np.testing.assert_array_equal(other.length, samples.length)
    np.testing.assert_allclose(other.logps, samples.logps, atol=1e-5)
    assert done == [1, 2, 3, 4, 5]


def test_progress_counts_each_prompt_once():
    """Five prompts two by two: what fills up the last batch is not counted."""
    done = []
    draw(FILTERED, PROMPTS, on_batch=done.append)
    assert done == [2, 4, 5]


class OneState:
    """A model whose state is 1 everywhere: its parameters [V, 1] are the logits."""

    max_positions = None

    def __init__(self, logit_softcap=None):
        self.logit_softcap = logit_softcap

    def init_cache(self, *sizes):
        return ()

    def prefill(self, params, tokens, length, cache):
        return cache

    def unembedding(self, params):
        return params

    def param_axes(self, params):
        return ("vocab", "embed")

    def decode(self, params, tokens, length, step, cache):
        return jnp.ones((*tokens.shape, 1), jnp.bfloat16), cache


def draw_from(logits, **options):
    """Responses of one token, drawn from logits [V]."""
    config = SamplingConfig(max_new_tokens=1, **options)
    sampler = sampling.make_sampler(OneState(), config, end_ids=())
    keys = jax.random.split(jax.random.key(0), 1)
    prompt = (np.zeros((1, 1), np.int32), np.ones(1, np.int32))
    return sampler(jnp.array(logits)[:, None], *prompt, keys)


def test_logps_of_bfloat16_states_are_float32():
    samples = draw_from([1.0, 4.0], temperature=0.0)
    expected = oracles.log_softmax([1.0, 4.0])[1]
    assert float(samples.logps[0, 0, 0]) == pytest.approx(expected, rel=1e-5)


def test_logps_of_samples_are_those_of_capped_logits():
    greedy = SamplingConfig(max_new_tokens=1, temperature=0.0)
    sampler = sampling.make_sampler(OneState(2.0), greedy, end_ids=())
    keys = jax.random.split(jax.random.key(0), 1)
    prompts, length = np.zeros((1, 1), np.int32), np.ones(1, np.int32)
    samples = sampler(jnp.array([[1.0], [4.0]]), prompts, length, keys)
    expected = oracles.log_softmax(oracles.soft_cap([1.0, 4.0], 2.0))[1]
    assert float(samples.logps[0, 0, 0]) == pytest.approx(expected, rel=1e-5)


def test_a_prompt_without_room_for_a_response_is_an_error():
    model = OneState()
    model.max_positions = 9
    sampler = sampling.make_sampler(model, SamplingConfig(max_new_tokens=4), end_ids=())
    prompts = [np.zeros(n, np.int32) for n in (3, 5, 6, 7)]
    options = {"key": jax.random.key(0), "batch_size": 2}
    drawn = sampling.sample_responses(sampler, jnp.ones((3, 1)), prompts[:2], **options)
    assert drawn.tokens.shape == (2, 1, 4)
    with pytest.raises(ValueError, match="prompts of 5 tokens .* 2 of 4 are longer"):
        sampling.sample_responses(sampler, jnp.ones((3, 1)), prompts, **options)


def test_samples_of_a_prompt_differ_and_so_do_those_of_another_key(samples):
    assert len({tuple(samples.tokens[0, k]) for k in range(SAMPLES)}) == SAMPLES
    other = draw(FILTERED, PROMPTS, seed=1)
    assert (other.tokens != samples.tokens).any(axis=(1, 2)).all()


def p_value(counts, expected) -> float:
    """Of Pearson's chi-squared test; cells in which fewer than 5 are expected are one.

    P(statistic > s) = gammaincc(freedom / 2, s / 2).
    """
    counts, expected = np.asarray(counts, float), np.asarray(expected, float)
    assert counts.sum() == pytest.approx(expected.sum())  # nothing else was drawn
    few = expected < 5
    if few.any():
        counts, expected = (
            np.append(x[~few], x[few].sum()) for x in (counts, expected)
        )
    statistic = ((counts - expected) ** 2 / expected).sum()
    freedom = len(counts) - 1
    return float(jax.scipy.special.gammaincc(freedom / 2, statistic / 2))


def test_the_p_value_of_three_cells_is_an_exponential():
    """Of two degrees of freedom: exp(-s / 2). Two cells of 3 are one of 6."""
    got = p_value([12, 9, 0, 5], [10, 10, 3, 3])
    statistic = 4 / 10 + 1 / 10 + 1 / 6
    assert got == pytest.approx(np.exp(-statistic / 2), rel=1e-5)


def test_frequencies_match_the_softmax_at_the_temperature():
    """A quarter of a million draws tell temperature 1 from 1.02 and from 0.98."""
    num = 2**18
    config = SamplingConfig(num_samples=num, max_new_tokens=1)
    samples = draw(config, PROMPTS[2:3], end_ids=(), batch_size=1, seed=4)
    counts = np.bincount(samples.tokens.flatten(), minlength=37)
    p_values = {}
    for temperature in (1.0, 0.98, 1.02):
        logps = oracles.log_softmax(next_logits(*PROMPTS[2]) / temperature)
        p_values[temperature] = p_value(counts, num * np.exp(logps))
    assert p_values[1.0] > 1e-3
    assert max(p_values[0.98], p_values[1.02]) < 1e-3


@pytest.mark.parametrize("vocab_size", [1, 2, 9, 64, 129])
def test_alike_tokens_are_drawn_alike_often(vocab_size):
    """Of 64 as many blocks as tokens in a block: their draws are not one draw."""
    samples = draw_from(np.zeros(vocab_size, np.float32), num_samples=2**14)
    counts = np.bincount(samples.tokens.flatten())
    expected = np.full(vocab_size, 2**14 / vocab_size)
    assert vocab_size == 1 or p_value(counts, expected) > 1e-3


def test_frequencies_of_pairs_match_the_filtered_distribution():
    config = dataclasses.replace(FILTERED, num_samples=2048, max_new_tokens=2, top_k=5)
    prompt = PROMPTS[2]
    samples = draw(config, [prompt], end_ids=(), batch_size=1, seed=3)
    # Without end tokens every response has full length.
    assert (samples.length == 2).all() and not samples.ended.any()
    drawn = samples.tokens[0]
    options = dict(temperature=1.5, top_k=5, top_p=0.8)
    first = np.exp(oracles.filter_logits(next_logits(*prompt), **options))
    counts, expected = [], []
    for u in np.flatnonzero(first):
        second = oracles.filter_logits(next_logits(*prompt, int(u)), **options)
        for v in np.flatnonzero(np.isfinite(second)):
            counts.append((drawn == (u, v)).all(-1).sum())
            expected.append(2048 * first[u] * np.exp(second[v]))
    assert sum(mean >= 5 for mean in expected) >= 8
    assert 1e-3 < p_value(counts, expected) < 0.999


# --- the filter -----------------------------------------------------------------------


@functools.cache
def compiled_filter():
    return jax.jit(
        sampling.filter_logits, static_argnames=("temperature", "top_k", "top_p")
    )


@pytest.mark.parametrize("temperature", [0.5, 2.0])
@pytest.mark.parametrize(
    ("top_k", "top_p"),
    [(None, 1.0), (1, 1.0), (4, 1.0), (37, 1.0), (99, 0.9)]
    + [(None, 0.01), (None, 0.5), (None, 0.95), (6, 0.7)],
)
def test_the_filter_equals_the_oracle(temperature, top_k, top_p):
    options = dict(temperature=temperature, top_k=top_k, top_p=top_p)
    logits = np.random.default_rng(0).standard_normal((3, 2, 37)).astype(np.float32)
    kept = compiled_filter()(logits * 2, **options)
    got = np.asarray(jax.nn.log_softmax(kept))
    for index in np.ndindex(3, 2):
        expected = oracles.filter_logits(logits[index] * 2, **options)
        np.testing.assert_allclose(got[index], expected, rtol=1e-5, atol=1e-5)


@given(
    logits=st.lists(
        st.sampled_from([-3.0, -1.0, 0.0, 0.5, 2.0]), min_size=5, max_size=5
    ),
    top_p=st.sampled_from([0.1, 0.6, 0.99]),
)
def test_the_likeliest_token_always_stays_and_ties_are_treated_alike(logits, top_p):
    logits = jnp.array(logits)
    kept = compiled_filter()(logits, temperature=1.0, top_k=3, top_p=top_p)
    stays = np.isfinite(kept)
    assert stays[np.asarray(logits).argmax()]
    threshold = np.asarray(logits)[stays].min()
    np.testing.assert_array_equal(stays, np.asarray(logits) >= threshold)


# --- errors ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_samples": 0}, "`num_samples` and `max_new_tokens` must be at least 1"),
        ({"max_new_tokens": 0}, "`num_samples` and `max_new_tokens` must be at least"),
        ({"temperature": -0.1}, r"`temperature` must not be negative \(0 is greedy\)"),
        ({"top_k": 0}, "`top_k` must be None or at least 1; got 0"),
        ({"top_p": 0.0}, r"`top_p` must lie in \(0, 1\]; got 0.0"),
        ({"top_p": 1.1}, r"`top_p` must lie in \(0, 1\]; got 1.1"),
        ({"temperature": 0.0}, "`top_k` and `top_p` have no effect on greedy sampling"),
    ],
)
def test_a_wrong_option_is_an_error(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(FILTERED, **change)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], "at least one token .a BOS will do.; got 0 prompts, 0 of them empty"),
        ([PROMPTS[0], PROMPTS[0][:0]], "got 2 prompts, 1 of them empty"),
    ],
)
def test_an_empty_prompt_is_an_error(prompts, message):
    with pytest.raises(ValueError, match=message):
        draw(FILTERED, prompts)
