"""Our losses are TRL's, in value and in the gradient with respect to token logps.

In float64, on random ragged batches, some responses of which are empty. Where the two
differ by convention, the test converts, and its docstring says how. Losses of ours that
are not named here have no counterpart in TRL 1.16.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("trl")

from parity import trl_losses  # noqa: E402
from pref_jax.logps import (  # noqa: E402
    length_desensitized_weights,
    response_sum,
    wpo_weights,
)
from pref_jax.losses.batch_coupled import (  # noqa: E402
    aot_loss,
    aot_unpaired_loss,
    mean_kl,
)
from pref_jax.losses.pairwise import (  # noqa: E402
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
    rpo_loss,
    sppo_loss,
)
from pref_jax.losses.reference_free import (  # noqa: E402
    cpo_loss,
    orpo_loss,
    simpo_loss,
)
from pref_jax.losses.supervised import nll_loss  # noqa: E402
from pref_jax.losses.unpaired import bco_loss, kto_loss  # noqa: E402
from pref_jax.rewards import (  # noqa: E402
    alpha_divergence_reward,
    forward_kl_reward,
    implicit_reward,
    jensen_shannon_reward,
)
from pref_jax.train.step import weighted_mean  # noqa: E402

NUM_PAIRS, NUM_TOKENS = 16, 12
SCALES = (0.1, 1.0, 20.0)  # mean nats of a token; margins up to a few hundred
SEEDS = (0, 1)
both_betas = pytest.mark.parametrize("beta", [0.1, 0.5])


class Batch(NamedTuple):
    """Random pairs; the reference is the policy's equal in size."""

    policy: jax.Array
    anchor: jax.Array
    log_sum_sq: jax.Array
    mask: jax.Array

    @property
    def lengths(self):
        return self.mask.sum(-1)

    @property
    def sums(self):
        return response_sum(self.policy, where=self.mask)

    @property
    def anchor_sums(self):
        return response_sum(self.anchor, where=self.mask)

    @property
    def log_ratios(self):
        return self.sums - self.anchor_sums

    @property
    def means(self):
        return self.sums / jnp.maximum(self.lengths, 1)

    def rewards(self, beta):
        return implicit_reward(self.sums, anchor_logps=self.anchor_sums, beta=beta)


def draw(seed, scale, *, shortest=0):
    rng = np.random.default_rng([seed, int(10 * scale)])
    shape = (NUM_PAIRS, 2, NUM_TOKENS)
    lengths = rng.integers(shortest, NUM_TOKENS + 1, size=(*shape[:2], 1))
    logps = -scale * rng.exponential(size=(3, *shape))
    return Batch(*logps, mask=np.arange(NUM_TOKENS) < lengths)


def assert_same(ours, theirs, batches, *, rtol=1e-10, atol=1e-14, dtype=torch.float64):
    """Value and gradient by the policy's token logps are TRL's on each batch.

    Args:
      ours: of a `Batch` of jax arrays.
      theirs: of a `Batch` of torch tensors.
      batches: of NumPy arrays.
      rtol: of each element.
      atol: where a library takes 1 - sigmoid, what it leaves of a number near 0 is
        float64's rounding of 1.
      dtype: of TRL's computation.
    """

    @jax.jit
    @jax.value_and_grad
    def value_and_gradient(policy, batch):
        return ours(batch._replace(policy=policy))

    for i, batch in enumerate(batches):
        with jax.enable_x64(True):
            got = value_and_gradient(batch.policy, batch)
        tensors = [torch.tensor(x, dtype=dtype) for x in batch[:-1]]
        tensors[0].requires_grad_()
        value = theirs(Batch(*tensors, mask=torch.tensor(batch.mask)))
        value.backward()
        expected = value.item(), tensors[0].grad.numpy()
        for name, x, y in zip(("loss", "gradient"), got, expected, strict=True):
            assert np.isfinite(y).all()
            message = f"{name} of batch {i}"
            np.testing.assert_allclose(x, y, rtol, atol, err_msg=message)
        assert np.abs(expected[1]).max() > 1e-3 / NUM_PAIRS  # else nothing is tested
        assert not np.asarray(got[1])[~batch.mask].any()


