"""The roofline's arithmetic."""

from __future__ import annotations

import pytest

from stacking_jax.errors import UserError
from stacking_jax.growth import ModelCosts, Stage
from stacking_jax.planning.config import PlanConfig
from stacking_jax.planning.estimate import (
    Rates,
    executed_flops_per_token,
    run_cost,
    step_estimate,
)

COSTS = ModelCosts(
    layer_params=0, other_params=0, layer_flops=10.0, attention_flops=2.0, head_flops=4.0
)
RATES = Rates(peak_flops=100.0, hbm_bandwidth=10.0, chips=4)


@pytest.mark.parametrize(
    ("remat", "again"),
    [("none", 0), ("dots", 3 * 2), ("minimal", 3 * 6), ("offload", 3 * 6), ("full", 3 * 12)],
)
def test_what_is_computed_again(remat, again):
    model = 3 * (3 * 12 + 4)
    assert COSTS.flops_per_token(3) == model
    assert executed_flops_per_token(Stage(3, 1, 0), COSTS, remat, mlp_flops=6.0) == model + again


@pytest.mark.parametrize(
    ("traffic", "links", "seconds", "bound"),
    [(10.0, 0.5, 3.0, "compute"), (50.0, 0.5, 5.0, "memory"), (10.0, 8.0, 8.0, "links")],
)
def test_the_largest_of_three_times(traffic, links, seconds, bound):
    made = step_estimate(800.0, 1200.0, traffic, links, RATES)
    assert (made["step_seconds_estimate"], made["bound_by"]) == (seconds, bound)
    # At the peak, 800 FLOPs on four chips take two seconds.
    assert made["mfu_estimate"] == pytest.approx(2.0 / seconds)


def test_a_run_in_days_chip_hours_and_money():
    cost = run_cost([(3600, 2.0), (7200, 1.0)], 8, PlanConfig(chip_hour_price=0.5))
    assert cost == {
        "days": 4 / 24, "chip_hours": 32.0, "price": 16.0, "currency": "USD"
    }
    assert run_cost([(1, 1.0)], 8, PlanConfig())["price"] is None
    assert run_cost([(1, 1.0), (1, None)], 8, PlanConfig())["days"] is None


@pytest.mark.parametrize(
    "settings",
    [{"chip_hour_price": 0}, {"chip_hour_price": "4"}, {"topology": 3}, {"topology": ""},
     {"currency": None}],
)  # fmt: skip
def test_settings_of_the_wrong_kind(settings):
    with pytest.raises(UserError, match=next(iter(settings))):
        PlanConfig(**settings)
