"""Asks the TPU compiler, in a process of its own, and keeps its answers."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from stacking_jax.errors import UserError
from stacking_jax.planning.cache import ResultCache, question
from stacking_jax.planning.compiled import for_accelerator
from stacking_jax.planning.topology import Topology
from stacking_jax.training.config import TrainConfig

BESIDE = Path(sys.prefix) / "tpu"
"""Where launch/tpu_compiler.sh puts libtpu, so that no training process ever loads it."""


class Compiler:
    """Compiles stages for a topology; use it as a context manager.

    What was compiled before is answered from the cache, without a process.
    """

    def __init__(
        self, topology: Topology, cache: ResultCache | None = None, modules: Sequence[str] = ()
    ):
        """Finds the compiler.

        Args:
          topology: of TPUs.
          cache: of results; None for the user's.
          modules: the user's own, to be imported in the process too.

        Raises:
          UserError: if libtpu is not installed.
        """
        use_libtpu()
        self.topology = topology
        self.cache = cache or ResultCache()
        self._modules = list(modules)
        self._process: subprocess.Popen | None = None
        self._folder: tempfile.TemporaryDirectory | None = None

    def __enter__(self) -> Compiler:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """Ends the process, whatever it is at."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process.stdin.close()
            self._process.stdout.close()
            self._folder.cleanup()
            self._process = None

    def stage(
        self, config: TrainConfig, stage: int, doing: Callable[[str], None] = lambda text: None
    ) -> dict:
        """What the train step of a stage needs; see `compiled.compile_stage`.

        Args:
          config: of the run.
          stage: its number, from 0.
          doing: told what goes on, 'tracing' and 'compiling'.

        Returns:
          The result; `cached` says whether it was there before.

        Raises:
          UserError: if the mesh cannot carry this run, or the compiler fails.
        """
        config = for_accelerator(config)
        asked = question(config, stage, self.topology.name, self._modules)
        found = self.cache.find(asked)
        if found is not None:
            return self._whole(found, cached=True)
        job = {
            "config": config.to_dict(), "stage": stage, "topology": self.topology.name,
            "modules": self._modules, "cache": str(self.cache.directory), "question": asked,
        }
        compiled = False
        for message in self._ask(job):
            if "doing" in message:
                compiled = compiled or message["doing"] == "compiling"
                doing(message["doing"])
            elif "refused" in message:
                raise UserError(message["refused"])
            else:
                return self._whole(message["result"], cached=not compiled)
        raise UserError(self._last_words())

    def _whole(self, result: dict, cached: bool) -> dict:
        limit = result.get("hbm_limit_bytes") or self.topology.chip.hbm_bytes
        return result | {"hbm_limit_bytes": limit, "cached": cached}

    def _ask(self, job: dict):
        if self._process is None:
            # What libtpu logs, in files and to the terminal, goes with this object.
            self._folder = tempfile.TemporaryDirectory()
            with open(self._errors, "wb") as errors:
                self._process = subprocess.Popen(
                    [sys.executable, "-m", "stacking_jax.planning.worker"],
                    stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True,
                    env=compiling_environment() | {"TPU_LOG_DIR": self._folder.name},
                )
        try:
            self._process.stdin.write(json.dumps(job) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            return
        for line in self._process.stdout:
            message = json.loads(line)
            yield message
            if "doing" not in message:
                return

    @property
    def _errors(self) -> Path:
        return Path(self._folder.name) / "stderr"

    def _last_words(self) -> str:
        code = self._process.wait()
        lines = self._errors.read_text(errors="replace").strip().splitlines()
        if code == -9:
            return (
                "the compiling process was killed, which a machine does that runs out of memory: "
                "about 2 GB are needed"
            )
        said = next((line for line in reversed(lines) if line.strip()), "nothing")
        return f"the compiling process ended with {code}; its last words: {said[:500]}"


def is_known(config: TrainConfig, stage: int, topology: Topology) -> bool:
    """Whether the user's cache answers for this stage without a compiler."""
    use_libtpu()  # Its version is a part of the question.
    asked = question(for_accelerator(config), stage, topology.name)
    return ResultCache().find(asked) is not None


def use_libtpu() -> None:
    """Makes libtpu importable, from the environment or the folder beside it.

    Raises:
      UserError: if it is in neither.
    """
    if importlib.util.find_spec("libtpu") is None and (BESIDE / "libtpu").is_dir():
        sys.path.append(str(BESIDE))
        importlib.invalidate_caches()
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            "planning for TPUs needs their compiler, libtpu: pip install 'stacking_jax[tpu]', or "
            "bash launch/tpu_compiler.sh in a checkout"
        )


def compiling_environment() -> dict[str, str]:
    """The environment of a process that describes and compiles for TPUs."""
    environment = dict(os.environ)
    # Our own results are kept; a described device can load no executable of JAX's cache.
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    return environment | {
        "JAX_PLATFORMS": "cpu",  # No accelerator that is here is taken.
        "JAX_ENABLE_COMPILATION_CACHE": "0",
        "TPU_SKIP_MDS_QUERY": "1",  # No metadata server is asked: this is no TPU machine.
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",  # Nothing is locked, so two may plan at once.
        "TPU_LOG_DIR": "disabled",
        "TPU_STDERR_LOG_LEVEL": "3",
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }
