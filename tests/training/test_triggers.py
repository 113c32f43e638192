"""When a stage ends by what is seen of it, on curves that are known."""

from __future__ import annotations

import json
import math

import pytest

from stacking_jax.growth import Plan
from stacking_jax.models import DecoderConfig
from stacking_jax.training.choice_config import ChoiceConfig
from stacking_jax.training.triggers import Watch, budgets, plateau

COSTS = DecoderConfig(vocab_size=64, num_layers=4, d_model=16, d_ff=32, num_heads=2).costs(32)
PLAN = Plan.prop(4, 2, 300, 1.0, "midas")  # 100 and 200 steps


def watch(**settings) -> Watch:
    return Watch(ChoiceConfig(**settings), PLAN, COSTS, 10)


def test_a_falling_loss_is_no_plateau_and_a_level_one_is():
    falling = [5 * 0.99**n for n in range(20)]
    assert plateau(falling, 0.01) is None
    assert plateau([2.0] * 8, 0.01) == 0.0
    assert plateau([2.0, 2.0, 2.2, 2.2], 0.01) == pytest.approx(-0.1)
    assert plateau([2.0], 0.5) is None and plateau([2.0, math.nan], 0.5) is None
    assert plateau([4.0, 3.0], 0.3) == pytest.approx(0.25)


def first_fire(trigger: Watch, loss_of, begin: int = 0, last: int = 100) -> int | None:
    trigger.begin_stage()
    for step in range(begin + 1, last + 1):
        trigger.see(loss_of(step))
        if trigger.due(step) and trigger.look(step, begin, 1, {}) is not None:
            return step
    return None


def test_a_curve_that_levels_off_fires_once_the_window_is_level():
    def curve(step):  # Falls by 1 % a step until 50, then not at all.
        return 5 * 0.99 ** min(step, 50)

    settings = {"trigger": "plateau", "check_every": 5, "window": 20, "threshold": 0.01}
    fired = first_fire(watch(**settings), curve)
    assert 50 < fired <= 70
    assert first_fire(watch(**settings), lambda step: 5 * 0.99**step) is None
    assert first_fire(watch(**settings), lambda step: 2.0) == 20, "not before a whole window"


def test_only_the_stage_s_own_losses_count():
    settings = {"trigger": "plateau", "check_every": 5, "window": 20, "threshold": 0.01}
    trigger = watch(**settings)
    assert first_fire(trigger, lambda step: 2.0, last=15) is None
    # Level before and after, but the window of the new stage is not full before step 35.
    assert first_fire(trigger, lambda step: 2.0, begin=15) == 35


def test_a_watch_that_goes_on_sees_what_it_would_have_seen():
    def curve(step):
        return 5 * 0.99 ** min(step, 40)

    choice = ChoiceConfig(trigger="plateau", check_every=5, window=20, threshold=0.01)
    whole = first_fire(Watch(choice, PLAN, COSTS, 10), curve)
    for stop in (7, 10, 33):
        trigger = Watch(choice, PLAN, COSTS, 10)
        for step in range(1, stop + 1):
            trigger.see(curve(step))
            if trigger.due(step):
                assert trigger.look(step, 0, 1, {}) is None
        trigger = Watch(choice, PLAN, COSTS, 10, json.loads(json.dumps(trigger.seen)))
        for step in range(stop + 1, 101):
            trigger.see(curve(step))
            if trigger.due(step) and trigger.look(step, 0, 1, {}) is not None:
                break
        assert step == whole


def test_a_plateau_of_the_held_out_loss_looks_at_that_alone():
    trigger = watch(
        trigger="plateau", plateau_on="held_out", check_every=5, window=20, threshold=0.01
    )
    assert trigger.needs_evaluation
    found = None
    for step in range(1, 26):
        trigger.see(5 * 0.9**step)  # The training loss falls; the held-out loss does not.
        if trigger.due(step):
            found = found or trigger.look(step, 0, 1, {}, held_out=3.0)
    assert found["reason"] == "plateau" and found["improvement"] == 0.0


def test_a_budget_is_spent_at_its_share():
    trigger = watch(trigger="seconds", budget=600.0, budget_shares=[0.25])
    assert trigger.look(40, 0, 1, {"seconds": 149.9}) is None
    assert trigger.look(50, 0, 1, {"seconds": 150.2}) == {
        "reason": "seconds", "spent": 150.2, "budget": 150.0
    }


def test_without_shares_the_plan_s_own_are_taken():
    assert budgets(ChoiceConfig(trigger="tokens"), PLAN, COSTS, 10) == pytest.approx([1000])
    half = budgets(ChoiceConfig(trigger="tokens", budget=600), PLAN, COSTS, 10)
    assert half == pytest.approx([200])
    first, second = (COSTS.flops_per_token(depth) for depth in (2, 4))
    share = 100 * first / (100 * first + 200 * second)
    assert budgets(ChoiceConfig(trigger="flops"), PLAN, COSTS, 10) == pytest.approx([1000 * first])
    found = budgets(ChoiceConfig(trigger="seconds", budget=60), PLAN, COSTS, 10)
    assert found == pytest.approx([60 * share])
