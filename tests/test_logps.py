"""Scoring: rows against the padded layout and float64, chunks, memory, devices."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import fixtures
import oracles
from pref_jax import axes, logps
from pref_jax.models import attention
from pref_jax.models.decoder import make_decoder
from pref_jax.train import sharding

# --- rows = the padded layout ---------------------------------------------------------


WANT = logps.STATISTICS
TOLERANCE = 2e-5  # logps reach -10; float32 keeps 1e-6 of that, through three layers


@dataclasses.dataclass(frozen=True)
class Packed:
    """Groups, their rows, and what the padded layout and the oracle say of them."""

    groups: list
    batch: object
    scores: object
    padded: list
    oracle: list

    def error(self, batch, *, k=None, score=None):
        """Largest difference from the padded layout, of response k or of all."""
        score = score or fixtures.scorer(WANT)
        logp = score(fixtures.random_params(0), batch).logp
        got = fixtures.by_response(logp, batch, self.groups)
        masks = fixtures.loss_masks(self.groups)
        num = len(self.groups[0].responses)
        return max(
            np.abs(x - y)[mask].max()
            for i, (x, y, mask) in enumerate(zip(got, self.padded, masks, strict=True))
            if k is None or i % num == k
        )


@functools.cache
def packed_groups(num_responses: int) -> Packed:
    params = fixtures.random_params(0)
    groups = fixtures.random_groups(num_responses, 7, num_responses, prompt=(1, 5))
    batch = fixtures.pack_all(groups, 48, rows_multiple=3, spare_groups=1)
    weights = fixtures.oracle_weights(params)
    oracle = [
        oracles.response_stats(weights, group.prompt, response, **fixtures.ORACLE)
        for group in groups
        for response in group.responses
    ]
    scores = fixtures.scorer(WANT)(params, batch)
    padded = fixtures.padded_logps(params, groups)
    return Packed(groups, batch, scores, padded, oracle)


@pytest.fixture(params=[1, 2, 3], ids="K={}".format)
def packed(request) -> Packed:
    return packed_groups(request.param)


@pytest.fixture
def packed_list() -> Packed:
    """Three responses to a prompt: two branches that a control can spoil."""
    return packed_groups(3)


def test_the_rows_of_these_tests_hold_several_groups_and_empty_slots(packed):
    valid = packed.batch.valid.all(axis=-1).reshape(len(packed.batch.tokens), -1)
    assert valid.sum() == 7
    assert valid.sum(axis=1).max() >= 2
    assert not valid.all(axis=1).any()
    lengths = {len(group.prompt) for group in packed.groups}
    assert min(lengths) == 1 and max(lengths) == 5


def test_packed_rows_equal_the_padded_layout_per_token(packed):
    assert packed.error(packed.batch) < TOLERANCE


def test_packed_rows_equal_the_oracle_for_every_statistic(packed):
    masks = fixtures.loss_masks(packed.groups)
    for name in WANT:
        got = fixtures.by_response(
            getattr(packed.scores, name), packed.batch, packed.groups
        )
        for values, oracle, mask in zip(got, packed.oracle, masks, strict=True):
            expected = np.where(mask, [stats[name] for stats in oracle], 0.0)
            np.testing.assert_allclose(values, expected, rtol=1e-5, atol=TOLERANCE)


def test_scores_are_zero_outside_the_mask_and_in_empty_slots(packed):
    logp = np.asarray(packed.scores.logp)
    assert (logp[~packed.batch.loss_mask] == 0).all()
    assert (logp[packed.batch.loss_mask] < 0).all()


def test_what_padding_holds_changes_nothing(packed):
    """Ids in padding, and targets that nobody scores, are free."""
    batch = packed.batch
    used = np.zeros(batch.tokens.shape, bool)
    per_row = len(batch.valid) // len(batch.tokens)
    for b, k in zip(*np.nonzero(batch.valid), strict=True):
        used[b // per_row, : batch.start[b, k] + batch.length[b, k] + 1] = True
    scored = np.zeros_like(used)
    for row, index in zip(scored, batch.predict, strict=True):
        row[index[index >= 0]] = True
    other = dataclasses.replace(
        batch,
        tokens=np.where(used, batch.tokens, 5),
        targets=np.where(scored, batch.targets, 6),
    )
    after = fixtures.scorer(WANT)(fixtures.random_params(0), other)
    jax.tree.map(np.testing.assert_array_equal, packed.scores, after)


def test_control_positions_that_do_not_restart_are_noticed(packed_list):
    """Rotary angles are relative: a first branch keeps them, a later one does not."""
    batch = packed_list.batch
    index = np.arange(batch.tokens.shape[1], dtype=np.int32)
    position = np.broadcast_to(index, batch.tokens.shape)
    wrong = dataclasses.replace(batch, position=position)
    assert packed_list.error(wrong, k=0) < 1e-4
    assert min(packed_list.error(wrong, k=k) for k in (1, 2)) > 0.1


def test_control_branches_that_end_with_their_group_are_noticed(packed_list):
    batch = packed_list.batch
    end = batch.end.copy()
    per_row = len(batch.valid) // len(end)
    for b in np.flatnonzero(batch.valid.all(-1)):
        group_end = batch.start[b, -1] + batch.length[b, -1] + 1
        end[b // per_row, batch.start[b, 0] : group_end] = group_end
    wrong = dataclasses.replace(batch, end=end)
    assert packed_list.error(wrong, k=0) < TOLERANCE
    assert min(packed_list.error(wrong, k=k) for k in (1, 2)) > 0.1


def test_control_a_window_by_index_is_noticed(packed_list, monkeypatch):
    def by_index(query, key, value, position, end, **kwargs):
        index = jnp.broadcast_to(jnp.arange(position.shape[1]), position.shape)
        return attention.xla_attention(query, key, value, index, end, **kwargs)

    monkeypatch.setitem(attention.IMPLEMENTATIONS, "xla", by_index)
    model = make_decoder(fixtures.CONFIG)
    score = jax.jit(functools.partial(logps.response_scores, model))
    error = functools.partial(packed_list.error, packed_list.batch, score=score)
    assert error(k=0) < TOLERANCE
    assert min(error(k=k) for k in (1, 2)) > 0.1


# --- chunks ---------------------------------------------------------------------------

G, L, D, V, P = 3, 11, 6, 37, 9


@pytest.fixture(scope="module")
def states():
    """hidden, unembedding, targets, and a predict with rows of 9, 5 and 0 positions."""
    rng = np.random.default_rng(0)
    hidden = rng.standard_normal((G, L, D)).astype(np.float32)
    unembedding = rng.standard_normal((V, D)).astype(np.float32)
    targets = rng.integers(0, V, (G, L)).astype(np.int32)
    predict = np.full((G, P), -1, np.int32)
    for g, num in enumerate((P, 5, 0)):
        predict[g, :num] = np.sort(rng.choice(L, num, replace=False))
    return hidden, unembedding, targets, predict


def plain_stats(hidden, unembedding, targets, predict):
    """All logits at once, and no chunk: what `token_stats` must equal."""
    logits = jnp.einsum("gld,vd->glv", hidden, unembedding)
    p, logp = jax.nn.softmax(logits), jax.nn.log_softmax(logits)
    at = targets[..., None]
    stats = {
        "logp": jnp.take_along_axis(logp, at, -1)[..., 0],
        "logsumexp": jnp.log(jnp.exp(logits).sum(-1)),
        "chosen_logit": jnp.take_along_axis(logits, at, -1)[..., 0],
        "entropy": -(p * logp).sum(-1),
        "log_sum_sq": jnp.log((p**2).sum(-1)),
    }
    index = jnp.maximum(predict, 0)
    return {
        name: jnp.where(predict >= 0, jnp.take_along_axis(x, index, 1), 0.0)
        for name, x in stats.items()
    }


def mixed(stats):
    """One number in which every statistic at every position has its own weight."""
    weights = np.random.default_rng(1).standard_normal((len(stats), G, P))
    terms = zip(weights.astype(np.float32), sorted(stats), strict=True)
    return sum((w * stats[name]).sum() for w, name in terms)


@pytest.fixture(scope="module")
def plain_gradient(states):
    hidden, unembedding, targets, predict = states

    def plain(hidden, unembedding):
        stats = plain_stats(hidden, unembedding, targets, predict)
        return mixed(stats), stats

    return jax.jit(jax.value_and_grad(plain, argnums=(0, 1), has_aux=True))(
        hidden, unembedding
    )


@pytest.mark.parametrize("chunk", [None, 1, 4])
def test_chunked_statistics_equal_plain_ones_in_value_and_gradient(
    states, plain_gradient, chunk
):
    hidden, unembedding, targets, predict = states

    def chunked(hidden, unembedding):
        stats = logps.token_stats(
            hidden, unembedding, targets, predict, want=logps.STATISTICS, chunk=chunk
        )
        return mixed(stats), stats

    got = jax.jit(jax.value_and_grad(chunked, argnums=(0, 1), has_aux=True))(
        hidden, unembedding
    )
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5),
        got,
        plain_gradient,
    )


@pytest.mark.parametrize("chunk", [None, 4])
def test_statistics_of_capped_logits_are_the_oracles_and_so_is_the_gradient(
    states, chunk
):
    hidden, unembedding, targets, predict = states
    cap = 1.5

    def ours(hidden, unembedding):
        arrays = (hidden, unembedding, targets, predict)
        stats = logps.token_stats(
            *arrays, want=logps.STATISTICS, chunk=chunk, softcap=cap
        )
        return mixed(stats), stats

    both = jax.value_and_grad(ours, argnums=(0, 1), has_aux=True)
    (_, stats), grads = jax.jit(both)(hidden, unembedding)
    wide = [x.astype(np.float64) for x in (hidden, unembedding)]
    for g, p in zip(*np.nonzero(predict >= 0), strict=True):
        i = predict[g, p]
        logits = oracles.soft_cap(wide[1] @ wide[0][g, i], cap)
        for name, value in oracles.token_stats(logits, targets[g, i]).items():
            assert stats[name][g, p] == pytest.approx(value, rel=1e-5, abs=1e-5)
    # Along one direction of both, by differences.
    rng = np.random.default_rng(0)
    steps = [1e-2 * rng.standard_normal(x.shape).astype("float32") for x in wide]
    ends = [
        ours(hidden + sign * steps[0], unembedding + sign * steps[1])[0]
        for sign in (1, -1)
    ]
    slope = sum(np.vdot(g, s) for g, s in zip(grads, steps, strict=True))
    assert float(ends[0] - ends[1]) / 2 == pytest.approx(float(slope), rel=2e-2)


def test_a_statistic_asked_for_alone_is_the_oracles(states):
    hidden, unembedding, targets, predict = states
    alone = jax.jit(
        lambda *arrays: [
            logps.token_stats(*arrays, want=(name,), chunk=4)
            for name in logps.STATISTICS
        ]
    )(*states)
    for name, stats in zip(logps.STATISTICS, alone, strict=True):
        assert set(stats) == {name}
        expected = np.zeros((G, P))
        for g, p in zip(*np.nonzero(predict >= 0), strict=True):
            i = predict[g, p]
            logits = unembedding.astype(np.float64) @ hidden[g, i].astype(np.float64)
            expected[g, p] = oracles.token_stats(logits, targets[g, i])[name]
        np.testing.assert_allclose(stats[name], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("chunk", [150, 4001])
def test_bfloat16_states_are_reduced_in_float32(chunk):
    """A bfloat16 log-softmax over 4001 tokens would be off by more than 1e-2."""
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.standard_normal((1, 7, 16)), jnp.bfloat16)
    unembedding = jnp.asarray(0.5 * rng.standard_normal((4001, 16)), jnp.bfloat16)
    targets = rng.integers(0, 4001, (1, 7))
    predict = np.arange(7)[None]
    stats = jax.jit(
        functools.partial(logps.token_stats, want=logps.STATISTICS, chunk=chunk)
    )(hidden, unembedding, targets, predict)
    wide = np.asarray(unembedding, np.float64)
    for p in range(7):
        logits = wide @ np.asarray(hidden[0, p], np.float64)
        expected = oracles.token_stats(logits, targets[0, p])
        for name, value in expected.items():
            assert stats[name].dtype == jnp.float32
            assert stats[name][0, p] == pytest.approx(value, abs=1e-5, rel=1e-5), name


def test_float32_weights_meet_bfloat16_states_in_bfloat16():
    """Matrix products run in the model's dtype, not in that of the master weights."""
    hidden = jnp.full((1, 1, 2), 1.0, jnp.bfloat16)
    unembedding = jnp.array([[1.0 + 2**-10, 0.0], [0.0, 1.0]])  # rounds to 1
    target, predict = jnp.zeros((1, 1), jnp.int32), jnp.zeros((1, 1), jnp.int32)
    score = jax.jit(functools.partial(logps.token_stats, want=("chosen_logit",)))
    stats = score(hidden, unembedding, target, predict)
    assert float(stats["chosen_logit"][0, 0]) == 1.0


