"""Experiments compiled for chips that are not there: the figures, and the exit code."""

import dataclasses
import json
import sys
import types

import jax
import pytest

from pref_jax.train import sharding, topology
from scripts import compile_for_tpu
from tests import tpu_experiment

COMMAND = ["--experiment", "tiny", "--preset", "small", "--topology", "v5e:4x2"]


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """The experiment, and this machine's eight devices in the place of TPUs."""
    monkeypatch.setitem(sys.modules, "experiments.tiny", tpu_experiment)

    def mesh(name, *, num_slices, **axes):
        topology.find_chip(name)
        if num_slices == 1:
            return sharding.make_mesh(**axes)
        found = sharding.make_mesh(**axes)
        devices = found.devices.reshape(num_slices, -1, *found.devices.shape[2:])
        return jax.sharding.Mesh(devices, found.axis_names, axis_types=found.axis_types)

    monkeypatch.setattr(topology, "topology_mesh", mesh)
    monkeypatch.setattr(topology, "axis_links", lambda mesh, axes, chip: 2)


@pytest.fixture
def small_chip(monkeypatch):
    """A chip of 550 kB: the step does not fit, the loss does."""
    chip = dataclasses.replace(topology.CHIPS["v5e"], hbm_bytes=5.5e5)
    monkeypatch.setitem(topology.CHIPS, "v5e", chip)


def read(folder):
    (path,) = folder.glob("*.json")
    return path.stem, json.loads(path.read_text())


def test_a_record_holds_the_figures_of_every_program(tmp_path, capsys):
    command = [*COMMAND, "--fsdp", "4", "--write", str(tmp_path), "--num-layers", "5"]
    assert (
        compile_for_tpu.main([*command, "--data-file", "/of/one/machine/p.jsonl"]) == 0
    )
    name, record = read(tmp_path)
    assert name == "tpu_small_v5e_4x2"
    assert record["mesh"] == {"slice": 1, "data": 2, "fsdp": 4, "tensor": 1}
    assert record["config"]["num_layers"] == 5  # of the command, not of the preset
    assert record["config"]["data_file"] == "p.jsonl"
    assert record["chip"]["source"] == topology.CHIPS["v5e"].source
    loss, step = record["programs"]
    useful = 2 * 5 * 64 * 256**2
    assert (loss["useful_flops"], step["useful_flops"]) == (useful, 3 * useful)
    assert step["flops"] == 4 * useful
    assert step["seconds"]["compute"] == pytest.approx(4 * useful / (8 * 197e12))
    for program in (loss, step):
        assert program["fits"]
        assert program["advice"] == program["unknown_loops"] == []
        for way in ("with_overlap", "without_overlap"):
            seconds = program["useful_flops"] / (8 * 197e12) / program["mfu"][way]
            assert seconds == pytest.approx(program["seconds"][way])
        sent = sum(part["bytes"] for part in program["sent"])
        assert program["seconds"]["ici"] == pytest.approx(sent / (2 * 50e9))
    assert "versions" in record["environment"]
    output = capsys.readouterr().out
    assert "estimate, not run" in output
    assert "MFU = useful flops / (chips * peak * s)" in output
    assert "step: useful flops = 3 * 2 * layers * rows * width^2" in output
    assert "does not fit" not in output


def test_several_slices_say_what_is_not_counted(tmp_path, capsys):
    command = [*COMMAND, "--num-slices", "2", "--write", str(tmp_path)]
    assert compile_for_tpu.main([*command, "--fsdp", "2"]) == 0
    name, record = read(tmp_path)
    assert name == "tpu_small_2_x_v5e_4x2"
    assert record["mesh"] == {"slice": 2, "data": 2, "fsdp": 2, "tensor": 1}
    assert "What slices send each other is not in" in capsys.readouterr().out


def test_what_does_not_fit_ends_with_1_and_advice(tmp_path, capsys, small_chip):
    assert (
        compile_for_tpu.main([*COMMAND, "--fsdp", "8", "--write", str(tmp_path)]) == 1
    )
    _, record = read(tmp_path)
    assert [program["fits"] for program in record["programs"]] == [True, False]
    output = capsys.readouterr().out
    assert "step does not fit: 0.00 GiB a chip too much" in output
    assert "more micro-batches" in output
    assert "loss does not fit" not in output


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["--experiment", "nothing"], "`experiment` must name a module.*'nothing'"),
        (["--experiment", "half"], "experiments.half has no PRESETS and no programs"),
        (["--topology", "v9:2x2"], "must begin with v4, v5e, v5p, v6e"),
        (["--fsdp", "3"], "fsdp=3, tensor=1 does not use 8 devices"),
    ],
)
def test_a_command_that_makes_no_sense_is_an_error(monkeypatch, command, message):
    half = types.ModuleType("experiments.half")
    monkeypatch.setitem(sys.modules, "experiments.half", half)
    with pytest.raises(SystemExit, match=f"error: .*{message}"):
        compile_for_tpu.main([*COMMAND, *command])


@pytest.mark.parametrize("command", [["--preset", "large"], ["--num-layer", "x"]])
def test_an_unknown_preset_or_value_ends_with_2(command, capsys):
    with pytest.raises(SystemExit) as stop:
        compile_for_tpu.main([*COMMAND, *command])
    assert stop.value.code == 2
    capsys.readouterr()
