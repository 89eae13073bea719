"""TPUs that are not there: what their chips can do, and meshes of them."""

import os
from importlib import metadata

import jax
import pytest
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

from pref_jax.train import costs, sharding, topology
from tests import tpu_experiment
from tests.train.test_costs import fake_mesh

CHIPS = topology.CHIPS


def test_each_chip_has_a_peak_and_a_source():
    peaks = {name: chip.peak_flops / 1e12 for name, chip in CHIPS.items()}
    assert peaks == {"v4": 275, "v5e": 197, "v5p": 459, "v6e": 918}
    for name, chip in CHIPS.items():
        assert f"TPU {name}" in chip.source
        assert chip.link_bandwidth * chip.num_links == chip.ici_bandwidth


def test_an_unknown_generation_is_an_error():
    with pytest.raises(ValueError, match="v4, v5e, v5p, v6e, as in .* got 'v9:2x2'"):
        topology.topology_mesh("v9:2x2")


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("JAX TPU support not installed.", r"pip install 'jax\[tpu\]'.*not installed"),
        ("accessing libtpu multi-process lockfile.", "another process .*lockfile"),
    ],
)
def test_an_error_of_libtpu_says_what_to_do(monkeypatch, said, told):
    def fails(**options):
        raise RuntimeError(said)

    monkeypatch.setattr(topologies, "get_topology_desc", fails)
    with pytest.raises(RuntimeError, match=told):
        topology.topology_mesh("v5e:2x2")


@pytest.mark.parametrize("installed", ["0.0.1", "99.0"])
def test_a_libtpu_of_another_jax_is_an_error(monkeypatch, installed):
    monkeypatch.setattr(metadata, "version", lambda name: installed)
    message = rf"needs libtpu==.* libtpu {installed} is installed: pip install 'jax\["
    with pytest.raises(RuntimeError, match=message):
        topology.topology_mesh("v5e:2x2")


@pytest.mark.parametrize(
    ("name", "shape", "extent", "axes", "links"),
    [
        ("v5p", (1, 16, 4), (4, 4, 4), ("fsdp",), 4),
        ("v5p", (1, 16, 4), (4, 4, 4), ("tensor",), 2),
        ("v5p", (1, 16, 4), (4, 4, 4), ("fsdp", "tensor"), 6),
        ("v5p", (1, 2, 2), (2, 2, 1), ("fsdp",), 1),  # smaller than a cube: no rings
        ("v5p", (2, 2, 4), (4, 2, 2), ("tensor",), 2),
        ("v5p", (1, 4, 4), (4, 2, 2), ("fsdp",), 1),
        ("v5p", (16, 2, 2), (4, 4, 4), ("tensor",), 1),  # half of a ring
        ("v5e", (1, 16, 16), (16, 16), ("fsdp",), 2),
        ("v5e", (1, 4, 8), (4, 8), ("fsdp",), 1),
        ("v5e", (1, 4, 8), (4, 8), ("fsdp", "tensor"), 2),
        ("v5e", (1, 1, 8), (1, 8), (), 1),
    ],
)
def test_links_follow_the_place_of_an_axis_on_the_torus(
    name, shape, extent, axes, links
):
    assert topology.axis_links(fake_mesh(shape, extent), axes, CHIPS[name]) == links


def test_local_bytes_follow_the_sharding():
    mesh = sharding.make_mesh(data=2, fsdp=4)
    split = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    leaf = jax.ShapeDtypeStruct((16, 3), "bfloat16", sharding=split)
    assert topology.local_bytes((leaf, jax.eval_shape(jax.random.key, 0))) == 2 * 3 * 2


@pytest.fixture
def libtpu(monkeypatch):
    pytest.importorskip("libtpu", reason="needs libtpu, which compiles for TPUs")
    monkeypatch.setitem(os.environ, "TPU_SKIP_MDS_QUERY", "1")


@pytest.mark.slow
def test_a_shape_that_the_compiler_does_not_know_is_an_error(libtpu):
    with pytest.raises(ValueError, match="such as v5p:4x4x4.*got 'v5e:3x5x7'"):
        topology.topology_mesh("v5e:3x5x7")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "num_chips"), [("v4:2x2x1", 4), ("v5e:4x4", 16), ("v5p:2x2x4", 16)]
)
def test_a_mesh_has_one_device_a_chip(libtpu, name, num_chips):
    mesh = topology.topology_mesh(name, fsdp=4)
    assert dict(mesh.shape) == {"data": num_chips // 4, "fsdp": 4, "tensor": 1}
    kinds = {device.device_kind for device in mesh.devices.flat}
    assert kinds == {topology.find_chip(name).device_kind}
    assert topology.axis_links(mesh, ("fsdp",), topology.find_chip(name)) in (1, 2)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
def test_a_chip_has_the_memory_that_the_compiler_gives_it(libtpu, name):
    mesh = topology.topology_mesh(name, fsdp=4)
    limit = topology.find_chip(name).hbm_bytes / 2**30
    # A layer is 1 GiB on each chip, and its gradient another.
    config = tpu_experiment.Config(num_layers=int(0.6 * limit), width=2**15, rows=64)
    program = tpu_experiment.programs(config, mesh)[1]
    with pytest.raises(RuntimeError, match="HBM|hbm") as refusal:
        program.function.lower(*program.arguments).compile()
    assert f"{limit:.2f}G" in str(refusal.value)
    found = costs.measure(program, mesh)  # all the same
    assert found.memory.total > limit * 2**30


@pytest.mark.slow
def test_an_array_that_no_chip_can_hold_is_an_error(libtpu):
    mesh = topology.topology_mesh("v5e:2x2", fsdp=4)
    config = tpu_experiment.Config(num_layers=20, width=2**15, rows=64)  # 20 GiB
    program = tpu_experiment.programs(config, mesh)[0]
    with pytest.raises(ValueError, match="'loss' cannot be compiled.*split it over"):
        costs.measure(program, mesh)
