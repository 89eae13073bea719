"""The decoder computes what torch computes, for every family of checkpoints.

The values under `golden/families/` were made by torch transformers
(`parity/write_family_golden.py`, which says how) and are only read here.
`parity/test_family_parity.py` runs these same tests on values that torch makes on the
spot.
"""

import dataclasses
import functools
import json
from pathlib import Path

import jax
import numpy as np
import pytest

import tiny_stage
from family_cases import FAMILY_CASES, LONG
from pref_jax.logps import response_scores
from pref_jax.models import attention as attention_lib
from pref_jax.models import pretrained
from pref_jax.models.decoder import Rotary, make_decoder
from pref_jax.numerics import soft_cap
from test_golden_llama import pack

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden" / "families"

# Absolute, on numbers of up to ten. Both sides are float32 and add in another order: up
# to 1e-5 was seen.
TOLERANCE = 1e-4
# Of the largest entry of each tensor, since a small entry is a sum that cancels. Up to
# 4e-5 was seen.
GRADIENT_TOLERANCE = 1e-4
# Nats. Eight bits of a state that three layers sharpen into logits of ten; up to 0.16
# was seen, with Mistral and Phi-3.
BFLOAT16_TOLERANCE = 0.3

quick_compiles = pytest.fixture(autouse=True, scope="module")(tiny_stage.quick_compiles)


@dataclasses.dataclass
class Case:
    """What torch computed, and the same batch in packed rows."""

    name: str
    folder: Path

    def __post_init__(self):
        self.values = dict(np.load(self.folder / "values.npz"))
        self.record = json.loads((self.folder / "record.json").read_text())
        self.config, self.params = self.load("weights")
        self.batch = pack(self.values, rows_multiple=1)

    def load(self, name):
        """The weights, or the gradient by them in our layout."""
        return pretrained.load(self.folder / name, max_positions=LONG.get(self.name))

    @property
    def weights(self):
        """Of the tokens of the batch, 0 in its empty slots."""
        record = self.batch.record
        return self.values["weights"][record] * (record >= 0)[:, None, None]

    def in_order(self, values):
        """Values of the batch, [B, ...] with empty slots, in the order of the pairs."""
        filled = np.flatnonzero(self.batch.record >= 0)
        return np.asarray(values)[filled[np.argsort(self.batch.record[filled])]]


@functools.cache
def golden(name):
    return Case(name, GOLDEN / name)


@pytest.fixture(scope="module", params=FAMILY_CASES)
def case(request):
    return golden(request.param)


model_of = functools.cache(make_decoder)


@functools.cache
def scores_of(config):
    """(params, batch) -> f32[B, K, T]."""
    model = model_of(config)
    return jax.jit(lambda *arguments: response_scores(model, *arguments).logp)


@functools.cache
def gradient_of(config):
    """(params, batch, weights) -> ((weighted sum, logps), its gradient)."""
    model = model_of(config)

    def weighted(params, batch, weights):
        logps = response_scores(model, params, batch).logp
        return (logps * weights).sum(), logps

    return jax.jit(jax.value_and_grad(weighted, has_aux=True))


def hidden_of_sequence(case, params, config):
    """[S, D] of the one sequence, which fills each row of a batch."""
    shape = case.batch.tokens.shape
    tokens, position = (
        np.broadcast_to(row, shape)
        for row in (case.values["sequence"], np.arange(shape[1]))
    )
    end = np.full_like(position, shape[1])
    # The models have most shapes in common: their operations compile once for all.
    with jax.disable_jit():
        return model_of(config).hidden(params, tokens, position, end)[0]


def logits_of_sequence(case, params, config):
    """[S, V]."""
    model = model_of(config)
    hidden = hidden_of_sequence(case, params, config)
    return soft_cap(hidden @ model.unembedding(params).T, model.logit_softcap)


