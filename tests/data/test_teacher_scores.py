"""SALT_DS on planted data: the score by hand, and what is kept by it."""

from __future__ import annotations

import numpy as np
import pytest

from stacking_jax.data.teacher_scores import chosen_records, record_scores

TRUTH = np.array([[5, 6, 7, 8, 9]])


def labels(losses, k=3):
    """A teacher that gives the truth of each token this loss; None puts it outside of its top k."""
    ids = np.tile(np.arange(k) + 100, (1, len(losses), 1))
    log_probs = np.full((1, len(losses), k), -9.0, np.float32)
    for place, loss in enumerate(losses):
        if loss is not None:
            ids[0, place, place % k] = TRUTH[0, place]
            log_probs[0, place, place % k] = -loss
    return ids, log_probs


ALL = np.ones((1, 5), bool)


@pytest.mark.parametrize(
    ("losses", "counted", "score"),
    [
        ([0.1, 0.2, 0.3, 0.4, 0.9], ALL, 0.3),
        # What the teacher would never have said is noise, not a challenge.
        ([0.1, 0.2, None, None, 0.9], ALL, 0.2),
        ([0.1, None, None, 0.4, None], ALL, 0.25),
        # A prompt or padding is not scored, whatever the teacher says of it.
        ([9.0, 8.0, 0.3, 0.4, 0.5], np.array([[False, False, True, True, True]]), 0.4),
        ([None] * 5, ALL, -np.inf),
        ([0.5] * 5, np.zeros((1, 5), bool), -np.inf),
        ([0.0] * 5, ALL, 0.0),
    ],
)
def test_the_median_of_the_learnable_tokens(losses, counted, score):
    found = record_scores(TRUTH, counted, *labels(losses))
    assert found.dtype == np.float32 and found.shape == (1,)
    np.testing.assert_allclose(found, [score], rtol=1e-6)


def test_the_highest_are_kept_in_the_order_of_the_cache():
    scores = np.array([0.1, 0.9, -np.inf, 0.5, 0.9, 0.2], np.float32)
    assert chosen_records(scores, 0.5).tolist() == [1, 3, 4]
    # Of equal ones those that come first.
    assert chosen_records(scores, 1 / 6).tolist() == [1]
    assert chosen_records(scores, 1.0).tolist() == [0, 1, 2, 3, 4, 5]
    assert chosen_records(scores, 0.01).tolist() == [1]


def test_the_control_is_as_many_and_does_not_look():
    scores = np.arange(1000, dtype=np.float32)
    drawn = chosen_records(scores, 0.3, "random", seed=1)
    assert len(drawn) == len(set(drawn.tolist())) == len(chosen_records(scores, 0.3)) == 300
    np.testing.assert_array_equal(drawn, chosen_records(-scores, 0.3, "random", seed=1))
    assert (np.diff(drawn) > 0).all() and 400 < np.median(drawn) < 600
    assert set(drawn) != set(chosen_records(scores, 0.3, "random", seed=2))
    assert set(drawn) != set(chosen_records(scores, 0.3, "random", seed=1, name="another"))
