"""Our Llama and DPO are torch's: layers, logits, logps, loss, gradient, one update.

The values under `golden/` were made by torch transformers (`parity/write_golden.py`,
which says how) and are only read here. `parity/test_llama_parity.py` runs these same
tests on values that torch makes on the spot.
"""

import dataclasses
import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from pref_jax import anchors, rewards
from pref_jax.data import sources
from pref_jax.logps import response_scores
from pref_jax.losses.pairwise import logistic_loss
from pref_jax.method import Method, objective, on_rewards
from pref_jax.models import pretrained
from pref_jax.models.decoder import LayerKind, Rotary, make_decoder
from pref_jax.train import sharding
from pref_jax.train.state import init_state
from pref_jax.train.step import make_train_step
from pref_jax.types import TokenGroup

GOLDEN = Path(__file__).parent / "golden"
CASES = ("llama_untied", "llama_tied")

# Of the largest entry of each tensor, since a small entry is a sum that cancels. Both
# sides are float32 and add in another order: up to 2e-6 was seen. The gradient of a
# norm's scale adds up all tokens, which cancel more: up to 6e-6.
TOLERANCE = 1e-5
GRADIENT_TOLERANCE = 3e-5


@dataclasses.dataclass
class Case:
    """What torch computed, and the same batch in packed rows."""

    folder: Path

    def __post_init__(self):
        self.values = dict(np.load(self.folder / "values.npz"))
        self.record = json.loads((self.folder / "record.json").read_text())
        self.config, self.params = pretrained.load(self.folder / "weights")
        self.model = make_decoder(self.config)
        scale = np.float32(self.record["reference_scale"])
        self.reference = jax.tree.map(lambda x: x * scale, self.params)
        self.batch = pack(self.values, rows_multiple=4)
        reward = functools.partial(rewards.sequence_reward, beta=self.record["beta"])
        self.method = Method(
            "dpo", anchors.fixed(), reward=reward, loss=on_rewards(logistic_loss)
        )

    def load(self, name):
        """A gradient, or the weights after a step, in our layout."""
        return pretrained.load(self.folder / name)[1]

    def in_order(self, values):
        """Values of the batch, [B, ...] with empty slots, in the order of the pairs."""
        filled = np.flatnonzero(self.batch.record >= 0)
        return np.asarray(values)[filled[np.argsort(self.batch.record[filled])]]


def pack(pairs, *, rows_multiple):
    """Ragged pairs, -1 in padding, as a `ResponseBatch` of a few full rows."""
    groups = [
        TokenGroup(
            prompt=prompt[prompt >= 0],
            responses=tuple(r[r >= 0] for r in responses),
            loss_masks=tuple(m[r >= 0] for r, m in zip(responses, masks, strict=True)),
            labels=(1.0, 0.0),
            record=i,
        )
        for i, (prompt, responses, masks) in enumerate(
            zip(pairs["prompt"], pairs["response"], pairs["mask"], strict=True)
        )
    ]
    batches = sources.evaluation_batches(
        groups,
        groups_per_step=len(groups),
        row_length=40,
        rows_multiple=rows_multiple,
    )
    return batches[0]


def relative_error(ours, theirs):
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert ours.shape == theirs.shape
    return np.abs(ours - theirs).max() / np.abs(theirs).max()


def assert_close(ours, theirs, name, tolerance=TOLERANCE):
    error = relative_error(ours, theirs)
    assert error < tolerance, f"{name}: relative error {error:.1e}"


def assert_trees_close(ours, theirs, tolerance=TOLERANCE):
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for (path, leaf), other in zip(
        jax.tree.leaves_with_path(ours), jax.tree.leaves(theirs), strict=True
    ):
        assert_close(leaf, other, jax.tree_util.keystr(path), tolerance)


@functools.cache
def jitted(config):
    """`hidden` and the scoring of a batch; compiled once for all tests of a config."""
    model = make_decoder(config)
    score = functools.partial(response_scores, model)
    return jax.jit(model.hidden), jax.jit(score)


def hidden_of_sequence(case, params):
    """[S, D] of the one sequence that fills a row alone."""
    tokens = case.values["sequence"][None]
    position = np.arange(tokens.size)[None]
    end = np.full_like(position, tokens.size)
    return jitted(case.config)[0](params, tokens, position, end)[0]


def logps(case, params, *, batch=None, **overrides):
    """f32[B, 2, T] in the order of the pairs."""
    _, score = jitted(dataclasses.replace(case.config, **overrides))
    return case.in_order(score(params, case.batch if batch is None else batch).logp)


@pytest.fixture(scope="module", params=CASES)
def case(request):
    return Case(GOLDEN / request.param)


def test_hidden_states_after_each_layer_are_torchs(case):
    expected = case.values["hidden"]
    assert len(expected) == case.config.num_layers
    for n in range(1, case.config.num_layers + 1):
        block = case.params["blocks"]["0"]
        # A layer that adds nothing leaves the state as it is.
        block = jax.tree.map(np.copy, block)
        block["attention"]["out"][n:] = block["mlp"]["down"][n:] = 0
        ours = hidden_of_sequence(case, case.params | {"blocks": {"0": block}})
        assert_close(ours, expected[n - 1], f"after layer {n}")


def test_logits_are_torchs(case):
    hidden = hidden_of_sequence(case, case.params)
    logits = hidden @ case.model.unembedding(case.params).T
    assert_close(logits, case.values["logits"], "logits")


