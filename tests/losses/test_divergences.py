"""SFT with a divergence: numbers by hand, the dual of a bandit, and what it is near."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import more_loss_oracles as oracles
from losses.loss_cases import as_the_oracle_has_it, assert_golden
from losses.more_loss_cases import DIVERGENCES
from pref_jax import losses, rewards
from test_more_loss_oracles import BASE, BETA, COUNTS, kl, primal

ARMS = np.repeat(np.arange(len(COUNTS)), COUNTS)  # of the demonstrations
every_divergence = pytest.mark.parametrize(
    "divergence", DIVERGENCES, ids=lambda d: d.name
)
curved = pytest.mark.parametrize("divergence", DIVERGENCES[1:], ids=lambda d: d.name)
ANCHORED = {"anchor_logps": [-4.0, -1.0], "beta": 0.5}


# --- likelihood weighted by itself ----------------------------------------------------


def test_dft_is_arithmetic_and_its_weight_has_no_gradient():
    p = [math.exp(-0.5), math.exp(-2.0)]
    slopes = [-x for x in p]
    assert slopes == [oracles.dft_slope(-0.5), oracles.dft_slope(-2.0)]
    assert_golden("dft_loss", [-0.5, -2.0], {}, [0.5 * p[0], 2 * p[1]], slopes)
    _, metrics = losses.dft_loss(jnp.array([-0.5, -2.0]))
    np.testing.assert_allclose(metrics["sft/weight"], p, rtol=1e-6)


def test_the_gradient_of_dft_is_that_of_sft_times_the_probability():
    def slope(loss_fn, x):
        return jax.grad(lambda x: loss_fn(x)[0].sum())(x)

    logps = -jnp.linspace(0.0, 60.0, 13)
    expected = jnp.exp(logps) * slope(losses.nll_loss, logps)
    np.testing.assert_array_equal(slope(losses.dft_loss, logps), expected)


# --- the family -----------------------------------------------------------------------

# v = 3 and -1/4 and their h and h'.
BY_HAND = {
    "total variation": ([3.0, -0.25], [1.0, 1.0]),
    "Pearson chi-squared": ([2.0, 2 * (0.75**0.5 - 1)], [0.5, 0.75**-0.5]),
    "squared Hellinger": ([0.75, -1 / 3], [1 / 16, 16 / 9]),
    "Jensen-Shannon": (
        [math.log(2 - math.exp(-3)), math.log(2 - math.exp(0.25))],
        [1 / (2 * math.exp(3) - 1), 1 / (2 * math.exp(-0.25) - 1)],
    ),
    "forward KL": ([math.log(4), math.log(0.75)], [0.25, 4 / 3]),
    "reverse KL": (
        [1 - math.exp(-3), 1 - math.exp(0.25)],
        [math.exp(-3), math.exp(0.25)],
    ),
}


@every_divergence
def test_every_member_is_arithmetic(divergence):
    h, slope = BY_HAND[divergence.name]
    options = {"anchor_logps": [-7.0, -1.0], "beta": 0.5, "divergence": divergence}
    logps = [-1.0, -1.5]  # v = 3 and -1/4
    expected = [-x / 0.5 for x in h], [-x for x in slope]
    assert_golden("fsft_loss", logps, options, *expected)
    # The same v, with a partition of 1 in it.
    solved = options | {"anchor_logps": [-5.0, 1.0], "partition": 1.0}
    expected = [-(x - 1) / 0.5 for x in h], [-x for x in slope]
    assert_golden("fsft_solved_loss", logps, solved, *expected)


@every_divergence
def test_at_zero_h_is_zero_with_a_slope_of_one(divergence):
    h, slope = divergence(jnp.zeros(()))
    assert (h, slope) == (0.0, 1.0)
    assert jax.grad(lambda v: divergence(v)[0])(0.0) == 1.0
    tiny = jnp.array([1e-6, -1e-6])
    np.testing.assert_allclose(divergence(tiny)[0], tiny, rtol=3e-6)  # of few digits


@every_divergence
def test_from_minus_to_plus_ten_thousand_nothing_is_nan_or_infinite(divergence):
    v = jnp.concatenate([jnp.linspace(-1e4, 1e4, 41), jnp.linspace(-5, 5, 101)])
    h, slope = divergence(v)
    gradient = jax.vmap(jax.grad(lambda v: divergence(v)[0]))(v)
    for x in (h, slope, gradient):
        assert np.isfinite(x).all()
    # The derivative of v / (1 + v) cancels: its error is that of 1 / (1 + v).
    np.testing.assert_allclose(gradient, slope, rtol=1e-5, atol=1e-9)
    assert np.isnan(divergence(jnp.array(jnp.nan))[0])


@every_divergence
def test_h_rises_is_concave_and_has_its_slope_by_the_oracle(divergence):
    name = as_the_oracle_has_it(divergence)
    v = np.linspace(-6.0, 4.0, 81)
    with jax.enable_x64(True):
        h, slope = divergence(jnp.asarray(v))
    expected = [oracles.divergence_h(x, divergence=name) for x in v]
    np.testing.assert_allclose(h, expected, rtol=1e-12, atol=1e-12)
    expected = [oracles.divergence_slope(x, divergence=name) for x in v]
    np.testing.assert_allclose(slope, expected, rtol=1e-12)
    assert (np.asarray(slope) > 0).all() and (np.diff(slope) <= 0).all()


def test_total_variation_is_the_likelihood_plus_the_anchor_whatever_beta_is():
    logps = jnp.array([-1.0, -2.5])
    nll, _ = losses.nll_loss(logps)
    for beta in (0.1, 3.0):
        options = {"anchor_logps": jnp.array([-4.0, -1.0]), "beta": beta}
        options["divergence"] = losses.TOTAL_VARIATION
        loss, _ = losses.fsft_loss(logps, **options)
        np.testing.assert_allclose(loss, nll + options["anchor_logps"], rtol=1e-6)
        solved, _ = losses.fsft_solved_loss(logps, partition=0.75, **options)
        np.testing.assert_allclose(solved, loss, rtol=1e-6, atol=1e-6)


@every_divergence
def test_as_beta_goes_to_zero_it_is_plain_sft_in_value_and_gradient(divergence):
    def total(logps):
        loss, _ = losses.fsft_loss(
            logps,
            anchor_logps=jnp.array([-4.0, -1.0]),
            beta=1e-7,
            divergence=divergence,
        )
        return loss.sum(), loss

    gradient, loss = jax.grad(total, has_aux=True)(jnp.array([-1.0, -2.5]))
    np.testing.assert_allclose(loss, [1 - 4, 2.5 - 1], rtol=1e-5)
    np.testing.assert_allclose(gradient, [-1.0, -1.0], rtol=1e-5)


def test_no_gradient_reaches_the_anchor_or_the_partition():
    def total(anchor_logps, partition):
        return losses.fsft_solved_loss(
            jnp.array([-1.0]),
            anchor_logps=anchor_logps,
            beta=0.5,
            divergence=losses.CHI_SQUARED,
            partition=partition,
        )[0].sum()

    gradients = jax.grad(total, argnums=(0, 1))(jnp.array([-2.0]), 0.5)
    assert not any(np.any(x) for x in gradients)


def test_a_divergence_of_ones_own_is_taken():
    log_cosh = losses.Divergence(
        "ours", lambda v: jnp.tanh(v), lambda v: 1 - jnp.tanh(v) ** 2, -2.0
    )
    assert dataclasses.replace(log_cosh, name="other") != log_cosh
    options = {"anchor_logps": jnp.array([0.0]), "beta": 1.0, "divergence": log_cosh}
    loss, _ = losses.fsft_loss(jnp.array([-4.0]), **options)
    expected = math.tanh(2) + 2 * (1 - math.tanh(2) ** 2)
    np.testing.assert_allclose(loss, [expected], rtol=1e-5)


def test_a_divergence_without_an_end_is_continued_nowhere():
    own = losses.Divergence(
        "own", lambda v: -jnp.expm1(-v), lambda v: jnp.exp(-v), -math.inf
    )
    h, slope = own(jnp.array([-3.0, 0.0, 2.0]))
    np.testing.assert_allclose(h, [1 - math.exp(3), 0.0, 1 - math.exp(-2)], rtol=1e-6)
    np.testing.assert_allclose(slope, np.exp([3.0, 0.0, -2.0]), rtol=1e-6)


@every_divergence
def test_a_divergence_is_a_static_argument_and_takes_numbers(divergence):
    call = jax.jit(lambda v, divergence: divergence(v)[0], static_argnames="divergence")
    assert call(0.5, divergence=divergence) == divergence(0.5)[0]


# --- bandits --------------------------------------------------------------------------


@curved
def test_at_the_optimum_the_mean_loss_is_the_primal_of_the_bandit(divergence):
    """min of D_f(mu || pi) + beta KL(pi || base), found over the simplex, by loops."""
    value, pi = primal(as_the_oracle_has_it(divergence))
    with jax.enable_x64(True):
        logits, base = jnp.log(jnp.asarray(pi)), jnp.log(BASE)

        def mean_loss(logits):
            logps = jax.nn.log_softmax(logits)[ARMS]
            options = {"anchor_logps": base[ARMS], "beta": BETA}
            options["divergence"] = divergence
            c = losses.solve_partition(logps, **options)
            loss, metrics = losses.fsft_solved_loss(logps, partition=c, **options)
            return loss.mean(), metrics["sft/weight"].mean()

        (loss, weight), gradient = jax.value_and_grad(mean_loss, has_aux=True)(logits)
    assert -BETA * float(loss) == pytest.approx(value, abs=1e-9)
    assert float(weight) == pytest.approx(1.0, abs=1e-12)
    np.testing.assert_allclose(gradient, np.zeros(len(BASE)), atol=1e-7)


def trained(divergence, *, beta):
    """The policy of a bandit after exact gradient steps without a partition."""

    def mean_loss(logits):
        return losses.fsft_loss(
            jax.nn.log_softmax(logits)[ARMS],
            anchor_logps=jnp.log(BASE)[ARMS],
            beta=beta,
            divergence=divergence,
        )[0].mean()

    def step(logits, _):
        return logits - 3.0 * jax.grad(mean_loss)(logits), None

    start = jnp.log(jnp.asarray(BASE))
    logits, _ = jax.jit(lambda x: jax.lax.scan(step, x, length=2000))(start)
    return np.asarray(jax.nn.softmax(logits))


def test_the_divergences_keep_nearer_to_the_base_in_their_known_order():
    with jax.enable_x64(True):
        far = {d.name: kl(trained(d, beta=1.0), BASE) for d in DIVERGENCES[:4]}
    mu = np.array(COUNTS) / sum(COUNTS)
    assert far["total variation"] == pytest.approx(kl(mu, BASE), rel=1e-6)
    assert far["total variation"] > 1.5 * far["Pearson chi-squared"]
    assert far["Pearson chi-squared"] > 1.5 * far["squared Hellinger"]
    assert far["squared Hellinger"] == pytest.approx(far["Jensen-Shannon"], rel=0.2)


# --- what SFT and DPO share -----------------------------------------------------------


def shared_reward(logits, c):
    """r = beta log(pi / pi_0) + c of every arm, and log pi."""
    logps = jax.nn.log_softmax(logits)
    reward = rewards.implicit_reward(logps, anchor_logps=jnp.log(BASE), beta=BETA)
    return reward + c, logps


def test_the_kl_of_a_policy_and_its_own_reward_cancel_to_a_constant():
    """E_pi[r] - beta KL(pi || pi_0) = c, whatever the policy is."""
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        for c in (0.0, -1.7, 3.0):
            reward, logps = shared_reward(jnp.asarray(rng.normal(size=len(BASE))), c)
            pi = np.exp(logps)
            assert (pi @ reward) - BETA * kl(pi, BASE) == pytest.approx(c, abs=1e-12)


def test_imitation_of_a_linear_divergence_has_the_gradient_of_sft():
    """E_mu[r] - beta log Z(r), of whose policy r is the reward."""
    rng = np.random.default_rng(1)
    mu = np.array(COUNTS) / sum(COUNTS)

    def dual(logits, c):
        reward, _ = shared_reward(logits, c)
        log_z = jax.nn.logsumexp(jnp.log(BASE) + reward / BETA)
        return mu @ reward - BETA * log_z

    def sft(logits):
        return losses.nll_loss(jax.nn.log_softmax(logits)[ARMS])[0].mean()

    with jax.enable_x64(True):
        logits = jnp.asarray(rng.normal(size=len(BASE)))
        ours, by_c = jax.grad(dual, argnums=(0, 1))(logits, 0.7)
        np.testing.assert_allclose(ours, -BETA * jax.grad(sft)(logits), atol=1e-9)
    # A constant of the reward is lost in log Z.
    assert abs(float(by_c)) < 1e-12


def test_the_reward_that_imitates_best_has_the_demonstrations_as_its_policy():
    """Of all rewards, free of any policy; gradient of E_mu[r] - beta log Z(r)."""
    mu = np.array(COUNTS) / sum(COUNTS)

    def policy(reward):
        return jax.nn.softmax(jnp.log(BASE) + reward / BETA)

    def dual(reward):
        return mu @ reward - BETA * jax.nn.logsumexp(jnp.log(BASE) + reward / BETA)

    def step(reward, _):
        return reward + 0.5 * BETA * jax.grad(dual)(reward), None

    with jax.enable_x64(True):
        reward, _ = jax.lax.scan(step, jnp.zeros(len(BASE)), length=4000)
        np.testing.assert_allclose(policy(reward), mu, atol=1e-9)
