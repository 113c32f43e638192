"""A small run to evaluate, and an oracle in place of its model's logits."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture(scope="session", autouse=True)
def compiled_once(cache_folder: str) -> None:
    """Keeps compiled programs on disk for all tests here, as evaluation itself does."""
    from stacking_jax.training.compilation import use_compilation_cache

    use_compilation_cache(None)


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of short texts."""
    folder = tmp_path_factory.mktemp("evaluation") / "texts"
    folder.mkdir()
    dice = random.Random(0)
    for number in range(40):
        words = ("".join(dice.choices("abcdefghij", k=dice.randint(2, 7))) for _ in range(150))
        (folder / f"{number}.txt").write_text(" ".join(words) + "\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def run_config(texts: Path):
    """Two layers grown from one, a context of 512 bytes, 4 steps."""
    from stacking_jax.data import DataConfig
    from stacking_jax.models import DecoderConfig
    from stacking_jax.training import GrowthConfig, OptimizerConfig, TrainConfig

    return TrainConfig(
        model=DecoderConfig(vocab_size=320, num_layers=2, d_model=32, d_ff=64, num_heads=2),
        data=DataConfig(text_dir=str(texts), sequence_length=512, held_out=0.1),
        growth=GrowthConfig(operator="midas", num_stages=2),
        optimizer=OptimizerConfig(peak_learning_rate=3e-3),
        total_steps=4,
        batch_size=8,
        log_every=1,
        checkpoint_every=2,
        keep_checkpoints=3,
    )


@pytest.fixture(scope="session")
def run_dir(run_config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a finished run, with checkpoints 2 and 4. Leave it as it is."""
    from stacking_jax.training import train

    folder = tmp_path_factory.mktemp("evaluated") / "run"
    train(run_config, folder)
    return folder


@functools.cache
def oracle_class():
    """The oracle's module; within a function, since a conftest must not import jax itself."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from flax import nnx

    def _hashes(tokens):
        """uint32 `[B, L]`: a polynomial hash of the tokens up to each place."""
        powers = np.cumprod(np.full(tokens.shape[1], 2654435761, np.uint32), dtype=np.uint32)
        both = tokens * powers[None]
        cumulative = np.cumsum if isinstance(tokens, np.ndarray) else jnp.cumsum
        return cumulative(both, axis=1, dtype=np.uint32)

    class Oracle(nnx.Module):
        """Knows the next token of texts by heart, and reads nothing but what it is fed.

        Its cache holds the tokens so far; the logits of a position are those of the token that
        follows this very sequence of tokens, found by its hash. So it answers right only where
        tokens, positions, padding and cache are handled right.
        """

        def __init__(self, config, known):
            self.config = config
            self.embedding = nnx.Param(jnp.zeros((config.vocab_size, 1), jnp.float32))
            after: dict[int, int] = {}
            for ids, start in known:
                hashes = _hashes(np.array([[0, *ids[:-1]]], np.uint32))[0]
                for place in range(start, len(ids)):
                    assert after.setdefault(int(hashes[place]), ids[place]) == ids[place]
            keys = sorted(after)
            self.keys = nnx.Param(jnp.asarray(np.array(keys, np.uint32)))
            self.next = nnx.Param(jnp.asarray(np.array([after[key] for key in keys], np.int32)))

        def prefill(
            self, tokens, capacity, *, bidirectional=None, depth_map=None, loop=None,
            constrain=None,
        ):
            room = ((0, 0), (0, capacity - tokens.shape[1]))
            return jnp.pad(tokens.astype(jnp.uint32), room)

        def decode(self, tokens, positions, cache, *, depth_map=None, loop=None, constrain=None):
            rows = jnp.arange(len(tokens))[:, None]
            cache = cache.at[rows, positions].set(tokens.astype(jnp.uint32), mode="drop")
            hashes = jnp.take_along_axis(_hashes(cache), positions, axis=1)
            found = jnp.clip(jnp.searchsorted(self.keys[...], hashes), 0, len(self.keys[...]) - 1)
            known = self.keys[...][found] == hashes
            token = jnp.where(known, self.next[...][found], 1)
            return 20.0 * jax.nn.one_hot(token, self.config.vocab_size), cache

    return Oracle


@pytest.fixture
def with_oracle(monkeypatch) -> Callable[..., None]:
    """with_oracle(tasks, limit=..., seed=...): every checkpoint of any run answers them right."""

    def put(tasks, limit: int, seed: int = 0, target=lambda example: example.target) -> None:
        from flax import nnx

        from stacking_jax.evaluation import model as models
        from stacking_jax.evaluation.task import VALIDATION

        def load(self, step):
            config = self.config
            plain = models.LanguageModel(
                None, None, self.tokenizer, config.data.sequence_length, self.mesh
            )
            known = []
            for task in tasks:
                for example in task.source(VALIDATION, limit, seed):
                    end = task.stop[0] if task.stop else ""
                    parts = plain.split(example.prompt, target(example))
                    behind = plain.tokenizer.encode(end) or [plain.tokenizer.eos_id]
                    ids = [*parts.prompt_ids, *parts.target_ids, *behind]
                    known.append((ids, len(parts.prompt_ids)))
            graph, state = nnx.split(oracle_class()(config.model, known))
            return models.LanguageModel(
                graph, nnx.to_pure_dict(state), plain.tokenizer, plain.context, self.mesh
            )

        monkeypatch.setattr(models.RunModels, "load", load)

    return put
