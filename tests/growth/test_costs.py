"""The arithmetic of costs."""

from __future__ import annotations

import pytest

from stacking_jax.growth import ModelCosts

COSTS = ModelCosts(
    layer_params=100, other_params=7, layer_flops=200.0, attention_flops=30.0, head_flops=11.0
)


def test_parameters():
    assert COSTS.params(1) == 107
    assert COSTS.params(24) == 2407


@pytest.mark.parametrize(
    ("head", "attention", "forward"),
    [(True, True, 4 * 230 + 11), (False, True, 4 * 230), (True, False, 811), (False, False, 800)],
)
def test_a_step_is_three_forward_passes(head, attention, forward):
    assert COSTS.flops_per_token(4, head=head, attention=attention) == 3 * forward


def test_the_head_does_not_shrink_with_depth():
    shallow, deep = COSTS.flops_per_token(1), COSTS.flops_per_token(10)
    assert deep < 10 * shallow
    assert COSTS.flops_per_token(10, head=False) == 10 * COSTS.flops_per_token(1, head=False)