@pytest.mark.parametrize("chunk", [1, 2])
def test_bfloat16_gradients_of_many_tokens_add_up_in_float32(chunk):
    """512 times +-1/2, as both entries are as likely; bfloat16 stops at 128."""
    hidden, targets = jnp.ones((1, 512, 1), jnp.bfloat16), jnp.zeros((1, 512), int)
    predict = jnp.arange(512)[None]

    def total(unembedding):
        stats = logps.token_stats(hidden, unembedding, targets, predict, chunk=chunk)
        return stats["logp"].sum()

    gradient = jax.jit(jax.grad(total))(jnp.zeros((2, 1)))
    assert gradient.tolist() == [[256.0], [-256.0]]


def test_nothing_is_computed_twice_if_one_chunk_is_enough(states):
    def total(hidden, chunk):
        return logps.token_stats(hidden, *states[1:], chunk=chunk)["logp"].sum()

    def program(chunk):
        return str(jax.make_jaxpr(jax.grad(total), static_argnums=1)(states[0], chunk))

    assert "scan" in program(V - 1)
    assert "scan" not in program(V)


@pytest.mark.parametrize(
    ("elements", "fewest", "chunk"),
    [
        (1, 1, 1),
        (3 * P * G, 1, 3),
        (3 * P * G - 1, 1, 2),
        (99 * P * G, 1, V),
        (1, 2, 2),
        (3 * P * G, 2, 3),
        (1, V, V),
    ],
)
def test_a_chunk_is_as_large_as_its_logits_may_be(
    states, monkeypatch, elements, fewest, chunk
):
    monkeypatch.setattr(logps, "_CHUNK_ELEMENTS", elements)
    monkeypatch.setattr(logps, "_CHUNK_ENTRIES", fewest)
    monkeypatch.setattr(logps, "_LANES", 1)

    def program(**options):
        return str(jax.make_jaxpr(lambda *x: logps.token_stats(*x, **options))(*states))

    assert program() == program(chunk=chunk) != program(chunk=chunk - 1 or V)


