"""Values that other libraries, or the code of a paper, give on fixed inputs.

TRL 1.16.0: the mean loss of `DPOTrainer` on `fixed_input`, at beta 0.1 and 0.5. They
are results in float32, and its losses of today are compared in `tests/parity`.
"""

import jax.numpy as jnp
import numpy as np
import pytest

from fixed_input import LENGTHS, fixed_logps, fixed_token_logps
from pref_jax import anchors
from pref_jax.logps import length_desensitized_weights, response_sum, wpo_weights
from pref_jax.losses.batch_coupled import aot_loss, aot_unpaired_loss
from pref_jax.losses.pairwise import (
    apo_down_loss,
    apo_zero_loss,
    discopop_loss,
    dpo_loss,
    exo_loss,
    hinge_loss,
    ipo_loss,
    length_normalized_dpo_loss,
    logistic_loss,
    nca_loss,
    robust_loss,
    sppo_loss,
)
from pref_jax.losses.reference_free import orpo_loss
from pref_jax.losses.supervised import nll_loss
from pref_jax.losses.unpaired import bco_loss
from pref_jax.rewards import (
    alpha_divergence_reward,
    forward_kl_reward,
    implicit_reward,
    jensen_shannon_reward,
)
from pref_jax.train.step import weighted_mean

BETAS = (0.1, 0.5)
POLICY, ANCHOR = (jnp.asarray(x, jnp.float32) for x in fixed_logps())
TOKENS, ANCHOR_TOKENS = (jnp.asarray(x, jnp.float32) for x in fixed_token_logps()[:2])
MASK = fixed_token_logps()[2]


def close(loss, expected):
    # Their float32, ours, and the seven decimals that were written down.
    np.testing.assert_allclose(float(loss), expected, rtol=2e-6)


# --- TRL ------------------------------------------------------------------------------


def bco_of_pairs(rewards):
    desirable = np.broadcast_to([True, False], rewards.shape)
    loss, metrics = bco_loss(rewards, desirable=desirable, delta=0.0)
    return loss.sum(-1), metrics


OF_REWARDS = {
    "sigmoid": (logistic_loss, {}, (0.7065278, 0.7772720)),
    "hinge": (hinge_loss, {"margin": 1.0}, (1.0250000, 1.1250001)),
    "nca_pair": (nca_loss, {}, (1.3934906, 1.4408696)),
    "bco_pair": (bco_of_pairs, {}, (1.3995440, 1.4673047)),
    "aot_unpaired": (aot_unpaired_loss, {}, (0.7058346, 0.7603146)),
    "aot_unpaired, 0.1": (
        aot_unpaired_loss,
        {"label_smoothing": 0.1},
        (None, 0.7478147),
    ),
    "apo_zero": (apo_zero_loss, {}, (1.0062399, 1.0300306)),
    "apo_down": (apo_down_loss, {}, (0.9956197, 0.9775200)),
    "discopop": (discopop_loss, {"tau": 0.05}, (0.8378050, 0.8837073)),
    "exo_pair, 0.1": (exo_loss, {"label_smoothing": 0.1}, (0.5254004, 0.5959362)),
    "robust, 0.1": (robust_loss, {"flip_rate": 0.1}, (0.7096527, 0.7928970)),
}


def parametrized(table):
    """A case per entry and beta, where a value is known."""
    return pytest.mark.parametrize(
        ("name", "beta", "expected"),
        [
            (name, beta, value)
            for name, (*_, values) in table.items()
            for beta, value in zip(BETAS, values, strict=True)
            if value is not None
        ],
    )


@parametrized(OF_REWARDS)
def test_losses_of_scaled_rewards_are_trls(name, beta, expected):
    function, options, _ = OF_REWARDS[name]
    rewards = implicit_reward(POLICY, anchor_logps=ANCHOR, beta=beta)
    loss, _ = function(rewards, **options)
    close(loss.mean(), expected)


OF_LOGPS = {
    "sigmoid": (dpo_loss, {}, (0.7065278, 0.7772720)),
    "sigmoid_norm": (
        length_normalized_dpo_loss,
        {"lengths": LENGTHS},
        (0.6974293, 0.7164462),
    ),
    "aot": (aot_loss, {}, (0.7064528, 0.7754009)),
    "aot, 0.1": (aot_loss, {"label_smoothing": 0.1}, (None, 0.7629009)),
}


@parametrized(OF_LOGPS)
def test_losses_of_logps_are_trls(name, beta, expected):
    function, options, _ = OF_LOGPS[name]
    loss, _ = function(POLICY, anchor_logps=ANCHOR, beta=beta, **options)
    close(loss.mean(), expected)


@pytest.mark.parametrize(("beta", "expected"), [(0.1, 25.9131966), (0.5, 1.2431953)])
def test_ipo_of_the_mean_log_ratio_of_tokens_is_trls(beta, expected):
    loss, _ = ipo_loss((POLICY - ANCHOR) / LENGTHS, beta=beta)
    close(loss.mean(), expected)


