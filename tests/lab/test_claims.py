"""Planted cells: verdicts follow what was planted, and figures and page show it."""

from __future__ import annotations

import math

import numpy as np
import pytest

from stacking_jax.lab import measure
from stacking_jax.lab.claims import Results, judge, law_fits, violations
from stacking_jax.lab.settings import IclSettings

SETTINGS = IclSettings(seeds=3)


def planted(tied_worse: bool = False) -> dict:
    """Cells of stacks whose loss is exp(−2.3 · depth / need), need growing by the claimed law."""
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


def verdicts(cells) -> dict[str, str]:
    return {claim.key: claim.verdict for claim in judge(Results(cells, SETTINGS))}


def test_planted_truth_is_found():
    found = verdicts(planted())
    assert set(found.values()) == {"holds"}, found


def test_the_opposite_is_found_too():
    found = verdicts(planted(tied_worse=True))
    robust = {name: verdict for name, verdict in found.items() if name.startswith("robust")}
    assert len(robust) == 4 and set(robust.values()) == {"does not hold"}


def test_a_diverged_loss_counts_against_its_stack():
    cells = planted()
    for depth in SETTINGS.depths[1:]:
        cell = cells[f"stack/linear full tied/{depth}"]
        cell["by_position"] = [
            [row[: depth - 1] + [None] * (len(row) - depth + 1) for row in of_kappa]
            for of_kappa in cell["by_position"]
        ]
    found = verdicts(cells)
    assert found["monotone/linear full tied"] == "does not hold"
    assert found["expressive"] == "does not hold"
    assert violations(Results(cells, SETTINGS), "linear full tied")[1:].min() > 0


def test_laws_are_not_fitted_to_kappas_that_were_not_solved():
    cells = planted()
    for depth in SETTINGS.depths:
        cell = cells[f"stack/linear restricted untied/{depth}"]
        cell["by_position"][2:] = np.full_like(cell["by_position"][2:], 0.9).tolist()
    results = Results(cells, SETTINGS)
    assert law_fits(results, "linear restricted untied") == []
    assert verdicts(cells)["sqrt_kappa"] == "no evidence"


def test_figures_and_page_are_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    from stacking_jax.lab.figures import draw
    from stacking_jax.lab.page import render_page

    results = Results(planted(), SETTINGS)
    figures = draw(results)
    assert len({figure.key for figure in figures}) == len(figures) == 9
    said = {"versions": {"a<b": "1"}, "settings": SETTINGS.to_dict(), "seconds": 1.0}
    page = render_page(judge(results), figures, said)
    assert page.count("<svg") == 9 and "a&lt;b" in page and "a<b" not in page
    assert "http" not in page.replace("http-equiv", "")
    for figure in figures:
        figure.write_png(tmp_path)
    (tmp_path / "page.html").write_text(page, encoding="utf-8")