# --- DPOTrainer -----------------------------------------------------------------------


def of_rewards(function, **options):
    return lambda batch, beta: function(batch.rewards(beta), **options)[0].mean()


def of_logps(function, **options):
    return lambda batch, beta: function(
        batch.sums, anchor_logps=batch.anchor_sums, beta=beta, **options
    )[0].mean()


def bco_of_pairs(batch, beta):
    rewards = batch.rewards(beta)
    desirable = jnp.broadcast_to(jnp.array([True, False]), rewards.shape)
    loss, _ = bco_loss(rewards, desirable=desirable, delta=0.0)
    return loss.sum(-1).mean()


def normalized(batch, beta):
    loss, _ = length_normalized_dpo_loss(
        batch.sums, anchor_logps=batch.anchor_sums, lengths=batch.lengths, beta=beta
    )
    return loss.mean()


def ipo_of_means(batch, beta):
    log_ratios = batch.log_ratios / jnp.maximum(batch.lengths, 1)
    return ipo_loss(log_ratios, beta=beta)[0].mean()


def mean_of_tokens(batch, beta):
    mask = batch.mask[:, 0]
    loss, _ = nll_loss(batch.policy[:, 0], where=mask)
    return weighted_mean(loss, mask.astype(loss.dtype))


DPO = {
    "sigmoid": of_rewards(logistic_loss),
    "hinge": of_rewards(hinge_loss, margin=1.0),
    "ipo": ipo_of_means,
    "nca_pair": of_rewards(nca_loss),
    "bco_pair": bco_of_pairs,
    "sppo_hard": lambda batch, beta: sppo_loss(batch.log_ratios, beta=beta)[0].mean(),
    "aot": of_logps(aot_loss),
    "aot_unpaired": of_rewards(aot_unpaired_loss),
    "apo_zero": of_rewards(apo_zero_loss),
    "apo_down": of_rewards(apo_down_loss),
    "discopop": of_rewards(discopop_loss, tau=0.05),
    "sft": mean_of_tokens,
    "sigmoid_norm": normalized,
}


@both_betas
@pytest.mark.parametrize("name", DPO)
def test_losses_of_pairs_are_those_of_trls_dpo_trainer(name, beta):
    """By convention.

    hinge: TRL's margin is 1; ours is an argument.
    ipo: TRL takes the mean over tokens of the log-ratio; ours takes what it is given.
    bco_pair: TRL has no shift (delta 0) and adds up the two responses of a pair.
    sppo_hard: TRL has no win rates but 1 and 0.
    aot, aot_unpaired: TRL returns the mean of sorted entries; ours are in the order of
      the batch.
    discopop: TRL's tau is 0.05 by default; ours is an argument.
    sft: the mean over all tokens of the batch, which here is a choice of weights.
    """
    assert_same(
        lambda batch: DPO[name](batch, beta),
        lambda batch: trl_losses.dpo(
            batch.policy, batch.anchor, batch.mask, beta=beta, loss_types=[name]
        ),
        [draw(seed, scale) for seed in SEEDS for scale in SCALES],
    )


SMOOTHED = {
    "robust": lambda e: of_rewards(robust_loss, flip_rate=e),
    "exo_pair": lambda e: of_rewards(exo_loss, label_smoothing=e),
    "aot": lambda e: of_logps(aot_loss, label_smoothing=e),
    "aot_unpaired": lambda e: of_rewards(aot_unpaired_loss, label_smoothing=e),
}


@both_betas
@pytest.mark.parametrize("smoothing", [0.01, 0.3])
@pytest.mark.parametrize("name", SMOOTHED)
def test_smoothed_losses_of_pairs_are_those_of_trls_dpo_trainer(name, smoothing, beta):
    """`robust` calls it `label_smoothing`; ours is `flip_rate`."""
    assert_same(
        lambda batch: SMOOTHED[name](smoothing)(batch, beta),
        lambda batch: trl_losses.dpo(
            batch.policy,
            batch.anchor,
            batch.mask,
            beta=beta,
            loss_types=[name],
            label_smoothing=smoothing,
        ),
        [draw(seed, scale) for seed in SEEDS for scale in SCALES],
        # TRL makes a float32 tensor of the smoothing of EXO, and the terms of its
        # gradient cancel.
        rtol=1e-6 if name == "exo_pair" else 1e-10,
        atol=1e-9 if name == "exo_pair" else 1e-14,
    )


