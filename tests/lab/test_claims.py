"""Planted cells: verdicts follow what was planted, and figures and page show it."""

from __future__ import annotations

import math

import numpy as np
import pytest

from stacking_jax.lab import measure
from stacking_jax.lab.claims import Claim, judge
from stacking_jax.lab.page import render_page
from stacking_jax.lab.results import AT_CAP, Results, law_fits, steps
from stacking_jax.lab.settings import IclSettings

# The depths needed lie between the smallest and the largest one, of softmax stacks too.
SETTINGS = IclSettings(seeds=3, softmax_depths=(2, 4, 8, 12), target_losses=(0.1, 0.05))
CAP = SETTINGS.cap


def planted(tied_worse: bool = False) -> dict:
    """Cells of stacks whose loss is exp(−2.3 · depth / need), need growing by the claimed law.

    They hold what measured cells can: finite losses of `cap` at the most.
    """
    rng = np.random.default_rng(0)
    cells = {}
    for stack in measure.arms(SETTINGS):
        law = math.sqrt if stack.restricted else math.log
        positions = stack.depth * (SETTINGS.extra_loops if stack.tied else 1)
        shape = (len(SETTINGS.kappas), SETTINGS.seeds, positions)
        need = np.array([1 + 0.5 * law(kappa) for kappa in SETTINGS.kappas])
        loss = np.exp(-2.3 * np.arange(1, positions + 1) / need[:, None, None])
        loss = loss * np.exp(rng.normal(scale=0.01, size=(*shape[:2], 1))) + np.zeros(shape)
        if not stack.tied and stack.depth > 1:
            loss[..., -2] = loss[..., -1] / 2  # One step of each goes up.
        worse = 4.0 if stack.tied == tied_worse else 2.0
        final = loss[..., stack.depth - 1]
        shift = final * worse * np.exp(rng.normal(scale=0.05, size=final.shape))
        cells[f"stack/{stack.arm}/{stack.depth}"] = {
            "by_position": loss.tolist(), "wider": shift.tolist(), "larger": shift.tolist(),
        }  # fmt: skip
    steps = np.arange(0, 101, 5)
    for pairs in SETTINGS.preconditioner_pairs:
        far = np.exp(-steps / 20) + 0.2 / pairs
        of_seeds = np.outer([1, 1.02, 0.98], far).tolist()
        cells[f"preconditioner/{pairs}"] = {
            "steps": steps.tolist(), "distance": of_seeds, "u": of_seeds, "loss": of_seeds,
        }  # fmt: skip
    for loops in SETTINGS.dominance_loops:
        for pairs in SETTINGS.dominance_pairs:
            loss = np.exp(-steps / 10) + (0 if pairs == 0 else 1e-2)
            ratio = 4 * loops**2 * (1 - (pairs > 0) * 1e-2 / loss)
            cells[f"dominance/{loops}/{pairs}"] = {
                "steps": steps.tolist(), "loss": [loss.tolist()] * 3,
                "ratio": np.outer([1, 1.01, 0.99], ratio).tolist(),
            }  # fmt: skip
    return {name: cell | {"seconds": 0.1} for name, cell in cells.items()}


def judged(cells) -> dict[str, Claim]:
    return {claim.key: claim for claim in judge(Results(cells, SETTINGS))}


def verdicts(cells) -> dict[str, str]:
    return {key: claim.verdict for key, claim in judged(cells).items()}


def test_planted_truth_is_found():
    found = verdicts(planted())
    assert set(found.values()) == {"holds"}, found


def test_the_opposite_is_found_too():
    found = verdicts(planted(tied_worse=True))
    robust = {name: verdict for name, verdict in found.items() if name.startswith("robust")}
    assert len(robust) == 8 and set(robust.values()) == {"does not hold"}


def test_what_is_claimed_of_linear_stacks_is_judged_of_softmax_stacks():
    found = set(verdicts(planted()))
    linear = {key for key in found if "linear" in key and "injected" not in key}
    assert {key.replace("linear", "softmax") for key in linear} <= found
    assert len(linear) == 4 * 2 + 2 * 2 * 2  # Six measures, two of them of two kinds each.


@pytest.mark.parametrize("at", [CAP, AT_CAP * CAP])
def test_a_loss_at_the_cap_counts_against_its_stack(at):
    cells = planted()
    for depth in SETTINGS.depths[1:]:
        cell = cells[f"stack/linear full tied/{depth}"]
        by_position = np.array(cell["by_position"])
        by_position[..., depth - 1 :] = at
        cell["by_position"] = by_position.tolist()
    found = verdicts(cells)
    assert found["expressive/linear full"] == "does not hold"
    # One step of each goes up to the cap; those from there to there say nothing.
    counted = steps(Results(cells, SETTINGS), "linear full tied")
    assert (counted.raised[1:] == 1).all()
    deep = np.array(SETTINGS.depths[1:])
    np.testing.assert_array_equal(counted.left_out[1:, 0, 0], 2 * deep)
    np.testing.assert_array_equal(counted.judged[1:, 0, 0], deep - 1)
    assert found["monotone/linear full tied"] == "does not hold"