@pytest.mark.parametrize("attention", ["xla", "blockwise"])
def test_token_logps_of_packed_rows_are_those_of_torchs_padded_ones(case, attention):
    groups_in_row = (case.batch.record >= 0).reshape(len(case.batch.tokens), -1).sum(1)
    assert max(groups_in_row) > 1, "groups share rows"
    for name, params in (("logps", case.params), ("reference_logps", case.reference)):
        ours = logps(case, params, attention=attention)
        np.testing.assert_array_equal(ours == 0, ~case.values["mask"])
        assert_close(ours, case.values[name], name)


def test_dpo_loss_of_each_pair_is_torchs(case):
    def score(model, params, batch):
        return jitted(case.config)[1](params, batch)

    method = dataclasses.replace(
        case.method, score=score, anchor=anchors.fixed(score=score)
    )
    loss, weight, metrics = objective(
        method, case.model, case.params, case.reference, case.batch
    )
    np.testing.assert_array_equal(weight, (case.batch.record >= 0).astype(np.float32))
    assert_close(case.in_order(loss), case.values["loss"], "loss")
    ours = [metrics[f"rewards/{name}"][0] for name in ("chosen", "rejected")]
    theirs = case.values["rewards"]
    assert_close(case.in_order(jnp.stack(ours, -1)), theirs, "rewards")
    accuracy = case.in_order(metrics["rewards/accuracy"][0])
    np.testing.assert_array_equal(accuracy, theirs[:, 0] > theirs[:, 1])
    assert set(accuracy) == {0.0, 1.0}, "pairs of both kinds"


def test_one_sgd_step_is_torchs_in_gradient_and_parameters(case):
    # On two or four devices (an odd vocabulary cannot be split), in two micro-batches.
    tensor = 1 if case.config.vocab_size % 2 else 2
    devices = jax.devices()[: 2 * tensor]
    mesh = sharding.make_mesh(data=1, fsdp=2, tensor=tensor, devices=devices)
    # Without any momentum its trace is the gradient itself.
    optimizer = optax.sgd(case.record["learning_rate"], momentum=0.0)
    state = init_state(
        case.params, optimizer, rng=jax.random.key(0), anchor=case.reference
    )
    step = make_train_step(case.method, case.model, optimizer, num_microbatches=2)
    with jax.set_mesh(mesh):
        axes = case.model.param_axes(case.params)
        shardings = sharding.state_shardings(mesh, axes, state, optimizer)
        step = sharding.CompiledStep(step, mesh, shardings)
        batch = sharding.place_batch(mesh, case.batch)
        state = jax.device_put(state, shardings)
        # It runs once: the time goes into making it quick.
        options = {"xla_backend_optimization_level": 0}
        arguments = step.arguments(state, batch)
        compiled = step.program.lower(*arguments).compile(compiler_options=options)
        state, outputs = compiled(*arguments)
    metrics = outputs["metrics"]
    assert_close(metrics["loss"], case.values["loss"].mean(), "mean loss")
    assert_close(metrics["grad_norm"], case.values["gradient_norm"], "gradient norm")
    gradient = optax.tree.get(state.opt_state, "trace")
    assert_trees_close(gradient, case.load("gradient"), GRADIENT_TOLERANCE)
    after = case.load("after_sgd")
    assert_trees_close(state.params, after)
    moved = jax.tree.map(relative_error, case.params, after)
    assert min(jax.tree.leaves(moved)) > 100 * TOLERANCE, "every parameter moves"


def with_attention(case, **changed):
    """Logps with some of the attention's parameters changed."""
    block = case.params["blocks"]["0"]
    block = block | {"attention": block["attention"] | changed}
    return logps(case, case.params | {"blocks": {"0": block}})


def heads_in_turn(case):
    """Query heads dealt out to the key heads in turn."""
    attention = case.params["blocks"]["0"]["attention"]
    order = np.arange(case.config.num_heads).reshape(2, -1).T.ravel()
    query, out = attention["query"][:, :, order], attention["out"][:, order]
    return with_attention(case, query=query, out=out)


def rotated_in_turn(case):
    """Rotary pairs (0, 1), (2, 3), ... in the place of the half-split ones."""
    attention = case.params["blocks"]["0"]["attention"]
    order = np.arange(case.config.head_dim).reshape(2, -1).T.ravel()
    changed = {name: attention[name][..., order] for name in ("query", "key")}
    return with_attention(case, **changed)


def with_batch(case, **fields):
    return logps(case, case.params, batch=dataclasses.replace(case.batch, **fields))


def end_of_group(case):
    """`end` with which a second response sees the first."""
    end = case.batch.end.copy()
    for b, starts in enumerate(case.batch.start):
        row = b // (len(case.batch.start) // len(end))
        end[row, starts[0] : starts[1]] = starts[1] + case.batch.length[b, 1] + 1
    return end


def position_by_index(case):
    """Positions that do not restart where a second response branches off."""
    shape = case.batch.tokens.shape
    return np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape)


WRONG = {
    "theta": lambda c: logps(c, c.params, period=(LayerKind(rotary=Rotary(1e4)),)),
    "eps": lambda c: logps(c, c.params, norm_eps=1e-5),
    "head order": heads_in_turn,
    "rotary order": rotated_in_turn,
    "position by index": lambda c: with_batch(c, position=position_by_index(c)),
    "end of the group": lambda c: with_batch(c, end=end_of_group(c)),
    "reference as policy": lambda c: logps(c, c.reference),
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_what_is_computed_otherwise_is_far_from_torch(case, wrong):
    assert relative_error(wrong(case), case.values["logps"]) > 1000 * TOLERANCE


def test_the_record_says_what_wrote_it(case):
    assert (GOLDEN.parents[1] / case.record["script"]).is_file()
    assert {"torch", "transformers"} <= set(case.record["versions"])
    assert case.record["date"] and case.record["after_commit"]
