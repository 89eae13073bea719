"""The command line of an experiment: its presets, its errors, its exit codes."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Mapping

from pref_jax import processes
from pref_jax.train import run as run_lib
from pref_jax.train import storage
from pref_jax.train.checkpoint import PREEMPTED_EXIT_CODE
from pref_jax.train.logging import configure_logging
from pref_jax.train.loop import NonFiniteError, Preempted

_logger = logging.getLogger("pref_jax.experiments")


def run_command(
    presets: Mapping[str, object],
    run_config: Callable,
    describe: Callable[[object, object], str],
    *,
    default: str,
    description: str,
) -> None:
    """What `main` of an experiment does.

    What a user can act on ends the program with one line, a run that was told to stop
    with `PREEMPTED_EXIT_CODE`; anything else is a mistake of ours and shows where.

    Args:
      presets: configs by name.
      run_config: runs, or continues, the run of a config.
      describe: (config, what `run_config` returned) -> the last lines of the output.
      default: the preset without `--preset`.
      description: of the experiment, for `--help`.
    """
    processes.initialize()
    configure_logging()
    try:
        config = run_lib.parse_config(presets, default=default, description=description)
        result = run_config(config)
    except Preempted as stop:
        print(f"{stop}; the same command continues.", file=sys.stderr)
        raise SystemExit(PREEMPTED_EXIT_CODE) from None
    except KeyboardInterrupt:  # while data is read, or a second Ctrl-C
        raise SystemExit("stopped; the same command continues.") from None
    except (ValueError, ImportError, NonFiniteError) as error:
        _logger.debug("where it happened", exc_info=True)
        raise SystemExit(f"error: {error}") from None
    if processes.is_first():
        print(describe(config, result))
    processes.wait("the end")


def where_is(page) -> str:
    """A report's path, and its address for a browser if it is on this disk."""
    if storage.is_object_store(page):
        return f"report: {page}"
    return f"report: {page}\n        {page.resolve().as_uri()}"
