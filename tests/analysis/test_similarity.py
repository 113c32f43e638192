"""Cosines of weights: planted loops, blocks against blocks written out, and the regulariser."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from stacking_jax.analysis.similarity import GROUPS, cosines, grams, of_blocks, similarity
from stacking_jax.errors import UserError
from stacking_jax.growth import grow
from stacking_jax.models import LAYOUT


def flat(layers, group, i):
    part, name = GROUPS[group]
    return np.asarray(layers[part][name][i], np.float64).ravel()


def test_cosines_of_layers_and_of_blocks_are_those_of_their_weights_put_end_to_end(params):
    layers = params["stack"]["layers"]
    found = similarity(layers, range(4), 2)
    assert set(found["groups"]) == set(GROUPS)
    for group, here in found["groups"].items():
        weights = [flat(layers, group, i) for i in range(4)]
        blocks = [np.concatenate(weights[i : i + 2]) for i in (0, 2)]
        for name, parts in (("layers", weights), ("blocks", blocks)):
            unit = np.stack([part / np.linalg.norm(part) for part in parts])
            np.testing.assert_allclose(here[name], unit @ unit.T, atol=2e-6)


def test_the_mean_at_a_distance_is_the_regularisers_sum(params):
    """R_G(k) of Saunshi et al. 2025, Eq. 3, written out with its own indices."""
    layers = params["stack"]["layers"]
    found = similarity(layers, range(4), 2)["groups"]["down"]["by_distance"]
    for k in (1, 2):
        total = 0.0
        for i in range(4 // k - 1):
            for j in range(k):
                a, b = (flat(layers, "down", n * k + j) for n in (i, i + 1))
                total += a @ b / np.linalg.norm(a) / np.linalg.norm(b)
        assert found[k] == pytest.approx(total / (4 - k), abs=2e-6)


def test_a_stack_grown_from_a_loop_is_alike_at_its_period(params):
    looped = (0, 1, 2, 0, 1, 2)
    grown = grow(params, looped, layout=LAYOUT)
    untied = similarity(grown["stack"]["layers"], range(6), 3)
    tied = similarity(params["stack"]["layers"], looped, 3)
    for found in (untied, tied):
        distance = found["mean"]["by_distance"]
        assert distance[0] == pytest.approx(1) and distance[3] == pytest.approx(1)
        assert max(abs(distance[d]) for d in (1, 2, 4, 5)) < 0.5
        np.testing.assert_allclose(found["mean"]["blocks"], 1, atol=1e-6)
    np.testing.assert_allclose(
        untied["mean"]["layers"], tied["mean"]["layers"], atol=1e-6
    )


def test_sharded_weights_are_as_whole_ones(params):
    whole = jax.tree.map(np.asarray, params)["stack"]["layers"]
    for name, gram in grams(params["stack"]["layers"]).items():
        np.testing.assert_allclose(gram, grams(whole)[name], rtol=1e-5, atol=1e-5)


def test_zeros_are_like_nothing_and_blocks_must_fill_the_stack():
    gram = np.array([[0.0, 0.0], [0.0, 4.0]])
    assert cosines(gram).tolist() == [[0.0, 0.0], [0.0, 1.0]]
    with pytest.raises(UserError, match="blocks of 3 layers do not fill a stack of 4.* 1, 2, 4"):
        of_blocks(np.eye(4), 3)
