"""Tiny runs that are forked, killed and compared: what `benchmarks.faults` is made of.

A start costs little: this process has imported everything and no backend, and forks a
child for each process of a run. The child is `stacking-jax train` from there on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import random
import re
import shutil
import signal
import socket
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path

# Where nobody computes a thread of OpenBLAS would only be in the way of a fork.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import grain  # noqa: E402, F401
import jax  # noqa: E402
import orbax.checkpoint  # noqa: E402, F401
from jax.experimental import multihost_utils  # noqa: E402, F401

from benchmarks import fault_worker  # noqa: E402
from stacking_jax import cli, configurables  # noqa: E402
from stacking_jax.training.record_log import read_records  # noqa: E402

STEPS, GROWTH, SAVE_EVERY, PAUSE = 12, 4, 2, 0.03
ROOT = Path(__file__).resolve().parents[1]

_GIN = f"""
include '{ROOT}/gin/train.gin'
TRAIN_STEPS = {STEPS}
BATCH_SIZE = 8
SEQUENCE_LENGTH = 32
NUM_STAGES = 2
DecoderConfig.vocab_size = 320
DecoderConfig.num_layers = 2
DecoderConfig.d_model = 16
DecoderConfig.d_ff = 32
DecoderConfig.num_heads = 2
GrowthConfig.operator = 'midas'
GrowthConfig.schedule = 'prop'
GrowthConfig.alpha = 1.0
DataConfig.held_out = 0.1
TrainConfig.log_every = 1
TrainConfig.eval_every = 6
TrainConfig.checkpoint_every = {SAVE_EVERY}
TrainConfig.log_records = True
"""


LIVES = 300.0
"""Seconds after which a life that does not end counts as failed."""


@dataclasses.dataclass
class Life:
    """The processes of one start, until they have ended.

    Attributes:
      pids: of the processes, by their number.
      codes: their exit codes so far; -n for signal n.
      logs: what they print, standard error too.
      phases: files with what each is doing.
      began, unix_began: by time.monotonic and time.time.
    """

    pids: list[int]
    codes: list[int | None]
    logs: list[Path]
    phases: list[Path]
    began: float
    unix_began: float = dataclasses.field(default_factory=time.time)

    def phase(self, process: int = 0) -> str:
        try:
            return self.phases[process].read_text(encoding="utf-8").strip() or "start"
        except OSError:
            return "start"

    def running(self) -> bool:
        """Whether one of them is there; notes the codes of those that have ended."""
        for process, pid in enumerate(self.pids):
            if self.codes[process] is not None:
                continue
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                self.codes[process] = os.waitstatus_to_exitcode(status)
        return any(code is None for code in self.codes)

    def kill(self, processes: Sequence[int]) -> None:
        for process in processes:
            if self.codes[process] is None:
                os.kill(self.pids[process], signal.SIGKILL)

    def wait(self, seconds: float) -> list[int | None]:
        """Their exit codes; None for one that goes on after so long, and is killed then."""
        deadline = time.monotonic() + seconds
        while self.running() and time.monotonic() < deadline:
            time.sleep(0.01)
        codes = list(self.codes)
        self.kill(range(len(self.pids)))
        while self.running():
            time.sleep(0.01)
        return codes

    def said(self, process: int = 0) -> str:
        return self.logs[process].read_text(encoding="utf-8", errors="replace")

    @property
    def last_words(self) -> str:
        """The last line that each process printed."""
        return " | ".join(
            (self.said(process).strip().splitlines() or [""])[-1][:200]
            for process in range(len(self.pids))
        )

    @property
    def resumed_from(self) -> int:
        found = re.search(r"going on from checkpoint (\d+)", self.said())
        return int(found[1]) if found else 0


class Runs:
    """A folder of runs of one tiny configuration, and of the reference for each topology."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.texts = folder / "texts"
        folder.mkdir(parents=True, exist_ok=True)
        if not self.texts.exists():
            _write_texts(self.texts)
        self._lives = 0

    def begin(self, name: str) -> Path:
        """An empty place for a run."""
        run_dir = self.folder / name
        shutil.rmtree(run_dir, ignore_errors=True)
        run_dir.mkdir(parents=True)
        return run_dir

    def start(
        self, run_dir: Path, processes: int = 1, devices: int = 1, *, cold: bool = False,
        fault: dict | None = None, environment: dict[str, str] | None = None,
        bindings: Sequence[str] = (), stop_at: int | None = None, heartbeat: int = 20,
    ) -> Life:
        """Starts a run, or goes on with it.

        Args:
          run_dir: from `begin`; the run lies in `run` there, its cache beside it.
          processes, devices: how many, and devices of each process.
          cold: compile everything anew, into the run's own folder.
          fault, environment: for `fault_worker`.
          bindings: further gin bindings.
          stop_at: see `--stop_at`.
          heartbeat: see `--heartbeat_timeout`.
        """
        self._lives += 1
        gin_file = self.folder / "run.gin"
        gin_file.write_text(_GIN, encoding="utf-8")
        compiled = run_dir if cold else self.folder
        arguments = [
            "train", "--gin_file", str(gin_file), "--run_dir", str(run_dir / "run"),
            f"--gin.TEXT_DIR='{self.texts}'", f"--gin.DataConfig.cache_dir='{run_dir}/cache'",
            f"--gin.TrainConfig.compilation_cache='{compiled}/compiled'",
            *(f"--gin.{binding}" for binding in bindings),
        ]
        if stop_at is not None:
            arguments += ["--stop_at", str(stop_at)]
        if processes > 1:
            arguments += [
                "--coordinator", f"127.0.0.1:{free_port()}", "--num_processes", str(processes),
                "--heartbeat_timeout", str(heartbeat), "--start_timeout", "120",
            ]
        life = Life([], [None] * processes, [], [], time.monotonic())
        for process in range(processes):
            log = run_dir / f"life-{self._lives}-{process}.txt"
            phase = run_dir / f"phase-{process}"
            phase.unlink(missing_ok=True)
            own = {
                "FAULT": json.dumps({"pause": PAUSE, **(fault or {})}), "FAULT_PHASE": str(phase),
                **(environment or {}),
            }
            own_arguments = ["--process_id", str(process)] if processes > 1 else []
            life.pids.append(_fork([*arguments, *own_arguments], own, devices, log))
            life.logs.append(log)
            life.phases.append(phase)
        return life

    def reference(self, processes: int = 1, devices: int = 1) -> tuple[Path, float]:
        """A run that nothing disturbed and its seconds, made once."""
        place = self.folder / f"reference-{processes}x{devices}"
        kept = place / "seconds"
        if not kept.exists():
            shutil.rmtree(place, ignore_errors=True)
            # Once to compile, once for the time that it takes where that is done.
            for _ in range(2):
                self.begin(place.name)
                life = self.start(place, processes, devices)
                codes = life.wait(300)
                if any(codes):
                    raise RuntimeError(f"the reference run failed: {codes}\n{life.said()}")
                seconds = time.monotonic() - life.began
            kept.write_text(str(seconds), encoding="utf-8")
        return place, float(kept.read_text(encoding="utf-8"))

    def difference(self, run_dir: Path, processes: int = 1, devices: int = 1) -> str:
        """How a finished run differs from the undisturbed one; '' for not in a single bit."""
        reference = self.reference(processes, devices)[0]
        if trace(run_dir) != trace(reference):
            return "the metrics differ"
        if digest(run_dir) != digest(reference):
            return "the last parameters differ"
        return self.lost_or_repeated(run_dir, reference)

    def lost_or_repeated(self, run_dir: Path, reference: Path) -> str:
        """What the logs of record ids say; '' for none."""
        try:
            records = read_records(run_dir / "run")
        except ValueError as error:
            return str(error)
        same = records == read_records(reference / "run")
        return "" if same else "other records were read"


