"""Collectives and memory traffic, read off the text of optimised programs."""

import os
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from pref_jax.loops import loop_at_most
from pref_jax.train import hlo, sharding, topology
from tests import tpu_programs
from tests.tpu_programs import INNER, NUM_LAYERS, WIDTH, on_all

P = PartitionSpec


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh(**tpu_programs.AXES)


def compiled(function, arguments) -> str:
    return function.lower(*arguments).compile().as_text()


def golden(name) -> str:
    return (tpu_programs.FOLDER / f"{name}.txt").read_text()


def summary(found):
    return sorted((c.kind, c.axes, c.bytes_sent, c.executions) for c in found)


# The array is f32[4096, 8], 131072 bytes; a part of it is one of `n` along the axes.
SIZE = 4096 * 8 * 4


@pytest.mark.parametrize(
    ("function", "inside", "outside", "kind", "axes", "num_bytes"),
    [
        (
            lambda x: jax.lax.psum(x, "tensor"),
            *(P(), P(), "all-reduce", ("tensor",), 2 * SIZE / 2),
        ),
        (
            lambda x: jax.lax.psum(x, ("data", "fsdp", "tensor")),
            *(P(), P(), "all-reduce", ("data", "fsdp", "tensor"), 2 * SIZE * 7 / 8),
        ),
        (
            lambda x: jax.lax.all_gather(x, ("data", "tensor"), tiled=True),
            *(P(("data", "tensor")), P()),
            *("all-gather", ("data", "tensor"), SIZE * 3 / 4),
        ),
        (
            lambda x: jax.lax.psum_scatter(x, "fsdp", tiled=True),
            *(P(), P("fsdp"), "reduce-scatter", ("fsdp",), SIZE / 2),
        ),
        (
            lambda x: jax.lax.all_to_all(x, ("data", "fsdp"), 0, 0, tiled=True),
            *(P(("data", "fsdp")), P(("data", "fsdp"))),
            *("all-to-all", ("data", "fsdp"), SIZE / 4 * 3 / 4),
        ),
        (
            lambda x: jax.lax.ppermute(x, "data", [(0, 1), (1, 0)]),
            *(P("data"), P("data"), "collective-permute", ("data",), SIZE / 2),
        ),
    ],
    ids=["psum", "psum of all", "gather", "scatter", "all to all", "permute"],
)
def test_a_collective_is_found_with_its_axes_and_bytes(
    mesh, function, inside, outside, kind, axes, num_bytes
):
    program = on_all(mesh, function, (4096, 8), inside, outside)
    found = hlo.collectives(compiled(*program), mesh)
    assert summary(found) == [(kind, axes, num_bytes, 1)]
    assert found[0].group_size == 2 ** len(axes)
    assert found[0].is_exact
    assert "shard_map" in found[0].scope


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("{{0,1},{2,3}}, x", [[0, 1], [2, 3]]),
        ("{}, x", [[0, 1, 2, 3]]),
        ("[2,2]<=[4], x", [[0, 1], [2, 3]]),
        ("[2,2]<=[2,2]T(1,0), x", [[0, 2], [1, 3]]),
        ("[1,4]<=[4], x", [[0, 1, 2, 3]]),
        ("mesh['a'=2,'b'=2] {'b'}, x", [[0, 1], [2, 3]]),
        ("mesh['a'=2,'b'=2] {'a'}, x", [[0, 2], [1, 3]]),
        ("mesh['a'=1,'b'=4] {'a','b'}, x", [[0, 1, 2, 3]]),
        ("mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'b'}, x", [[0, 2], [1, 3]]),
        ("mesh['a'=2,'b'=2], device_ids=(0,3,1,2) {'b'}, x", [[0, 3], [1, 2]]),
        ("mesh['a'=4] {'a':(1)2}, x", [[0, 2], [1, 3]]),
        ("mesh['a'=4] {'a':(2)2}, x", [[0, 1], [2, 3]]),
    ],
)
def test_replica_groups_are_read_in_every_spelling(text, groups):
    read = hlo.replica_groups(f"channel_id=1, replica_groups={text}", 4)
    assert sorted(sorted(group) for group in read.tolist()) == groups