def test_all_losses_of_trls_dpo_trainer_are_compared():
    assert {*DPO, *SMOOTHED} == {*trl_losses.DPO_LOSSES}


def test_sigmoid_with_smoothing_is_trls_cpo_trainer_as_its_dpo_trainer_leaves_it_out():
    """`DPOTrainer` takes `label_smoothing` and "sigmoid" does not use it; ours is cDPO,
    which is what `CPOTrainer` computes when it is given log-ratios.
    """
    batch = draw(0, 1.0)
    tensors = [torch.tensor(x) for x in (batch.policy, batch.anchor, batch.mask)]
    plain, smoothed = (
        trl_losses.dpo(*tensors, beta=0.5, label_smoothing=e).item() for e in (0.0, 0.3)
    )
    assert plain == smoothed
    assert_same(
        lambda batch: of_logps(dpo_loss, label_smoothing=0.3)(batch, 0.5),
        lambda batch: trl_losses.cpo(
            ((batch.policy - batch.anchor) * batch.mask).sum(-1),
            beta=0.5,
            label_smoothing=0.3,
        ),
        [draw(seed, scale) for seed in SEEDS for scale in SCALES],
    )


DIVERGENCES = {
    "forward_kl": (forward_kl_reward, {}, {}),
    "js_divergence": (jensen_shannon_reward, {}, {}),
    "alpha_divergence, 0.3": (
        alpha_divergence_reward,
        {"alpha": 0.3},
        {"f_alpha_divergence_coef": 0.3},
    ),
    "alpha_divergence, 0.5": (
        alpha_divergence_reward,
        {"alpha": 0.5},
        {"f_alpha_divergence_coef": 0.5},
    ),
}


@both_betas
@pytest.mark.parametrize("name", DIVERGENCES)
def test_dpo_with_another_divergence_is_trls(name, beta):
    """TRL's alpha is ours; that of arXiv:2309.16240 is 1 - alpha.

    Log-ratios stay below 40: beyond, ours goes on by the tangent.
    """
    function, options, their_options = DIVERGENCES[name]
    is_alpha = name.startswith("alpha")

    def ours(batch):
        rewards = function(
            batch.sums, anchor_logps=batch.anchor_sums, beta=beta, **options
        )
        return logistic_loss(rewards)[0].mean()

    def theirs(batch):
        return trl_losses.dpo(
            batch.policy,
            batch.anchor,
            batch.mask,
            beta=beta,
            f_divergence_type=name.partition(",")[0],
            **their_options,
        )

    assert_same(
        ours,
        theirs,
        [draw(seed, scale) for seed in SEEDS for scale in (0.1, 1.0)],
        # TRL takes the exponential of the alpha divergence in float32 and has no
        # float64: exp of a rounded argument near 10.
        rtol=2e-5 if is_alpha else 1e-10,
        atol=1e-7 if is_alpha else 1e-14,
        dtype=torch.float32 if is_alpha else torch.float64,
    )


def test_far_log_ratios_keep_a_gradient_where_trls_alpha_divergence_loses_it():
    """TRL cuts the exponent at 80, and its gradient; ours is a line from 40."""

    def batch(log_ratio):
        policy = np.zeros((1, 2, 1))
        policy[0, 0, 0] = log_ratio
        return policy, np.zeros_like(policy), np.ones((1, 2, 1), bool)

    policy, anchor, mask = batch(-170.0)  # exponent 85 at alpha 0.5
    leaf = torch.tensor(policy, dtype=torch.float32, requires_grad=True)
    loss = trl_losses.dpo(
        leaf,
        torch.tensor(anchor, dtype=torch.float32),
        torch.tensor(mask),
        beta=0.1,
        f_divergence_type="alpha_divergence",
    )
    loss.backward()
    assert not leaf.grad[0, 0].any()

    @jax.grad
    def gradient(logps):
        rewards = alpha_divergence_reward(
            logps, anchor_logps=jnp.zeros_like(logps), beta=0.1, alpha=0.5
        )
        return logistic_loss(rewards)[0].sum()

    ours = gradient(jnp.asarray(policy[..., 0], jnp.float32))
    assert np.isfinite(ours).all() and ours[0, 0] < 0