def trace(run_dir: Path) -> list[tuple]:
    """Every number of every step, evaluation and growth."""
    names = ("kind", "step", "loss", "grad_norm", "learning_rate", "eval_loss", "tokens")
    return [
        tuple(row.get(name) for name in names)
        for row in _rows(run_dir) if row["kind"] != "resume"
    ]


def losses(run_dir: Path) -> dict[int, float]:
    return {row["step"]: row["loss"] for row in _rows(run_dir) if row["kind"] == "train"}


def last_step(run_dir: Path, life: Life | None = None) -> int:
    """The last step whose metrics are on disk, of all or of those that a life has written."""
    since = 0.0 if life is None else life.unix_began
    return max(
        (row["step"] for row in _rows(run_dir)
         if row["kind"] == "train" and row["unix_time"] >= since),
        default=0,
    )


def saved(run_dir: Path) -> int:
    """The newest checkpoint that is whole; 0 for none."""
    folder = run_dir / "run/checkpoints"
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return max((int(name) for name in names if name.isdecimal()), default=0)


def digest(run_dir: Path) -> str:
    summary = json.loads((run_dir / "run/summary.json").read_text(encoding="utf-8"))
    return summary["params_digest"]


def is_saving(run_dir: Path) -> bool:
    """Whether a checkpoint is begun and not whole."""
    return any((run_dir / "run/checkpoints").glob("*orbax-checkpoint-tmp*"))


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def _rows(run_dir: Path) -> Iterator[dict]:
    path = run_dir / "run/metrics.jsonl"
    if not path.exists():
        return
    for line in path.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            yield json.loads(line)


def _fork(arguments: list[str], environment: dict[str, str], devices: int, log: Path) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.setsid()
        out = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        os.dup2(out, 1)
        os.dup2(out, 2)
        sys.stdout = open(1, "w", buffering=1, closefd=False)
        sys.stderr = sys.__stderr__ = open(2, "w", buffering=1, closefd=False)
        os.environ.update(environment)
        jax.config.update("jax_num_cpu_devices", devices)
        fault_worker.install()
        fault_worker.keep_every_program()
        configurables.register()
        code = cli.main(arguments)
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _write_texts(folder: Path) -> None:
    folder.mkdir()
    dice = random.Random(0)
    words = ["".join(dice.choices("abcdefghij", k=dice.randint(2, 7))) for _ in range(200)]
    for number in range(40):
        text = " ".join(dice.choices(words, k=150)) + "\n"
        (folder / f"{number}.txt").write_text(text, encoding="utf-8")