def test_an_unknown_spelling_of_groups_is_an_error():
    with pytest.raises(ValueError, match="unknown spelling: 'tree"):
        hlo.replica_groups("replica_groups=tree(2,2)", 4)


def test_a_text_that_is_no_program_is_an_error(mesh):
    with pytest.raises(ValueError, match="no ENTRY computation"):
        hlo.collectives("module @jit_f {", mesh)


def loop_bytes(mesh, num_layers):
    function, arguments = tpu_programs.layers(mesh, num_layers)
    found = hlo.collectives(compiled(function, arguments), mesh)
    assert all(c.is_exact for c in found)
    inside = [c for c in found if c.loops and "layers" in c.scope]
    return found, inside, sum(c.total_bytes for c in inside)


def test_twice_the_layers_send_twice_the_bytes_inside_the_loop(mesh):
    found, inside, few = loop_bytes(mesh, 3)
    more, _, many = loop_bytes(mesh, 6)
    assert few > 0
    assert many == 2 * few
    assert {c.executions for c in inside} == {3}
    # Forward, and again backward where it is rematerialised: float32 on this machine.
    matrix = WIDTH * INNER // 2 * 4
    gathers = [c for c in inside if c.kind == "all-gather" and "layers" in c.scope]
    assert {c.axes for c in gathers} == {("fsdp",)}
    assert {c.bytes_sent for c in gathers} == {matrix / 2}
    outside = [c for c in found if not c.loops]
    assert summary(outside) == summary(c for c in more if not c.loops)


def test_loops_in_loops_multiply(mesh):
    def inner(x, _):
        return jnp.cos(jax.lax.psum(x, "tensor")), None

    def outer(x, _):
        return jax.lax.scan(inner, x, None, length=3)[0], None

    def function(x):
        return jax.lax.scan(outer, x, None, length=5)[0]

    program = on_all(mesh, function, (8,), P(), P())
    (found,) = hlo.collectives(compiled(*program), mesh)
    assert found.executions == 15
    assert len(found.loops) == 2
    assert found.total_bytes == 15 * 32


def test_a_loop_that_turns_an_unknown_number_of_times_is_marked(mesh):
    def function(x):
        return jax.lax.while_loop(
            lambda x: x[0] < 100, lambda x: jax.lax.psum(x, "tensor"), x
        )

    text = compiled(*on_all(mesh, function, (8,), P(), P()))
    (found,) = hlo.collectives(text, mesh)
    assert (found.executions, found.is_exact) == (1, False)
    (loop,) = hlo.unknown_loops(text)
    assert loop.endswith("while")
    function, arguments = tpu_programs.layers(mesh)
    assert hlo.unknown_loops(compiled(function, arguments)) == []


def test_a_loop_that_says_how_often_it_turns_at_most_is_taken_at_its_word(mesh):
    def function(x):
        def outer(x, _):
            turns = x[0].astype(int) % 7
            inner = lambda n, x: jax.lax.psum(x, "tensor")  # noqa: E731
            return loop_at_most(7, turns, inner, x), None

        return jax.lax.scan(outer, x, None, length=5)[0]

    text = compiled(*on_all(mesh, function, (8,), P(), P()))
    (found,) = hlo.collectives(text, mesh)
    assert (found.executions, found.is_exact) == (35, False)
    assert hlo.unknown_loops(text) == []


def test_a_kernel_has_the_scope_of_the_loop_that_it_stands_in():
    def function(x):
        with jax.named_scope("outside"):
            y = jnp.sin(x) @ x
        with jax.named_scope("inside"):
            return jax.lax.fori_loop(0, 3, lambda _, y: jnp.tanh(y @ x), y)

    text = jax.jit(function).lower(jnp.ones((8, 8))).compile().as_text()
    scopes = hlo.kernel_scopes(text)
    (loop,) = re.findall(r"%?([\w.-]+) = .* while\(", text)
    assert loop not in scopes  # its kernels are listed in its place
    assert {"outside", "inside"} <= {
        part for s in scopes.values() for part in s.split("/")
    }
    # The compiler forgets the scope of a kernel now and then.
    bare = re.sub(r', metadata={op_name="[^"]*/while/body[^}]*}', "", text)
    inside = [name for name, scope in scopes.items() if "while/body" in scope]
    assert inside
    for name in inside:
        assert "inside" in hlo.kernel_scopes(bare)[name].split("/")