@both_betas
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_dpo_with_desensitized_lengths_is_trls(alpha, beta):
    """The reference is weighted like the policy, as where TRL scores it in the step.

    Precomputed sums, TRL's other way, have the weights only if they are put there.
    """

    def ours(batch):
        weights = length_desensitized_weights(batch.mask, alpha=alpha)
        policy, anchor = (
            response_sum(x, where=batch.mask, weights=weights)
            for x in (batch.policy, batch.anchor)
        )
        return dpo_loss(policy, anchor_logps=anchor, beta=beta)[0].mean()

    assert_same(
        ours,
        lambda batch: trl_losses.dpo(
            batch.policy, batch.anchor, batch.mask, beta=beta, ld_alpha=alpha
        ),
        [draw(seed, scale) for seed in SEEDS for scale in SCALES],
    )


@both_betas
@pytest.mark.parametrize("name", ["sigmoid", "apo_zero"])
def test_the_weights_of_wpo_are_trls(name, beta):
    """A pair's weight is the product of its responses', not clipped, as in TRL 1.16.

    With "hinge" TRL's step fails: it multiplies a ReLU's output in place.
    """
    function = {"sigmoid": logistic_loss, "apo_zero": apo_zero_loss}[name]

    def ours(batch):
        loss, _ = function(batch.rewards(beta))
        weights = wpo_weights(
            batch.policy, log_sum_sq=batch.log_sum_sq, where=batch.mask
        )
        return (weights.prod(-1) * loss).mean()

    assert_same(
        ours,
        lambda batch: trl_losses.dpo(
            batch.policy,
            batch.anchor,
            batch.mask,
            beta=beta,
            loss_types=[name],
            log_sum_sq=batch.log_sum_sq,
        ),
        [draw(seed, scale) for seed in SEEDS for scale in (0.1, 1.0)],
    )


@both_betas
def test_rpo_is_trls_sigmoid_and_sft_where_the_chosen_have_one_length(beta):
    """TRL's likelihood is a mean over the tokens of the batch, ours of each response.

    They part where chosen responses have several lengths: TRL's long ones weigh more.
    """
    alpha = 0.7

    def ours(batch):
        loss, _ = rpo_loss(
            batch.sums,
            anchor_logps=batch.anchor_sums,
            lengths=batch.lengths,
            beta=beta,
            alpha=alpha,
        )
        return loss.mean()

    def theirs(batch):
        return trl_losses.dpo(
            batch.policy,
            batch.anchor,
            batch.mask,
            beta=beta,
            loss_types=["sigmoid", "sft"],
            loss_weights=[1.0, alpha],
        )

    batches = [draw(seed, scale) for seed in SEEDS for scale in SCALES]
    for batch in batches:
        batch.mask[:, 0] = np.arange(NUM_TOKENS) < 7
    assert_same(ours, theirs, batches)


def test_sums_as_responses_of_one_token_have_the_same_loss_in_trl():
    batch = draw(0, 1.0)
    tensors = Batch(*map(torch.tensor, batch))
    by_token = trl_losses.dpo(tensors.policy, tensors.anchor, tensors.mask, beta=0.5)
    policy, anchor = (
        (x * tensors.mask).sum(-1) for x in (tensors.policy, tensors.anchor)
    )
    (policy, mask), (anchor, _) = (trl_losses.as_tokens(x) for x in (policy, anchor))
    by_sum = trl_losses.dpo(policy, anchor, mask, beta=0.5)
    torch.testing.assert_close(by_sum, by_token)


def test_discopop_is_finite_where_trls_overflows():
    """TRL multiplies exp(-h) by a sigmoid that is 0: in float32 from h = -89 on."""
    rewards = np.array([[-100.0, 0.0]], np.float32)
    policy, mask = trl_losses.as_tokens(torch.tensor(rewards))
    theirs = trl_losses.dpo(
        policy, torch.zeros_like(policy), mask, beta=1.0, loss_types=["discopop"]
    )
    assert torch.isnan(theirs)
    ours, _ = discopop_loss(jnp.asarray(rewards), tau=0.05)
    np.testing.assert_allclose(ours, [100.0])


