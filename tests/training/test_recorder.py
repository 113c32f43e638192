"""The host's side of the loop: what is counted, when, and when it gives up."""

from __future__ import annotations

import json

import jax.numpy as jnp
import pytest

from stacking_jax.errors import UserError
from stacking_jax.growth import Plan
from stacking_jax.training.recorder import Counters, Recorder
from stacking_jax.training.telemetry import Clock, MetricsLog

PLAN = Plan.prop(4, 2, 9, alpha=1.0)  # 3 steps at depth 2, 6 at depth 4


def metrics(loss=1.0, tokens=10, skipped=0):
    return {
        "loss": jnp.asarray(loss), "grad_norm": jnp.asarray(0.5), "tokens": jnp.asarray(tokens),
        "learning_rate": jnp.asarray(0.1), "skipped": jnp.asarray(skipped),
    }


@pytest.fixture
def make(tmp_path):
    def build(log_every=1, on_nan="stop"):
        return Recorder(
            PLAN, Counters.of(PLAN), Clock(), MetricsLog(tmp_path),
            flops_at=lambda step: 100.0 * step, log_every=log_every, on_nan=on_nan,
        )

    return build


def rows(tmp_path):
    return [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]


def test_a_step_is_read_after_the_next_one_was_dispatched(make):
    recorder = make()
    recorder.push(1, metrics(tokens=10))
    assert recorder.counters.tokens == 0
    recorder.push(2, metrics(tokens=7))
    assert recorder.counters.tokens == 10
    recorder.drain()
    recorder.drain()
    assert recorder.counters.tokens == 17


def test_steps_are_counted_for_their_stage(make):
    recorder = make()
    for step in range(1, 10):
        recorder.push(step, metrics(tokens=step))
    recorder.drain()
    stages = recorder.counters.stages
    assert [(s["depth"], s["steps"], s["tokens"]) for s in stages] == [(2, 3, 6), (4, 6, 39)]


def test_rows_come_every_so_often_and_at_the_end(make, tmp_path):
    recorder = make(log_every=4)
    for step in range(1, 10):
        recorder.push(step, metrics(loss=10.0 - step))
    recorder.drain()
    written = rows(tmp_path)
    assert [row["step"] for row in written] == [4, 8, 9]
    assert [row["loss"] for row in written] == [6.0, 2.0, 1.0]
    assert [row["tokens"] for row in written] == [40, 80, 90]
    assert [row["model_flops"] for row in written] == [400.0, 800.0, 900.0]
    assert [row["stage"] for row in written] == [2, 2, 2]
    assert recorder.counters.train_loss == 1.0
    assert "stage 2/2 · 4 layers · loss 1.000" in recorder.status


def test_a_run_that_diverges_ends_with_the_last_good_checkpoint(make):
    recorder = make()
    recorder.push(1, metrics(loss=float("nan"), skipped=1))
    with pytest.raises(UserError) as caught:
        recorder.drain()
    message = str(caught.value)
    assert "loss nan" in message and "at step 1" in message and "no checkpoint yet" in message
    assert "on_nan = 'skip'" in message and "\n" not in message

    recorder = make()
    recorder.last_good_checkpoint = 40
    recorder.push(5, metrics(loss=float("inf"), skipped=1))
    with pytest.raises(UserError, match="at step 5; the last good checkpoint is 40"):
        recorder.push(6, metrics())


def test_skipped_steps_are_counted_and_named(make, capsys):
    recorder = make(on_nan="skip")
    for step in range(1, 4):
        recorder.push(step, metrics(loss=float("nan"), skipped=1) if step == 2 else metrics())
    recorder.drain()
    assert recorder.counters.skipped == 1 and recorder.counters.train_loss == 1.0
    assert "warning: skipped a step: loss nan" in capsys.readouterr().err


def test_twenty_skipped_steps_in_a_row_are_enough(tmp_path):
    plan = Plan.constant(4, 100)
    recorder = Recorder(
        plan, Counters.of(plan), Clock(), MetricsLog(tmp_path),
        flops_at=lambda step: 0.0, log_every=1, on_nan="skip",
    )
    bad = metrics(loss=float("nan"), skipped=1)
    for step in range(1, 20):
        recorder.push(step, bad)
    recorder.push(20, metrics())  # One that works starts the count again.
    for step in range(21, 41):
        recorder.push(step, bad)
    with pytest.raises(UserError, match="20 steps in a row were not finite, the last .* step 40"):
        recorder.drain()
    assert recorder.counters.skipped == 39


def test_speed_is_measured_since_the_last_row(make, tmp_path):
    recorder = make()
    recorder.clock.go_on_from({"step": 1000.0})
    recorder.restart_speed(0)
    recorder.clock.go_on_from({"step": 2.0})
    recorder.push(1, metrics(tokens=10))
    recorder.drain()
    [row] = rows(tmp_path)
    assert row["tokens_per_second"] == pytest.approx(5.0, rel=0.05)
    assert row["flops_per_second"] == pytest.approx(50.0, rel=0.05)
    assert row["train_seconds"] >= 1002
