"""`stacking-jax` with faults: the same command, which something happens to on the way.

    FAULT='{"process": 1, "step": 4, "what": "SIGKILL"}' python -m benchmarks.fault_worker train ..

FAULT is a JSON object:
  what: "SIGTERM", "SIGKILL" or "SIGINT" of the process itself; "hang" in Python; "full", after
    which no file can grow beyond `bytes`; or "clock", in which `time.time` leaps hours back and
    forth from the beginning on.
  process, step: where and before which update it happens, once per process.
  pause: seconds to wait before each update, so that a tiny run lasts a while.
FAULT_PHASE names a file that holds, in its first bytes, what the process is doing now.
FAULT_DIGESTS=1 prints, as `saved N DIGEST` and `restored N DIGEST`, what whole state is written
and read. FAULT_NO_GATHER=1 makes it an error to bring arrays of several hosts to one, and to have
any collective or host transfer in the compiled program of a growth.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import resource
import signal
import sys
import time
from collections.abc import Iterator

COLLECTIVES = re.compile(
    r"\b(all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter|collective-broadcast"
    r"|infeed|outfeed|send|recv)(-start)?\("
)
PHASE_BYTES = 16


def install() -> None:
    """Puts the faults that the environment asks for into this process."""
    fault = json.loads(os.environ.get("FAULT", "{}"))
    if fault:
        _in_the_loop(fault)
    if fault.get("what") == "clock":
        _leaping_clock()
    if "FAULT_PHASE" in os.environ:
        show_phases(os.environ["FAULT_PHASE"])
    if "FAULT_DIGESTS" in os.environ:
        _digests()
    if "FAULT_NO_GATHER" in os.environ:
        _no_gather()


def _in_the_loop(fault: dict) -> None:
    from stacking_jax.data import PackedBatches

    iterate = PackedBatches.iterate

    def faulty(self, *args, **options) -> Iterator:
        import jax

        for item in iterate(self, *args, **options):
            step = item[0]
            time.sleep(fault.get("pause", 0))
            if step + 1 == fault.get("step") and jax.process_index() == fault.get("process", 0):
                if fault["what"].startswith("SIG"):
                    os.kill(os.getpid(), getattr(signal, fault["what"]))
                elif fault["what"] == "hang":
                    print(f"hangs from {time.monotonic()}", file=sys.stderr, flush=True)
                    time.sleep(3600)
                elif fault["what"] == "full":
                    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
                    resource.setrlimit(resource.RLIMIT_FSIZE, (fault["bytes"], most))
            yield item

    PackedBatches.iterate = faulty


def _leaping_clock() -> None:
    real, leaps = time.time, iter(range(1, 1 << 30))
    time.time = lambda: real() + (-1) ** next(leaps) * 5 * 3600


def show_phases(path: str) -> None:
    """Keeps the category of the run's clock in a file, where it outlives the process."""
    from stacking_jax.training.telemetry import Clock

    place = os.open(path, os.O_CREAT | os.O_WRONLY)
    changed = Clock._changed

    def show(self):
        os.pwrite(place, self._stack[-1].ljust(PHASE_BYTES).encode(), 0)
        changed(self)

    from stacking_jax.data import making

    make = making.make

    def show_making(*args, **kwargs):
        os.pwrite(place, b"cache".ljust(PHASE_BYTES), 0)
        make(*args, **kwargs)
        os.pwrite(place, b"data".ljust(PHASE_BYTES), 0)

    os.pwrite(place, b"start".ljust(PHASE_BYTES), 0)
    Clock._changed, making.make = show, show_making


def _digests() -> None:
    from stacking_jax.training.checkpoints import Checkpoints
    from stacking_jax.training.state import params_digest

    save, restore = Checkpoints.save, Checkpoints.restore

    def show_saved(self, state, meta):
        print("saved", meta["step"], params_digest([state.params, state.opt_state]), flush=True)
        save(self, state, meta)

    def show_restored(self, step, abstract):
        state = restore(self, step, abstract)
        print("restored", step, params_digest([state.params, state.opt_state]), flush=True)
        return state

    Checkpoints.save, Checkpoints.restore = show_saved, show_restored


def keep_every_program() -> None:
    """Keeps on disk what compiles in a moment too, for runs that are started often."""
    import jax

    # The package has the function of that name.
    training = importlib.import_module("stacking_jax.training.train")
    use = training.use_compilation_cache

    def use_for_all(directory):
        use(directory)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)

    training.use_compilation_cache = use_for_all


def _no_gather() -> None:
    import jax
    from jax.experimental import multihost_utils

    from stacking_jax.training import growing, state

    digest, growing_now = state._whole_on_host.__code__, []
    gather = multihost_utils.process_allgather

    def forbidden(tree, *args, **kwargs):
        # Orbax compares numbers of its own so; the summary's digest is after the last step.
        whole = all(getattr(leaf, "is_fully_addressable", True) for leaf in jax.tree.leaves(tree))
        if growing_now or not (whole or sys._getframe(1).f_code is digest):
            raise AssertionError("process_allgather was called")
        return gather(tree, *args, **kwargs)

    multihost_utils.process_allgather = forbidden
    grow = growing.GrowthProgram.__call__

    def checked(self, tree):
        text = self.lower(tree).compile().as_text()
        found = COLLECTIVES.search(text)
        assert found is None, f"the growth has a collective: {found[0]}"
        print(f"growth without a gather, {len(text)} characters of HLO", file=sys.stderr)
        growing_now.append(True)
        try:
            return grow(self, tree)
        finally:
            growing_now.clear()

    growing.GrowthProgram.__call__ = checked


if __name__ == "__main__":
    from stacking_jax.cli import main

    install()
    keep_every_program()
    sys.exit(main())
