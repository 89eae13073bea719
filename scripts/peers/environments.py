"""Environments of the peers: each its own, so that none decides another's versions."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys

PINS = {
    "trl": (
        "torch==2.13.0",
        "trl==1.16.0",
        "transformers==5.24.0",
        "accelerate==1.15.0",
        "datasets==5.2.0",
    ),
    "tunix": (
        "google-tunix==0.1.7",
        "jax==0.10.2",
        "flax==0.12.8",
        "optax==0.2.8",
        "safetensors",
    ),
}
"""Packages of each peer; jax, flax and optax as this repository has them."""

_DONE = "pins.json"


def python_of(folder: pathlib.Path, peer: str) -> str:
    """The Python of a peer's environment, which is made where it is missing.

    Args:
      folder: of all environments.
      peer: a name of `PINS`.

    Raises:
      subprocess.CalledProcessError: the packages cannot be installed.
    """
    place = folder.absolute() / peer
    python, done = place / "bin" / "python", place / _DONE
    if done.is_file() and json.loads(done.read_text()) == list(PINS[peer]):
        return str(python)
    print(f"making the environment of {peer}: some minutes, 1 to 2 GB", flush=True)
    subprocess.run([sys.executable, "-m", "venv", "--clear", place], check=True)
    install = [python, "-m", "pip", "install", "--quiet", *PINS[peer]]
    subprocess.run(install, check=True)
    done.write_text(json.dumps(PINS[peer]) + "\n")
    return str(python)