def test_default_chunks_are_alike_and_of_whole_lanes():
    chunk = logps._default_chunk(1000, 50257)
    assert chunk == 2176 and chunk % 128 == 0
    assert -(-50257 // chunk) == -(-50257 // (2**21 // 1000)) == 24


def test_a_far_off_token_has_a_finite_gradient(states):
    _, _, targets, predict = states

    def total(hidden, unembedding):
        stats = logps.token_stats(
            hidden, unembedding, targets, predict, want=logps.STATISTICS, chunk=4
        )
        return sum(x.sum() for x in stats.values())

    hidden = np.full((G, L, D), 100.0, np.float32)
    unembedding = np.zeros((V, D), np.float32)
    unembedding[0], unembedding[1:] = 16.0, -16.0  # logits of +-9600
    value, grads = jax.jit(jax.value_and_grad(total, argnums=(0, 1)))(
        hidden, unembedding
    )
    assert np.isfinite(value)
    assert all(np.isfinite(grad).all() for grad in grads)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"want": ("logp", "perplexity")}, "`want` may name .*entropy.*; got perplex"),
        ({"unembedding": np.zeros((V, D + 1))}, r"one width; got f32\[3, 11, 6\] and"),
        ({"unembedding": np.zeros((V, D - 1))}, r"one width; got f32\[3, 11, 6\] and"),
        ({"targets": np.zeros((G, L - 1), np.int32)}, "`targets` needs the shape of"),
    ],
)
def test_wrong_arguments_are_named(states, change, message):
    names = ("hidden", "unembedding", "targets", "predict")
    arguments = dict(zip(names, states, strict=True)) | change
    with pytest.raises(ValueError, match=message):
        logps.token_stats(**arguments)


