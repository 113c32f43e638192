"""The run directory: what lies there, and whether it may be used."""

from __future__ import annotations

import dataclasses
import json
import platform
import typing
from pathlib import Path

import jax

from stacking_jax import __version__
from stacking_jax.errors import UserError
from stacking_jax.paths import make_folder, open_path
from stacking_jax.training import distributed
from stacking_jax.training.config import TrainConfig, differences, with_defaults
from stacking_jax.training.telemetry import one_line_disk_errors, write_json


def check(run_dir: Path, config: TrainConfig) -> dict | None:
    """Whether a run may go on, or begin, in this directory. Changes nothing in it.

    Returns:
      What config.json holds, or None where no run has begun yet.

    Raises:
      UserError: if it holds another run (with the differences), or something else.
    """
    recorded = run_dir / "config.json"
    if recorded.exists():
        old = _read(recorded)
        before = with_defaults(old.get("config", {}), config)
        changed = differences(json.loads(json.dumps(before)), _plain(config))
        if changed:
            raise UserError(
                f"{run_dir} holds a run with another configuration; use another --run_dir. "
                f"Differences: {'; '.join(changed)}"
            )
        return old
    if run_dir.exists() and not run_dir.is_dir():
        raise UserError(f"{run_dir} is a file; use another --run_dir")
    # Hidden files are what a begun `write_json` leaves when it is killed.
    if run_dir.exists() and any(not entry.name.startswith(".") for entry in run_dir.iterdir()):
        raise UserError(
            f"{run_dir} is not empty and holds no run (no config.json); use another --run_dir"
        )
    return None


def prepare(
    run_dir: Path,
    config: TrainConfig,
    data_digest: str,
    gin_text: str | None = None,
    about: dict | None = None,
) -> None:
    """Creates the run directory, or checks that the run in it may go on with these data.

    Args:
      run_dir: see `check`.
      config: what is to run.
      data_digest: of the data as they are now; the path alone says nothing.
      gin_text: kept as config.gin, for people.
      about: what tables show of a run that has no summary yet.

    Raises:
      UserError: as `check`, or if the data are not those that the run began with.
    """
    with distributed.main_process_first("prepare"):
        prepare_alone(run_dir, config, data_digest, gin_text, about)


def prepare_alone(
    run_dir: Path, config: TrainConfig, data_digest: str, gin_text: str | None = None,
    about: dict | None = None,
) -> None:
    """`prepare`, of several processes for one that the others do not wait for here."""
    old = check(run_dir, config)
    if old is None and jax.process_index() != 0:
        raise UserError(
            f"{run_dir} is not shared: process {jax.process_index()} does not see there what "
            "process 0 has written; use a --run_dir that all hosts share"
        )
    before = data_digest if old is None else str(old.get("data_digest"))
    if before != data_digest:
        raise UserError(
            f"{run_dir} began with other data (digest {before[:12]}, now {data_digest[:12]}): "
            "the text has changed since; use another --run_dir"
        )
    if jax.process_index() != 0:
        return
    with one_line_disk_errors(run_dir):
        make_folder(run_dir)
        if old is None:
            write_json(
                run_dir / "config.json",
                {
                    **(about or {}),
                    "config": _plain(config),
                    "data_digest": data_digest,
                    "versions": versions(),
                },
            )
        write_json(run_dir / "plan.json", config.describe_plan())
        if gin_text is not None:
            (run_dir / "config.gin").write_text(gin_text, encoding="utf-8")


def read_summary(run_dir: Path) -> dict | None:
    """The summary of a finished run, None where there is none yet."""
    path = run_dir / "summary.json"
    return _read(path) if path.exists() else None


def read_config(run_dir: str | Path) -> TrainConfig:
    """The configuration of a run, from its config.json (data, not code).

    Raises:
      UserError: if the directory holds no run, or one of another version.
    """
    recorded = open_path(run_dir) / "config.json"
    if not recorded.exists():
        raise UserError(f"{run_dir} holds no run: there is no {recorded.name} in it")
    try:
        values = dict(_read(recorded)["config"])
        kinds = typing.get_type_hints(TrainConfig)
        parts = {name: kind for name, kind in kinds.items() if dataclasses.is_dataclass(kind)}
        built = {name: kind(**values.pop(name)) for name, kind in parts.items() if name in values}
        return TrainConfig(**built, **values)
    except (KeyError, TypeError) as error:
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


def _read(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); use another --run_dir") from None
