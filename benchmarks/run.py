"""All measured promises of speed, as one table.

    python -m benchmarks.run --suite cpu
    python -m benchmarks.run --suite gpu --only 1,2,3 --minutes 9
    python -m benchmarks.run --suite gpu --tiny      # every script in small, on the CPU

Each job runs in a process of its own, a failure of one is a note and not the end, and lines
that are done are kept: the same command goes on where it stopped. Results and the table go to
`benchmarks/results/suite_SUITE.json` and `.md`; with `--tiny` they are not kept, unless
`--results` names a folder.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.measure import machine
from benchmarks.suite import Job, Measured, NotYet, Results, chosen
from stacking_jax.host_memory import keep_freed_memory

SUITES = {"cpu": "benchmarks.cpu_lines", "gpu": "benchmarks.gpu_lines"}
RESULTS = Path(__file__).with_name("results")
NO_GPU = "not measured: no GPU was at hand"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--suite", choices=SUITES, required=True)
    parser.add_argument("--only", metavar="N,N", default="", help="lines by their numbers")
    parser.add_argument("--minutes", type=float, default=float("inf"), metavar="M",
                        help="begin no job that would not fit into so many minutes")
    parser.add_argument("--again", action="store_true", help="measure what is measured already")
    parser.add_argument("--tiny", action="store_true",
                        help="small shapes on the CPU: proves the scripts, measures nothing")
    parser.add_argument("--json", action="store_true", help="print the lines as one JSON list")
    parser.add_argument("--table", action="store_true", help="measure nothing, print the table")
    parser.add_argument("--results", type=Path, metavar="DIR")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    parser.add_argument("--to", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    jobs = importlib.import_module(SUITES[arguments.suite]).JOBS
    if arguments.job is not None:
        keep_freed_memory()  # As the commands that train do.
        _measure(next(job for job in jobs if job.name == arguments.job), arguments)
        return 0
    try:
        wanted = chosen(jobs, [name for name in arguments.only.split(",") if name])
    except KeyError as error:
        names = ", ".join(line.name for job in jobs for line in job.lines)
        print(f"--only: there is no line {error}; there are {names}", file=sys.stderr)
        return 2
    folder = arguments.results or (None if arguments.tiny else RESULTS)
    results = Results(arguments.suite, jobs, folder)
    if not arguments.table:
        if arguments.suite == "gpu" and not arguments.tiny and not _has_gpu():
            for job in jobs:
                for line in job.lines:
                    results.put(line, Measured(None, NO_GPU))
        else:
            _run_all(wanted, results, arguments)
    results.write()
    print(json.dumps(results.objects(), indent=1) if arguments.json else results.table())
    return 0


def _run_all(jobs: Sequence[Job], results: Results, arguments: argparse.Namespace) -> None:
    began = time.monotonic()
    # The process of a job ends with this one, also where this one is told to.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    with tempfile.TemporaryDirectory() as folder:
        for job in jobs:
            names = ", ".join(line.name for line in job.lines)
            if results.has(job) and not arguments.again:
                _say(f"{names}: measured already")
                continue
            left = arguments.minutes - (time.monotonic() - began) / 60
            if job.minutes > left:
                _say(f"{names}: about {job.minutes:.0f} minutes do not fit into {left:.1f}")
                for line in job.lines:
                    results.put(line, Measured(None, "not measured yet: there was no time for it"))
                continue
            _say(f"{names}: {job.name}, about {job.minutes:.0f} minutes")
            _run(job, results, arguments, Path(folder), 60 * left)


def _run(
    job: Job, results: Results, arguments: argparse.Namespace, folder: Path, seconds: float
) -> None:
    """One job in a process of its own; what it finds is kept as it comes."""
    to = folder / f"{job.name}.jsonl"
    command = [
        sys.executable, "-m", "benchmarks.run", "--suite", arguments.suite, "--job", job.name,
        "--to", str(to), *(["--tiny"] if arguments.tiny else []),
    ]
    environment = dict(os.environ)
    if arguments.tiny or arguments.suite == "cpu":
        environment["JAX_PLATFORMS"] = "cpu"
    else:
        # The step of a shape is compiled once for all jobs.
        environment["JAX_COMPILATION_CACHE_DIR"] = str(folder / "compiled")
        environment |= job.environment
    with (folder / f"{job.name}.txt").open("w+", encoding="utf-8") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=log, env=environment, start_new_session=True
        )
        try:
            limit = min(seconds, 60 * max(8 * job.minutes, 30))
            code = process.wait(limit)
            why = f"it ended with {code}"
        except subprocess.TimeoutExpired:
            code, why = None, f"it was not done after {limit / 60:.0f} minutes"
        finally:
            if process.poll() is None:  # Its own children too.
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        log.seek(0)
        said = [line for line in log.read().splitlines() if line.strip("* \t")]
    rows = []
    if to.exists():
        rows = [json.loads(row) for row in to.read_text(encoding="utf-8").splitlines()]
    found = {row["name"]: (Measured(**row["found"]), row["machine"]) for row in rows}
    command_line = f"python -m benchmarks.run {' '.join(sys.argv[1:])}"
    for line in job.lines:
        if line.name in found:
            measured, where = found[line.name]
            results.put(line, measured, where | {"command": command_line})
        else:
            last = f": {said[-1][:300]}" if said and code is not None else ""
            results.put(line, Measured(None, f"not measured: {why}{last}"))
            _say("\n".join(said[-20:]))
        _say(f"  {line.name}: {results.rows[line.name]['measured']}")


def _measure(job: Job, arguments: argparse.Namespace) -> None:
    """In the process of a job: every line that it yields goes to the file at once."""
    import jax

    def put(name: str, found: Measured) -> None:
        device = jax.devices()[0]
        where = machine() | found.details.get("versions", {})
        if device.platform != "cpu":
            where["device"] = device.device_kind
        with arguments.to.open("a", encoding="utf-8") as out:
            out.write(json.dumps({"name": name, "found": vars(found), "machine": where}) + "\n")

    try:
        for name, found in job.run(arguments.tiny):
            put(name, found)
    except NotYet as missing:
        for line in job.lines:
            put(line.name, Measured(None, f"not there yet: {missing}"))


def _has_gpu() -> bool:
    """Asked in a process of its own, since whoever asks holds the memory."""
    asked = subprocess.run(
        [sys.executable, "-c", "import jax; print(jax.default_backend())"],
        capture_output=True, text=True, check=False,
    )
    return asked.stdout.strip().endswith(("gpu", "cuda"))


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
