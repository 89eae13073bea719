"""A stage returns the parameters that its validation prefers, and trains them once."""

import contextlib
import dataclasses
import functools
import gc
import json
import pathlib
import shutil

import jax
import numpy as np
import pytest

import tiny_stage
from pref_jax.data import rows, sources
from pref_jax.method import objective
from pref_jax.train import loop, optimizer, sharding
from pref_jax.train import stage as stage_lib
from pref_jax.train.checkpoint import PreemptionGuard
from pref_jax.train.loop import LoopConfig, Preempted
from tiny_stage import CONFIG, DPO, MODEL, SHALLOW, make_groups, make_params

LOOP = LoopConfig(
    num_steps=6, validate_every=2, checkpoint_every=3, best="validation/loss"
)

quick_compiles = pytest.fixture(autouse=True, scope="module")(tiny_stage.quick_compiles)


def never(*args):
    raise AssertionError("a finished stage was trained again")


def swapped(groups):
    """The same pairs with the other response chosen: training makes them worse."""
    return [
        dataclasses.replace(
            g, responses=g.responses[::-1], loss_masks=g.loss_masks[::-1]
        )
        for g in groups
    ]


def train(folder, mesh, *, loop_config=LOOP, guard=None, **options):
    config = dataclasses.replace(CONFIG, loop=loop_config)
    guard = guard or PreemptionGuard()
    return tiny_stage.train(folder, mesh=mesh, guard=guard, config=config, **options)


