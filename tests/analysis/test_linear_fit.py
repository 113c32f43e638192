"""Linear maps: found where they are planted, worth nothing where there is noise."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stacking_jax.analysis.linear_fit import LinearFit

WIDTH = 8


@pytest.fixture
def fitted():
    whole = jax.sharding.SingleDeviceSharding(jax.devices()[0])

    def fit(update_of, rows=4):
        found = LinearFit(whole)
        for number in range(rows):
            random = np.random.default_rng(number)
            x = random.normal(size=(2, 50, WIDTH)) * [100, *[1] * (WIDTH - 1)] + 3
            weights = random.random((2, 50)) < 0.9
            update = update_of(x, random)
            update[~weights] = np.nan  # What does not count may be anything.
            take = found.judge if number > rows // 2 else found.fit
            arrays = (jnp.asarray(a, jnp.float32) for a in (x, update))
            take(*arrays, jnp.asarray(weights), int(weights.sum()))
        return found

    return fit


def test_a_linear_layer_has_r2_1(fitted):
    matrix = np.random.default_rng(9).normal(size=(WIDTH, WIDTH))
    found = fitted(lambda x, random: x @ matrix + 5)
    assert found.r2 == pytest.approx(1, abs=1e-6) and found.cosine == pytest.approx(1, abs=1e-5)
    assert found.fitted > found.judged > 0


def test_half_noise_is_half_explained(fitted):
    found = fitted(lambda x, random: x * [0.01, *[1] * (WIDTH - 1)] + random.normal(size=x.shape),
                   rows=40)  # fmt: skip
    assert found.r2 == pytest.approx(0.5, abs=0.05)


def test_noise_alone_is_not_explained(fitted):
    assert fitted(lambda x, random: random.normal(size=x.shape)).r2 < 0.05


def test_a_layer_that_adds_nothing_has_no_r2(fitted):
    assert fitted(lambda x, random: 0 * x).r2 is None
