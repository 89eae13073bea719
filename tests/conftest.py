"""What every test sees: eight CPU devices, float32 matmuls, strict shapes, no hub."""

import gc
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

# Before jax is imported, and for the processes that tests start.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["HF_HUB_OFFLINE"] = "1"

import hypothesis  # noqa: E402
import jax  # noqa: E402
import pytest  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "float32")

# The same examples on every machine; no deadline, since the first one compiles.
hypothesis.settings.register_profile(
    "pref_jax",
    derandomize=True,
    deadline=None,
    max_examples=20,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("pref_jax")


def pytest_terminal_summary(terminalreporter):
    """Says whether pages were looked at in a browser."""
    counts = dict.fromkeys(("passed", "failed", "skipped"), 0)
    for kind in counts:
        for found in terminalreporter.getreports(kind):
            # A whole module that was skipped has no keywords.
            counts[kind] += "browser" in getattr(found, "keywords", ())
    ran, skipped = counts["passed"] + counts["failed"], counts["skipped"]
    if ran or skipped:
        done = f"{ran} tests of pages ran" if ran else "no test of a page ran"
        terminalreporter.write_line(f"browser: {done}, {skipped} skipped")


@pytest.fixture(autouse=True, scope="module")
def small_heap():
    """What earlier modules left behind is looked at by no later collection of garbage.

    Each would pass over all of it: towards the end they took seconds.
    """
    yield
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def shared_data() -> Callable[[str], Path]:
    """`shared_data(name)`: that folder of `../shared/data`, or the test is skipped."""

    def find(name: str) -> Path:
        folder = ROOT.parent / "shared" / "data" / name
        if not folder.is_dir():
            pytest.skip(f"no ../shared/data/{name} beside the repository")
        return folder

    return find


@pytest.fixture(scope="session")
def tracked_files() -> list[Path]:
    """The files of the repository, relative to its root, as git knows them."""
    command = ["git", "ls-files", "-z"]
    try:
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs git and a clone: lists the tracked files")
    return [Path(name) for name in listed.stdout.decode().split("\0") if name]