def lines(folder):
    text = (folder / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def assert_same(params, other):
    assert jax.tree.structure(params) == jax.tree.structure(other)
    jax.tree.map(np.testing.assert_array_equal, params, other)


# --- a decoder on eight devices -------------------------------------------------------


@pytest.fixture(scope="module")
def overfitted(tmp_path_factory):
    """A stage that gets worse on its validation set from the start."""
    folder = tmp_path_factory.mktemp("overfitted")
    mesh = sharding.make_mesh(fsdp=2, tensor=2)
    validation = sources.evaluation_batches(
        swapped(make_groups(14, seed=0)),
        groups_per_step=4,
        row_length=tiny_stage.ROW_LENGTH,
        rows_multiple=8,
    )
    assert len(validation) == 4 and not validation[3].valid.all()

    def again(**options):
        return train(folder, mesh, validation=validation, **options)

    params, fitted = again()
    return folder, mesh, params, fitted, again


@pytest.mark.slow
def test_the_best_parameters_are_returned_and_not_the_last(overfitted):
    folder, mesh, params, fitted, _ = overfitted
    losses = {
        line["step"]: line["validation/loss"]
        for line in lines(folder)
        if "validation/loss" in line
    }
    assert list(losses) == [2, 4, 6]
    assert losses[2] < losses[4] < losses[6]
    assert (fitted.steps, fitted.best_step) == (6, 2)
    best, last = (loop.restore_params(folder, LOOP, params, step) for step in (2, 6))
    assert_same(params, best)
    assert not np.array_equal(params["embedding"], last["embedding"])
    # What the log says of step 6 is the mean over all held-out pairs at its parameters.
    batch = sources.evaluation_batches(
        swapped(make_groups(14, seed=0)), groups_per_step=14, row_length=200
    )[0]
    measure = jax.jit(functools.partial(objective, DPO, MODEL))
    loss, weight, _ = measure(jax.device_get(last), make_params(), batch)
    assert weight.sum() == 14
    assert losses[6] == pytest.approx(float((loss * weight).sum() / 14), rel=1e-5)


@pytest.mark.slow
def test_the_parameters_come_back_on_the_mesh(overfitted):
    _, mesh, params, _, _ = overfitted
    shardings = sharding.param_shardings(mesh, MODEL.param_axes(params), params)
    jax.tree.map(lambda x, s: x.sharding == s or pytest.fail(str(s)), params, shardings)


@pytest.mark.slow
def test_a_finished_stage_is_read_and_nothing_is_trained(overfitted):
    _, _, params, fitted, again = overfitted
    found, found_fitted = again(source=never)
    assert_same(found, params)
    assert found_fitted == fitted


# --- what does not depend on the model ------------------------------------------------


def longest(model, params, anchor, batch):
    """An analysis: the longer response of each pair."""
    weight = batch.valid.all(axis=-1).astype(np.float32)
    return {"lengths/longest": (batch.length.max(axis=-1).astype(np.float32), weight)}


class WatchedSource(sources.OfflineSource):
    """Says which batch is drawn next."""

    def __init__(self, batches, before_batch):
        super().__init__(batches)
        self.before_batch = before_batch

    def __call__(self, state):
        self.before_batch(self.get_state())
        return super().__call__(state)


class CountingSource(WatchedSource):
    """Counts the buffers that look like a parameter, whenever a batch is drawn."""

    def __init__(self, batches, params, before_batch):
        super().__init__(batches, before_batch)
        self.like, self.counts = params["mix"].shape, []
        self.held = self.count()

    def count(self):
        gc.collect()
        return sum(x.shape == self.like for x in jax.live_arrays())

    def __call__(self, state):
        self.counts.append(self.count() - self.held)
        return super().__call__(state)


@pytest.fixture(scope="module")
def lives(tmp_path_factory):
    """One stage straight; one stopped after two steps and continued here, and there."""
    root = tmp_path_factory.mktemp("lives")
    config = LoopConfig(num_steps=6, validate_every=4, checkpoint_every=6)
    method = dataclasses.replace(DPO, analyses=(longest,))
    params = make_params(0, SHALLOW)

    def live(name, stop_at=None, num_devices=1):
        mesh = sharding.make_mesh(fsdp=num_devices, devices=jax.devices()[:num_devices])
        guard = PreemptionGuard()

        def before_batch(number):
            guard.requested = number == stop_at

        stage_config = dataclasses.replace(CONFIG, loop=config)
        batches = tiny_stage.make_batches(mesh, stage_config)
        source = CountingSource(batches, params, before_batch)
        trained, fitted = None, None
        with contextlib.suppress(Preempted):
            trained, fitted = train(
                root / name,
                mesh,
                loop_config=config,
                guard=guard,
                method=method,
                model=SHALLOW,
                params=params,
                anchor=params,
                source=source,
            )
        return Life(root / name, config, trained, fitted, source.counts)

    straight, stopped = live("straight"), live("stopped", stop_at=1)
    for name in ("resumed", "elsewhere"):
        shutil.copytree(stopped.folder, root / name)
    return {
        "straight": straight,
        "stopped": stopped,
        "resumed": live("resumed"),
        "elsewhere": live("elsewhere", num_devices=2),
    }


@dataclasses.dataclass(frozen=True)
class Life:
    """What one process did of a stage."""

    folder: pathlib.Path
    config: LoopConfig
    params: dict | None
    fitted: loop.Fitted | None
    counts: list[int]  # parameter-sized buffers beside the caller's, at each batch


def test_nothing_is_compiled_again_in_200_steps(tmp_path):
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    loop_config = LoopConfig(num_steps=200, validate_every=20, checkpoint_every=60)
    stage_config = dataclasses.replace(CONFIG, loop=loop_config)
    params = make_params(0, SHALLOW)
    compiled, before_step = [], {}

    def count(event, duration, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(duration)

    def before_batch(number):
        before_step[int(number)] = len(compiled)

    batches = tiny_stage.make_batches(mesh, stage_config)
    jax.monitoring.register_event_duration_secs_listener(count)
    try:
        train(
            tmp_path,
            mesh,
            loop_config=loop_config,
            model=SHALLOW,
            params=params,
            anchor=params,
            source=WatchedSource(batches, before_batch),
        )
    finally:
        jax.monitoring.unregister_event_duration_listener(count)
    assert before_step[0] < before_step[70]  # it does count; two checkpoints by then
    assert before_step[70] == before_step[199]


def test_a_folder_keeps_to_the_config_that_it_was_started_with(tmp_path):
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    stage_lib.write_json(
        tmp_path / stage_lib.CONFIG_FILE,
        stage_lib.as_read_back(
            dataclasses.asdict(dataclasses.replace(CONFIG, loop=LOOP))
        ),
    )
    longer = dataclasses.replace(LOOP, num_steps=8)
    with pytest.raises(ValueError, match="loop.num_steps: saved 6, now 8"):
        train(tmp_path, mesh, loop_config=longer)
    assert not (tmp_path / "checkpoints").exists()


def test_a_stage_that_was_begun_on_other_data_is_refused(tmp_path):
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    description = json.loads(SHALLOW.description) | {
        **{"method": DPO.name, "paper": DPO.paper, "seed": 0, "base": None},
        "data": rows.measure(make_groups(8, seed=0)).digest(),
    }
    stage_lib.write_json(tmp_path / stage_lib.MODEL_FILE, description)
    others = rows.measure(make_groups(8, seed=1)).digest()
    with pytest.raises(ValueError, match="on other data: data: saved '"):
        train(tmp_path, mesh, model=SHALLOW, data=others)
    same = rows.measure(make_groups(8, seed=0)).digest()
    assert same == description["data"]
    turned = rows.measure(make_groups(8, seed=0)[::-1]).digest()
    assert len({same, turned, others}) == 3
    assert not (tmp_path / "checkpoints").exists()


def test_without_a_best_the_last_parameters_are_returned(lives):
    life = lives["straight"]
    assert (life.fitted.steps, life.fitted.best_step) == (6, None)
    last = loop.restore_params(life.folder, life.config, life.params, 6)
    assert_same(life.params, last)
    assert not np.array_equal(last["mix"], make_params(0, SHALLOW)["mix"])


def test_a_stopped_stage_goes_on_to_the_same_end(lives):
    assert lives["stopped"].params is None
    assert [len(life.counts) for life in lives.values()] == [6, 2, 4, 4]
    assert_same(lives["resumed"].params, lives["straight"].params)
    assert lives["resumed"].fitted.steps == lives["straight"].fitted.steps


def test_a_stage_goes_on_to_the_same_end_on_another_mesh(lives):
    found, expected = lives["elsewhere"].params, lives["straight"].params
    assert len(found["mix"].sharding.device_set) == 2
    for name, leaf in expected.items():
        # The bound is ours: Adam turns rounding of small gradients into larger steps.
        difference = np.linalg.norm(np.asarray(found[name]) - np.asarray(leaf))
        assert difference <= 1e-4 * np.linalg.norm(leaf)
    for line, wanted in zip(
        lines(lives["elsewhere"].folder), lines(lives["straight"].folder), strict=True
    ):
        assert line.keys() == wanted.keys()
        if "loss" in line:
            assert line["loss"] == pytest.approx(wanted["loss"], rel=1e-4)


@pytest.mark.parametrize("name", ["straight", "stopped", "resumed"])
def test_a_stage_holds_one_state_with_one_anchor(lives, name):
    # Policy, two moments of the optimiser and anchor; and one of `tiny_stage.train`
    # itself. Before the first save: on CPU a save keeps the buffers that it wrote.
    assert lives[name].counts[:2] == [4 + 1, 4 + 1]


def test_analyses_are_measured_in_the_middle_and_at_the_end(lives):
    expected = np.mean([max(map(len, g.responses)) for g in make_groups(6, seed=1)])
    found = {
        line["step"]: line["validation/lengths/longest"]
        for line in lines(lives["resumed"].folder)
        if "validation/lengths/longest" in line
    }
    assert found == pytest.approx({4: expected, 6: expected})


def test_the_schedule_spans_the_stage(lives):
    rate = optimizer.make_schedule(CONFIG.optimizer, 6)
    found = [
        line["learning_rate"]
        for line in lines(lives["resumed"].folder)
        if "learning_rate" in line
    ]
    assert found == pytest.approx([float(rate(done)) for done in range(6)])


class Stop(Exception):
    """Ends a stage where the loop would begin."""


def test_what_the_loop_is_given(tmp_path, monkeypatch):
    found, mesh = [], sharding.make_mesh(devices=jax.devices()[:1])

    def fit(state, **options):
        found.append((options["flops_per_token"], jax.random.key_data(state.rng)))
        raise Stop

    def make_optimizer(config, num_steps, **options):
        assert (config, num_steps) == (CONFIG.optimizer, LOOP.num_steps)
        return optimizer.make_optimizer(config, num_steps, **options)

    monkeypatch.setattr(stage_lib.loop, "fit", fit)
    monkeypatch.setattr(stage_lib, "make_optimizer", make_optimizer)
    params = make_params(0, SHALLOW)
    for anchor in ((), params):
        with pytest.raises(Stop):
            train(tmp_path, mesh, model=SHALLOW, anchor=anchor, seed=7)
    # Forward, and backward at twice its cost; the anchor's forward if it is live.
    assert [flops / SHALLOW.flops_per_token for flops, _ in found] == [3.0, 4.0]
    for _, key in found:
        np.testing.assert_array_equal(key, jax.random.key_data(jax.random.key(7)))


def test_a_step_is_cut_into_the_microbatches_of_the_config(tmp_path):
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    source = sources.OfflineSource(tiny_stage.make_batches(mesh))
    config = dataclasses.replace(CONFIG, num_microbatches=3)
    with pytest.raises(ValueError, match="2 rows cannot be split into 3 micro-batches"):
        tiny_stage.train(
            tmp_path,
            mesh=mesh,
            guard=PreemptionGuard(),
            config=config,
            source=source,
            model=SHALLOW,
        )


@pytest.mark.parametrize("field", ["groups_per_step", "num_microbatches"])
def test_a_config_that_makes_no_sense_is_an_error(field):
    with pytest.raises(ValueError, match="must be at least 1"):
        dataclasses.replace(CONFIG, **{field: 0})
