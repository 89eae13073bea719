"""Distillation as preference optimisation: students that are anchored, and plain ones.

At states of the teacher's episodes, K candidate actions are compared; of a discrete
task all actions, of a continuous one actions that the teacher draws. The target is the
softmax of the teacher's log-probabilities over T among the candidates. The loss of all
students is the listwise cross-entropy; they differ in the anchor:

    KD              none: plain distillation at temperature T
    self-anchor     the student as it began
    self-anchor EMA its running average
    teacher-anchor  the teacher; its optimum is sharper than the teacher, pi^(1 + tau)

Each student has four temperatures and is reported at the best, by the return on
episodes that are not reported. Measured on fresh episodes: return, also as a share of
the teacher's; KL(teacher || student) at states of the teacher; NDCG of the student's
order of the candidates. A control: the return at the likeliest actions, since a student
that is sharper than its teacher returns more by drawing fewer bad ones.

Source: ADPO, arXiv:2510.18913v6, on the MuJoCo tasks HalfCheetah-v5 and Hopper-v5. Its
teachers are not published; here every task has one of our own, and classic control is
the quick version. All numbers are ours.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.worlds import bandits
from experiments.worlds.control import ActingPolicy, TeacherConfig, play, train_teacher
from experiments.worlds.jobs import Job
from pref_jax import anchors, targets
from pref_jax.envs import control, mujoco
from pref_jax.evals.ranking import ndcg

_SIMULATED = TeacherConfig(
    num_episodes=8,
    num_epochs=10,
    num_minibatches=16,
    learning_rate=3e-4,
    reward_scale=0.05,
)
TASKS: Mapping[str, tuple[Callable, TeacherConfig]] = {
    "CartPole": (control.cartpole, TeacherConfig(num_updates=60)),
    "Pendulum": (
        control.pendulum,
        TeacherConfig(
            num_updates=200, num_episodes=64, discount=0.95, reward_scale=0.1
        ),
    ),
    "HalfCheetah-v5": (
        functools.partial(mujoco.simulator, "HalfCheetah-v5"),
        dataclasses.replace(_SIMULATED, num_updates=250),
    ),
    "Hopper-v5": (
        functools.partial(mujoco.simulator, "Hopper-v5"),
        dataclasses.replace(_SIMULATED, num_updates=2_000, max_steps=600_000),
    ),
}
"""Task and how its teacher is trained, by name."""

SIMULATED = "HalfCheetah-v5", "Hopper-v5"
"""The tasks that need the extra `envs`; the paper's."""

KD = "KD"
STUDENTS = {
    KD: anchors.none(),
    "self-anchor": anchors.fixed(bandits.score),
    "self-anchor EMA": anchors.ema(decay=0.99, score=bandits.score),
    "teacher-anchor": anchors.fixed(bandits.score),
}
"""Anchor of each student, by name."""

TEACHER = "teacher"
_OF_TEACHER = "teacher-anchor"
_TUNING_SEED, _MEASURING_SEED = 10_000, 1_000_000


@dataclasses.dataclass(frozen=True)
class DistillationConfig:
    """The distillation part; all numbers are ours."""

    tasks: tuple[str, ...] = ("CartPole", "Pendulum")  # HalfCheetah-v5, Hopper-v5
    teacher_hidden: int = 64
    hidden: int = 32  # of a student
    num_states: int = 2_000  # of the teacher's episodes
    num_candidates: int = 16  # P, of a continuous task
    temperatures: tuple[float, ...] = (0.5, 1.0, 2.0, 4.0)  # T
    num_steps: int = 600
    states_per_step: int = 128
    learning_rate: float = 1e-3
    num_seeds: int = 5
    num_episodes: int = 64  # that a policy is measured on
    teacher_updates: int | None = None  # None: as `TASKS` has it

    def __post_init__(self):
        unknown = [name for name in self.tasks if name not in TASKS]
        if unknown or not self.tasks:
            raise ValueError(
                f"`tasks` needs one or more of {', '.join(TASKS)}; got "
                f"{', '.join(unknown) or 'none'}."
            )


def _job_name(task: str, policy: str) -> str:
    return f"distillation/{task}/{policy}"


def _teacher(task_name: str, config: DistillationConfig, results):
    """Task, and the teacher of the earlier job: its policy and parameters."""
    task = TASKS[task_name][0]()
    policy = ActingPolicy.of(task, config.teacher_hidden)
    found = results[_job_name(task_name, TEACHER)]["params"]
    like = policy.init(jax.random.key(0))  # the tree whose leaves are lists as yet
    if "normaliser" in found:
        like["normaliser"] = dict.fromkeys(found["normaliser"], 0.0)
    return task, (policy, jax.tree.map(lambda _, x: jnp.float32(x), like, found))


def _candidates(task, policy, params, observations, key, num: int):
    """f32[B, K, A]: all actions, or draws of the teacher."""
    if task.num_actions is not None:
        every = jnp.eye(task.num_actions)[None]
        return jnp.broadcast_to(every, (len(observations), *every.shape[1:]))
    keys = jax.random.split(key, num)
    drawn = jax.vmap(
        lambda key: jax.vmap(policy.act, in_axes=(None, 0, 0))(
            params, observations, jax.random.split(key, len(observations))
        )
    )(keys)
    return drawn.swapaxes(0, 1)