# --- memory ---------------------------------------------------------------------------


def temporary_bytes(function, *shapes) -> int:
    compiled = jax.jit(function).lower(*shapes).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def scoring_bytes(
    length, *, rows=2, width=16, vocabulary=8192, chunk, want=("logp",)
) -> int:
    """Peak of the forward and backward pass of `token_stats`, beside its arguments."""

    def value(hidden, unembedding, targets, predict):
        stats = logps.token_stats(
            hidden, unembedding, targets, predict, want=want, chunk=chunk
        )
        return sum(x.sum() for x in stats.values())

    def shape(*sizes, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(sizes, dtype)

    integers = shape(rows, length, dtype=jnp.int32)
    return temporary_bytes(
        jax.value_and_grad(value, argnums=(0, 1)),
        shape(rows, length, width),
        shape(vocabulary, width),
        integers,
        integers,
    )


@pytest.mark.parametrize("want", [("logp",), logps.STATISTICS], ids=len)
def test_no_buffer_of_all_logits_exists(want):
    all_logits = 2 * 1024 * 8192 * 4
    assert scoring_bytes(1024, chunk=32, want=want) < all_logits / 4
    assert scoring_bytes(1024, chunk=8192, want=want) >= all_logits  # the control


def test_the_default_chunk_is_that_of_a_device():
    """On a mesh the rows and the vocabulary of one device count, not those of all."""

    def loops(num_rows, num_entries):
        integers = jnp.zeros((num_rows, 4096), jnp.int32)
        states = [jnp.zeros((num_rows, 4096, 2)), jnp.zeros((num_entries, 2))]
        program = str(jax.make_jaxpr(logps.token_stats)(*states, integers, integers))
        return re.findall(r"\blength=(\d+)\b", program)

    alone = loops(2, 2**14)
    with jax.set_mesh(sharding.make_mesh(fsdp=2, tensor=2)):
        assert loops(8, 2**15) == alone == ["16"]


def test_the_default_chunk_bounds_the_logits():
    all_logits = 4 * 4096 * 32768 * 4  # 2 GiB; a chunk has 16 million logits
    assert scoring_bytes(4096, rows=4, vocabulary=32768, chunk=None) < all_logits / 8


def test_scoring_memory_does_not_grow_with_the_vocabulary_but_by_its_gradient():
    small, large = (
        scoring_bytes(1024, vocabulary=v, chunk=1024) for v in (2**15, 2**17)
    )
    gradient = (2**17 - 2**15) * 16 * 4
    assert large - small <= 2.1 * gradient


def test_scoring_memory_is_linear_in_the_row_length():
    short, middle, long = (scoring_bytes(n, chunk=64) for n in (2048, 4096, 8192))
    assert long - middle == pytest.approx(2 * (middle - short), rel=0.1)
    assert long < 4 * short


# --- devices --------------------------------------------------------------------------

COLLECTIVES = re.compile(
    r"\b(all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)"
    r"(?:-start)?\("
)


def collectives(hlo: str) -> tuple[list[str], list[str]]:
    """Collectives of a compiled module: (inside loop bodies, everywhere)."""
    computations, name = {}, None
    for line in hlo.splitlines():
        header = re.match(r"(?:ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$", line)
        if header:
            name = header[1]
            computations[name] = []
        elif name and line.strip() != "}":
            computations[name].append(line)
    loops = re.findall(r"\bwhile\(.*?condition=%?([\w.\-]+), body=%?([\w.\-]+)", hlo)
    todo, reached = [name for pair in loops for name in pair], set()
    while todo:
        name = todo.pop()
        if name not in reached:
            reached.add(name)
            text = "\n".join(computations[name])
            todo += [x for x in re.findall(r"%([\w.\-]+)", text) if x in computations]
    assert loops

    def found(names):
        return [
            match[0]
            for name in names
            for line in computations[name]
            for match in COLLECTIVES.finditer(line)
        ]

    return found(reached), found(computations)


def on_mesh(mesh, states):
    """The arguments of `token_stats` where a run has them."""
    rows = PartitionSpec(axes.ROW_AXES)
    specs = (rows, PartitionSpec("tensor", "fsdp"), rows, rows)
    return [
        jax.device_put(x, NamedSharding(mesh, spec))
        for x, spec in zip(states, specs, strict=True)
    ]


def sharded_states(vocabulary=40):
    rng = np.random.default_rng(0)
    return (
        rng.standard_normal((8, 13, 8)).astype(np.float32),
        rng.standard_normal((vocabulary, 8)).astype(np.float32),
        rng.integers(0, vocabulary, (8, 13)).astype(np.int32),
        np.tile(np.arange(13, dtype=np.int32), (8, 1)),
    )


def scoring_value(hidden, unembedding, targets, predict):
    stats = logps.token_stats(
        hidden, unembedding, targets, predict, want=logps.STATISTICS, chunk=4
    )
    return sum((i + 1) * x.sum() for i, x in enumerate(stats.values())), stats


scoring_gradient = jax.value_and_grad(scoring_value, argnums=(0, 1), has_aux=True)


@functools.cache
def compiled_scoring(sizes):
    """The gradient of scoring compiled for (data, fsdp, tensor), and its inputs."""
    names = ("data", "fsdp", "tensor")
    mesh = sharding.make_mesh(**dict(zip(names, sizes, strict=True)))
    with jax.set_mesh(mesh):
        arguments = on_mesh(mesh, sharded_states())
        return jax.jit(scoring_gradient).lower(*arguments).compile(), arguments


@pytest.fixture(scope="module")
def on_one_device():
    return jax.jit(scoring_gradient)(*sharded_states())


@pytest.mark.parametrize("sizes", [(2, 4, 1), (2, 2, 2), (2, 1, 4)], ids=str)
def test_every_mesh_gives_the_values_of_one_device(sizes, on_one_device):
    compiled, arguments = compiled_scoring(sizes)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5),
        jax.device_get(compiled(*arguments)),
        on_one_device,
    )


