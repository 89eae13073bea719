"""Students of policies: what they learn from, and what is kept of their teacher."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from experiments.adpo import distillation
from experiments.adpo.__main__ import make_jobs, run_config
from experiments.adpo.config import CONTROL, SMOKE
from experiments.worlds.jobs import run_jobs
from pref_jax.train import run as run_lib

TINY = dataclasses.replace(
    SMOKE.distillation, tasks=("CartPole",), num_states=32, num_episodes=2
)


class Never:
    """A guard that is never told to stop."""

    def agreed(self):
        return False


def test_tasks_are_known_and_there_is_one():
    with pytest.raises(ValueError, match="HalfCheetah-v5, Hopper-v5; got Cartpole"):
        dataclasses.replace(TINY, tasks=("CartPole", "Cartpole"))
    with pytest.raises(ValueError, match="one or more of CartPole, .* got none"):
        dataclasses.replace(TINY, tasks=())


def test_the_control_preset_is_the_papers_tasks_and_nothing_else():
    jobs = make_jobs(CONTROL, epath.Path("nowhere"), None)
    runs = 4 + CONTROL.distillation.num_seeds
    assert CONTROL.distillation.num_seeds == 5
    assert [(job.name, job.num_runs) for job in jobs] == [
        (f"distillation/{task}/{name}", 1 if name == distillation.TEACHER else runs)
        for task in distillation.SIMULATED
        for name in (distillation.TEACHER, *distillation.STUDENTS)
    ]


def test_leaving_out_every_part_is_an_error():
    nothing = dataclasses.replace(CONTROL, distillation=None)
    with pytest.raises(ValueError, match="all parts are left out"):
        make_jobs(nothing, epath.Path("nowhere"), None)


@pytest.mark.slow
def test_a_teacher_is_kept_with_its_results(tmp_path):
    teacher, *_ = distillation.jobs(TINY)
    found = run_jobs("test", [teacher], epath.Path(tmp_path), Never())
    again = run_jobs("test", [teacher], epath.Path(tmp_path), Never())
    assert found == again
    task, (policy, params) = distillation._teacher("CartPole", TINY, again)
    expected = distillation._of_teacher("CartPole", TINY, {})["params"]
    jax.tree.map(np.testing.assert_array_equal, params, expected)
    assert task.name == "CartPole-v1" and policy.hidden == TINY.teacher_hidden


def test_a_standardised_teacher_is_kept_too():
    task = dataclasses.replace(TINY, tasks=("Pendulum",))
    policy = distillation.ActingPolicy(3, None, 1, task.teacher_hidden)
    normaliser = {"mean": jnp.arange(3.0), "deviation": jnp.full(3, 2.0)}
    params = policy.init(jax.random.key(4), normaliser=normaliser)
    as_read = run_lib.as_read_back(jax.tree.map(lambda x: np.array(x).tolist(), params))
    name = f"distillation/Pendulum/{distillation.TEACHER}"
    _, (_, found) = distillation._teacher("Pendulum", task, {name: {"params": as_read}})
    jax.tree.map(np.testing.assert_array_equal, found, params)


@pytest.mark.slow
def test_the_control_command_makes_a_report_and_continues(tmp_path):
    pytest.importorskip("mujoco")
    config = dataclasses.replace(
        CONTROL,
        root=str(tmp_path),
        distillation=dataclasses.replace(
            CONTROL.distillation,
            teacher_updates=2,
            num_states=64,
            num_steps=3,
            num_episodes=1,
            num_seeds=2,
            temperatures=(1.0, 2.0),
        ),
    )
    page = run_config(config)
    text = page.read_text()
    assert "The paper" in text and "279.3 +- 53.2 (3.3 %)" in text
    assert "gaussian" not in text.split("Config")[0]
    record = run_lib.read_json(page.parent / "record.json")
    students = record["results"]["distillation"]
    assert len(students) == 2 * len(distillation.STUDENTS)
    assert len(record["results"]["verdicts"]) == 2 * 2 + 1
    # As if it had been killed before its last student.
    (page.parent / "record.json").unlink()
    last = page.parent / "results/distillation/Hopper-v5/teacher-anchor.json"
    kept = run_lib.read_json(last)
    last.unlink()
    assert run_config(config) == page
    assert run_lib.read_json(last) | {"seconds": kept["seconds"]} == kept
    again = run_lib.read_json(page.parent / "record.json")
    assert again["results"] == record["results"]
    # The teachers' time counts, though they were not trained again.
    assert again["seconds"] == pytest.approx(record["seconds"], rel=0.5)