def test_of_a_conditional_the_branch_that_sends_most_is_listed(mesh):
    def function(x):
        few = lambda x: jax.lax.psum(x, "tensor")  # noqa: E731
        many = lambda x: jax.lax.psum(x, ("data", "fsdp"))  # noqa: E731
        none = lambda x: x  # noqa: E731
        return jax.lax.switch(x[0].astype(int), [few, many, none], x)

    text = compiled(*on_all(mesh, function, (64,), P(), P()))
    assert " conditional(" in text
    (found,) = hlo.collectives(text, mesh)
    assert found.axes == ("data", "fsdp")


ASYNCHRONOUS = """HloModule m

%wrapped (p: f32[8,4]) -> f32[4,4] {
  %p = f32[8,4]{1,0} parameter(0)
  ROOT %rs = f32[4,4]{1,0} reduce-scatter(%p), replica_groups={{0,1},{2,3},{4,5},{6,7}}
}

ENTRY %main (x: f32[8,4]) -> f32[4,4] {
  %x = f32[8,4]{1,0} parameter(0)
  %ag = (f32[8,4]{1,0}, f32[16,4]{1,0}) all-gather-start(%x), replica_groups=[4,2]<=[8]
  %agd = f32[16,4]{1,0} all-gather-done(%ag)
  %ar = f32[8,4]{1,0} all-reduce-start(%x), replica_groups={}, to_apply=%add
  %ard = f32[8,4]{1,0} all-reduce-done(%ar)
  %s = ((f32[8,4]{1,0}), f32[4,4]{1,0}, u32[]) async-start(%x), calls=%wrapped
  %u = ((f32[8,4]{1,0}), f32[4,4]{1,0}, u32[]) async-update(%s), calls=%wrapped
  ROOT %d = f32[4,4]{1,0} async-done(%u), calls=%wrapped
}
"""


def test_asynchronous_collectives_count_once_where_they_start(mesh):
    assert summary(hlo.collectives(ASYNCHRONOUS, mesh)) == [
        ("all-gather", ("tensor",), 16 * 4 * 4 / 2, 1),
        ("all-reduce", ("data", "fsdp", "tensor"), 2 * 8 * 4 * 4 * 7 / 8, 1),
        ("reduce-scatter", ("tensor",), 8 * 4 * 4 / 2, 1),
    ]


# Of one layer on one chip: bfloat16, split over tensor alone, and over fsdp too.
MATRIX, QUARTER = WIDTH * INNER // 2 * 2, WIDTH * INNER // 4 * 2
ROW_BYTES = tpu_programs.ROWS // 4 * WIDTH * 2


def test_the_layers_of_a_tpu_program_gather_reduce_and_scatter(mesh):
    text = golden("layers")
    assert "known_trip_count" not in text  # the number of turns is worked out
    assert text.count('"flag_start"') > 1  # one gather, repeated in several kernels
    assert hlo.unknown_loops(text) == []
    found = hlo.collectives(text, mesh)
    assert summary(found) == sorted(
        [
            *[("all-gather", ("fsdp",), MATRIX / 2, NUM_LAYERS)] * 4,
            *[("all-reduce", ("tensor",), 2 * ROW_BYTES / 2, NUM_LAYERS)] * 2,
            ("all-reduce", ("fsdp",), 2 * MATRIX / 2, NUM_LAYERS),
            ("reduce-scatter", ("fsdp",), MATRIX / 2, NUM_LAYERS),
            ("all-reduce", ("data",), 2 * 2 * QUARTER / 2, NUM_LAYERS),
        ]
    )
    # The reduce-scatter has no metadata of its own: it has that of its kernel.
    assert all("layers" in c.scope and len(c.loops) == 1 for c in found)
    assert sum("rematted" in c.scope for c in found) == 1


