"""What a step holds depends on its number: not on hosts, devices, or restarts."""

import dataclasses
import json
import os
import pathlib
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import fixtures
from pref_jax.data import rows, sources

ROOT = pathlib.Path(__file__).resolve().parents[2]
NUM_STEPS = 7


def batches(*, rows_multiple=1, seed=0, weights=None, num_steps=NUM_STEPS):
    parts = [fixtures.random_groups(9, 13, 2), fixtures.random_groups(8, 6, 2)]
    groups = sources.Mixture(parts, weights) if weights else parts[0] + parts[1]
    return sources.training_batches(
        groups,
        groups_per_step=4,
        num_steps=num_steps,
        row_length=64,
        seed=seed,
        rows_multiple=rows_multiple,
    )


def members(batch):
    """The texts of a batch's groups, whatever rows they stand in."""
    found = []
    for b in np.flatnonzero(batch.valid.all(axis=1)):
        row = b // (batch.valid.shape[0] // batch.tokens.shape[0])
        texts = [
            batch.targets[row, start : start + length].tolist()
            for start, length in zip(batch.start[b], batch.length[b], strict=True)
        ]
        found.append((int(batch.record[b]), texts))
    return sorted(found)


@given(
    devices=st.sampled_from([2, 3, 4, 8]),
    seed=st.integers(0, 5),
    weights=st.sampled_from([None, (1.0, 1.0), (5.0, 1.0)]),
    resumed_at=st.integers(0, NUM_STEPS - 1),
    num_steps=st.integers(NUM_STEPS, 9),
)
def test_a_step_holds_the_same_groups_on_any_devices_and_after_any_restart(
    devices, seed, weights, resumed_at, num_steps
):
    alone = batches(seed=seed, weights=weights)
    many = batches(
        rows_multiple=devices, seed=seed, weights=weights, num_steps=num_steps
    )
    source = sources.OfflineSource(many)
    source.set_state(resumed_at)
    for number in range(resumed_at, NUM_STEPS):
        batch = source(None)
        assert batch.tokens.shape[0] % devices == 0
        assert members(batch) == members(alone[number])
        assert len(members(batch)) == 4


class Watched:
    """Groups that remember which of them were read."""

    def __init__(self, groups):
        self.groups, self.read = groups, []
        self.lengths = rows.measure(groups)

    def __len__(self):
        return len(self.groups)

    def __getitem__(self, index):
        self.read.append(index)
        return self.groups[index]


@pytest.mark.parametrize("own", [[0], [1], [2, 3], [3, 1]], ids=str)
def test_a_process_builds_and_reads_its_own_rows_alone(own):
    whole = batches(rows_multiple=4)
    groups = Watched(whole.groups)
    part = dataclasses.replace(whole, groups=groups).of_rows(own)
    per_row = whole.shape.groups_per_row
    slots = [g * per_row + e for g in own for e in range(per_row)]
    for number in range(NUM_STEPS):
        groups.read.clear()
        found, expected = part[number], whole[number]
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            index = own if len(b) == whole.shape.num_rows else slots
            np.testing.assert_array_equal(a, b[index])
        texts = {groups.groups[i].prompt.tobytes() for i in groups.read}
        first = groups.groups[whole.indices(number)[0]].prompt.tobytes()
        assert len(texts - {first}) <= (found.record >= 0).sum()


PROCESS = """
import json, sys
import jax
import numpy as np
jax.config.update("jax_cpu_collectives_implementation", "gloo")
if len(sys.argv) > 1:
    port, number = sys.argv[1:]
    jax.distributed.initialize(f"localhost:{port}", 2, int(number))
from jax.experimental import multihost_utils
import test_hosts
from pref_jax.train import sharding
mesh = sharding.make_mesh()
shards = sharding.num_row_shards(mesh)
assert shards == jax.device_count() == max(1, jax.process_count())
found = test_hosts.batches(rows_multiple=2)
for batch in found.of_rows(sharding.own_rows(mesh, found.shape.num_rows)):
    placed = sharding.place_batch(mesh, batch)
    own = [s.data.shape[0] for s in placed.tokens.addressable_shards]
    assert sum(own) == batch.tokens.shape[0]
    assert placed.tokens.shape[0] == found.shape.num_rows
    whole = multihost_utils.process_allgather(placed, tiled=True)
    print(json.dumps([np.asarray(x).tolist() for x in jax.tree.leaves(whole)]))
"""


@pytest.mark.slow
def test_a_step_of_two_processes_is_that_of_one():
    """Each process holds half of the rows; together they are the one's, bit for bit."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    path = os.pathsep.join(str(ROOT / part) for part in ("", "tests", "tests/data"))
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": path}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, *arguments],
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        for arguments in ((), (port, "0"), (port, "1"))
    ]
    try:
        outputs = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    alone, first, second = (
        [json.loads(line) for line in output.splitlines() if line.startswith("[[")]
        for output in outputs
    )
    assert len(alone) == NUM_STEPS
    assert alone == first == second
