"""A tiny corpus, a tiny run, and one finished run that many tests compare with.

The package is imported inside the fixtures: pytest reads this file before it lets
tests/conftest.py check that nobody else has set up the devices.
"""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from stacking_jax.training import TrainConfig


@pytest.fixture(scope="session", autouse=True)
def compiled_once(cache_folder: str) -> None:
    """Keeps compiled programs on disk for all tests here, as training itself does."""
    from stacking_jax.training.compilation import use_compilation_cache

    use_compilation_cache(None)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of forty short texts."""
    folder = tmp_path_factory.mktemp("corpus") / "texts"
    folder.mkdir()
    dice = random.Random(0)
    words = ["".join(dice.choices("abcdefghij", k=dice.randint(2, 7))) for _ in range(200)]
    for number in range(40):
        text = " ".join(dice.choices(words, k=150)) + "\n"
        (folder / f"{number}.txt").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def config(corpus: Path) -> TrainConfig:
    """Four layers grown from two after step 3 of 9: batches for the eight devices."""
    from stacking_jax.data import DataConfig
    from stacking_jax.models import DecoderConfig
    from stacking_jax.training import GrowthConfig, OptimizerConfig, TrainConfig

    return TrainConfig(
        model=DecoderConfig(vocab_size=320, num_layers=4, d_model=32, d_ff=64, num_heads=2),
        data=DataConfig(text_dir=str(corpus), sequence_length=64, held_out=0.1),
        growth=GrowthConfig(operator="midas", num_stages=2, schedule="prop", alpha=1.0),
        optimizer=OptimizerConfig(peak_learning_rate=3e-3, weight_decay=0.1),
        total_steps=9,
        batch_size=8,
        log_every=1,
        eval_every=4,
        checkpoint_every=2,
        keep_checkpoints=3,
    )


@pytest.fixture(scope="session")
def reference(config: TrainConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run of `config` that nothing disturbed."""
    from stacking_jax.training import train

    run_dir = tmp_path_factory.mktemp("reference") / "run"
    train(config, run_dir)
    return run_dir


@pytest.fixture(scope="session")
def stopped(config: TrainConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run of `config` left off at step 6, with checkpoints 2, 4, 6.

    Copy it before going on in it.
    """
    from stacking_jax.training import Stopped, train

    run_dir = tmp_path_factory.mktemp("stopped") / "run"
    with pytest.raises(Stopped):
        train(config, run_dir, stop_at=6)
    return run_dir


@pytest.fixture(scope="session")
def read_rows() -> Callable[..., list[dict]]:
    """rows(run_dir, kind=None): the lines of metrics.jsonl."""

    def read(run_dir: Path, kind: str | None = None) -> list[dict]:
        lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
        return [row for row in rows if kind in (None, row["kind"])]

    return read


@pytest.fixture(scope="session")
def read_summary() -> Callable[[Path], dict]:
    return lambda run_dir: json.loads((run_dir / "summary.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def snapshot() -> Callable[[Path], dict[str, tuple[int, bytes]]]:
    """Everything in a folder: path -> (time of the last change, content)."""

    def take(folder: Path) -> dict[str, tuple[int, bytes]]:
        return {
            str(path.relative_to(folder)): (
                path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else b""
            )
            for path in sorted(folder.rglob("*"))
        }

    return take


@pytest.fixture(scope="session")
def change() -> Callable[..., TrainConfig]:
    """change(config, batch_size=4, optimizer={"name": "adafactor"}): nested parts by dict."""

    def changed(config: TrainConfig, **settings) -> TrainConfig:
        parts = {
            name: dataclasses.replace(getattr(config, name), **value)
            if isinstance(value, dict) else value
            for name, value in settings.items()
        }
        return dataclasses.replace(config, **parts)

    return changed
