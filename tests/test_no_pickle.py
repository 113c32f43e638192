"""Nothing is pickled: not in the source, and not when a run is trained, resumed, scored and grown.

A pickle is a program that runs when it is read.
"""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PICKLERS = {
    "pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "shelve", "marshal",
    "jsonpickle", "copyreg",
}


def pickling(source: str) -> list[str]:
    """What of a source reads or writes pickles, by name."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            names = [] if ast.unparse(node.value) == "False" else ["pickle"]
        elif isinstance(node, ast.Attribute):
            # torch.load and the like; and what JAX's own pickling of programs is called.
            names = ["pickle"] if node.attr in ("serialize_executable", "save_pickle") else []
        else:
            continue
        found += [name for name in names if PICKLERS & set(name.split("."))]
        found += [name for name in names if "serialize_executable" in name]
    return found


@pytest.mark.parametrize("room", ["stacking_jax", "benchmarks", "examples", "launch"])
def test_the_source_knows_no_pickle(room):
    found = {
        str(path.relative_to(ROOT)): names
        for path in (ROOT / room).rglob("*.py")
        if (names := pickling(path.read_text(encoding="utf-8")))
    }
    assert not found


def test_the_search_finds_what_it_looks_for():
    for source in (
        "import pickle", "from cloudpickle import dumps", "import os, dill as d",
        "np.load(p, allow_pickle=True)", "from jax.experimental import serialize_executable",
        "from jax.experimental.serialize_executable import serialize",
    ):
        assert pickling(source), source
    assert not pickling("np.load(p, allow_pickle=False)\nfrom json import load")


# Put in place before anything else is imported. What is called: where from, and whether the
# stack leads through this package.
TRACE = """
import _pickle, pickle, json, os, sys, traceback

calls = []

def note(what):
    frames = traceback.extract_stack()[:-2]
    calls.append([what, [f"{frame.filename}:{frame.lineno}" for frame in frames]])

def watched(name, function):
    def call(*args, **kwargs):
        note(name)
        return function(*args, **kwargs)
    return call

class Pickler(_pickle.Pickler):
    def __init__(self, *args, **kwargs):
        note("Pickler")
        super().__init__(*args, **kwargs)

class Unpickler(_pickle.Unpickler):
    def __init__(self, *args, **kwargs):
        note("Unpickler")
        super().__init__(*args, **kwargs)

for name in ("dump", "dumps", "load", "loads"):
    for module in (pickle, _pickle):
        setattr(module, name, watched(name, getattr(module, name)))
for module in (pickle, _pickle):
    module.Pickler, module.Unpickler = Pickler, Unpickler
# Also what goes past these names, in C: reading any class or function from a pickle.
sys.addaudithook(lambda event, args: note(event) if event == "pickle.find_class" else None)
"""

RUN = """
import dataclasses, pathlib
from stacking_jax.data import DataConfig
from stacking_jax.evaluation.command import evaluate_run
from stacking_jax.evaluation.config import EvaluationConfig
from stacking_jax.interop import grow_folder
from stacking_jax.growth import growth_map
from stacking_jax.models import DecoderConfig
from stacking_jax.training import GrowthConfig, OptimizerConfig, Stopped, TrainConfig, train

here = pathlib.Path(sys.argv[1])
texts = here / "texts"
texts.mkdir()
for number in range(20):
    (texts / f"{number}.txt").write_text(f"one two three {number} " * 40)
config = TrainConfig(
    model=DecoderConfig(vocab_size=320, num_layers=2, d_model=16, d_ff=32, num_heads=2),
    data=DataConfig(text_dir=str(texts), sequence_length=256, held_out=0.2),
    growth=GrowthConfig(operator="midas", num_stages=2, alpha=1.0),
    optimizer=OptimizerConfig(peak_learning_rate=3e-3),
    total_steps=3, batch_size=2, checkpoint_every=1, log_every=1, eval_every=3,
)
for stop_at in (2, None):
    try:
        train(config, here / "run", stop_at=stop_at)
    except Stopped:
        pass
evaluate_run(
    here / "run", "copying", EvaluationConfig(limit=1, shots=0),
)
grow_folder(
    here / "run", here / "deeper", lambda depth: growth_map("midas", depth, 4, block=2),
    operator="midas", options={"block": 2}, total_steps=4,
)
"""


def traced(program: str, *arguments: str) -> list:
    end = "\nprint('CALLS', json.dumps(calls))"
    done = subprocess.run(
        [sys.executable, "-c", TRACE + textwrap.dedent(program) + end, *arguments],
        capture_output=True, text=True, timeout=300, cwd=ROOT,
        env={**os.environ, "JAX_NUM_CPU_DEVICES": "1", "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.rpartition("CALLS ")[2])


def test_the_trace_sees_all_ways():
    program = """
    import collections, copy, io, json
    from pickle import loads, Unpickler
    text = pickle.dumps(collections.OrderedDict)
    loads(text)
    Unpickler(io.BytesIO(text)).load()
    """
    seen = [what for what, _ in traced(program)]
    assert seen == ["dumps", "loads", "pickle.find_class", "Unpickler", "pickle.find_class"]


@pytest.mark.slow
def test_a_run_pickles_nothing(tmp_path):
    """From texts to a grown checkpoint: no pickle is written or read, by us or below us.

    But for TensorBoard's events on their way to the thread that writes them: tensorboardX takes
    a queue of `multiprocessing`, a pipe from this process to itself.
    """
    calls = traced(RUN, str(tmp_path))
    ours, queue = str(ROOT / "stacking_jax"), os.path.join("multiprocessing", "queues.py")
    assert not [call for call in calls if ours in " ".join(call[1])]
    assert not [call for call in calls if queue not in " ".join(call[1])]
    assert (tmp_path / "deeper" / "checkpoints" / "3").is_dir()
