"""Token losses and centred rewards are TRL's, in value and gradient, in float64."""

import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("trl")

from parity import trl_losses  # noqa: E402
from parity.agreement import assert_same  # noqa: E402
from pref_jax.losses.reward_models import reward_model_loss  # noqa: E402
from pref_jax.losses.supervised import dft_loss, nll_loss  # noqa: E402
from pref_jax.train.step import weighted_mean  # noqa: E402


@pytest.mark.parametrize("scale", [0.1, 1.0, 20.0])
@pytest.mark.parametrize(("loss_fn", "kind"), [(nll_loss, "nll"), (dft_loss, "dft")])
def test_the_token_mean_is_that_of_trls_sft_trainer(loss_fn, kind, scale):
    rng = np.random.default_rng(3)
    token_logps = -scale * rng.exponential(size=(6, 9))
    mask = np.arange(9) < rng.integers(1, 10, (6, 1))
    assert_same(
        lambda x: weighted_mean(loss_fn(x, where=mask)[0], jnp.asarray(mask, x.dtype)),
        lambda x: trl_losses.sft(x, torch.tensor(mask), loss_type=kind),
        token_logps,
    )


@pytest.mark.parametrize("has_margin", [False, True])
@pytest.mark.parametrize("centering", [0.01, 2.0])
def test_centred_rewards_are_those_of_trls_reward_trainer(centering, has_margin):
    rng = np.random.default_rng(4)
    margin = rng.uniform(-1, 3, 16) if has_margin else None
    assert_same(
        lambda x: reward_model_loss(x, centering=centering, margin=margin)[0].mean(),
        lambda x: trl_losses.reward_model(
            x,
            centering=centering,
            margin=torch.tensor(margin) if has_margin else None,
        ),
        rng.normal(size=(16, 2)),
    )