@pytest.mark.parametrize(("beta", "expected"), [(0.1, 53.1000023), (0.5, 3.0999999)])
def test_sppo_with_hard_labels_is_trls(beta, expected):
    loss, _ = sppo_loss(POLICY - ANCHOR, beta=beta)
    close(loss.mean(), expected)


def test_the_mean_over_all_tokens_of_chosen_responses_is_trls_sft():
    loss, _ = nll_loss(TOKENS[:, 0], where=MASK[:, 0])
    close(weighted_mean(loss, jnp.asarray(MASK[:, 0], jnp.float32)), 0.8285714)


OF_DIVERGENCES = {
    "forward_kl": (forward_kl_reward, {}, (0.7223088, 0.8906651)),
    "js_divergence": (jensen_shannon_reward, {}, (0.7015398, 0.7416878)),
    "alpha_divergence, 0.5": (
        alpha_divergence_reward,
        {"alpha": 0.5},
        (0.7123046, 0.8176268),
    ),
}


@parametrized(OF_DIVERGENCES)
def test_dpo_with_other_divergences_is_trls(name, beta, expected):
    reward, options, _ = OF_DIVERGENCES[name]
    rewards = reward(POLICY, anchor_logps=ANCHOR, beta=beta, **options)
    loss, _ = logistic_loss(rewards)
    close(loss.mean(), expected)


OF_LENGTH_WEIGHTS = {
    0.0: ((0.7035283, 0.7526380),),
    0.5: ((0.7049547, 0.7632132),),
    1.0: ((0.7065278, 0.7772720),),
}


@parametrized(OF_LENGTH_WEIGHTS)
def test_dpo_with_desensitized_lengths_is_trls(name, beta, expected):
    """Policy and reference alike, as where TRL scores the reference in the step."""
    weights = length_desensitized_weights(MASK, alpha=name)
    policy, anchor = (
        response_sum(x, where=MASK, weights=weights) for x in (TOKENS, ANCHOR_TOKENS)
    )
    loss, _ = dpo_loss(policy, anchor_logps=anchor, beta=beta)
    close(loss.mean(), expected)


def test_dpo_times_the_weights_of_wpo_is_trls():
    log_sum_sq = jnp.full_like(TOKENS, -0.5)
    weights = wpo_weights(TOKENS, log_sum_sq=log_sum_sq, where=MASK).prod(-1)
    loss, _ = dpo_loss(POLICY, anchor_logps=ANCHOR, beta=0.1)
    close((weights * loss).mean(), 0.4029683)


def test_the_fixed_input_tells_aot_from_dpo():
    """The two orders of its gaps differ; with one order AOT is DPO and shows nothing.

    And chosen and rejected log-ratios have different orders, for the unpaired form.
    """
    gaps = [x[:, 0] - x[:, 1] for x in fixed_logps()]
    log_ratios = (POLICY - ANCHOR).T
    for x, y in (gaps, log_ratios):
        assert np.argsort(x).tolist() != np.argsort(y).tolist()


# --- Tunix ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("smoothing", "expected"), [(0.0, 0.7530594), (0.3, 0.9254465)]
)
def test_dpo_with_either_smoothing_is_tunixs(smoothing, expected):
    """tests/sft/dpo/dpo_trainer_test.py: NumPy's legacy generator, seed 0."""
    generator = np.random.RandomState(0)
    policy, anchor = (
        jnp.asarray(generator.normal(0, 5, (8, 4)).sum(-1).reshape(2, 4).T, jnp.float32)
        for _ in range(2)
    )
    loss, _ = dpo_loss(policy, anchor_logps=anchor, beta=0.1, label_smoothing=smoothing)
    close(loss.mean(), expected)


def tunix_orpo_tokens():
    """tests/sft/dpo/dpo_trainer_test.py: 8 rows of 4 tokens, chosen first."""
    return -abs(np.random.RandomState(0).rand(8, 4).astype(np.float32))


def test_orpo_is_tunixs_where_responses_are_averaged():
    lengths = np.array([2, 3, 4, 1, 2, 3, 4, 1])
    sums = (tunix_orpo_tokens() * (np.arange(4) < lengths[:, None])).sum(-1)
    loss, metrics = orpo_loss(
        jnp.asarray(sums.reshape(2, 4).T),
        lengths=lengths.reshape(2, 4).T,
        lambda_=0.1,
    )
    np.testing.assert_allclose(loss.mean(), 0.671129, atol=1e-6)
    np.testing.assert_allclose(metrics["loss/nll"].mean(), 0.592339, atol=1e-6)
    np.testing.assert_allclose(metrics["loss/odds_ratio"].mean(), 0.7879, atol=5e-6)


