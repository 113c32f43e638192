"""What processes tell one another, and that they give up a checkpoint together."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from stacking_jax.training import consensus


def test_one_process_agrees_with_itself():
    value = {"a": [1, None, "ä"]}
    assert consensus.from_first(value) is value and consensus.every(value) == [value]


PROGRAM = """
import sys
from pathlib import Path
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec
process, port, folder = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
jax.distributed.initialize(f"127.0.0.1:{port}", 2, process)
from stacking_jax.training import consensus
from stacking_jax.training.checkpoints import Checkpoints
from stacking_jax.training.state import TrainState

said = consensus.every({"p": process, "long": "x" * (process * 7)})
assert said == [{"p": 0, "long": ""}, {"p": 1, "long": "xxxxxxx"}], said
assert consensus.from_first([process, "ä"]) == [0, "ä"]

mesh = jax.make_mesh((4,), ("x",))
split, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("x",), ()))
make = jax.jit(lambda n: (n, jnp.arange(4096.0) + n), out_shardings=(whole, split))
checkpoints = Checkpoints(folder / "checkpoints", 3)
for step in (1, 2):
    count, values = make(np.int32(step))
    checkpoints.save(TrainState(count, {"a": values}, {}), {"step": step, "depth": 1})
checkpoints.close()
consensus.every(None)  # Each writes its own digests, and waits for nobody else's.
if process == 0:
    for number in (0, 1):
        assert (folder / f"checkpoints/2/digests.process_{number}.json").exists()
    theirs = (folder / "checkpoints/2/state/ocdbt.process_1/d").iterdir()
    largest = max(theirs, key=lambda path: path.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 1
    largest.write_bytes(data)
consensus.from_first(None)
abstract = TrainState(
    jax.ShapeDtypeStruct((), jnp.int32, sharding=whole),
    {"a": jax.ShapeDtypeStruct((4096,), jnp.float32, sharding=split)}, {},
)
checkpoints = Checkpoints(folder / "checkpoints", 3)
state, meta = checkpoints.restore_latest(lambda depth: abstract)
print("restored", meta["step"], int(state.step.addressable_data(0)))
checkpoints.close()
"""


@pytest.mark.slow
def test_two_processes_move_to_the_same_checkpoint(tmp_path):
    """Although only one of the two finds the damage."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "PYTHONPATH": str(Path(__file__).resolve().parents[2]), "JAX_NUM_CPU_DEVICES": "2",
    }
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(number), str(port), str(tmp_path)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
        )
        for number in range(2)
    ]
    try:
        for process in processes:
            said, messages = process.communicate(timeout=240)
            assert process.returncode == 0, messages
            assert "restored 1 1" in said
            assert "warning: checkpoint 2 cannot be read (the content of " in messages
    finally:
        for process in processes:
            process.kill()