def error(ours, theirs):
    """The largest difference."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert ours.shape == theirs.shape
    return np.abs(ours - theirs).max()


def assert_close(ours, theirs, name, tolerance=TOLERANCE):
    found = error(ours, theirs)
    assert found < tolerance, f"{name}: error {found:.1e}"


def with_silent_layers(config, params, first):
    """Parameters with which layers `first`, `first` + 1, ... add nothing."""
    params = jax.tree.map(np.copy, params)
    period = len(config.period)
    scanned = config.num_layers // period * period
    for layer in range(first, config.num_layers):
        if layer < scanned:
            block, index = params["blocks"][str(layer % period)], layer // period
        else:
            block, index = params["last_blocks"][str(layer - scanned)], ...
        for room, name in (("attention", "out"), ("mlp", "down")):
            for writer in (name, f"{name}_bias"):
                if writer in block[room]:
                    block[room][writer][index] = 0
    return params


def test_hidden_states_after_each_layer_are_torchs(case):
    expected = case.values["hidden"]
    assert len(expected) == case.config.num_layers
    for n, theirs in enumerate(expected, 1):
        params = with_silent_layers(case.config, case.params, n)
        ours = hidden_of_sequence(case, params, case.config)
        assert_close(ours, theirs, f"after layer {n}")


def test_logits_are_torchs(case):
    logits = logits_of_sequence(case, case.params, case.config)
    assert_close(logits, case.values["logits"], "logits")


def test_token_logps_of_packed_rows_and_their_gradient_are_torchs(case):
    groups_in_row = (case.batch.record >= 0).reshape(len(case.batch.tokens), -1).sum(1)
    assert max(groups_in_row) > 1, "groups share rows"
    (_, logps), gradient = gradient_of(case.config)(
        case.params, case.batch, case.weights
    )
    ours = case.in_order(logps)
    np.testing.assert_array_equal(ours == 0, ~case.values["mask"])
    assert_close(ours, case.values["logps"], "logps")
    _, expected = case.load("gradient")
    for (path, leaf), theirs in zip(
        jax.tree.leaves_with_path(gradient), jax.tree.leaves(expected), strict=True
    ):
        name, largest = jax.tree_util.keystr(path), np.abs(theirs).max()
        if "key_bias" in name and case.config.period[0].rotary is None:
            # It adds the same to all logits of a query, which changes nothing.
            assert largest < TOLERANCE
        else:
            assert largest > 0.01, f"{name} matters"
            assert_close(leaf / largest, theirs / largest, name, GRADIENT_TOLERANCE)


WINDOWED = ("mistral", "qwen2", "gemma2", "gemma3", "phi3")


@pytest.mark.parametrize("name", WINDOWED)
def test_blockwise_attention_is_the_dense_one_with_windows_and_caps(name, monkeypatch):
    blocks = functools.partial(attention_lib.blockwise_attention, block=8)
    monkeypatch.setitem(attention_lib.IMPLEMENTATIONS, "blockwise", blocks)
    case = golden(name)
    config = dataclasses.replace(case.config, attention="blockwise")
    # Not from the cache, which other tests share: the blocks are smaller here.
    logps = scores_of.__wrapped__(config)(case.params, case.batch)
    assert_close(case.in_order(logps), case.values["logps"], "logps")


def test_bfloat16_stays_near_float32(case):
    config = dataclasses.replace(case.config, dtype="bfloat16")
    logps = case.in_order(scores_of(config)(case.params, case.batch))
    assert_close(logps, case.values["logps"], "logps", BFLOAT16_TOLERANCE)
    assert error(logps, case.values["logps"]) > 10 * TOLERANCE, "it is bfloat16"


# --- what must be seen ----------------------------------------------------------------


def with_kinds(config, **fields):
    """A config whose layers all differ in these fields from what they were."""
    kinds = (dataclasses.replace(kind, **fields) for kind in config.period)
    return dataclasses.replace(config, period=tuple(kinds))


def with_rotary(config, **fields):
    """A config whose rotary embeddings all differ in these fields."""
    period = tuple(
        dataclasses.replace(kind, rotary=dataclasses.replace(kind.rotary, **fields))
        for kind in config.period
    )
    return dataclasses.replace(config, period=period)


def with_scaling(config, **fields):
    scaling = dataclasses.replace(config.period[0].rotary.scaling, **fields)
    return with_rotary(config, scaling=scaling)


def replacing(**fields):
    return lambda config: dataclasses.replace(config, **fields)


GEMMAS = ("gemma", "gemma2", "gemma3")
WRONG = {
    "no window": (WINDOWED, lambda c: with_kinds(c, window=None)),
    "window one shorter": (WINDOWED, lambda c: with_kinds(c, window=5)),
    "layers in another order": (
        ("gemma2", "gemma3"),
        lambda c: dataclasses.replace(c, period=c.period[::-1]),
    ),
    "theta": (("qwen3", "pythia"), lambda c: with_rotary(c, theta=1e4)),
    "no rope scaling": (
        ("llama3", "gemma3", "phi4_mini"),
        lambda c: with_rotary(c, scaling=None),
    ),
    "one rope for all layers": (
        ("gemma3",),
        lambda c: with_kinds(c, rotary=c.period[0].rotary),
    ),
    "short factors": (("phi4_mini",), lambda c: with_scaling(c, is_long=False)),
    "amplitude": (("phi4_mini",), lambda c: with_scaling(c, amplitude=1.0)),
    "all entries turn": (
        ("phi3", "pythia"),
        lambda c: with_rotary(c, fraction=1.0),
    ),
    "no positions": (
        ("llama2", "gpt_neox_in_turn"),
        lambda c: with_kinds(c, rotary=None),
    ),
    "rope beside learned positions": (
        ("gpt2",),
        lambda c: with_kinds(c, rotary=Rotary()),
    ),
    "no cap of attention": (("gemma2",), replacing(attention_softcap=None)),
    "no cap of the logits": (("gemma2", "gemma3"), replacing(logit_softcap=None)),
    "scale of attention": (("gemma2", "gemma3"), replacing(attention_scale=None)),
    "offset of the norms": (GEMMAS, replacing(norm_offset=0.0)),
    "scale of the embedding": (GEMMAS, replacing(embedding_scale=1.0)),
    "no norm of queries and keys": (
        ("qwen3", "gemma3", "olmo2"),
        replacing(qk_norm="none"),
    ),
    "parallel or in turn": (
        ("pythia", "gpt_neox_in_turn"),
        lambda c: dataclasses.replace(c, parallel=not c.parallel),
    ),
    "eps": (("mistral_small", "gpt2"), replacing(norm_eps=1e-5)),
    "activation": (("pythia", "gemma"), replacing(activation="silu")),
}


def without_qk_norms(params):
    """As the decoder without such norms takes them."""
    return {
        name: without_qk_norms(leaf) if isinstance(leaf, dict) else leaf
        for name, leaf in params.items()
        if name not in ("query_norm", "key_norm")
    }


@pytest.mark.parametrize(
    ("name", "wrong"), [(n, wrong) for wrong in WRONG for n in WRONG[wrong][0]]
)
def test_what_is_computed_otherwise_is_far_from_torch(name, wrong):
    case = golden(name)
    config = WRONG[wrong][1](case.config)
    params = case.params
    if config.qk_norm == "none":
        params = without_qk_norms(params)
    logits = logits_of_sequence(case, params, config)
    assert error(logits, case.values["logits"]) > 100 * TOLERANCE


@pytest.mark.parametrize("name", WINDOWED)
def test_a_window_counts_positions_and_not_places_in_the_row(name, monkeypatch):
    def by_place(query, key, value, position, end, **options):
        place = np.broadcast_to(np.arange(position.shape[1]), position.shape)
        return attention_lib.xla_attention(query, key, value, place, end, **options)

    monkeypatch.setitem(attention_lib.IMPLEMENTATIONS, "xla", by_place)
    case = golden(name)
    config = dataclasses.replace(case.config, attention="xla")
    logps = scores_of.__wrapped__(config)(case.params, case.batch)
    assert error(case.in_order(logps), case.values["logps"]) > 100 * TOLERANCE


def test_texts_are_longer_than_windows_and_than_a_model_before_its_extension(case):
    num_prompt = (case.values["prompt"] >= 0).sum(1)
    num_response = (case.values["response"] >= 0).sum(-1)
    for kind in case.config.period:
        if kind.window is not None:
            assert num_prompt.max() > kind.window
        if case.name in LONG:
            assert kind.rotary.scaling.is_long
            longest = (num_prompt[:, None] + num_response).max()
            assert longest > kind.rotary.scaling.old_positions


def test_the_record_says_what_wrote_it(case):
    assert (ROOT / case.record["script"]).is_file()
    assert {"torch", "transformers"} <= set(case.record["versions"])
    assert case.record["date"] and case.record["after_commit"]
