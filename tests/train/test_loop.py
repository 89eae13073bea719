"""A stage ends the same however often it is stopped, and says why when it cannot."""

import dataclasses
import json
import math
import types

import jax
import numpy as np
import pytest

import tiny_stage
from pref_jax.data import rows, sources
from pref_jax.train import loop, sharding
from pref_jax.train.checkpoint import Checkpoints, PreemptionGuard
from pref_jax.train.loop import LoopConfig, NonFiniteError, Preempted
from pref_jax.train.optimizer import OptimizerConfig, make_optimizer
from pref_jax.train.state import init_state
from pref_jax.train.step import make_train_step
from tiny_stage import DPO, SHALLOW, make_groups, make_params

CONFIG = LoopConfig(
    num_steps=6, validate_every=3, checkpoint_every=2, best="validation/loss"
)

quick_compiles = pytest.fixture(autouse=True, scope="module")(tiny_stage.quick_compiles)


class Crash(Exception):
    """Stands for whatever ends a process."""


class Watched(sources.OfflineSource):
    """A source that remembers what it handed out, and calls `before(number)` first."""

    def __init__(self, batches, before=lambda number: None):
        super().__init__(batches)
        self.before, self.drawn = before, []

    def __call__(self, state):
        self.before(self.get_state())
        self.drawn.append(self.get_state())
        return super().__call__(state)


class Stage:
    """The pieces of a small stage, compiled once for all tests."""

    def __init__(self):
        self.mesh = sharding.make_mesh(devices=jax.devices()[:2])
        self.traces = 0
        self.groups = [
            dataclasses.replace(
                group,
                extras={
                    "anchor_logps": [np.full(len(r), -2.0) for r in group.responses]
                },
            )
            for group in make_groups(17, seed=0)
        ]
        self.batches = self.make_batches(self.groups)
        params = make_params(0, SHALLOW)
        axes = SHALLOW.param_axes(params)
        self.optimizer = make_optimizer(
            OptimizerConfig(0.01, warmup_steps=2), CONFIG.num_steps, param_axes=axes
        )
        self.shardings = sharding.state_shardings(
            self.mesh, axes, self.init(), self.optimizer
        )

        def reward(*args):
            self.traces += 1
            return DPO.reward(*args)

        method = dataclasses.replace(DPO, reward=reward)
        step = make_train_step(
            method, SHALLOW, self.optimizer, observe=loop.observing(rows.count_batch)
        )
        self.step = sharding.CompiledStep(step, self.mesh, self.shardings)

    def make_batches(self, groups):
        return sources.training_batches(
            groups,
            groups_per_step=4,
            num_steps=CONFIG.num_steps,
            row_length=tiny_stage.ROW_LENGTH,
            seed=0,
            rows_multiple=2,
        )

    def init(self):
        params = make_params(0, SHALLOW)
        return init_state(params, self.optimizer, rng=jax.random.key(1))

    def start(self):
        return jax.device_put(self.init(), self.shardings)

    def fit(self, folder, config=CONFIG, **options):
        arguments = {
            "state": self.start(),
            "step": self.step,
            "source": sources.OfflineSource(self.batches),
            "place": lambda batch: sharding.place_batch(self.mesh, batch),
            "validate": lambda state: {"validation/loss": float(state.step)},
            "guard": PreemptionGuard(),
        } | options
        with jax.set_mesh(self.mesh):
            return loop.fit(name="tiny", folder=folder, config=config, **arguments)

    def saved(self, folder, step=None):
        """The leaves of a saved state, as bits."""
        with Checkpoints(folder / "checkpoints", read_only=True) as checkpoints:
            state = checkpoints.restore(self.start(), step)
        state = dataclasses.replace(state, rng=jax.random.key_data(state.rng))
        return [np.asarray(leaf) for leaf in jax.tree.leaves(state)]

    def assert_same_end(self, folder, other):
        for a, b in zip(self.saved(folder), self.saved(other), strict=True):
            np.testing.assert_array_equal(a, b)
        assert lines(folder) == lines(other)


