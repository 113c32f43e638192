"""Losses under changed maps, against networks that were changed for good."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from stacking_jax.analysis.depth_use import losses_of_maps
from stacking_jax.analysis.interventions import interventions
from stacking_jax.growth import grow
from stacking_jax.models import LAYOUT
from stacking_jax.training.step import make_eval_step


@pytest.fixture(scope="module")
def loss_of(graph, sample):
    step = jax.jit(make_eval_step(graph))

    def loss(params):
        nats, tokens = zip(
            *(step(params, batch) for _, _, batch in sample.batches()), strict=True
        )
        return float(sum(nats)) / int(sum(tokens))

    return loss


@pytest.mark.slow
def test_a_changed_map_has_the_loss_of_the_changed_weights(graph, params, sample, loss_of):
    changed = interventions(range(4), 2)
    found = losses_of_maps(graph, params, range(4), changed, sample)
    assert found["loss"] == pytest.approx(loss_of(params), rel=1e-6)
    rows = found["interventions"]
    assert len(rows) == len(changed) == 18
    whole = jax.tree.map(np.asarray, params)
    # Of every kind one: all lengths of a map, and permutations of layers and within a block.
    one = {(row["kind"], row["unit"]): row for row in rows}
    assert len(one) == 7
    for row in one.values():
        grown = grow(whole, tuple(row["map"]), layout=LAYOUT)
        assert found["loss"] + row["change"] == pytest.approx(loss_of(grown), rel=1e-5)
    for row in rows:
        low, high = row["interval"]
        assert low < row["change"] < high


def test_skipping_a_layer_that_does_nothing_changes_nothing(graph, params, sample):
    layers = params["stack"]["layers"]
    silent = {
        "attention": {**layers["attention"], "out": layers["attention"]["out"].at[2].set(0.0)},
        "mlp": {**layers["mlp"], "down": layers["mlp"]["down"].at[2].set(0.0)},
    }
    muted = {**params, "stack": {"layers": {**layers, **silent}}}
    changed = [each for each in interventions(range(4), 1) if each.kind in ("skip", "repeat")]
    rows = losses_of_maps(graph, muted, range(4), changed, sample)["interventions"]
    for row in rows:
        if row["at"] == 2:
            assert row["change"] == pytest.approx(0, abs=1e-7)
            assert np.ptp(row["interval"]) == pytest.approx(0, abs=1e-6)
        else:
            assert abs(row["change"]) > 1e-4
