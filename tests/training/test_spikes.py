"""Loss spikes: what counts as one, and that skipping and rewinding survive interruptions."""

from __future__ import annotations

import dataclasses
import functools
import json
import statistics

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stacking_jax.data import PackedBatches, open_cache
from stacking_jax.errors import UserError
from stacking_jax.models import LAYOUT, DecoderConfig
from stacking_jax.training import (
    MeshConfig,
    OptimizerConfig,
    Stopped,
    run_directory,
    sharding,
    spikes,
    train,
)
from stacking_jax.training.checkpoints import Checkpoints
from stacking_jax.training.optimizers import optimizer
from stacking_jax.training.spike_config import SpikeConfig
from stacking_jax.training.state import (
    abstract_params,
    abstract_state,
    initial_state,
    model_graph,
)
from stacking_jax.training.step import make_eval_step, make_train_step

# Whole runs, of some seconds each.
pytestmark = pytest.mark.slow

# ---- The rule -----------------------------------------------------------------------------


def test_the_rule_against_plain_python():
    config = SpikeConfig("skip", window=5, factor=2.0)
    dice = np.random.default_rng(0)
    norms = dice.lognormal(0.0, 0.8, 60).astype(np.float32)
    norms[[3, 20, 21]] = np.nan, np.inf, np.nan
    window = {"norms": jnp.zeros(5), "count": jnp.int32(0)}
    judge = jax.jit(functools.partial(spikes.judge, config))
    accepted, found = [], []
    for norm in norms:
        spike, median, window = judge(window, norm)
        full = len(accepted) >= 5
        want = statistics.median(accepted[-5:]) if full else 0.0
        assert float(median) == pytest.approx(want)
        assert bool(spike) == (full and bool(np.isfinite(norm)) and norm > 2 * want)
        found.append(bool(spike))
        if np.isfinite(norm) and not spike:
            accepted.append(float(norm))
    assert 3 < sum(found) < 30 and int(window["count"]) == len(accepted)


def step_and_state(config: SpikeConfig | None, num_layers=1):
    model = DecoderConfig(vocab_size=64, num_layers=num_layers, d_model=16, d_ff=16, num_heads=2)
    transform = optimizer(OptimizerConfig(weight_decay=0.1), LAYOUT)
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    abstract = abstract_state(model, transform, num_layers, mesh)
    settings = {} if config is None else {"spikes": config}
    step = make_train_step(model_graph(model), transform, lambda step: 1e-2, **settings)
    state = initial_state(model, transform, num_layers, 0)
    abstract = spikes.with_window(abstract, config or SpikeConfig(), mesh)
    ones = np.ones((2, 8), np.int32)
    batch = {"tokens": ones * 5, "segment_ids": ones, "positions": ones * np.arange(8)}
    return jax.jit(step), spikes.empty_window(state, abstract), batch


def test_without_a_policy_the_program_is_the_same():
    step, state, batch = step_and_state(None)
    off, state_off, _ = step_and_state(SpikeConfig(window=3, factor=2.0))
    text = step.lower(state, batch).as_text()
    assert off.lower(state_off, batch).as_text() == text
    assert "stablehlo.sort" not in text
    assert len(jax.tree.leaves(state_off)) == len(jax.tree.leaves(state))
    on, state_on, _ = step_and_state(SpikeConfig("skip", window=3))
    assert "stablehlo.sort" in on.lower(state_on, batch).as_text()


def test_a_spike_is_left_out_and_nothing_else_is():
    plain, state, batch = step_and_state(None)
    step, ours, _ = step_and_state(SpikeConfig("skip", window=3, factor=2.0))
    want, metrics = plain(state, batch)
    norm = float(metrics["grad_norm"])
    for norms, spike in (([norm] * 3, 0), ([norm / 3] * 3, 1)):
        window = {"norms": jnp.asarray(norms, jnp.float32), "count": jnp.int32(7)}
        after, seen = step(dataclasses.replace(ours, spikes=window), batch)
        assert int(seen["spike"]) == spike and int(seen["skipped"]) == 0
        assert float(seen["median_grad_norm"]) == pytest.approx(norms[0])
        goal = state if spike else want
        assert jax.tree.all(jax.tree.map(np.array_equal, after.params, goal.params))
        assert jax.tree.all(jax.tree.map(np.array_equal, after.opt_state, goal.opt_state))
        assert int(after.step) == 1 and int(after.spikes["count"]) == 8 - spike


