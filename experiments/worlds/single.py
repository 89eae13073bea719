"""A run of one pipeline: its folder and tokenizer, its record, its report."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
from collections.abc import Iterator, Sequence

from experiments.worlds.pipeline import Pipeline, save_tokenizer
from pref_jax import processes, report
from pref_jax.data.templates import TextEncoder
from pref_jax.models.lora import LoraConfig
from pref_jax.train import run as run_lib
from pref_jax.train.checkpoint import PreemptionGuard
from pref_jax.train.loop import Watch
from pref_jax.types import Model

_logger = logging.getLogger("pref_jax.experiments")


ASIDE = ("profile", "profile_steps", "wandb", "compile_cache", "cache")
"""Fields of a config that change nothing of what is computed: a run that was begun
without a profile may be continued with one."""


@contextlib.contextmanager
def open_pipeline(
    config,
    *,
    mesh,
    model: Model,
    encoder: TextEncoder,
    notes: Sequence[str],
    watch: Watch,
    max_new_tokens: int,
    lora: LoraConfig | None = None,
) -> Iterator[Pipeline]:
    """The pipeline of a config, in a new run folder or that of an unfinished run.

    Args:
      config: a dataclass with `name`, `root`, `seed`, `row_length` and `long_groups`.
      mesh: of `sharding.make_mesh`.
      model: the functions.
      encoder: text <-> ids; its tokenizer is kept beside the models.
      notes: what was read and left out, for the log.
      watch: what is looked at while stages train.
      max_new_tokens: of a sampled response.
      lora: adapters that stages train, or None.
    """
    values = dataclasses.asdict(config)
    with (
        run_lib.open_run(
            config.root, config=values, name=config.name, aside=ASIDE
        ) as folder,
        PreemptionGuard() as guard,
    ):
        _logger.info("run folder: %s", folder)
        processes.on_first(functools.partial(save_tokenizer, encoder, folder))
        for note in notes:
            _logger.info("%s", note)
        yield Pipeline(
            folder=folder,
            guard=guard,
            mesh=mesh,
            model=model,
            encoder=encoder,
            seed=config.seed,
            max_new_tokens=max_new_tokens,
            row_length=config.row_length,
            long_groups=config.long_groups,
            lora=lora,
            watch=watch,
        )


def keep_record(
    experiment: str,
    config,
    pipeline: Pipeline,
    *,
    results: dict,
    seconds: float,
    notes: Sequence[str],
    page: report.Report | None = None,
) -> None:
    """Write `record.json`, and `report.html` if there is a page.

    Args:
      experiment: name in the record.
      config: of the run.
      pipeline: of the run, whose notes stand behind `notes`.
      results: plain values.
      seconds: of the last start.
      notes: as in `open_pipeline`.
      page: the report, or None.
    """
    record = {
        "experiment": experiment,
        "results": results,
        "config": dataclasses.asdict(config),
        "environment": run_lib.environment(),
        "seconds": seconds,
        "starts": run_lib.count_starts(pipeline.folder),
        "notes": [*notes, *pipeline.notes],
    }
    if page is not None:
        record["report"] = report.to_json(page)

    def write() -> None:
        if page is not None:
            report.write_report(page, pipeline.folder / "report.html")
        run_lib.write_json(pipeline.folder / run_lib.RECORD_FILE, record)

    processes.on_first(write)