def _states(task, policy, params, key, num: int):
    """Observations of the teacher's episodes, drawn at random: f32[num, O]."""
    first, second = jax.random.split(key)
    num_episodes = max(8, -(-2 * num // task.horizon))
    episodes = play(task, policy, params, first, num_episodes, False)
    alive = np.flatnonzero(np.asarray(episodes.alive))
    order = jax.random.choice(second, alive, (num,), replace=len(alive) < num)
    return episodes.observations.reshape(-1, task.observation_size)[order]


def _draw(task, policy, params, key, config: DistillationConfig):
    """What a student learns from: states, candidates, what the teacher says of them."""
    first, second = jax.random.split(key)
    observations = _states(task, policy, params, first, config.num_states)
    items = _candidates(
        task, policy, params, observations, second, config.num_candidates
    )
    labels = policy.logps(params, observations, items)
    return bandits.make_batch(
        observations, items, labels, bandits.all_pairs(items.shape[1])
    )


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _train(name, student: ActingPolicy, config, params, anchor, data, key, temperature):
    def make_targets(labels):
        return targets.softmax(labels, temperature=temperature)

    # KD at temperature T softens both sides; the others have tau = 1.
    beta = 1 / temperature if name == KD else 1.0
    method = bandits.make_list_method(
        name, STUDENTS[name], beta=beta, make_targets=make_targets
    )
    return bandits.train(
        method,
        student,
        params,
        data,
        anchor=anchor,
        key=key,
        groups_per_step=config.states_per_step,
        num_steps=config.num_steps,
        optimizer=optax.adam(config.learning_rate),
    ).params


def _distil(task, name, teacher, config, seed: int, temperature: float):
    """A student and its parameters after training."""
    policy, teacher_params = teacher
    keys = jax.random.split(jax.random.key(seed), 3)
    data = _draw(task, policy, teacher_params, keys[0], config)
    student = ActingPolicy.of(task, config.hidden)
    params = student.init(keys[1], normaliser=teacher_params.get("normaliser"))
    anchor = teacher_params if name == _OF_TEACHER else params
    temperature = jnp.float32(temperature)
    trained = _train(name, student, config, params, anchor, data, keys[2], temperature)
    return student, trained


def _measure(task, policy, params, teacher, config, seed: int) -> dict[str, float]:
    """On fresh episodes: the policy's own, and the teacher's for what is compared."""
    teacher_policy, teacher_params = teacher
    keys = jax.random.split(jax.random.key(seed), 2)
    drawn, likeliest = (
        play(task, policy, params, keys[0], config.num_episodes, best).returns.mean()
        for best in (False, True)
    )
    data = _draw(task, teacher_policy, teacher_params, keys[1], config)
    scores = policy.logps(params, data.context, data.items)
    relevance = jax.nn.softmax(data.labels)
    divergence = policy.divergence(teacher_params, params, data.context)
    gain = ndcg(np.asarray(scores), np.asarray(relevance), k=scores.shape[-1])
    return {
        "return": float(drawn),
        "likeliest": float(likeliest),
        "kl": float(divergence.mean()),
        "ndcg": float(gain.mean()),
    }


def _of_teacher(task_name: str, config: DistillationConfig, results) -> dict:
    """Train the teacher; its parameters are kept with its results."""
    del results
    make_task, training = TASKS[task_name]
    task = make_task()
    if config.teacher_updates is not None:
        training = dataclasses.replace(training, num_updates=config.teacher_updates)
    policy = ActingPolicy.of(task, config.teacher_hidden)
    params, returns = train_teacher(task, policy, training, jax.random.key(0))
    untrained = policy.init(jax.random.key(1), normaliser=params.get("normaliser"))
    found, start = (
        _measure(task, policy, p, (policy, params), config, _MEASURING_SEED)
        for p in (params, untrained)
    )
    return {
        "return": found["return"],
        "likeliest": found["likeliest"],
        "untrained": start["return"],
        "rounds": returns,
        "params": params,
    }


def _compare(
    task_name: str, student_name: str, config: DistillationConfig, results
) -> dict:
    task, teacher = _teacher(task_name, config, results)

    def run(seed, temperature):
        student, trained = _distil(
            task, student_name, teacher, config, seed, temperature
        )
        measuring = _MEASURING_SEED + seed
        return _measure(task, student, trained, teacher, config, measuring)

    tuning = [run(_TUNING_SEED, t)["return"] for t in config.temperatures]
    temperature = config.temperatures[int(np.argmax(tuning))]
    found = [run(seed, temperature) for seed in range(config.num_seeds)]
    return {
        "temperature": temperature,
        "tuning": np.array(tuning),
        **{name: np.array([run[name] for run in found]) for name in found[0]},
    }


def jobs(config: DistillationConfig) -> list[Job]:
    """The teacher of each task, and every student of it."""
    found = []
    num_runs = len(config.temperatures) + config.num_seeds
    for task in config.tasks:
        # A simulated episode of a thousand steps takes a tenth of a second and more.
        simulated = task in SIMULATED
        seconds = 200 if simulated else 30
        if config.teacher_updates is not None:
            seconds = 10
        compute = functools.partial(_of_teacher, task, config)
        found.append(Job(_job_name(task, TEACHER), 1, seconds, compute))
        seconds = 10 + num_runs * (config.num_steps * 2e-3 + 8 * simulated)
        for student in STUDENTS:
            compute = functools.partial(_compare, task, student, config)
            found.append(Job(_job_name(task, student), num_runs, seconds, compute))
    return found