# ---- Whole runs -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def restless(config, change):
    """A learning rate so large that gradients jump; one layer, two after step 6 of 18."""
    return change(
        config, total_steps=18, eval_every=0, checkpoint_every=3, keep_checkpoints=20,
        model={"num_layers": 2, "d_model": 16}, growth={"alpha": 1.0},
        optimizer={"peak_learning_rate": 3e-2, "schedule": "constant"},
    )


def with_policy(config, change, action, **settings):
    return change(config, spikes=SpikeConfig(action, **{"window": 3, "factor": 1.1} | settings))


@pytest.fixture(scope="module")
def skipping(restless, change, tmp_path_factory):
    config = with_policy(restless, change, "skip")
    run_dir = tmp_path_factory.mktemp("skipping") / "run"
    return config, run_dir, train(config, run_dir)


@pytest.fixture(scope="module")
def rewinding(restless, change, tmp_path_factory):
    config = with_policy(change(restless, checkpoint_every=5), change, "rewind", factor=1.7)
    run_dir = tmp_path_factory.mktemp("rewinding") / "run"
    return config, run_dir, train(config, run_dir)


def meta_of(run_dir, step=18) -> dict:
    reader = Checkpoints(run_dir / "checkpoints", read_only=True)
    meta = reader.read_meta(step)
    reader.close()
    return meta


def spikes_of(run_dir) -> list[dict]:
    return [entry for entry in meta_of(run_dir)["history"] if entry.get("event") == "spike"]


def losses(read_rows, run_dir):
    return [(row["step"], row["loss"], row["tokens"]) for row in read_rows(run_dir, "train")]


def stop_and_go(config, run_dir, *stops):
    for step in stops:
        with pytest.raises(Stopped):
            train(config, run_dir, stop_at=step)
    return train(config, run_dir)


def test_skipped_steps_are_recorded(skipping, read_rows, restless):
    _, run_dir, summary = skipping
    found = spikes_of(run_dir)
    rows = read_rows(run_dir, "spike")
    assert found and [entry["step"] for entry in found] == [row["step"] for row in rows]
    norms = {row["step"]: row["grad_norm"] for row in read_rows(run_dir, "train")}
    for entry in found:
        assert entry["action"] == "skip" and entry["grad_norm"] == norms[entry["step"]]
        assert entry["grad_norm"] > 1.1 * entry["median"] > 0
        # Three steps fill the window, at the beginning and after the growth at step 6.
        assert entry["step"] not in (1, 2, 3, 7, 8, 9)
    assert summary["skipped_steps"] == 0 and meta_of(run_dir)["skipped_batches"] == 0
    assert [e["step"] for e in meta_of(run_dir)["history"] if "to_depth" in e] == [6]


def test_a_run_that_skips_resumes_bit_equal(skipping, tmp_path, read_rows):
    config, run_dir, summary = skipping
    first = spikes_of(run_dir)[0]["step"]
    # With a window that is being filled after the growth, and right after a spike.
    again = stop_and_go(config, tmp_path / "run", *sorted({8, first}))
    assert again["params_digest"] == summary["params_digest"]
    assert losses(read_rows, tmp_path / "run") == losses(read_rows, run_dir)
    assert spikes_of(tmp_path / "run") == spikes_of(run_dir)


