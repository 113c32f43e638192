"""The law of when G_stack grows, against the figures that its authors give."""

from __future__ import annotations

import pytest

from stacking_jax.errors import UserError
from stacking_jax.growth import g_stack_tokens


def test_the_authors_figure_for_seven_billion_parameters():
    """Llama 2 7B on 2 T tokens: after 11.11 B tokens (the README of the paper's code)."""
    params, tokens = 7e9, 2e12
    assert g_stack_tokens(params, 6 * params * tokens) == pytest.approx(11.11e9, rel=1e-3)


def test_larger_models_grow_later_and_longer_runs_sooner():
    assert g_stack_tokens(2e9, 1e22) > g_stack_tokens(1e9, 1e22)
    assert g_stack_tokens(1e9, 1e23) < g_stack_tokens(1e9, 1e22)


@pytest.mark.parametrize(("params", "flops"), [(0, 1e20), (1e9, 1), (1e9, 0)])
def test_what_has_no_logarithm(params, flops):
    with pytest.raises(UserError, match="above 1"):
        g_stack_tokens(params, flops)
