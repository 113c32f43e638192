"""The run directory: what lies there, and whether it may be used."""

from __future__ import annotations

import json
import platform
from pathlib import Path

import jax

from stacking_jax import __version__
from stacking_jax.data import DataConfig
from stacking_jax.errors import UserError
from stacking_jax.models import DecoderConfig
from stacking_jax.training.config import (
    GrowthConfig,
    MeshConfig,
    OptimizerConfig,
    TrainConfig,
    differences,
)
from stacking_jax.training.telemetry import write_json


def prepare(run_dir: Path, config: TrainConfig) -> None:
    """Creates the run directory, or checks that this run may go on in it.

    Raises:
      UserError: if it holds another run (with the differences), or something else.
    """
    recorded = run_dir / "config.json"
    if recorded.exists():
        try:
            old = json.loads(recorded.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise UserError(f"{recorded} cannot be read ({error}); use another --run_dir") from None
        changed = differences(old["config"], _plain(config))
        if changed:
            raise UserError(
                f"{run_dir} holds a run with another configuration; use another --run_dir. "
                f"Differences: {'; '.join(changed)}"
            )
        return
    if run_dir.exists() and any(run_dir.iterdir()):
        raise UserError(
            f"{run_dir} is not empty and holds no run (no config.json); use another --run_dir"
        )
    if jax.process_index() == 0:
        run_dir.mkdir(parents=True, exist_ok=True)
        write_json(recorded, {"config": _plain(config), "versions": versions()})
        write_json(run_dir / "plan.json", config.describe_plan())


def read_config(run_dir: str | Path) -> TrainConfig:
    """The configuration of a run, from its config.json (data, not code).

    Raises:
      UserError: if the directory holds no run, or one of another version.
    """
    recorded = Path(run_dir) / "config.json"
    if not recorded.exists():
        raise UserError(f"{run_dir} holds no run: there is no {recorded.name} in it")
    try:
        values = dict(json.loads(recorded.read_text(encoding="utf-8"))["config"])
        parts = {
            "model": DecoderConfig, "data": DataConfig, "growth": GrowthConfig,
            "optimizer": OptimizerConfig, "mesh": MeshConfig,
        }
        built = {name: kind(**values.pop(name)) for name, kind in parts.items()}
        return TrainConfig(**built, **values)
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise UserError(f"{recorded} cannot be read by this version: {error}") from None


def versions() -> dict[str, str]:
    """What made a run, for the report."""
    import flax
    import optax

    return {
        "stacking_jax": __version__,
        "python": platform.python_version(),
        "jax": jax.__version__,
        "flax": flax.__version__,
        "optax": optax.__version__,
        "backend": jax.default_backend(),
        "devices": f"{jax.device_count()} × {jax.devices()[0].device_kind}",
        "machine": f"{platform.system()} {platform.machine()}",
    }


def _plain(config: TrainConfig) -> dict:
    """The configuration as JSON gives it back (tuples become lists, and so on)."""
    return json.loads(json.dumps(config.to_dict()))