def test_a_tpu_program_names_groups_by_axes_and_scatters_in_a_kernel(mesh):
    size = 4096 * 1024 * 4
    assert summary(hlo.collectives(golden("scatter"), mesh)) == [
        ("all-gather", ("tensor",), size / 2, 1),
        ("reduce-scatter", ("tensor",), size / 2, 1),
    ]
    (found,) = hlo.collectives(golden("permute"), mesh)
    assert (found.kind, found.axes) == ("collective-permute", ("data", "tensor"))
    assert found.bytes_sent == size / 4


@pytest.mark.slow
def test_the_tpu_compiler_still_writes_what_the_golden_files_hold(monkeypatch):
    pytest.importorskip("libtpu", reason="needs libtpu, which compiles for TPUs")
    monkeypatch.setitem(os.environ, "TPU_SKIP_MDS_QUERY", "1")
    mesh = topology.topology_mesh(tpu_programs.TOPOLOGY, **tpu_programs.AXES)
    for name, program in tpu_programs.GOLDEN.items():
        text = tpu_programs.optimised_text(program, mesh)
        found = hlo.collectives(text, mesh)
        assert summary(found) == summary(hlo.collectives(golden(name), mesh))
        short = tpu_programs.shorten(text)  # which loses nothing that is read
        assert hlo.collectives(short, mesh) == found
        assert hlo.bytes_accessed(short) == hlo.bytes_accessed(text)


def test_a_gather_of_a_whole_stack_is_told_from_one_of_a_layer(mesh):
    function, arguments = tpu_programs.layers(mesh)
    (up, down), x = arguments
    found = hlo.collectives(compiled(function, arguments), mesh)
    assert hlo.gathers_of(found, up, mesh) == []

    def all_at_once(stacks, x):
        whole = NamedSharding(mesh, P(None, None, "tensor"))
        return function(
            (jax.lax.with_sharding_constraint(stacks[0], whole), stacks[1]), x
        )

    text = compiled(jax.jit(all_at_once), arguments)
    found = hlo.collectives(text, mesh)
    assert len(hlo.gathers_of(found, up, mesh)) == 1
    one_layer = jax.ShapeDtypeStruct(
        up.shape[1:], up.dtype, sharding=NamedSharding(mesh, P("fsdp", "tensor"))
    )
    assert len(hlo.gathers_of(found, one_layer, mesh)) > 1


def test_a_program_without_loops_accesses_what_xla_says():
    def function(x, matrix):
        return jnp.tanh(x @ matrix) @ matrix.T + x

    arguments = [jax.ShapeDtypeStruct(s, "float32") for s in ((64, 256), (256, 256))]
    program = jax.jit(function).lower(*arguments).compile()
    accessed = hlo.bytes_accessed(program.as_text())
    assert accessed >= 4 * (2 * 64 * 256 + 256 * 256)  # each read or written once
    assert accessed == pytest.approx(program.cost_analysis()["bytes accessed"], rel=0.1)


def scan_bytes(num_layers):
    def function(x, stack):
        return jax.lax.scan(lambda x, matrix: (jnp.tanh(x @ matrix), x), x, stack)

    shapes = ((64, 256), (num_layers, 256, 256))
    arguments = [jax.ShapeDtypeStruct(shape, "float32") for shape in shapes]
    return hlo.bytes_accessed(jax.jit(function).lower(*arguments).compile().as_text())


def test_a_loop_accesses_slices_as_often_as_it_turns():
    first, second, third = (scan_bytes(n) for n in (4, 8, 12))
    a_turn = (second - first) / 4
    # Counting the whole stack each time would grow with the square.
    assert third - second == pytest.approx(second - first, rel=1e-3)
    # The matrix; the rows read and written, and once more as they are kept.
    assert a_turn >= 4 * (256 * 256 + 3 * 64 * 256)
    assert a_turn < 4 * 4 * (256 * 256 + 3 * 64 * 256)


