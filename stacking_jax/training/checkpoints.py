"""Checkpoints: state and everything needed to go on, by Orbax, asynchronously."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import re
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from stacking_jax.console import say, warn
from stacking_jax.errors import UserError
from stacking_jax.growth.layouts import path_keys
from stacking_jax.models import LAYOUT
from stacking_jax.paths import make_folder, open_path
from stacking_jax.training import consensus, manifest
from stacking_jax.training.state import TrainState

CHUNK_BYTES = 4 << 20
"""The most bytes of a chunk of an array: a piece that is read or written at a time."""

# Orbax measures by the wall clock how long processes may wait for each other in a save (20
# minutes, where we say nothing), and a clock may leap. Lost processes are found by
# their heartbeat, stuck ones by the watchdog.
_SAVE_TIMEOUT = 7 * 24 * 3600

_UNFINISHED = ".orbax-checkpoint-tmp"


class Checkpoints:
    """The checkpoints of one run directory.

    A checkpoint holds the state as nested dicts and a JSON object beside it
    (step, stage, depth, plan, history of depth maps, configuration, counters).
    It appears under its step's number whole or not at all; then, in the background, a
    manifest of its files is put into it, against which it is checked before it is read.
    """

    def __init__(
        self, directory: str | Path, keep: int = 1, *, read_only: bool = False,
        digests: bool = True,
    ):
        """Opens or creates the folder.

        Args:
          directory: of the checkpoints alone.
          keep: how many are kept, the newest ones.
          read_only: touch nothing; another process may be training here.
          digests: write and check the digest of every file, or only its size.
        """
        import orbax.checkpoint as ocp

        _print_no_tracebacks()
        self._ocp = ocp
        self.directory = open_path(directory)
        if not read_only:
            self._warn_of_unfinished()
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=None if read_only else keep,
                create=not read_only,
                read_only=read_only,
                enable_async_checkpointing=not read_only,
                async_options=ocp.AsyncOptions(
                    timeout_secs=_SAVE_TIMEOUT,
                    # Waiting for them has a limit of 5 minutes that nobody can set.
                    create_directories_asynchronously=False,
                ),
                cleanup_tmp_directories=not read_only,
            ),
            item_names=("state", "meta"),
        )
        self._last_begun: int | None = None
        self._digests, self._read_only = digests, read_only
        self._sealing: _Sealing | None = None

    def save(self, state: TrainState, meta: dict) -> None:
        """Starts to save; returns when the values are out of the state's buffers.

        `meta` is written in the background: nobody may change it afterwards.

        Raises:
          UserError: if this save, or an earlier one, could not be written.
        """
        # Orbax would wait here anyway; this way a failure is reported under its own step.
        self.wait()
        step = self._last_begun = int(meta["step"])
        tree = as_stored(state)
        with self._saving():
            self._manager.save(
                step,
                args=self._ocp.args.Composite(
                    state=self._ocp.args.StandardSave(tree, save_args=storage(tree)),
                    meta=self._ocp.args.JsonSave(meta),
                ),
                force=True,
            )
        self._sealing = _Sealing(self._manager, self.directory / str(step), self._digests)

    def wait(self) -> None:
        """Waits until everything is on disk.

        Raises:
          UserError: if it could not be written.
        """
        with self._saving():
            self._manager.wait_until_finished()
            self._manager.check_for_errors()
            self._seal()

    def close(self) -> None:
        """Waits, then lets go of the folder.

        Raises:
          UserError: if something could not be written.
        """
        with self._saving():
            self._manager.close()
            self._seal()

    def steps(self) -> list[int]:
        """Steps of the checkpoints that are there, oldest first."""
        # Not the manager's list: reading that from disk makes it forget the save in
        # progress, and then it keeps one too many.
        if not self.directory.is_dir():
            return []
        return sorted(
            int(entry.name) for entry in self.directory.iterdir()
            if entry.name.isdecimal() and entry.is_dir()
        )

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
        steps = consensus.from_first(self.steps())
        for step in reversed(steps):
            state, meta, problem = None, None, self._problem(step, put_back_mark=True)
            if problem is None:
                try:
                    meta = self.read_meta(step)
                    state = self.restore(step, abstract(int(meta["depth"])))
                except Exception as error:  # noqa: BLE001  any kind of damage ends here
                    if _is_out_of_memory(error):
                        raise
                    problem = _first_line(error)
                problem = _first(consensus.every(problem))
            if problem is None:
                return state, meta
            older = [other for other in steps if other < step]
            moved = self._move_aside(step)
            warn(
                f"checkpoint {step} cannot be read ({problem}); it was moved to "
                f"{moved}; going on from "
                + (f"checkpoint {older[-1]}" if older else "the beginning")
            )
        return None

    def verify(self, step: int) -> None:
        """Holds one checkpoint against its manifest.

        Raises:
          UserError: if a file is not as it was written, or nothing says that the
            checkpoint was ever finished.
        """
        problem = self._problem(step)
        if problem is not None:
            raise self._unreadable(step, problem)

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
            args=self._ocp.args.Composite(state=self._ocp.args.StandardRestore(as_stored(abstract))),
        )
        return TrainState(**_with_empty(_fields(abstract), restored["state"]))

    def restore_params(self, step: int, abstract: Callable[[int], Any]) -> Any:
        """The parameters alone of one checkpoint, straight into their shards.

        Args:
          step: of the checkpoint.
          abstract: from a depth to nested dicts of `ShapeDtypeStruct`s with shardings.

        Raises:
          UserError: if the checkpoint cannot be read.
        """
        self.verify(step)
        try:
            whole = {"params": abstract(int(self.read_meta(step)["depth"]))}
            item = _without_empty(whole)
            with self._ocp.Checkpointer(self._ocp.PyTreeCheckpointHandler()) as reader:
                restored = reader.restore(
                    self.directory / str(step) / "state",
                    args=self._ocp.args.PyTreeRestore(
                        item=item,
                        restore_args=self._ocp.checkpoint_utils.construct_restore_args(item),
                        partial_restore=True,
                    ),
                )
        except Exception as error:
            if isinstance(error, UserError) or _is_out_of_memory(error):
                raise
            raise self._unreadable(step, _first_line(error)) from error
        return _with_empty(whole, restored)["params"]

    def drop_after(self, step: int) -> None:
        """Deletes the checkpoints of later steps: of a way that the run does not go."""
        self.wait()
        step = consensus.from_first(step)
        for later in consensus.from_first([s for s in self.steps() if s > step]):
            self._manager.delete(later)

    def _problem(self, step: int, put_back_mark: bool = False) -> str | None:
        """What is wrong with a checkpoint, as far as its manifest and Orbax's marks say.

        Every process looks at its part of the files, and all get the same answer.
        """
        folder = self.directory / str(step)
        verdict = manifest.check(
            folder, jax.process_index(), jax.process_count(), digests=self._digests
        )
        problem = _first(consensus.every(verdict.problem))
        if problem is not None:
            return problem
        if not consensus.from_first(verdict.complete):
            if not consensus.from_first(manifest.committed(folder)):
                return "neither a manifest nor a mark of Orbax's says that it was finished"
            if jax.process_index() == 0 and not self._read_only:
                say(
                    f"checkpoint {step} has no whole manifest (an older version wrote it, or the "
                    "run was killed just then); it is read on Orbax's word alone"
                )
        elif put_back_mark:
            if jax.process_index() == 0:
                manifest.put_back_mark(folder)
            consensus.from_first(None)  # Nobody reads on before it is there.
        return None

    def _unreadable(self, step: int, problem: str) -> UserError:
        return UserError(
            f"checkpoint {step} of {self.directory} cannot be read ({problem}); "
            f"there are checkpoints of {', '.join(map(str, self.steps()))}"
        )

    def _seal(self) -> None:
        """Waits for the manifest of the newest checkpoint."""
        sealing, self._sealing = self._sealing, None
        if sealing is None:
            return
        sealing.join()
        if sealing.error is not None:
            raise UserError(
                f"checkpoint {self._last_begun} is whole, but its manifest could not be written "
                f"to {self.directory}: {_first_line(sealing.error)}; make room and run the same "
                "command again"
            ) from sealing.error

    def _move_aside(self, step: int) -> Path:
        aside = self.directory.parent / "damaged_checkpoints"
        target = aside / str(step)
        while target.exists():
            target = target.with_name(target.name + "_")
        if jax.process_index() == 0:
            make_folder(aside)
            (self.directory / str(step)).rename(target)
        target = open_path(consensus.from_first(str(target)))
        self._manager.reload()
        return target

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
    def _saving(self):
        try:
            yield
        except UserError:
            raise
        except Exception as error:
            step, steps = self._last_begun, self.steps()
            last_good = f"the last good one is {steps[-1]}" if steps else "there is no earlier one"
            raise UserError(
                f"checkpoint {step} could not be written to {self.directory}: "
                f"{_first_line(error)}; "
                f"{last_good}; make room and run the same command again"
            ) from error


class _Sealing(threading.Thread):
    """Puts the manifest into a checkpoint, once Orbax has finished it.

    Attributes:
      error: why the manifest could not be written, or None. What Orbax could not write
        it says itself, to those who wait for it.
    """

    def __init__(self, manager: Any, folder: Path, digests: bool):
        super().__init__(name="manifest", daemon=True)
        self._manager, self._folder, self._with_digests = manager, folder, digests
        self.error: Exception | None = None
        self.start()

    def run(self) -> None:
        try:
            self._manager.wait_until_finished()
        except Exception:  # noqa: BLE001
            return
        try:
            manifest.write(
                self._folder, jax.process_index(), jax.process_count(),
                digests=self._with_digests,
            )
        except Exception as error:  # noqa: BLE001  raised where it is waited for
            self.error = error


def storage(tree: Any) -> Any:
    """How Orbax is to store each array of a state: one layer to a chunk, or less.

    So that a checkpoint can be read, grown and exported a layer at a time, whatever
    its size.
    """
    import orbax.checkpoint as ocp

    def args(path, leaf):
        by_layer = LAYOUT.matches(path_keys(path)) and leaf.ndim > 0
        return ocp.SaveArgs(shard_axes=(0,) if by_layer else (), chunk_byte_size=CHUNK_BYTES)

    return jax.tree_util.tree_map_with_path(args, tree)


def as_stored(state: TrainState) -> dict[str, Any]:
    """A state as it lies on disk: nested dicts, without what it has none of.

    Of a stack of no layers that is every array; None stands in its place.
    """
    return _without_empty(_fields(state))


def _fields(state: TrainState) -> dict[str, Any]:
    fields = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
    return {name: value for name, value in fields.items() if value is not None}


def _without_empty(tree: Any) -> Any:
    # Orbax writes no array without elements.
    return jax.tree.map(lambda leaf: None if 0 in np.shape(leaf) else leaf, tree)


def _with_empty(abstract: Any, restored: Any) -> Any:
    def filled(leaf, found):
        if found is not None:
            return found
        return jax.make_array_from_callback(
            leaf.shape, leaf.sharding,
            lambda index: np.zeros(leaf.shape, leaf.dtype)[index],
        )

    return jax.tree.map(filled, abstract, restored)


def _first(problems: list[str | None]) -> str | None:
    """The problem of the first process that has one."""
    return next((problem for problem in problems if problem is not None), None)


def _first_line(error: Exception) -> str:
    """What went wrong, in the system's words where they can be found."""
    text = str(error).strip() or type(error).__name__
    found = re.search(r"os_error_code='(\d+)'", text)
    code = int(found[1]) if found else error.errno if isinstance(error, OSError) else None
    return os.strerror(code) if code else text.splitlines()[0][:300]


def _print_no_tracebacks() -> None:
    """Keeps quiet what Orbax prints of errors that reach us as exceptions anyway."""
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    # Of the writes of a save that failed together, Orbax waits for the first alone.
    logging.getLogger("asyncio").addFilter(_no_siblings_of_a_failure)
    report = sys.unraisablehook
    if getattr(report, "__name__", "") == "report_others":
        return

    def report_others(unraisable):
        # Writes and reads that end after Orbax has given up on their event loop.
        if str(unraisable.exc_value) != "Event loop is closed":
            report(unraisable)

    sys.unraisablehook = report_others


def _no_siblings_of_a_failure(record: logging.LogRecord) -> bool:
    message = record.getMessage()
    return not ("exception was never retrieved" in message and "OCDBT database" in message)


def _is_out_of_memory(error: Exception) -> bool:
    """Whether the machine is too small, which says nothing against the checkpoint."""
    return isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)
