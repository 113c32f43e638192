"""Checkpoints: state and everything needed to go on, by Orbax, asynchronously."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from stacking_jax.console import warn
from stacking_jax.errors import UserError
from stacking_jax.training.state import TrainState

_UNFINISHED = ".orbax-checkpoint-tmp"


class Checkpoints:
    """The checkpoints of one run directory.

    A checkpoint holds the state as nested dicts and a JSON object beside it
    (step, stage, depth, plan, history of depth maps, configuration, counters).
    It appears under its step's number whole or not at all.
    """

    def __init__(self, directory: str | Path, keep: int = 1, *, read_only: bool = False):
        """Opens or creates the folder.

        Args:
          directory: of the checkpoints alone.
          keep: how many are kept, the newest ones.
          read_only: touch nothing; another process may be training here.
        """
        import orbax.checkpoint as ocp

        # Orbax announces every step of a save; its errors reach us as exceptions.
        logging.getLogger("absl").setLevel(logging.ERROR)
        self._ocp = ocp
        self.directory = Path(directory).absolute()
        if not read_only:
            self._warn_of_unfinished()
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=None if read_only else keep,
                create=not read_only,
                read_only=read_only,
                enable_async_checkpointing=not read_only,
            ),
            item_names=("state", "meta"),
        )

    def save(self, state: TrainState, meta: dict) -> None:
        """Starts to save; returns when the values are out of the state's buffers.

        Raises:
          UserError: if this save, or an earlier one, could not be written.
        """
        step = int(meta["step"])
        with self._saving(step):
            self._manager.save(
                step,
                args=self._ocp.args.Composite(
                    state=self._ocp.args.StandardSave(_as_dict(state)),
                    meta=self._ocp.args.JsonSave(meta),
                ),
                force=True,
            )

    def wait(self) -> None:
        """Waits until everything is on disk.

        Raises:
          UserError: if it could not be written.
        """
        with self._saving(self._manager.latest_step()):
            self._manager.wait_until_finished()
            self._manager.check_for_errors()

    def close(self) -> None:
        self._manager.close()

    def steps(self) -> list[int]:
        """Steps of the checkpoints that are there, oldest first."""
        return sorted(self._manager.all_steps(read=True))

    def restore_latest(
        self, abstract: Callable[[int], TrainState]
    ) -> tuple[TrainState, dict] | None:
        """The newest checkpoint that can be read, straight into its shards.

        One that cannot be read is named in a warning and moved aside (nothing is
        deleted); the one before it is tried.

        Args:
          abstract: from a depth to the abstract state of that depth.

        Returns:
          The state and its metadata, or None where there is no checkpoint.
        """
        steps = self.steps()
        for step in reversed(steps):
            try:
                return self._restore(step, abstract)
            except Exception as error:  # noqa: BLE001  any kind of damage ends here
                older = [other for other in steps if other < step]
                moved = self._move_aside(step)
                first_line = str(error).strip().splitlines()[:1] or [type(error).__name__]
                warn(
                    f"checkpoint {step} cannot be read ({first_line[0][:200]}); it was moved to "
                    f"{moved}; going on from "
                    + (f"checkpoint {older[-1]}" if older else "the beginning")
                )
        return None

    def read_meta(self, step: int) -> dict:
        """The metadata of one checkpoint."""
        restored = self._manager.restore(
            step, args=self._ocp.args.Composite(meta=self._ocp.args.JsonRestore())
        )
        return restored["meta"]

    def restore(self, step: int, abstract: TrainState) -> TrainState:
        """The state of one checkpoint."""
        restored = self._manager.restore(
            step,
            args=self._ocp.args.Composite(state=self._ocp.args.StandardRestore(_as_dict(abstract))),
        )
        return TrainState(**restored["state"])

    def restore_params(self, step: int, abstract: Any) -> Any:
        """The parameters alone of one checkpoint, straight into their shards.

        Args:
          step: of the checkpoint.
          abstract: nested dicts of `ShapeDtypeStruct`s with shardings.
        """
        item = {"params": abstract}
        with self._ocp.Checkpointer(self._ocp.PyTreeCheckpointHandler()) as reader:
            restored = reader.restore(
                self.directory / str(step) / "state",
                args=self._ocp.args.PyTreeRestore(
                    item=item,
                    restore_args=self._ocp.checkpoint_utils.construct_restore_args(item),
                    partial_restore=True,
                ),
            )
        return restored["params"]

    def _restore(self, step, abstract):
        meta = self.read_meta(step)
        return self.restore(step, abstract(int(meta["depth"]))), meta

    def _move_aside(self, step: int) -> Path:
        aside = self.directory.parent / "damaged_checkpoints"
        if jax.process_index() == 0:
            aside.mkdir(exist_ok=True)
            target = aside / str(step)
            while target.exists():
                target = target.with_name(target.name + "_")
            (self.directory / str(step)).rename(target)
        self._manager.reload()
        return aside / str(step)

    def _warn_of_unfinished(self) -> None:
        if not self.directory.is_dir() or jax.process_index() != 0:
            return
        for entry in sorted(self.directory.iterdir()):
            if _UNFINISHED in entry.name:
                warn(
                    f"checkpoint {entry.name.split('.')[0]} was not finished when the run "
                    "stopped; it is dropped"
                )

    @contextlib.contextmanager
    def _saving(self, step):
        try:
            yield
        except Exception as error:
            steps = self.steps()
            last_good = f"the last good one is {steps[-1]}" if steps else "there is no earlier one"
            reason = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
            raise UserError(
                f"checkpoint {step} could not be written to {self.directory}: {reason}; "
                f"{last_good}; make room and run the same command again"
            ) from error


def _as_dict(state: TrainState) -> dict[str, Any]:
    return {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