def lines(folder):
    """The lines of `metrics.jsonl` without what the clock says."""
    text = (folder / "metrics.jsonl").read_text()
    return [
        {k: v for k, v in json.loads(line).items() if not k.startswith("time/")}
        for line in text.splitlines()
    ]


def steps_on_disk(folder):
    return sorted(int(path.name) for path in (folder / "checkpoints").iterdir())


def scripted(values):
    """A validation whose loss by step is given."""
    return lambda state: {"validation/loss": values[int(state.step)]}


def fail_at(number):
    def before(next_number):
        if next_number == number:
            raise Crash

    return before


@pytest.fixture(scope="module")
def stage():
    return Stage()


@pytest.fixture(scope="module")
def straight(stage, tmp_path_factory):
    """The folder of a run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("straight")
    fitted = stage.fit(folder)
    assert (fitted.steps, fitted.best_step) == (6, 3)
    return folder


# --- what a run writes ----------------------------------------------------------------


def test_every_step_has_a_line_and_every_validation_its_own(straight):
    found = lines(straight)
    assert [line["step"] for line in found] == [1, 2, 3, 3, 4, 5, 6, 6]
    assert found[3] == {"step": 3, "validation/loss": 3.0}
    assert found[7] == {"step": 6, "validation/loss": 6.0}
    names = {"loss", "grad_norm", "update_norm", "rewards/accuracy", "logps/chosen"}
    for line in (*found[:3], *found[4:7]):
        assert names < line.keys() and math.isfinite(line["loss"])
    for line in (straight / "metrics.jsonl").read_text().splitlines():
        assert {"time/step", "time/validation"} & json.loads(line).keys()


def test_metrics_are_read_one_step_late(stage, tmp_path):
    # While a step runs the host fetches the next batch: the numbers of the step that
    # was started last are not in the file, unless it was saved.
    seen = []

    def before(number):
        seen.append(len(lines(tmp_path)))

    config = LoopConfig(num_steps=6, validate_every=6, checkpoint_every=4)
    stage.fit(tmp_path, config, source=Watched(stage.batches, before))
    assert seen == [0, 0, 1, 2, 4, 4]


def test_a_step_compiles_once_over_all_runs(stage, straight):
    assert stage.traces == 1


def test_the_step_is_not_allowed_to_move_data(stage, tmp_path):
    with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
        stage.fit(tmp_path, place=lambda batch: batch)


# --- validation, best and patience ----------------------------------------------------

EVERY_STEP = dataclasses.replace(CONFIG, validate_every=1)


@pytest.mark.parametrize(("higher_is_better", "best_step"), [(False, 2), (True, 4)])
def test_the_best_checkpoint_is_kept_beside_the_last(
    stage, tmp_path, higher_is_better, best_step
):
    config = dataclasses.replace(EVERY_STEP, higher_is_better=higher_is_better)
    values = {1: 0.5, 2: 0.1, 3: 0.8, 4: 0.9, 5: 0.3, 6: 0.7}
    fitted = stage.fit(tmp_path, config, validate=scripted(values))
    assert (fitted.steps, fitted.best_step) == (6, best_step)
    assert steps_on_disk(tmp_path) == [best_step, 6]
    abstract = stage.start().params
    best = loop.restore_params(tmp_path, config, abstract, fitted.best_step)
    last = loop.restore_params(tmp_path, config, abstract)
    for params, step in ((best, best_step), (last, 6)):
        expected = stage.saved(tmp_path, step)
        for leaf in jax.tree.leaves(params):
            assert any(np.array_equal(leaf, x) for x in expected)
    assert not np.array_equal(best["mix"], last["mix"])


@pytest.mark.parametrize(
    ("patience", "values", "steps", "best_step"),
    [
        (2, [0.5, 0.4, 0.41, 0.42, 0.1, 0.0], 4, 2),
        (3, [0.5, 0.4, 0.41, 0.42, 0.1, 0.0], 6, 6),
        (1, [0.5, 0.6, 0.1, 0.1, 0.1, 0.1], 2, 1),
        (2, [0.5, 0.6, 0.4, 0.6, 0.3, 0.6], 6, 5),
        (2, [0.5, 0.5, 0.5, 0.1, 0.1, 0.1], 3, 3),  # as good is not better
    ],
)
def test_patience_counts_validations_without_a_better_one(
    stage, tmp_path, patience, values, steps, best_step
):
    config = dataclasses.replace(EVERY_STEP, patience=patience)
    validate = scripted(dict(enumerate(values, start=1)))
    source = Watched(stage.batches)
    fitted = stage.fit(tmp_path, config, validate=validate, source=source)
    assert (fitted.steps, fitted.best_step) == (steps, best_step)
    assert source.drawn == list(range(steps))
    assert lines(tmp_path)[-1]["step"] == steps


def test_patience_counts_in_the_direction_of_the_metric(stage, tmp_path):
    config = dataclasses.replace(EVERY_STEP, patience=2, higher_is_better=True)
    values = dict(enumerate([0.1, 0.2, 0.3, 0.2, 0.1, 0.0], start=1))
    fitted = stage.fit(tmp_path, config, validate=scripted(values))
    assert (fitted.steps, fitted.best_step) == (5, 3)


def test_patience_is_not_forgotten_by_a_restart(stage, tmp_path):
    config = dataclasses.replace(EVERY_STEP, patience=2)
    values = dict(enumerate([0.5, 0.4, 0.6, 0.6, 0.1, 0.0], start=1))
    with pytest.raises(Crash):
        stage.fit(
            tmp_path,
            config,
            validate=scripted(values),
            source=Watched(stage.batches, fail_at(3)),
        )
    fitted = stage.fit(tmp_path, config, validate=scripted(values))
    assert (fitted.steps, fitted.best_step) == (4, 2)


def test_a_best_that_is_not_measured_is_an_error(stage, tmp_path):
    config = dataclasses.replace(CONFIG, best="accuracy")
    message = "`best` is 'accuracy', which the validation does not measure; it has vali"
    with pytest.raises(ValueError, match=message):
        stage.fit(tmp_path, config)


# --- stop and go on -------------------------------------------------------------------


def test_four_steps_are_two_a_restore_and_two(stage, tmp_path):
    config = LoopConfig(num_steps=4, validate_every=4, checkpoint_every=2)
    once, twice = tmp_path / "once", tmp_path / "twice"
    stage.fit(once, config)
    with pytest.raises(Crash):
        stage.fit(twice, config, source=Watched(stage.batches, fail_at(2)))
    assert steps_on_disk(twice) == [2]
    source = Watched(stage.batches)
    assert stage.fit(twice, config, source=source).steps == 4
    assert source.drawn == [2, 3]
    stage.assert_same_end(once, twice)


@pytest.mark.parametrize("number", [1, 2, 3, 5])
def test_a_crash_anywhere_changes_nothing(stage, straight, tmp_path, number):
    with pytest.raises(Crash):
        stage.fit(tmp_path, source=Watched(stage.batches, fail_at(number)))
    fitted = stage.fit(tmp_path)
    assert (fitted.steps, fitted.best_step) == (6, 3)
    stage.assert_same_end(tmp_path, straight)


def test_lines_of_steps_that_were_undone_are_written_anew(stage, tmp_path):
    config = LoopConfig(num_steps=6, validate_every=4, checkpoint_every=6)
    with pytest.raises(Crash):
        stage.fit(tmp_path, config, source=Watched(stage.batches, fail_at(3)))
    undone = lines(tmp_path)
    assert [line["step"] for line in undone] == [1, 2] and not steps_on_disk(tmp_path)
    stage.fit(tmp_path, config)
    # The last step is validated, due or not.
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4, 4, 5, 6, 6]
    assert lines(tmp_path)[:2] == undone


@pytest.mark.parametrize("number", [0, 1, 2, 4])
def test_a_stop_is_saved_and_continued(stage, straight, tmp_path, number):
    guard = PreemptionGuard()

    def before(next_number):
        guard.requested = next_number == number

    source = Watched(stage.batches, before)
    step = number + 1  # the step of that batch is still done
    with pytest.raises(Preempted, match=f"stopped after step {step}, which is saved"):
        stage.fit(tmp_path, source=source, guard=guard)
    assert source.drawn == list(range(step))
    assert steps_on_disk(tmp_path)[-1] == step
    assert lines(tmp_path)[-1]["step"] == step
    source = Watched(stage.batches)
    fitted = stage.fit(tmp_path, source=source)
    assert source.drawn == list(range(step, 6))
    assert (fitted.steps, fitted.best_step) == (6, 3)
    stage.assert_same_end(tmp_path, straight)


def test_a_stop_during_validation_waits_for_the_next_step(stage, straight, tmp_path):
    guard = PreemptionGuard()

    def validate(state):
        guard.requested = True
        return {"validation/loss": float(state.step)}

    with pytest.raises(Preempted, match="stopped after step 4"):
        stage.fit(tmp_path, validate=validate, guard=guard)
    stage.fit(tmp_path)
    stage.assert_same_end(tmp_path, straight)


def test_a_stop_at_the_last_step_finishes(stage, straight, tmp_path):
    guard = PreemptionGuard()

    def before(number):
        guard.requested = number == 5

    assert stage.fit(tmp_path, source=Watched(stage.batches, before), guard=guard)
    stage.assert_same_end(tmp_path, straight)


def test_no_batch_is_repeated_or_skipped(stage, tmp_path):
    trained = []

    def step(state, batch):
        trained.append((int(state.data), np.asarray(batch.record).tolist()))
        return stage.step(state, batch)

    config = LoopConfig(num_steps=6, validate_every=6, checkpoint_every=1)
    for number in (2, 3, 5):
        with pytest.raises(Crash):
            stage.fit(
                tmp_path,
                config,
                step=step,
                source=Watched(stage.batches, fail_at(number)),
            )
    stage.fit(tmp_path, config, step=step)
    expected = [(i, batch.record.tolist()) for i, batch in enumerate(stage.batches)]
    assert trained == expected


def test_seconds_are_those_of_steps_alone_over_all_starts(stage, tmp_path, monkeypatch):
    """By a clock on which a batch takes one second and a validation a hundred."""
    now = [0.0]
    clock = types.SimpleNamespace(perf_counter=lambda: now[0])
    monkeypatch.setattr(loop, "time", clock)

    def source(stop_at=None):
        def before(number):
            fail_at(stop_at)(number)
            now[0] += 1.0

        return Watched(stage.batches, before)

    def validate(state):
        now[0] += 100.0
        return {"validation/loss": float(state.step)}

    config = LoopConfig(num_steps=6, validate_every=3, checkpoint_every=1)
    with pytest.raises(Crash):
        stage.fit(tmp_path, config, source=source(stop_at=4), validate=validate)
    fitted = stage.fit(tmp_path, config, source=source(), validate=validate)
    assert fitted.seconds == 6.0


def test_a_finished_folder_is_read_and_nothing_is_trained(stage, straight):
    def never(*args):
        raise AssertionError("a finished stage was trained again")

    before = (straight / "metrics.jsonl").read_bytes()
    fitted = stage.fit(straight, source=never, step=never, validate=never)
    assert (fitted.steps, fitted.best_step) == (6, 3)
    assert fitted.seconds > 0
    assert (straight / "metrics.jsonl").read_bytes() == before


def test_a_kill_between_the_last_save_and_the_note_of_it_costs_nothing(
    stage, straight, tmp_path
):
    stage.fit(tmp_path)
    (tmp_path / loop.DONE_FILE).unlink()
    source = Watched(stage.batches)
    fitted = stage.fit(tmp_path, source=source)
    assert source.drawn == []
    assert (fitted.steps, fitted.best_step) == (6, 3)
    stage.assert_same_end(tmp_path, straight)


# --- numbers that are not finite ------------------------------------------------------


@pytest.mark.parametrize("number", [2, 3], ids=["step 3", "step 4, which saves"])
@pytest.mark.parametrize("poison", [math.nan, math.inf], ids=str)
def test_the_bad_group_is_named_and_the_last_good_state_kept(
    stage, tmp_path, number, poison
):
    config = LoopConfig(num_steps=6, validate_every=6, checkpoint_every=2)
    seen = {i for past in range(number) for i in stage.batches.indices(past)}
    bad = next(i for i in stage.batches.indices(number) if i not in seen)
    groups = list(stage.groups)
    chosen, rejected = groups[bad].extras["anchor_logps"]
    extras = {"anchor_logps": [np.full_like(chosen, poison), rejected]}
    groups[bad] = dataclasses.replace(groups[bad], extras=extras)
    poisoned = sources.OfflineSource(stage.make_batches(groups))
    with pytest.raises(NonFiniteError) as raised:
        stage.fit(tmp_path, config, source=poisoned)
    message = str(raised.value)
    assert message.startswith(f"step {number + 1}: loss is {poison} on records {bad} (")
    assert "rewards/chosen" in message and "lengths" not in message
    assert "Last good checkpoint: step 2 is kept." in message
    assert steps_on_disk(tmp_path) == [2]
    # With the data mended the run goes on from there.
    resumed = Watched(stage.batches)
    stage.fit(tmp_path, config, source=resumed)
    assert resumed.drawn == [2, 3, 4, 5]
    reference = tmp_path / "reference"
    stage.fit(reference, config)
    stage.assert_same_end(tmp_path, reference)


def test_a_bad_first_step_leaves_nothing(stage, tmp_path):
    state = stage.start()
    params = jax.tree.map(lambda x: x * math.nan, state.params)
    records = ", ".join(map(str, sorted(stage.batches.indices(0))))
    message = f"step 1: loss is nan on records {records} .*none was saved yet"
    with pytest.raises(NonFiniteError, match=message):
        stage.fit(tmp_path, state=dataclasses.replace(state, params=params))
    assert steps_on_disk(tmp_path) == []


def test_a_bad_gradient_of_good_losses_names_the_records_of_its_batch(stage, tmp_path):
    """And not the empty slots, whose record is -1."""
    assert (stage.batches[0].record < 0).any()

    def step(state, batch):
        state, outputs = stage.step(state, batch)
        metrics = outputs["metrics"] | {"grad_norm": np.float32(math.nan)}
        return state, outputs | {"metrics": metrics}

    records = ", ".join(map(str, sorted(stage.batches.indices(0))))
    with pytest.raises(NonFiniteError, match=f"grad_norm is nan on records {records} "):
        stage.fit(tmp_path, step=step)


def test_a_bad_validation_is_not_saved(stage, tmp_path):
    message = "step 3: validation/loss is nan .*Last good checkpoint: step 2 is kept"
    with pytest.raises(NonFiniteError, match=message):
        stage.fit(tmp_path, validate=scripted({3: math.nan}))
    assert steps_on_disk(tmp_path) == [2]


# --- config ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_steps": 0}, "`num_steps` must be at least 1"),
        ({"validate_every": 0}, "`validate_every` must be at least 1"),
        ({"checkpoint_every": -1}, "`checkpoint_every` must be at least 1"),
        ({"keep_last": 0}, "`keep_last` must be at least 1"),
        ({"patience": 0}, "`patience` counts validations"),
        ({"patience": 2, "best": None}, "it needs that metric's name"),
    ],
)
def test_a_config_that_makes_no_sense_is_an_error(fields, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **fields)
