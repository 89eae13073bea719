"""Save and restore train states with Orbax, and stop cleanly when asked to.

A run keeps its checkpoints in `checkpoints/`, one folder a step. Orbax writes a
checkpoint into a temporary folder and commits it in one move, so a step that is listed
is complete, whatever killed the process while it was saved.
"""

from __future__ import annotations

import json
import math
import os
import signal
from typing import Self

import jax
import jax.numpy as jnp
from orbax.checkpoint import v1 as ocp

from pref_jax.checks import describe
from pref_jax.train import storage

PREEMPTED_EXIT_CODE = 75
"""What a run exits with after a clean stop that wants a restart (BSD `EX_TEMPFAIL`)."""

_DIFFERENCES_SHOWN = 5


class Checkpoints:
    """The checkpoints of one run: the newest, the best, and the way back to both.

    A state is any pytree of `jax.Array`s, typed random keys among them. On several
    hosts every process calls the same methods with the same arguments.

    Args:
      folder: `checkpoints/` of the run, on a disk or `gs://`.
      keep_last: how many of the newest checkpoints stay; at least 1.
      keep_best: how many of the best stay beside them. Needs `metric`.
      metric: name of the metric that ranks checkpoints. A checkpoint that was saved
        without metrics is never among the best, nor is NaN.
      higher_is_better: direction of `metric`.
      read_only: open the checkpoints of a run that may still be training: nothing is
        cleaned up, saved or deleted. Otherwise the temporary folders that a killed
        run left behind are removed.

    Raises:
      ValueError: the numbers to keep make no sense.
      FileNotFoundError: `read_only` and there is no such folder.

    >>> import jax.numpy as jnp, tempfile
    >>> with Checkpoints(tempfile.mkdtemp() + "/checkpoints") as checkpoints:
    ...     checkpoints.save(10, {"w": jnp.ones(3)}, meta={"rows_read": 640})
    ...     restored = checkpoints.restore({"w": jnp.zeros(3)})
    ...     print(checkpoints.restore(jnp.zeros(3), field="w"))  # of all fields, this
    ...     print(restored["w"], checkpoints.latest_step(), checkpoints.restore_meta())
    [1. 1. 1.]
    [1. 1. 1.] 10 {'rows_read': 640}
    """

    def __init__(
        self,
        folder,
        *,
        keep_last: int = 1,
        keep_best: int = 0,
        metric: str | None = None,
        higher_is_better: bool = True,
        read_only: bool = False,
    ):
        if keep_last < 1 or keep_best < 0 or (keep_best > 0) != (metric is not None):
            raise ValueError(
                f"Checkpoints need `keep_last` >= 1, and `metric` together with "
                f"`keep_best` >= 1 or neither; got keep_last={keep_last}, "
                f"keep_best={keep_best}, metric={metric!r}."
            )
        self.folder = storage.as_folder(folder)
        if not storage.is_object_store(self.folder):  # epath would break those
            self.folder = self.folder.absolute()
        if read_only and not self.folder.exists():
            raise FileNotFoundError(
                f"There is no folder {self.folder} to read checkpoints from. Give the "
                f"`checkpoints` folder of a run."
            )
        self._metric = metric
        self._sign = 1.0 if higher_is_better else -1.0
        self._read_only = read_only
        self._saving = None  # step of the save in progress
        policies = ocp.training.preservation_policies
        self._checkpointer = ocp.training.Checkpointer(
            self.folder,
            preservation_policy=policies.AnyPreservationPolicy(
                [
                    policies.LatestN(keep_last),
                    policies.BestN(
                        n=keep_best,
                        get_metric_fn=self._rank,
                        keep_checkpoints_without_metrics=False,
                    ),
                ]
            ),
            cleanup_tmp_directories=not read_only,
        )

    def _rank(self, metrics: dict[str, float]) -> float:
        value = metrics[self._metric]
        return -math.inf if math.isnan(value) else self._sign * value

    def save(
        self,
        step: int,
        state,
        *,
        metrics: dict[str, float] | None = None,
        meta: dict | None = None,
    ) -> None:
        """Write `state` in the background; return once it is copied off the device.

        The arrays may be donated or deleted as soon as this returns. A save that is
        still being written is waited for first, and an error it met is raised here.

        Args:
          step: number of the checkpoint; greater than every step saved so far.
          state: pytree of `jax.Array`s.
          metrics: host numbers that rank the checkpoint.
          meta: small dictionary of plain JSON values, read back by `restore_meta`.

        Raises:
          ValueError: the step is not after the latest, the ranking metric is missing,
            `meta` would change on its way through JSON, or this is `read_only`.
          TypeError: a leaf of `state` is not a `jax.Array`.
          RuntimeError: the save before this one failed.
        """
        if self._read_only:
            raise ValueError(f"{self.folder} was opened `read_only`; cannot save.")
        latest = self.latest_step()
        if latest is not None and step <= latest:
            raise ValueError(
                f"Cannot save step {step}: {self.folder} already holds step {latest}. "
                f"Resume from the latest step, or go on in a new run folder."
            )
        if metrics is not None:
            metrics = {name: float(value) for name, value in metrics.items()}
            if self._metric is not None and self._metric not in metrics:
                raise ValueError(
                    f"`metrics` of step {step} lack {self._metric!r}, which ranks the "
                    f"checkpoints; got {sorted(metrics)}. Leave `metrics` out where "
                    f"it was not measured."
                )
        if not _survives_json(meta):
            raise ValueError(
                f"`meta` must hold only what JSON keeps as it is (dict with string "
                f"keys, list, str, int, finite float, bool, None); got {meta!r}."
            )
        self._checkpointer.save_async(
            step,
            state,
            force=True,
            metrics=metrics,
            # Orbax casts dtypes on loading and forgets which random generator a key
            # belongs to: the leaves as they were saved are what a restore is held to.
            custom_metadata={"leaves": _describe_leaves(state), "meta": meta},
        )
        self._saving = step

    def restore(self, abstract_state, step: int | None = None, *, field=None):
        """Read a state into the shapes, dtypes and shardings of `abstract_state`.

        The mesh may be another than the one that saved.

        Args:
          abstract_state: the state that is needed, as `jax.ShapeDtypeStruct`s with
            shardings; arrays serve as well, their values are not used.
          step: which checkpoint; the latest when None.
          field: read this one field of the saved state, and nothing else;
            `abstract_state` is then that of the field.

        Returns:
          A tree of the same types as `abstract_state`.

        Raises:
          FileNotFoundError: there is no such checkpoint.
          ValueError: the checkpoint holds other leaves, shapes or dtypes, or a leaf of
            `abstract_state` has no sharding.
          TypeError: a leaf of `abstract_state` does not describe an array.
        """
        wanted = abstract_state if field is None else {field: abstract_state}
        needed = _describe_leaves(wanted)
        checkpoint = self._find(step)
        saved = self._metadata(checkpoint)["leaves"]
        if field is not None:
            saved = {k: v for k, v in saved.items() if k.split("/")[0] == field}
        _check_same_leaves(saved, needed, checkpoint.path)
        context = ocp.Context()
        context.pytree.loading.partial_load = field is not None
        with context:
            restored = ocp.load(checkpoint.path, jax.tree.map(_abstract, wanted))
        return restored if field is None else restored[field]

    def restore_meta(self, step: int | None = None) -> dict | None:
        """The `meta` that was saved beside the state of `step` (the latest when None).

        Raises:
          FileNotFoundError: there is no such checkpoint.
        """
        return self._metadata(self._find(step))["meta"]

    def saved_shapes(self, field: str, step: int | None = None) -> dict:
        """Shapes and dtypes of a field of a saved state, a nested dict of arrays.

        Args:
          field: of the state, such as `params`.
          step: which checkpoint; the latest when None.

        Raises:
          FileNotFoundError: there is no such checkpoint.
        """
        shapes: dict = {}
        for path, described in self._metadata(self._find(step))["leaves"].items():
            first, *names = path.split("/")
            if first == field:
                tree = shapes
                for name in names[:-1]:
                    tree = tree.setdefault(name, {})
                tree[names[-1]] = _read_description(described)
        return shapes

    def latest_step(self) -> int | None:
        """The newest complete checkpoint; waits for a save that is being written."""
        checkpoints = self._complete()
        return checkpoints[-1].step if checkpoints else None

    def best_step(self) -> int | None:
        """The best complete checkpoint by `metric`; of equals the newest.

        Raises:
          ValueError: no metric ranks these checkpoints.
        """
        if self._metric is None:
            raise ValueError(
                "`best_step` needs a metric: give `metric` and `keep_best` to "
                "`Checkpoints`."
            )
        measured = [c for c in self._complete() if c.metrics is not None]
        best = max(
            measured, key=lambda c: (self._rank(c.metrics), c.step), default=None
        )
        return None if best is None else best.step

    def wait(self) -> None:
        """Return once the save in progress is complete on disk.

        Raises:
          RuntimeError: it failed; the checkpoints before it are untouched.
        """
        step, self._saving = self._saving, None
        if step is None:
            return
        try:
            self._checkpointer.wait()
        except Exception as error:
            raise RuntimeError(
                f"Saving step {step} to {self.folder} failed: {error}\nEarlier "
                f"checkpoints are untouched. Check the space and rights of the disk."
            ) from error

    def close(self) -> None:
        """Finish the save in progress and release what Orbax holds."""
        try:
            self.wait()
        finally:
            self._checkpointer.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _complete(self):
        """Checkpoints in the order of their steps, none of them half-written."""
        self.wait()  # Orbax lists a step from the moment its save begins
        if self._read_only:
            self._checkpointer.reload()
        return self._checkpointer.checkpoints

    def _find(self, step: int | None):
        complete = {c.step: c for c in self._complete()}
        if step is None and complete:
            step = max(complete)
        if step not in complete:
            raise FileNotFoundError(
                f"{self.folder} holds no complete checkpoint"
                + (f" of step {step}" if step is not None else "")
                + f"; its steps: {list(complete) or 'none'}."
            )
        return complete[step]

    def _metadata(self, checkpoint) -> dict:
        found = self._checkpointer.checkpointables_metadata(checkpoint.step)
        if "leaves" not in (found.custom_metadata or {}):
            raise ValueError(
                f"{checkpoint.path} was not written by `Checkpoints.save`: it does not "
                f"say which leaves it holds."
            )
        return found.custom_metadata