# --- CPO, SimPO, ORPO -----------------------------------------------------------------


CPO = {
    "sigmoid": (
        lambda batch, beta: cpo_loss(batch.sums, beta=beta, alpha=0.0),
        {},
    ),
    "sigmoid, smoothed": (
        lambda batch, beta: cpo_loss(
            batch.sums, beta=beta, alpha=0.0, label_smoothing=0.3
        ),
        {"label_smoothing": 0.3},
    ),
    "hinge": (
        lambda batch, beta: hinge_loss(beta * batch.sums, margin=1.0),
        {},
    ),
    "ipo": (
        lambda batch, beta: ipo_loss(batch.means, beta=beta),
        {},
    ),
    "simpo": (
        lambda batch, beta: simpo_loss(
            batch.sums, lengths=batch.lengths, beta=beta, gamma=0.8
        ),
        {"simpo_gamma": 0.8},
    ),
    "simpo, smoothed": (
        lambda batch, beta: simpo_loss(
            batch.sums,
            lengths=batch.lengths,
            beta=beta,
            gamma=0.8,
            label_smoothing=0.3,
        ),
        {"simpo_gamma": 0.8, "label_smoothing": 0.3},
    ),
}


@pytest.mark.parametrize("beta", [0.1, 2.5])
@pytest.mark.parametrize("name", CPO)
def test_losses_without_a_reference_are_those_of_trls_cpo_trainer(name, beta):
    """The preference term. TRL's likelihood term is another: the mean over all tokens
    of the batch, prompts included, where ours is the sum over the chosen response.

    TRL divides gamma of SimPO by beta before beta multiplies it: ours, outside beta.
    """
    function, options = CPO[name]
    loss_type = name.partition(",")[0]

    def theirs(batch):
        logps = (batch.policy * batch.mask).sum(-1)
        if loss_type in ("ipo", "simpo"):  # as the trainer does
            logps = logps / batch.mask.sum(-1)
        return trl_losses.cpo(logps, beta=beta, loss_type=loss_type, **options)

    assert_same(
        lambda batch: function(batch, beta)[0].mean(),
        theirs,
        [draw(seed, scale, shortest=1) for seed in SEEDS for scale in SCALES],
    )


@both_betas
def test_cpo_adds_the_sum_of_the_chosen_response_to_trls_term(beta):
    """TRL's own term would be the mean over the batch's tokens."""

    def theirs(batch):
        logps = (batch.policy * batch.mask).sum(-1)
        return trl_losses.cpo(logps, beta=beta) - 0.7 * logps[:, 0].mean()

    assert_same(
        lambda batch: cpo_loss(batch.sums, beta=beta, alpha=0.7)[0].mean(),
        theirs,
        [draw(seed, scale) for seed in SEEDS for scale in SCALES],
    )


@pytest.mark.parametrize("weight", [0.1, 1.0])
def test_orpo_is_trls_odds_ratio_and_the_mean_logp_of_the_chosen(weight):
    """TRL's odds ratio; its likelihood is the mean over all tokens of the batch,
    prompts included, where ours is the mean over each chosen response.
    """

    def ours(batch):
        loss, _ = orpo_loss(batch.sums, lengths=batch.lengths, lambda_=weight)
        return loss.mean()

    def theirs(batch):
        means = (batch.policy * batch.mask).sum(-1) / batch.mask.sum(-1)
        return trl_losses.orpo_odds_ratio(means, beta=weight) - means[:, 0].mean()

    assert_same(
        ours,
        theirs,
        [draw(seed, scale, shortest=1) for seed in SEEDS for scale in SCALES],
        rtol=2e-5,  # TRL works in float32; 1 - exp(m) cancels where m is near 0
        atol=1e-7,
    )


