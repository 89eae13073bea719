"""Sends the numbers of a run to Weights & Biases as well, if asked to."""

from __future__ import annotations

import dataclasses
import json
import os
import secrets
from collections.abc import Mapping

from etils import epath

from pref_jax.train import storage

ID_FILE = "wandb.json"


@dataclasses.dataclass(frozen=True)
class WandbConfig:
    """Where the numbers of a run are shown on Weights & Biases.

    Key, server and mode come from the environment, as `wandb` documents them:
    `WANDB_API_KEY`, `WANDB_BASE_URL`, and `WANDB_MODE=offline` to send nothing now and
    `wandb sync` later.
    """

    project: str
    entity: str | None = None  # team or user; None: the key's own
    group: str | None = None  # of runs that belong together
    name: str | None = None  # shown; None: the last two names of the folder


def load_wandb():
    """The package `wandb`.

    Raises:
      ImportError: it is not installed; says what to do.
    """
    try:
        import wandb
    except ImportError as error:
        raise ImportError(
            "numbers can be sent to Weights & Biases only with the package wandb. "
            "Install it with `pip install 'pref_jax[wandb]'`, or leave `wandb` out."
        ) from error
    return wandb


class WandbRun:
    """A run on Weights & Biases that goes on when the run of the folder does.

    Its id lies in the folder, in `wandb.json`. Steps are the metric `step` there, not
    wandb's own counter, which drops what a resumed run does again: on the server such
    steps stand twice, in `metrics.jsonl` once.

    Args:
      config: where.
      folder: of the run, on a disk or `gs://`.
      files: local folder that gets wandb's own files.
      about: plain values, shown as the run's config.
    """

    def __init__(
        self,
        config: WandbConfig,
        folder: epath.Path,
        files: str | os.PathLike,
        about: Mapping | None = None,
    ):
        path = folder / ID_FILE
        if path.exists():
            number = json.loads(path.read_bytes())["id"]
        else:
            number = secrets.token_hex(8)
            storage.write_text(path, json.dumps({"id": number}) + "\n")
        self._run = load_wandb().init(
            project=config.project,
            entity=config.entity,
            group=config.group,
            name=config.name or "/".join(folder.parts[-2:]),
            id=number,
            resume="allow",
            dir=os.fspath(files),
            config=dict(about or {}),
        )
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        """Send the numbers of one step; wandb does so in the background."""
        self._run.log({"step": step, **numbers})

    def close(self, *, failed: bool) -> None:
        """Wait until all is sent, or written in offline mode.

        Args:
          failed: whether the run is shown as such; it can be resumed all the same.
        """
        self._run.finish(exit_code=int(failed))
