"""The learning rate after a growth."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from stacking_jax.errors import UserError
from stacking_jax.growth import rewarm


def test_it_falls_at_each_growth_and_climbs_back():
    rate = rewarm(1.0, [100, 200], 10, initial=0.2)
    np.testing.assert_allclose(
        [float(rate(step)) for step in (0, 99, 100, 105, 109, 110, 200, 210)],
        [1, 1, 0.2, 0.6, 0.92, 1, 0.2, 1], rtol=1e-6,
    )


def test_away_from_the_growths_it_is_the_schedule_to_the_bit():
    schedule = optax.warmup_cosine_decay_schedule(0.0, 0.01, 20, 300)
    rate = jax.jit(rewarm(schedule, [100], 10))
    for step in (0, 7, 50, 99, 110, 299):
        assert float(rate(step)) == float(jax.jit(schedule)(step))
    assert float(rate(104)) < float(schedule(104))


def test_the_latest_of_climbs_that_overlap_counts():
    rate = rewarm(1.0, [104, 100], 10, initial=0.0)
    assert float(rate(103)) == pytest.approx(0.3) and float(rate(104)) == 0.0
    assert float(rate(112)) == pytest.approx(0.8)


def test_a_cosine_climbs_between_the_same_ends():
    rate = rewarm(1.0, [0], 10, initial=0.0, shape="cosine")
    np.testing.assert_allclose([float(rate(s)) for s in (0, 5, 10)], [0, 0.5, 1], atol=1e-6)
    assert float(rate(2)) < 0.2


def test_it_drives_an_optimiser():
    optimizer = optax.sgd(rewarm(0.5, [2], 2, initial=0.5))
    state, sizes = optimizer.init(jnp.zeros(())), []
    update = jax.jit(optimizer.update)
    for _ in range(5):
        step, state = update(jnp.ones(()), state)
        sizes.append(-float(step))
    np.testing.assert_allclose(sizes, [0.5, 0.5, 0.25, 0.375, 0.5])


def test_without_growths_or_steps_nothing_changes():
    schedule = optax.linear_schedule(1.0, 0.0, 10)
    for rate in (rewarm(schedule, [], 5), rewarm(schedule, [3], 0)):
        assert [float(rate(s)) for s in range(10)] == [float(schedule(s)) for s in range(10)]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"steps": -1}, "0 or more steps"), ({"initial": 1.5}, "from 0 to 1"),
        ({"initial": float("nan")}, "from 0 to 1"), ({"shape": "square"}, "'linear' or 'cosine'"),
    ],
)
def test_numbers_out_of_range_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        rewarm(1.0, [1], **{"steps": 5} | options)