def test_a_vocabulary_that_the_devices_cannot_split_is_scored_whole():
    states = sharded_states(vocabulary=41)
    with jax.set_mesh(sharding.make_mesh(tensor=2)):
        got = jax.jit(scoring_gradient)(*states)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5),
        jax.device_get(got),
        jax.jit(scoring_gradient)(*states),
    )


def test_rows_that_the_devices_cannot_share_are_scored_too(states):
    with jax.set_mesh(sharding.make_mesh()):
        got = jax.jit(logps.token_stats)(*states)["logp"]
    np.testing.assert_allclose(got, plain_stats(*states)["logp"], rtol=1e-5, atol=1e-5)


def test_a_mesh_of_ones_own_axes_is_left_alone(states):
    with jax.set_mesh(jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))):
        got = jax.jit(logps.token_stats)(*states)["logp"]
    np.testing.assert_allclose(got, plain_stats(*states)["logp"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sizes", [(2, 4, 1), (8, 1, 1)], ids=str)
def test_the_loop_over_chunks_holds_no_collective(sizes):
    in_loops, everywhere = collectives(compiled_scoring(sizes)[0].as_text())
    assert in_loops == []
    assert everywhere


def test_a_split_vocabulary_is_never_gathered():
    """Devices that split the vocabulary exchange sums over it, nothing of its size."""
    hlo = compiled_scoring((2, 1, 4))[0].as_text()
    lines = [line for line in hlo.splitlines() if COLLECTIVES.search(line)]
    assert lines
    for line in lines:
        kind = COLLECTIVES.search(line)
        shapes = re.findall(r"\[([\d,]+)\]", line.split(" = ")[1].split(kind[0])[0])
        sizes = {int(size) for shape in shapes for size in shape.split(",")}
        # 40 tokens, 10 a device; the sum of gradients over data holds a device's own.
        assert 40 not in sizes, line
        assert kind[1] != "all-gather" or 10 not in sizes, line


# --- from rows to [B, K, T] -----------------------------------------------------------


def test_gathering_puts_each_position_where_its_token_is():
    groups = fixtures.random_groups(3, 6, 2)
    batch = fixtures.pack_all(groups, 40, rows_multiple=2, spare_groups=1)
    row = np.arange(len(batch.tokens))[:, None]
    values = np.where(batch.predict < 0, np.nan, 1.0 + 1000 * row + batch.predict)
    got = np.asarray(jax.jit(logps.gather_responses)(values.astype(np.float32), batch))
    per_row = len(batch.valid) // len(batch.tokens)
    for b, k, t in np.ndindex(got.shape):
        place = 1.0 + 1000 * (b // per_row) + batch.start[b, k] + t
        assert got[b, k, t] == (place if batch.loss_mask[b, k, t] else 0.0)


def test_response_sum_leaves_out_what_is_not_counted_even_nan():
    values = jnp.array([[0.5, jnp.nan, 2.0], [jnp.nan, jnp.nan, jnp.nan]])
    where = jnp.array([[True, False, True], [False, False, False]])
    total = functools.partial(logps.response_sum, where=where)
    np.testing.assert_array_equal(total(values), [2.5, 0.0])
    gradient = jax.grad(lambda x: total(x).sum())(values)
    np.testing.assert_array_equal(gradient, where.astype(np.float32))


@pytest.mark.parametrize(
    ("where", "error", "message"),
    [
        (np.ones(3), TypeError, r"`where` is inclusion and needs booleans; got f"),
        (np.ones(4, bool), ValueError, r"broadcasts to \(2, 3\), that of `token_val"),
    ],
)
def test_response_sum_names_a_wrong_mask(where, error, message):
    with pytest.raises(error, match=message):
        logps.response_sum(jnp.zeros((2, 3)), where=where)


# --- exact KL -------------------------------------------------------------------------


def test_token_kl_is_exact_and_zero_from_itself():
    both = [fixtures.random_params(seed) for seed in (0, 1)]
    groups = fixtures.random_groups(6, 3, 2)
    batch = fixtures.pack_all(groups, 40)
    assert (batch.predict == 0).any()  # a prompt of one token begins a row
    token_kl = jax.jit(
        lambda params, anchor_params, batch: logps.token_kl(
            fixtures.decoder(), params, batch, anchor_params=anchor_params, chunk=4
        )
    )
    got = iter(fixtures.by_response(token_kl(*both, batch), batch, groups))
    weights = [fixtures.oracle_weights(params) for params in both]
    for group in groups:
        for response, mask in zip(group.responses, group.loss_masks, strict=True):
            text = [*group.prompt, *response]
            logits = [
                oracles.decoder_hidden(w, text, **fixtures.ORACLE) @ w["unembedding"]
                for w in weights
            ]
            first = len(group.prompt) - 1
            expected = [
                oracles.kl_divergence(logits[0][first + t], logits[1][first + t])
                for t in range(len(response))
            ]
            assert min(expected) > 0.01
            np.testing.assert_allclose(
                next(got), np.where(mask, expected, 0.0), rtol=1e-4, atol=1e-5
            )
    assert not np.asarray(token_kl(both[0], both[0], batch)).any()


@dataclasses.dataclass(frozen=True)
class Bigram:
    """A model of which the logits of u after t are embedding[t] @ embedding[u]."""

    vocab_size: int
    logit_softcap: float | None = None

    def hidden(self, params, tokens, position, end):
        return params[tokens].astype(jnp.bfloat16)

    def unembedding(self, params):
        return params


def test_token_kl_of_bfloat16_states_is_reduced_in_float32():
    batch = fixtures.pack_all(fixtures.random_groups(0, 2, 2, vocab_size=1), 40)
    params, anchor_params = jnp.array([[1.0], [4.0]]), jnp.ones((2, 1))
    got = logps.token_kl(Bigram(2), params, batch, anchor_params=anchor_params)
    expected = oracles.kl_divergence([1.0, 4.0], [1.0, 1.0])
    np.testing.assert_allclose(got, np.where(batch.loss_mask, expected, 0), rtol=1e-5)


def test_token_kl_is_that_of_capped_logits():
    batch = fixtures.pack_all(fixtures.random_groups(0, 2, 2, vocab_size=1), 40)
    params, anchor_params = jnp.array([[1.0], [4.0]]), jnp.ones((2, 1))
    model = Bigram(2, logit_softcap=2.0)
    got = logps.token_kl(model, params, batch, anchor_params=anchor_params)
    capped = [oracles.soft_cap(x, 2.0) for x in ([1.0, 4.0], [1.0, 1.0])]
    expected = oracles.kl_divergence(*capped)
    np.testing.assert_allclose(got, np.where(batch.loss_mask, expected, 0), rtol=1e-5)


def test_token_kl_of_a_split_vocabulary_is_that_of_one_device():
    """The highest logits of the two parts are far apart."""
    batch = fixtures.pack_all(fixtures.random_groups(0, 2, 2, vocab_size=1), 40)
    params = jnp.array([[1.0], [-2.0], [4.0], [3.0]])
    anchor_params = jnp.array([[1.0], [5.0], [-1.0], [0.0]])

    def token_kl(params, anchor_params):
        return logps.token_kl(
            Bigram(4), params, batch, anchor_params=anchor_params, chunk=1
        )

    with jax.set_mesh(sharding.make_mesh(tensor=2)):
        got = jax.jit(token_kl)(params, anchor_params)
    logits = [np.ravel(x) * float(x[0, 0]) for x in (params, anchor_params)]
    expected = oracles.kl_divergence(*logits)
    np.testing.assert_allclose(got, np.where(batch.loss_mask, expected, 0), rtol=1e-5)


def test_scores_are_those_of_capped_logits():
    batch = fixtures.pack_all(fixtures.random_groups(0, 2, 2, vocab_size=1), 40)
    params = jnp.array([[1.0], [4.0]])
    got = logps.response_scores(Bigram(2, logit_softcap=2.0), params, batch)
    expected = oracles.log_softmax(oracles.soft_cap([1.0, 4.0], 2.0))[0]
    where = np.where(batch.loss_mask, expected, 0)
    np.testing.assert_allclose(got.logp, where, rtol=1e-5)


def has_loop(length, function, vocab_size, batch, **kwargs):
    """Whether a loop of this length is in the program of `function`."""
    params = jax.ShapeDtypeStruct((vocab_size, 2), jnp.float32)
    run = functools.partial(function, Bigram(vocab_size), batch=batch, **kwargs)
    return re.search(rf"\blength={length}\b", str(jax.make_jaxpr(run)(params)))


def kl_from_itself(model, params, batch, **kwargs):
    return logps.token_kl(model, params, batch, anchor_params=params, **kwargs)


def test_the_default_chunk_of_token_kl_is_that_of_scoring(monkeypatch):
    monkeypatch.setattr(logps, "_CHUNK_ENTRIES", 256)
    monkeypatch.setattr(logps, "_CHUNK_ELEMENTS", 1)
    batch = fixtures.pack_all(fixtures.random_groups(0, 2, 2), 40, rows_multiple=2)
    assert has_loop(4, kl_from_itself, 2**10, batch)


@pytest.mark.parametrize("function", [logps.response_scores, kl_from_itself])
@pytest.mark.parametrize("chunk", [2, 5, 37])
def test_scores_and_kl_are_computed_in_the_chunks_asked_for(function, chunk):
    batch = fixtures.pack_all(fixtures.random_groups(0, 2, 2), 40)
    chunks = -(-37 // chunk)
    looped = has_loop(chunks, function, 37, batch, chunk=chunk)
    assert bool(looped) == (chunk < 37 or function is kl_from_itself)
