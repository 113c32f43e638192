"""Which checkpoint of which run a path means."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from stacking_jax.errors import UserError
from stacking_jax.interop.tensor_files import read_json
from stacking_jax.paths import local_path
from stacking_jax.training.checkpoints import Checkpoints
from stacking_jax.training.config import TrainConfig
from stacking_jax.training.growing import refuse_open_ramp
from stacking_jax.training.run_directory import read_config

FOREIGN = "hugging_face"
"""Folder of an imported run with what came beside the weights: tokenizer, configuration."""


@dataclasses.dataclass(frozen=True)
class RunCheckpoint:
    """One checkpoint of a run.

    Attributes:
      run_dir: the run.
      folder: the checkpoint's own.
      config: the run's configuration.
      meta: the JSON object beside the state.
    """

    run_dir: Path
    folder: Path
    config: TrainConfig
    meta: dict

    @property
    def step(self) -> int:
        return int(self.meta["step"])

    @property
    def depth(self) -> int:
        """Stored layers, which may be fewer than the run's final depth."""
        return int(self.meta["depth"])


def is_run(path: str | Path) -> bool:
    """Whether `path` is a run directory or one checkpoint in it."""
    path = Path(path)
    return _is_checkpoint(path) or (path / "checkpoints").is_dir()


def find(path: str | Path, step: int | None = None) -> RunCheckpoint:
    """The checkpoint of a run directory, or that which `path` itself is.

    Args:
      path: RUN or RUN/checkpoints/STEP.
      step: which one; None for the newest.

    Raises:
      UserError: if there is none.
    """
    path = local_path(path)
    if _is_checkpoint(path):
        if step not in (None, int(path.name)):
            raise UserError(f"{path} is checkpoint {path.name}, but step {step} is asked for")
        step, path = int(path.name), path.parents[1]
    config = read_config(path)
    directory = path / "checkpoints"
    if not directory.is_dir():
        raise UserError(f"{path} holds no checkpoint yet")
    checkpoints = Checkpoints(directory, read_only=True, digests=config.checkpoint_digests)
    try:
        steps = checkpoints.steps()
        if not steps:
            raise UserError(f"{path} holds no checkpoint yet")
        step = steps[-1] if step is None else step
        if step not in steps:
            raise UserError(
                f"{path} holds no checkpoint of step {step}; it has {', '.join(map(str, steps))}"
            )
        refuse_open_ramp(config, step, "grow or export")
        checkpoints.verify(step)
        try:
            meta = checkpoints.read_meta(step)
        except Exception as error:  # Orbax has many kinds.
            raise UserError(f"checkpoint {step} of {path} cannot be read: {error}") from error
    finally:
        checkpoints.close()
    return RunCheckpoint(path, directory / str(step), config, meta)


def recorded(run_dir: Path) -> dict:
    """What config.json of a run holds: the configuration, the data digest, versions."""
    return read_json(run_dir / "config.json")


def _is_checkpoint(path: Path) -> bool:
    return path.name.isdecimal() and path.absolute().parent.name == "checkpoints"