def test_orpo_is_finite_for_a_certain_response_where_trls_is_not():
    """Ours takes mean logps of at most -1e-7 for the odds."""
    logps = np.array([[0.0, -1.0], [-1.0, 0.0]], np.float32)
    leaf = torch.tensor(logps, requires_grad=True)
    trl_losses.orpo_odds_ratio(leaf, beta=1.0).backward()
    assert not torch.isfinite(leaf.grad).all()

    def total(logps):
        return orpo_loss(logps, lengths=np.ones((2, 2)), lambda_=1.0)[0].sum()

    value, gradient = jax.value_and_grad(total)(jnp.asarray(logps))
    assert np.isfinite(value) and np.isfinite(gradient).all()


# --- KTO ------------------------------------------------------------------------------


def some_desirable(seed):
    return np.random.default_rng(seed).random((NUM_PAIRS, 2)) < 0.4


@both_betas
@pytest.mark.parametrize("shift", [0.2, -0.2], ids=["positive kl", "negative kl"])
@pytest.mark.parametrize("labels", ["mixed", "all desirable"])
def test_kto_is_trls_with_its_estimate_of_the_divergence(labels, shift, beta):
    """TRL's estimate is in nats and beta multiplies it in the loss; ours is scaled.

    Both clamp it at 0 and send no gradient through it, though it is of the policy. TRL
    estimates on each device and averages; ours is over the whole batch.
    """
    desirable = some_desirable(3) | (labels == "all desirable")
    weights = {"desirable_weight": 1.5, "undesirable_weight": 0.4}

    def ours(batch):
        policy, mask = (jnp.roll(x, 1, axis=0) for x in (batch.policy, batch.mask))
        anchor = jax.lax.stop_gradient(policy) - shift
        kl = mean_kl(Batch(policy, anchor, anchor, mask).rewards(beta))
        loss, _ = kto_loss(
            batch.rewards(beta),
            desirable=desirable,
            kl=kl,
            **weights,
        )
        return loss.mean()

    def theirs(batch):
        policy, mask = (x.roll(1, 0).flatten(0, 1) for x in (batch.policy, batch.mask))
        return trl_losses.kto(
            *(x.flatten(0, 1) for x in (batch.policy, batch.anchor, batch.mask)),
            desirable=torch.tensor(desirable).flatten(),
            beta=beta,
            mismatched=(policy, policy.detach() - shift, mask),
            **weights,
        )

    assert_same(ours, theirs, [draw(seed, s) for seed in SEEDS for s in SCALES])


@both_betas
def test_kto_without_a_divergence_is_trls_unpaired_apo_zero(beta):
    """With kl = 0; and `apo_zero_loss` is the sum of the two of a pair."""
    desirable = some_desirable(4)

    def ours(batch):
        loss, _ = kto_loss(batch.rewards(beta), desirable=desirable, kl=0.0)
        return loss.mean()

    def theirs(batch, desirable=desirable):
        return trl_losses.kto(
            *(x.flatten(0, 1) for x in (batch.policy, batch.anchor, batch.mask)),
            desirable=torch.tensor(desirable).flatten(),
            beta=beta,
            loss_type="apo_zero_unpaired",
        )

    batches = [draw(seed, scale) for seed in SEEDS for scale in SCALES]
    assert_same(
        ours,
        theirs,
        batches,
    )
    in_pairs = np.tile([True, False], (NUM_PAIRS, 1))
    assert_same(
        lambda batch: apo_zero_loss(batch.rewards(beta))[0].mean() / 2,
        lambda batch: theirs(batch, in_pairs),
        batches,
    )


# --- RewardTrainer --------------------------------------------------------------------


@pytest.mark.parametrize("has_margin", [False, True])
def test_the_logistic_loss_with_a_margin_is_that_of_trls_reward_trainer(has_margin):
    margin = np.random.default_rng(5).uniform(-1, 3, NUM_PAIRS)
    assert_same(
        lambda batch: logistic_loss(
            batch.sums, margin=jnp.asarray(margin) if has_margin else None
        )[0].mean(),
        lambda batch: trl_losses.reward_model(
            (batch.policy * batch.mask).sum(-1),
            margin=torch.tensor(margin) if has_margin else None,
        ),
        [draw(seed, scale) for seed in SEEDS for scale in SCALES],
    )