def test_rewinding_leaves_the_batches_out(rewinding, read_rows):
    config, run_dir, _ = rewinding
    rows = read_rows(run_dir, "rewind")
    assert rows and all(row["step"] % 5 == 0 and row["step"] < row["from_step"] for row in rows)
    lengths = [row["from_step"] - row["step"] for row in rows]
    assert meta_of(run_dir)["skipped_batches"] == sum(lengths) == rows[-1]["skipped_batches"]
    assert [entry["step"] for entry in spikes_of(run_dir)] == [row["from_step"] for row in rows]
    assert [row["step"] for row in read_rows(run_dir, "train")] == list(range(1, 19))

    # After the last of them, a step has the batch behind the spike's.
    step, skipped = rows[-1]["step"], rows[-1]["skipped_batches"]
    reader = Checkpoints(run_dir / "checkpoints", read_only=True)
    mesh = sharding.make_mesh(config.mesh)
    params = reader.restore_params(
        step, functools.partial(abstract_params, config.model, mesh=mesh)
    )
    batches = PackedBatches(open_cache(config.data), "train", batch_size=8, seed=config.seed)
    evaluate = jax.jit(
        make_eval_step(model_graph(config.model), constrain=sharding.constrainer(mesh))
    )
    nats, tokens = evaluate(params, sharding.place_batch(batches.batch(step + skipped), mesh))
    [row] = [row for row in read_rows(run_dir, "train") if row["step"] == step + 1]
    assert row["loss"] == pytest.approx(float(nats / tokens), rel=1e-5)


def test_a_run_that_rewinds_resumes_bit_equal(rewinding, tmp_path, read_rows):
    """Stopped off the schedule between a checkpoint and its spike, and after the rewinding."""
    config, run_dir, summary = rewinding
    first = read_rows(run_dir, "rewind")[0]
    assert first["step"] < first["from_step"] - 1
    again = stop_and_go(config, tmp_path / "run", first["from_step"] - 1, first["from_step"] + 1)
    assert again["params_digest"] == summary["params_digest"]
    assert losses(read_rows, tmp_path / "run") == losses(read_rows, run_dir)
    assert spikes_of(tmp_path / "run") == spikes_of(run_dir)
    assert meta_of(tmp_path / "run")["skipped_batches"] == meta_of(run_dir)["skipped_batches"]
    account = json.loads((tmp_path / "run/goodput.json").read_text())
    assert account["seconds"]["recomputed"] > 0


def test_rewinding_goes_back_over_a_growth(restless, change, tmp_path, read_rows):
    """And to the very beginning, for want of a checkpoint."""
    config = with_policy(change(restless, checkpoint_every=13), change, "rewind", factor=1.7)
    train(config, tmp_path / "run")
    meta = meta_of(tmp_path / "run")
    first = spikes_of(tmp_path / "run")[0]
    assert 6 < first["step"] <= 13 and meta["skipped_batches"] >= first["step"]
    assert [entry["step"] for entry in meta["history"] if "to_depth" in entry] == [6]
    assert [row["step"] for row in read_rows(tmp_path / "run", "train")] == list(range(1, 19))


@pytest.mark.parametrize("action", ["skip", "rewind"])
def test_too_many_end_the_run(action, restless, change, tmp_path):
    config = with_policy(restless, change, action, window=1, factor=1.0001, limit=1)
    with pytest.raises(UserError, match="2 loss spikes within 1000 steps, the last at") as caught:
        train(config, tmp_path / "run")
    assert "\n" not in str(caught.value) and "raise SpikeConfig.limit" in str(caught.value)
    # Which changes no number, so the run may go on with another.
    more = with_policy(restless, change, action, window=1, factor=1.0001, limit=99)
    assert run_directory.check(tmp_path / "run", more)


# ---- Settings -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({"action": "halt"}, "None, 'skip' or 'rewind'"),
        ({"window": 0}, "SpikeConfig.window must be a whole number"),
        ({"factor": 1}, "SpikeConfig.factor must be a number above 1"),
        ({"limit": 0}, "SpikeConfig.limit "),
    ],
)
def test_settings_are_checked(settings, part):
    with pytest.raises(UserError, match=part):
        SpikeConfig(**settings)


def test_rewinding_needs_checkpoints(config, change):
    with pytest.raises(UserError, match="TrainConfig.checkpoint_every"):
        change(config, checkpoint_every=0, spikes=SpikeConfig("rewind"))


def test_where_to_rewind_to():
    assert spikes.rewind_target(14, 3, [6, 9, 12, 13]) == 12
    assert spikes.rewind_target(12, 3, [6, 9, 12, 13]) == 9
    # Only one saved at a stop is left.
    assert spikes.rewind_target(14, 10, [13]) == 13
    assert spikes.rewind_target(2, 3, []) == 0