ON_TPU = """HloModule m

%part (p: f32[4,8,8], i: s32[]) -> f32[8,8] {
  %p = f32[4,8,8]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %zero = s32[] constant(0)
  %one = f32[1,8,8]{2,1,0} dynamic-slice(%p, %i, %zero, %zero)
  ROOT %b = f32[8,8]{1,0} bitcast(%one)
}

%fused (p: f32[4,8,8], i: s32[]) -> f32[8,8] {
  %p = f32[4,8,8]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %inner = f32[8,8]{1,0} fusion(%p, %i), kind=kLoop, calls=%part
  ROOT %n = f32[8,8]{1,0} negate(%inner)
}

%put (p: f32[4,8,8], x: f32[8,8], i: s32[]) -> f32[4,8,8] {
  %p = f32[4,8,8]{2,1,0} parameter(0)
  %x = f32[8,8]{1,0} parameter(1)
  %i = s32[] parameter(2)
  %zero = s32[] constant(0)
  %b = f32[1,8,8]{2,1,0} bitcast(%x)
  ROOT %u = f32[4,8,8]{2,1,0} dynamic-update-slice(%p, %b, %i, %zero, %zero)
}

ENTRY %main (x: f32[4,8,8], i: s32[]) -> f32[4,8,8] {
  %x = f32[4,8,8]{2,1,0} parameter(0)
  %i = s32[]{:S(6)} parameter(1)
  %f = f32[8,8]{1,0:S(1)} fusion(%x, %i), kind=kLoop, calls=%fused
  ROOT %r = f32[4,8,8]{2,1,0} fusion(%x, %f, %i), kind=kLoop, calls=%put
}
"""


def test_slices_in_nested_kernels_and_fast_memory_are_told_apart():
    layer = 8 * 8 * 4
    # One layer is read into fast memory, and written back in its place.
    assert hlo.bytes_accessed(ON_TPU) == 2 * layer
    slow = ON_TPU.replace(":S(1)", "")
    assert hlo.bytes_accessed(slow) == 4 * layer
    # A kernel that turns all of an array into another shape first reads all of it.
    whole = ON_TPU.replace(" bitcast(%one)", " bitcast(%p)")
    assert hlo.bytes_accessed(whole) == (4 + 1) * layer


def test_sizes_of_arrays_follow_their_types():
    sizes = {"pred": 8, "bf16": 16, "f32": 32, "s4": 4, "f8e4m3fn": 8, "token": 0}
    found = {name: hlo.Shape(name, (2, 4)).num_bytes for name in sizes}
    assert found == sizes
    assert np.prod(hlo.Shape("f32", ()).dims) == hlo.Shape("f32", ()).size == 1


@pytest.mark.parametrize(
    ("dims", "axes", "is_whole"),
    [
        ((32, 4096, 2, 128), ("fsdp",), True),
        ((4096, 32, 256), ("fsdp",), True),  # turned around, and two merged
        ((32, 4096, 4, 128), ("fsdp", "tensor"), True),
        ((1, 4096, 2, 128), ("fsdp",), False),  # one layer
        ((64, 2048, 2, 128), ("fsdp",), False),  # rows of as many elements
        ((32, 2048, 2, 128), ("data",), False),  # over which it is not split
    ],
)
def test_a_whole_stack_is_known_by_its_shape(mesh, dims, axes, is_whole):
    split = NamedSharding(mesh, P(None, "fsdp", "tensor", None))
    stack = jax.ShapeDtypeStruct((32, 4096, 4, 128), "float32", sharding=split)
    outputs = (hlo.Shape("bf16", dims),)
    gather = hlo.Collective("all-gather", axes, 2, 1.0, 1, True, outputs, "", ())
    assert hlo.gathers_of([gather], stack, mesh) == [gather] * is_whole
    other = hlo.Collective("all-reduce", axes, 2, 1.0, 1, True, outputs, "", ())
    assert hlo.gathers_of([other], stack, mesh) == []