class PreemptionGuard:
    """Turns SIGTERM and the first Ctrl-C into an answer that the training loop polls.

    A second Ctrl-C raises `KeyboardInterrupt` at once. Leaving the block puts the old
    handlers back. Enter it in the main thread, and after `jax.distributed.initialize`.

    Attributes:
      requested: whether to stop; on several processes, whether they agreed to.

    >>> with PreemptionGuard() as guard:
    ...     guard.agreed()
    False
    """

    def __init__(self):
        self.requested = False
        self._interrupted = False
        self._asked = 0

    def __enter__(self) -> Self:
        handlers = {signal.SIGINT: self._interrupt}
        # On several processes jax holds SIGTERM, to tell the other ones of it.
        if jax.process_count() == 1:
            handlers[signal.SIGTERM] = self._terminate
        self._previous = {n: signal.signal(n, h) for n, h in handlers.items()}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._previous.items():
            # None: the old handler was not Python's, and Python cannot put it back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _terminate(self, number, frame) -> None:
        self.requested = True

    def _interrupt(self, number, frame) -> None:
        if self._interrupted:
            raise KeyboardInterrupt
        self._interrupted = True
        os.kill(os.getpid(), signal.SIGTERM)

    def agreed(self) -> bool:
        """Whether to stop now: the same answer on every process.

        A signal reaches hosts steps apart, or only one of them, and a host that leaves
        the loop alone leaves the others hanging in a collective. So the processes agree
        on a later step, in the background: this does not wait for them.

        On several processes every one must ask equally often, after every step and
        every part of other work, or it may miss the one that was agreed on.
        """
        if jax.process_count() > 1 and not self.requested:
            from jax.experimental import multihost_utils

            # The point that is agreed on lies ahead of all, so it must never go back,
            # as the steps of a next stage would.
            self._asked += 1
            asked = self._asked
            self.requested = multihost_utils.reached_preemption_sync_point(asked)
        return self.requested


