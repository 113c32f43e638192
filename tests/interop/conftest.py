"""Small Hugging Face folders of every family, and one small grown run."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest

LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 40,
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_act": "silu",
    "rms_norm_eps": 1e-5, "rope_theta": 5000.0, "tie_word_embeddings": False,
}


@pytest.fixture(scope="session")
def make_folder() -> Callable[..., Path]:
    """make_folder(path, max_shard=None, dtype="float32", biases=(), norms=(), **config changes).

    Written by the safetensors library, with random values. `biases` and `norms` are
    the names of further vectors in a layer.
    """
    import ml_dtypes
    import numpy as np
    from safetensors.numpy import save_file

    def make(path, *, max_shard=None, dtype="float32", biases=(), norms=(), **changes) -> Path:
        config = LLAMA | changes
        config = {name: value for name, value in config.items() if value is not ...}
        stream, inner = config["hidden_size"], config["intermediate_size"]
        heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
        width = config.get("head_dim") or stream // heads
        shapes = {"model.embed_tokens.weight": (config["vocab_size"], stream)}
        for layer in range(config["num_hidden_layers"]):
            matrices = {
                "self_attn.q_proj": (heads * width, stream),
                "self_attn.k_proj": (kv_heads * width, stream),
                "self_attn.v_proj": (kv_heads * width, stream),
                "self_attn.o_proj": (stream, heads * width),
                "mlp.gate_proj": (inner, stream), "mlp.up_proj": (inner, stream),
                "mlp.down_proj": (stream, inner),
            }
            inside = {f"{name}.weight": shape for name, shape in matrices.items()}
            inside |= {f"{name}.bias": matrices[name][:1] for name in biases}
            inside |= {f"{name}.weight": (width,) for name in norms}
            inside |= {"input_layernorm.weight": (stream,)}
            inside |= {"post_attention_layernorm.weight": (stream,)}
            shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in inside.items()}
        shapes["model.norm.weight"] = (stream,)
        if not config["tie_word_embeddings"]:
            shapes["lm_head.weight"] = (config["vocab_size"], stream)
        dice = np.random.default_rng(0)
        kind = np.dtype(getattr(ml_dtypes, dtype, dtype))
        tensors = {
            name: (dice.standard_normal(shape) * 0.3).astype(kind)
            for name, shape in shapes.items()
        }
        path.mkdir(parents=True)
        (path / "config.json").write_text(json.dumps(config))
        (path / "tokenizer_config.json").write_text('{"tokenizer_class": "ByT5Tokenizer"}')
        (path / "generation_config.json").write_text('{"max_length": 7}')
        if max_shard is None:
            save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
            return path
        names = list(tensors)
        shards = [names[at : at + max_shard] for at in range(0, len(names), max_shard)]
        weight_map = {}
        for number, shard in enumerate(shards, start=1):
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            save_file({name: tensors[name] for name in shard}, path / file)
            weight_map |= dict.fromkeys(shard, file)
        index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
        (path / "model.safetensors.index.json").write_text(json.dumps(index))
        return path

    return make


@pytest.fixture(scope="session")
def load_folder() -> Callable[[Path], dict]:
    """load(folder): all tensors of a folder, read by the safetensors library."""
    from safetensors.numpy import load_file

    def load(folder: Path) -> dict:
        tensors: dict = {}
        for file in sorted(folder.glob("*.safetensors")):
            for name, values in load_file(file).items():
                assert name not in tensors, f"{name} stands in two shards"
                tensors[name] = values
        return tensors

    return load


@pytest.fixture(scope="session")
def run_config(tmp_path_factory):
    """Six layers grown from two in three stages of three steps; grouped keys, tied."""
    from stacking_jax.data import DataConfig
    from stacking_jax.models import DecoderConfig
    from stacking_jax.training import GrowthConfig, OptimizerConfig, TrainConfig

    texts = tmp_path_factory.mktemp("interop_corpus") / "texts"
    texts.mkdir()
    dice = random.Random(1)
    words = ["".join(dice.choices("abcdefghij", k=dice.randint(2, 7))) for _ in range(100)]
    for number in range(20):
        (texts / f"{number}.txt").write_text(" ".join(dice.choices(words, k=100)) + "\n")
    return TrainConfig(
        model=DecoderConfig(
            vocab_size=264, num_layers=6, d_model=32, d_ff=48, num_heads=4, num_kv_heads=2,
            rope_theta=5000.0,
        ),
        data=DataConfig(text_dir=str(texts), sequence_length=64, held_out=0.2),
        growth=GrowthConfig(operator="midas", num_stages=3, alpha=0.0),
        optimizer=OptimizerConfig(peak_learning_rate=1e-2, weight_decay=0.1),
        total_steps=9, batch_size=8, log_every=1, checkpoint_every=3, keep_checkpoints=5,
    )


@pytest.fixture(scope="session")
def run_dir(run_config, tmp_path_factory) -> Path:
    """A finished run of `run_config`, with checkpoints of 2, 4 and 6 layers at 3, 6 and 9."""
    from stacking_jax.training import train

    folder = tmp_path_factory.mktemp("interop_run") / "run"
    train(run_config, folder)
    return folder


@pytest.fixture(scope="session")
def restore() -> Callable[[Path, int], object]:
    """restore(run_dir, step): the whole train state, read by the training code.

    On one device: there, what a test does with it needs no program for all eight.
    """
    import jax

    from stacking_jax.models import LAYOUT
    from stacking_jax.training import sharding
    from stacking_jax.training.checkpoints import Checkpoints
    from stacking_jax.training.config import MeshConfig
    from stacking_jax.training.optimizers import optimizer
    from stacking_jax.training.run_directory import read_config
    from stacking_jax.training.state import abstract_state

    def read(run_dir: Path, step: int):
        config = read_config(run_dir)
        checkpoints = Checkpoints(run_dir / "checkpoints", read_only=True)
        depth = int(checkpoints.read_meta(step)["depth"])
        made = optimizer(config.optimizer, LAYOUT)
        mesh = sharding.make_mesh(MeshConfig(data=-1, fsdp=1), jax.devices()[:1])
        state = checkpoints.restore(step, abstract_state(config.model, made, depth, mesh))
        checkpoints.close()
        return state

    return read


@pytest.fixture(scope="session")
def snapshot_of() -> Callable[[Path], dict[str, bytes]]:
    """Everything in a folder: path -> content."""
    return lambda folder: {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*")) if path.is_file()
    }