def test_steps_between_diverged_losses_are_left_out_and_counted():
    cells, seeds = planted(), SETTINGS.seeds
    for depth in SETTINGS.depths:
        shape = (len(SETTINGS.kappas), seeds, depth * SETTINGS.extra_loops)
        cells[f"stack/linear full tied/{depth}"]["by_position"] = np.full(shape, CAP).tolist()
    claim = judged(cells)["monotone/linear full tied"]
    assert claim.verdict == "no evidence" and claim.value.count == 0
    total = sum(3 * depth - 1 for depth in SETTINGS.depths) * len(SETTINGS.kappas) * seeds
    assert f"0 of 0, {total:,} between diverged losses left out" in claim.measure


def test_violations_are_told_as_counts():
    claim = judged(planted())["monotone/only/linear restricted"]
    of_each = len(SETTINGS.kappas) * SETTINGS.seeds
    layers = sum(depth - 1 for depth in SETTINGS.depths)
    loops = sum(3 * depth - 1 for depth in SETTINGS.depths)
    raised = of_each * (len(SETTINGS.depths) - 1)
    assert f"untied ({raised} of {of_each * layers}) less" in claim.measure
    assert f"tied (0 of {of_each * loops:,})" in claim.measure


@pytest.mark.parametrize("before", [None, 0.95 * CAP, CAP])
def test_a_stack_that_diverges_is_not_robust(before):
    """Not under shift alone, and not where it was broken before, so that nothing grows."""
    cells = planted()  # Tied stacks lose less.
    for depth in SETTINGS.depths[1:]:
        cell = cells[f"stack/linear restricted tied/{depth}"]
        cell["wider"] = np.full_like(cell["wider"], CAP if before is None else before).tolist()
        if before is not None:
            by_position = np.array(cell["by_position"])
            by_position[..., depth - 1] = before
            cell["by_position"] = by_position.tolist()
    assert verdicts(cells)["robust/linear restricted/wider"] == "does not hold"


def test_pairs_that_both_diverge_under_shift_are_left_out_and_counted():
    cells = planted(tied_worse=True)
    for kind in ("tied", "untied"):
        cell = cells[f"stack/softmax full {kind}/8"]
        cell["larger"] = np.full_like(cell["larger"], CAP).tolist()
    before, after = judged(planted(tied_worse=True)), judged(cells)
    key = "robust/softmax full/larger"
    assert "12 of 48 pairs left out, both diverged" in after[key].measure
    assert "left out" not in before[key].measure
    assert after[key].value.mean == pytest.approx(before[key].value.mean, abs=0.05)


def test_a_descent_that_diverged_says_nothing_of_gradient_dominance():
    cells = planted()
    first, *others = cells["dominance/1/0"]["loss"]
    cells["dominance/1/0"]["loss"] = [first[:-1] + [None], *others]
    claim = judged(cells)["dominance/0"]
    assert claim.value.count == SETTINGS.seeds - 1


def test_laws_are_not_fitted_to_kappas_that_were_not_solved():
    cells = planted()
    for depth in SETTINGS.depths:
        cell = cells[f"stack/linear restricted untied/{depth}"]
        cell["by_position"][2:] = np.full_like(cell["by_position"][2:], 0.9).tolist()
    results = Results(cells, SETTINGS)
    assert law_fits(results, "linear restricted untied", 0.1) == []
    claim = judged(cells)["sqrt_kappa/linear restricted untied/0.1"]
    assert claim.said.startswith("no evidence: every seed reaches the loss at 2 of 4 κ")


def test_bounds_are_no_points_of_a_fit():
    """At the two easiest kappas one layer is enough already: two depths are left."""
    cells = planted()
    for depth in SETTINGS.depths:
        cell = cells[f"stack/linear full untied/{depth}"]
        cell["by_position"][:2] = np.full_like(cell["by_position"][:2], 0.01).tolist()
    results = Results(cells, SETTINGS)
    assert {of for row in results.reached("linear full untied", 0.1)[:2] for of in row} == {
        (1.0, "<=")
    }
    assert law_fits(results, "linear full untied", 0.1) == []
    claim = judged(cells)["log_kappa/linear full untied/0.1"]
    assert claim.said.endswith(
        "at 4 of 4 κ, at 2 of them with the smallest depth already, which is a bound; 0 of 3 "
        "seeds have the three depths of a fit"
    )
    assert claim.reason in render_page([claim], [], {"versions": {}, "settings": {}, "seconds": 0})


def test_figures_and_page_are_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    from stacking_jax.lab.figures import draw

    results = Results(planted(), SETTINGS)
    figures = draw(results)
    assert len({figure.key for figure in figures}) == len(figures) == 14
    said = {"versions": {"a<b": "1"}, "settings": SETTINGS.to_dict(), "seconds": 1.0}
    page = render_page(judge(results), figures, said)
    assert page.count("<svg") == 14 and "a&lt;b" in page and "a<b" not in page
    assert "http" not in page.replace("http-equiv", "")
    for figure in figures:
        figure.write_png(tmp_path)
    (tmp_path / "page.html").write_text(page, encoding="utf-8")