def test_orpos_odds_of_sums_and_a_likelihood_with_the_prompt_are_tunixs():
    """Odds of summed logps are ours at lengths of 1; their NLL counts prompt tokens.

    In their case the prompt adds half of what the response has.
    """
    sums = jnp.asarray(tunix_orpo_tokens().sum(-1).reshape(2, 4).T)
    loss, metrics = orpo_loss(sums, lengths=np.ones((4, 2)), lambda_=0.1)
    odds, nll = metrics["loss/odds_ratio"].mean(), metrics["loss/nll"].mean()
    np.testing.assert_allclose(odds, 0.708663, atol=2e-5)  # they allow 1e-4
    np.testing.assert_allclose(1.5 * nll, 3.423784, rtol=1e-6)
    np.testing.assert_allclose(loss.mean() + 0.5 * nll, 3.494651, rtol=1e-5)


# --- torchtune ------------------------------------------------------------------------

TORCHTUNE_POLICY = jnp.array([[-0.5, -0.1], [-10.0, -30.0], [-1.0, -21.0]])
TORCHTUNE_ANCHOR = jnp.array([[-0.5, -0.1], [-10.1, -20.1], [-0.1, -0.1]])


def test_dpo_of_margins_0_1_and_2_is_torchtunes():
    """tests/torchtune/rlhf/loss/test_dpo_loss.py: -log sigmoid of these."""
    loss, metrics = dpo_loss(TORCHTUNE_POLICY, anchor_logps=TORCHTUNE_ANCHOR, beta=0.1)
    np.testing.assert_allclose(metrics["rewards/margin"], [0.0, 1.0, 2.0], atol=1e-6)
    np.testing.assert_allclose(loss, np.log1p(np.exp([-0.0, -1.0, -2.0])), rtol=2e-6)


def test_the_hinge_of_a_tenth_of_the_log_ratios_is_torchtunes_rso():
    """Its gamma scales the log-ratios, our beta; the margin is 1."""
    rewards = implicit_reward(TORCHTUNE_POLICY, anchor_logps=TORCHTUNE_ANCHOR, beta=0.1)
    loss, _ = hinge_loss(rewards, margin=1.0)
    np.testing.assert_allclose(loss, [1.0, 0.0, 0.0], atol=1e-6)


# --- InfiFPO: a row of its released data ----------------------------------------------

PIVOT = jnp.array([-16.809629 / 241, -35.141197 / 252])
SOURCES = jnp.array(
    [
        [-0.23787796, -0.26214793, -0.36793104],
        [-0.25559500, -0.26778769, -0.33684847],
    ]
)


def clipped():
    return anchors.clip_to_initial(SOURCES, initial_logps=PIVOT)


def fused_by(name):
    match name:
        case "max margin of clipped":
            return anchors.fuse_max_margin(clipped(), pivot_logps=PIVOT)
        case "max margin":
            return anchors.fuse_max_margin(SOURCES, pivot_logps=PIVOT)
        case "average of clipped":
            return anchors.fuse_average(clipped(), pivot_logps=PIVOT)
        case "confidence of clipped":
            return anchors.fuse_confidence(clipped(), pivot_logps=PIVOT, epsilon=1e-8)


@pytest.mark.parametrize(
    ("name", "fused", "margin", "expected"),
    [
        (
            "max margin of clipped",
            (-0.06974950, -0.33684847),
            -0.49349818,
            0.97003484,
        ),
        ("max margin", (-0.36793104, -0.33684847), 0.25195567, 0.57508366),
        (
            "average of clipped",
            (-0.06974950, -0.28674372),
            -0.36823632,
            0.89412018,
        ),
        (
            "confidence of clipped",
            (-0.06974950, -0.28260735),
            2.5 * (-0.28260735 + 0.13944919),  # the chosen ones cancel
            None,
        ),
    ],
)
def test_a_released_row_fuses_to_the_anchor_margin_and_loss_of_infifpo(
    name, fused, margin, expected
):
    """Mean logps over each model's own tokens, beta 2.5, the pivot as the policy."""
    got = fused_by(name)
    np.testing.assert_allclose(got, fused, rtol=1e-6)
    loss, metrics = dpo_loss(PIVOT, anchor_logps=got, beta=2.5)
    # A difference of numbers ten times as large, in float32.
    np.testing.assert_allclose(metrics["rewards/margin"], margin, rtol=5e-6)
    if expected is not None:
        close(loss, expected)


def test_confidence_weighs_the_sources_of_a_released_row_as_infifpo_does():
    fused = anchors.fuse_confidence(SOURCES, pivot_logps=PIVOT, epsilon=1e-8)[1]
    weights = np.array([0.36856, 0.35178, 0.27966])  # as written down: five digits
    np.testing.assert_allclose(fused, weights @ np.asarray(SOURCES[1]), rtol=2e-5)
