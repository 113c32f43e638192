"""The process that compiles: jobs come in as lines of JSON, results go out as lines of JSON.

A process of its own, because libtpu talks to the terminal, takes settings from the
environment when it is loaded, and ends its process where it fails; and so that the process
of the command can use the devices that are here. Run by `compiler.Compiler`, nobody else.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import tempfile
from pathlib import Path


def main() -> int:
    # What libraries print belongs to standard error; the results have a line of their own.
    results = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def answer(**content):
        results.write(json.dumps(content) + "\n")

    from stacking_jax.errors import UserError

    for line in sys.stdin:
        job = json.loads(line)
        try:
            answer(result=_work(job, answer))
        except UserError as error:
            answer(refused=str(error))
    return 0


def _work(job: dict, answer) -> dict:
    from stacking_jax.planning import topology as topologies
    from stacking_jax.planning.cache import ResultCache, program_digest, reader_digest
    from stacking_jax.planning.compiled import compile_stage, lower_stage, read_program
    from stacking_jax.training import sharding

    for name in job["modules"]:
        importlib.import_module(name)
    cache = ResultCache(job["cache"])
    topology = topologies.parse(job["topology"])
    config = read(job["config"])
    mesh = sharding.make_mesh(config.mesh, topology.devices())
    answer(doing="tracing")
    lowered = lower_stage(config, job["stage"], mesh)
    digest = program_digest(lowered.program.as_text(), topology.name)
    result = cache.program(digest)
    text = cache.text(digest) if result is not None else None
    if result is not None and text is not None and result.get("reader") != reader_digest():
        # What is read off a program has changed since; the program has not.
        result |= read_program(text, mesh, topology.link_rate) | {"reader": reader_digest()}
        cache.keep(job["question"], digest, result)
    elif result is None:
        answer(doing="compiling")
        result, text, _ = compile_stage(lowered, mesh, topology.link_rate)
        result["mesh"] = dict(zip(mesh.axis_names, mesh.devices.shape, strict=True))
        result |= {"program": digest, "reader": reader_digest()}
        cache.keep(job["question"], digest, result, text)
    else:
        cache.keep(job["question"], digest)
    return result


def read(settings: dict):
    """A configuration from plain data, as a run's config.json holds it."""
    from stacking_jax.training.run_directory import read_config

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps({"config": settings}))
        return read_config(folder)


if __name__ == "__main__":
    sys.exit(main())