def _abstract(leaf) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)


def _describe_leaves(tree) -> dict[str, str]:
    """Path -> dtype and shape of every leaf, such as `params/w` -> `f32[4, 8]`."""
    leaves = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if not isinstance(leaf, jax.Array | jax.ShapeDtypeStruct):
            raise TypeError(
                f"State leaf {name} must be a jax.Array (or, for restoring, a "
                f"jax.ShapeDtypeStruct); got {type(leaf).__name__}. Put it on the "
                f"devices with `jax.device_put`, or keep it in `meta`."
            )
        if leaf.sharding is None:
            raise ValueError(
                f"State leaf {name} says no sharding: where should it be restored to? "
                f"Give `jax.ShapeDtypeStruct(shape, dtype, sharding=...)`."
            )
        leaves[name] = describe(leaf)
    return leaves


def _read_description(described: str) -> jax.ShapeDtypeStruct:
    """What `checks.describe` says of an array, such as `bf16[4, 8]`, read back."""
    dtype, _, sizes = described.rstrip("]").partition("[")
    shape = tuple(int(size) for size in sizes.split(",") if size)
    kind = dtype.rstrip("0123456789")
    names = {"f": "float", "bf": "bfloat", "i": "int", "u": "uint"}
    dtype = names.get(kind, kind) + dtype[len(kind) :]
    return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))


def _check_same_leaves(saved: dict, needed: dict, path) -> None:
    """Raise with the first differences unless both name the same leaves."""
    # Missing leaves stand in their places in the order of the state asked for.
    names = list(needed) + [name for name in saved if name not in needed]
    lines = [
        f"  {name}: saved {saved.get(name, 'nothing')}, "
        f"needed {needed.get(name, 'nothing')}"
        for name in names
        if saved.get(name) != needed.get(name)
    ]
    if lines:
        rest = len(lines) - _DIFFERENCES_SHOWN
        raise ValueError(
            f"Checkpoint {path} does not fit the state asked for: {len(lines)} of "
            f"{len(names)} leaves differ.\n"
            + "\n".join(lines[:_DIFFERENCES_SHOWN])
            + (f"\n  and {rest} more" if rest > 0 else "")
            + "\nBuild the model and the optimiser with the config that saved it, or "
            "start in a new run folder. To change a dtype, restore the saved one and "
            "cast."
        )


def _survives_json(value) -> bool:
    try:
        return json.loads(json.dumps(value, allow_nan=False)) == value
    except (TypeError, ValueError):
        return False
