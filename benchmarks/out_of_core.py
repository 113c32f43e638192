"""Peak memory of growing checkpoints of 2 GB on disk, ours and Hugging Face's.

    python -m benchmarks.out_of_core --out benchmarks/results/out_of_core.json

Each growth is a process of its own, which first grows a tiny checkpoint: what is
imported, compiled and pooled then is the base. What its peak resident memory rises
above that while it grows the large one is what the growth costs. It may cost two
layers and the embeddings (of a run: with their moments), whatever the depth; so half
the depth is measured as well. Linux only.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.measure import report

MB = 10**6
SHAPE = {"d_model": 1024, "d_ff": 4096, "num_heads": 16, "vocab_size": 32_000}
TINY = {"d_model": 64, "d_ff": 128, "num_heads": 2, "vocab_size": 320}

GROW = """
import json, re, sys, time
from pathlib import Path
from stacking_jax.growth import gradstack
from stacking_jax.interop import grow_folder

def memory(field):
    # Not getrusage: its peak outlives exec, so it would hold the parent's too.
    return int(re.search(field + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

tiny, large, out, options = sys.argv[1], sys.argv[2], sys.argv[3], json.loads(sys.argv[4])
grow_folder(tiny, out + "_tiny", lambda depth: gradstack(depth, 1), **options)
base = memory("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # The peak begins anew.
began = time.perf_counter()
grow_folder(large, out, lambda depth: gradstack(depth, depth // 4), **options)
seconds = time.perf_counter() - began
print(json.dumps({"base_bytes": base, "peak_bytes": memory("VmHWM"), "seconds": seconds}))
"""


def make_hugging_face(folder: Path, depth: int, shape: dict) -> None:
    """A folder of float32 noise, written a tensor at a time."""
    import numpy as np

    from stacking_jax.interop import hugging_face
    from stacking_jax.interop.llama_names import LAYER, OUTSIDE
    from stacking_jax.interop.tensor_files import Tensor, write_folder, write_json
    from stacking_jax.models import DecoderConfig

    config = DecoderConfig(num_layers=depth, tied_embeddings=False, **shape)
    stream, inner = config.d_model, config.d_ff
    sizes = {"gate": (inner, stream), "up": (inner, stream), "down": (stream, inner)}
    dice = np.random.default_rng(0)

    def noise(name, size):
        return Tensor.lazy(
            name, np.float32, size, lambda: dice.standard_normal(size, np.float32)
        )

    tensors = []
    for path, name in OUTSIDE.items():
        size = (stream,) if path[-1] == "scale" else (config.vocab_size, stream)
        tensors.append(noise(name, size))
    for layer in range(depth):
        for path, rest in LAYER.items():
            size = (stream,) if path[-1] == "scale" else sizes.get(path[-1], (stream, stream))
            tensors.append(noise(f"model.layers.{layer}.{rest}", size))
    folder.mkdir()
    write_folder(folder, tensors, max_shard_size=500 * MB)
    write_json(folder / "config.json", hugging_face.config_values(
        config, depth, dtype="float32", max_positions=512, eos_id=1
    ))


def make_run(folder: Path, depth: int, shape: dict) -> None:
    """A run whose one checkpoint holds parameters and Adam's moments, all of them noise."""
    import dataclasses

    import jax
    import numpy as np

    from stacking_jax.data import DataConfig
    from stacking_jax.interop import stored_state
    from stacking_jax.interop.run_files import first_meta, write_run_files
    from stacking_jax.models import LAYOUT, DecoderConfig
    from stacking_jax.training import TrainConfig
    from stacking_jax.training.optimizers import optimizer
    from stacking_jax.training.state import initial_state

    config = TrainConfig(model=DecoderConfig(num_layers=depth, **shape), data=DataConfig())
    abstract = jax.eval_shape(lambda: initial_state(
        config.model, optimizer(config.optimizer, LAYOUT), depth, 0
    ))
    tree = {field.name: getattr(abstract, field.name) for field in dataclasses.fields(abstract)}
    (folder / "checkpoints").mkdir(parents=True)
    state = stored_state.create(folder / "checkpoints" / "0", tree, first_meta(config))
    dice, writer = np.random.default_rng(0), stored_state.Writer()
    for keys, leaf in state.shapes().items():
        array = state.open(keys, write=True)
        for region in stored_state.regions(leaf.shape, stored_state.chunk_shape(array)):
            values = dice.standard_normal(array[region].shape, np.float32).astype(leaf.dtype)
            writer.write(array[region], values)
    writer.finish()
    write_run_files(folder, config, None)


def budget(shape: dict, copies: int, tied: bool) -> int:
    """Bytes of two layers and the embeddings, `copies` times."""
    stream, inner = shape["d_model"], shape["d_ff"]
    layer = 4 * stream * stream + 3 * stream * inner + 2 * stream
    embeddings = shape["vocab_size"] * stream * (1 if tied else 2)
    return 4 * copies * (2 * layer + embeddings)


def measure(kind: str, make, depth: int, options: dict, work: Path) -> dict:
    large, tiny = work / f"{kind}_{depth}", work / f"{kind}_tiny"
    if not tiny.exists():
        make(tiny, 2, TINY)
    make(large, depth, SHAPE)
    size = sum(file.stat().st_size for file in large.rglob("*") if file.is_file())
    done = subprocess.run(
        [sys.executable, "-c", GROW, tiny, large, work / "out", json.dumps(options)],
        check=True, capture_output=True, text=True,
    )
    row = json.loads(done.stdout.splitlines()[-1])
    allowed = budget(SHAPE, 3 if kind == "run" else 1, tied=kind == "run")
    above = row["peak_bytes"] - row["base_bytes"]
    subprocess.run(["rm", "-rf", large, work / "out", work / "out_tiny"], check=True)
    return {
        "kind": kind, "depth": depth, "to_depth": depth + depth // 4, **options,
        "checkpoint_megabytes": size // MB, "seconds": round(row["seconds"], 1),
        "base_megabytes": row["base_bytes"] // MB,
        "above_base_megabytes": above // MB, "allowed_megabytes": allowed // MB,
        "within": above <= allowed,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out")
    parser.add_argument("--work", help="folder for the checkpoints; a temporary one by default")
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory(dir=arguments.work) as folder:
        work = Path(folder)
        for depth in (14, 28):
            for init in ("copy", "identity"):
                rows.append(
                    measure("hugging_face", make_hugging_face, depth, {"init": init}, work)
                )
        for depth in (4, 8):
            for moments in ("copy", "copy_first"):
                rows.append(measure("run", make_run, depth, {"moments": moments}, work))
    report("out_of_core", {"shape": SHAPE, "rows": rows}, arguments.out)


if __name__ == "__main__":
    main()
