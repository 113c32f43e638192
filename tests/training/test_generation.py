"""Continuing text with the model of a run directory."""

from __future__ import annotations

import functools
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from stacking_jax.data import tokenizer
from stacking_jax.errors import UserError
from stacking_jax.training import MeshConfig, run_directory, sharding
from stacking_jax.training.checkpoints import Checkpoints
from stacking_jax.training.generation import sample_from_run
from stacking_jax.training.state import abstract_params, model_graph


def refusal(*arguments, **options) -> str:
    with pytest.raises(UserError) as caught:
        sample_from_run(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("step", [2, 6], ids=["before the growth", "after it"])
def test_the_likeliest_text_is_that_of_full_forward_passes(step, stopped, config):
    reader = Checkpoints(stopped / "checkpoints", read_only=True)
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    params = reader.restore_params(step, lambda depth: abstract_params(config.model, depth, mesh))
    model = nnx.merge(model_graph(config.model), params)
    codec = tokenizer(config.data)
    inputs = [0, *codec.encode("abc ")]
    forward = jax.jit(lambda tokens: model(tokens))
    for _ in range(5):
        padded = jnp.asarray([inputs + [0] * (16 - len(inputs))])
        inputs.append(int(jnp.argmax(forward(padded)[0, len(inputs) - 1])))
        if inputs[-1] == codec.eos_id:
            break
    new = [token for token in inputs[5:] if token != codec.eos_id]
    assert sample_from_run(
        stopped, "abc ", step=step, max_new_tokens=5, temperature=0.0
    ) == [codec.decode(new)]


def test_the_newest_checkpoint_is_the_default_and_the_seed_decides(stopped, snapshot):
    before = snapshot(stopped)
    draw = functools.partial(sample_from_run, stopped, "ab", max_new_tokens=20)
    assert draw(seed=1, num_samples=2) == draw(seed=1, num_samples=2, step=6)
    assert len(draw(num_samples=2)) == 2 and draw(seed=1) != draw(seed=2)
    assert snapshot(stopped) == before


def test_another_mesh_says_the_same(stopped, tmp_path):
    """That of the run, with whatever number of samples."""
    run_dir = Path(shutil.copytree(stopped, tmp_path / "run"))
    recorded = json.loads((run_dir / "config.json").read_text())
    recorded["config"]["mesh"] |= {"data": 2, "fsdp": 1, "sequence": 2, "tensor": 2}
    (run_dir / "config.json").write_text(json.dumps(recorded))
    draw = functools.partial(sample_from_run, prompt="ab", max_new_tokens=20, num_samples=3)
    assert draw(run_dir, temperature=1.0) == draw(stopped, temperature=1.0)


def test_what_is_not_there_is_named(stopped, tmp_path, config):
    assert "holds no run" in refusal(tmp_path / "nothing", "a")
    assert "holds no checkpoint of step 5; it has 2, 4, 6" in refusal(stopped, "a", step=5)
    assert "num_samples must be at least 1" in refusal(stopped, "a", num_samples=0)
    assert "temperature -1" in refusal(stopped, "a", temperature=-1.0)
    run_directory.prepare(tmp_path / "young", config, "abc")
    assert "young holds no checkpoint yet" in refusal(tmp_path / "young", "a")


def test_a_damaged_checkpoint_is_one_line(stopped, tmp_path):
    run_dir = Path(shutil.copytree(stopped, tmp_path / "run"))
    (run_dir / "checkpoints/6/meta/metadata").unlink()
    message = refusal(run_dir, "a")
    assert message.startswith("checkpoint 6 of ") and "cannot be read" in message
    assert "there are checkpoints of 2, 4, 6" in message
    assert sample_from_run(run_dir, "a", step=4, max_new_tokens=2)
