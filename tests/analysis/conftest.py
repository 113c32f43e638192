"""A tiny corpus, a model of six layers on it, and held-out batches over all devices."""

from __future__ import annotations

import random
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from stacking_jax.analysis.sample import Sample
    from stacking_jax.training import TrainConfig


@pytest.fixture(scope="session", autouse=True)
def compiled_once(cache_folder: str) -> None:
    """Keeps compiled programs on disk for all tests here, as diagnosing itself does."""
    from stacking_jax.training.compilation import use_compilation_cache

    use_compilation_cache(None)


@pytest.fixture(scope="session")
def config(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """Four layers grown from two, on forty short texts."""
    from stacking_jax.data import DataConfig
    from stacking_jax.models import DecoderConfig
    from stacking_jax.training import GrowthConfig, OptimizerConfig, TrainConfig

    folder = tmp_path_factory.mktemp("corpus") / "texts"
    folder.mkdir()
    dice = random.Random(0)
    words = ["".join(dice.choices("abcdefghij", k=dice.randint(2, 7))) for _ in range(200)]
    for number in range(40):
        text = " ".join(dice.choices(words, k=150)) + "\n"
        (folder / f"{number}.txt").write_text(text, encoding="utf-8")
    return TrainConfig(
        model=DecoderConfig(
            vocab_size=320, num_layers=4, d_model=16, d_ff=32, num_heads=2, stack="scan"
        ),
        data=DataConfig(text_dir=str(folder), sequence_length=64, held_out=0.4),
        growth=GrowthConfig(operator="midas", num_stages=2),
        optimizer=OptimizerConfig(peak_learning_rate=3e-3),
        total_steps=3, batch_size=8, log_every=1, checkpoint_every=0, eval_batches=4,
    )  # fmt: skip


@pytest.fixture(scope="session")
def run_dir(config: TrainConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of `config`. Copy it before writing into it."""
    from stacking_jax.training import train

    path = tmp_path_factory.mktemp("runs") / "run"
    train(config, path)
    return path


@pytest.fixture(scope="session")
def mesh(config: TrainConfig):
    from stacking_jax.training.mesh import make_decoding_mesh

    return make_decoding_mesh(config.mesh)


@pytest.fixture(scope="session")
def sample(config: TrainConfig, mesh) -> Sample:
    """Four held-out batches."""
    from stacking_jax.analysis.sample import Sample

    return Sample.open(config, mesh, batches=4)


@pytest.fixture(scope="session")
def params(config: TrainConfig, mesh):
    """Drawn at random, in their shards; branches are large enough to matter."""
    import jax
    from flax import nnx

    from stacking_jax.models import Decoder
    from stacking_jax.training.state import abstract_params

    model = Decoder(config.model, key=jax.random.key(1))
    drawn = jax.tree.map(lambda leaf: 2.0 * leaf, nnx.to_pure_dict(nnx.state(model)))
    shapes = abstract_params(config.model, config.model.num_layers, mesh)
    return jax.tree.map(lambda leaf, like: jax.device_put(leaf, like.sharding), drawn, shapes)


@pytest.fixture(scope="session")
def graph(config: TrainConfig):
    from stacking_jax.training.state import model_graph

    return model_graph(config.model)


@pytest.fixture(scope="session")
def network_of(config: TrainConfig, graph, mesh):
    """network_of(params, sources): every layer once where no sources are given."""
    from stacking_jax.analysis.inside import Network
    from stacking_jax.analysis.walk import Walk

    walk = Walk(graph, mesh)

    def network(params, sources=range(4)) -> Network:
        return Network(walk, params, tuple(sources), config.model.d_model)

    return network
