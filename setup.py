"""Package metadata. The version stands in `pref_jax/__init__.py` alone."""

import re
from pathlib import Path

from setuptools import find_packages, setup

PACKAGE = Path(__file__).parent / "pref_jax" / "__init__.py"

setup(
    name="pref_jax",
    version=re.search(r'^__version__ = "(.+)"$', PACKAGE.read_text(), re.M)[1],
    description="Preference optimisation of language and diffusion models in JAX.",
    author="The pref_jax authors",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["pref_jax", "pref_jax.*"]),
    package_data={"": ["*.jinja"]},
    install_requires=[
        "jax>=0.10.2,<0.13",  # pip takes 0.10.2 on Python 3.11: 0.11 needs 3.12
        "flax>=0.12.8,<0.13; python_version < '3.12'",
        "flax>=0.12.9,<0.13; python_version >= '3.12'",  # 0.12.8 fails on jax 0.11.1
        "optax>=0.2.8,<0.3",
        "orbax-checkpoint>=0.12.8,<0.13",
        "grain>=0.2.18,<0.3",
        "tensorflow-datasets>=4.9.10,<5",
        "importlib_resources",  # tensorflow-datasets needs it and does not say so
        "array_record>=0.8",
        "immutabledict",
        "pyarrow",
        "zstandard",
        "transformers>=5.12,<6",
        "jinja2>=3.1",  # chat templates of transformers need it and do not say so
        "tokenizers>=0.22",
        "safetensors>=0.7",
        "numpy>=2.0",
        "packaging",
        "scipy",
        "tyro",
        "jaxtyping",
        "rich",
        "matplotlib",
        "tensorboardX",
    ],
    extras_require={
        "test": [
            *("pytest", "pytest-xdist", "hypothesis", "ruff>=0.17,<0.18"),
            *("nbclient", "nbformat", "ipykernel"),
        ],
        "parity": [
            *("torch==2.13.0", "trl==1.16.0", "peft==0.21.2"),
            *("rlax==0.1.9", "scikit-learn"),
        ],
        "tpu": ["jax[tpu]", "gcsfs>=2026.4"],  # gcsfs: what lies on gs://
        "wandb": ["wandb>=0.19"],
        "envs": ["gymnasium[mujoco]>=1.3,<2"],  # HalfCheetah-v5, Hopper-v5
        "cuda": ["jax[cuda12]"],  # runs on newer drivers too; cuda13 would not on older
    },
)
