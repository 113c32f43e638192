"""The command once, and that what it measured is kept and repeatable."""

from __future__ import annotations

import dataclasses
import hashlib
import json

import numpy as np
import pytest

from stacking_jax import cli
from stacking_jax.errors import UserError
from stacking_jax.lab import IclSettings, keep, measure, quick
from stacking_jax.lab.keep import Kept
from stacking_jax.lab.stacks import Stack

SMALL = dataclasses.replace(
    quick(), kappas=(4,), steps=12, batch=8, test_prompts=32, preconditioner_steps=10,
    dominance_steps=10,
)  # fmt: skip


@pytest.mark.slow
def test_a_cell_is_a_function_of_the_settings():
    stack = Stack("linear", True, True, 2)
    one, two = (measure.measure_stack(stack, SMALL, lambda steps: None) for _ in range(2))
    assert one == two
    assert len(one["by_position"][0][0]) == 2 * SMALL.extra_loops


@pytest.mark.slow
def test_training_lowers_the_loss_and_the_distance():
    settings = dataclasses.replace(SMALL, preconditioner_steps=150)
    found = measure.measure_preconditioner(40, settings, lambda steps: None)
    for first, last in zip(found["distance"], found["distance"], strict=True):
        assert last[-1] < 0.8 * first[0]


def test_cells_are_kept_by_settings_and_not_measured_twice(tmp_path):
    kept = Kept(tmp_path, {"a": 1}, {})
    assert kept.get("x/y", lambda: {"v": 1})["v"] == 1
    again = Kept(tmp_path, {"a": 1}, {})
    assert again.has("x/y") and again.get("x/y", lambda: {"v": 2})["v"] == 1
    assert not Kept(tmp_path, {"a": 2}, {}).has("x/y")
    # What another kind of cell depends on alone measures this one no second time.
    more = Kept(tmp_path, {"a": 1, "dominance_rate": 0.1}, {})
    assert more.has("x/y") and not more.has("dominance/1")
    more.get("dominance/1", lambda: {"b": 1})
    assert not Kept(tmp_path, {"a": 1, "dominance_rate": 0.2}, {}).has("dominance/1")


def test_what_judges_alone_measures_nothing_anew(tmp_path):
    first = Kept(tmp_path, IclSettings().to_dict(), {})
    for change in ({"target_losses": (0.5,)}, {"tolerance": 0.1}, {"floor": 3.0}):
        other = dataclasses.replace(IclSettings(), **change)
        assert Kept(tmp_path, other.to_dict(), {}).path("stack/x") == first.path("stack/x")


def test_cells_of_the_first_computation_are_found_and_those_of_another_are_not(
    tmp_path, monkeypatch
):
    # As settings were named when the committed results were measured.
    then = {"seeds": 4, "target_loss": 0.1, "tolerance": 0.01, "floor": 2.0}
    digest = hashlib.sha256(json.dumps([then, {}], sort_keys=True).encode()).hexdigest()[:10]
    kept = Kept(tmp_path, {"seeds": 4, "target_losses": (0.1, 0.2)}, {})
    assert kept.path("stack/x").name == f"stack-x-{digest}.json"
    monkeypatch.setattr(keep, "COMPUTATION", keep.COMPUTATION + 1)
    assert kept.path("stack/x").name != f"stack-x-{digest}.json"


def test_the_covariance_of_the_preconditioner_is_not_a_matter_of_the_seeds(monkeypatch):
    drawn = []

    def seen(covariance, pairs):
        drawn.append(np.asarray(covariance.basis))
        raise StopIteration

    monkeypatch.setattr(measure.fitting, "alike", seen)
    for seeds in (2, 4):
        with pytest.raises(StopIteration):
            measure.measure_preconditioner(10, IclSettings(seeds=seeds), lambda steps: None)
    np.testing.assert_array_equal(*drawn)


def test_settings_that_cannot_be_are_refused():
    with pytest.raises(UserError, match="full rank"):
        IclSettings(pairs=3)
    with pytest.raises(UserError, match="seeds is at least 1"):
        IclSettings(seeds=0)
    with pytest.raises(UserError, match="target_losses"):
        IclSettings(target_losses=(0.1, 1.0))
    with pytest.raises(UserError, match="condition number"):
        IclSettings(kappas=(0,))


@pytest.mark.slow
def test_the_command_measures_judges_and_draws(tmp_path, capsys):
    out = tmp_path / "icl"
    assert cli.main(["lab", "icl", "--quick", "--out", str(out)]) == 0
    assert "gradient descent" in capsys.readouterr().out
    found = json.loads((out / "icl.json").read_text())
    assert {c["verdict"] for c in found["claims"]} <= {"holds", "does not hold", "no evidence"}
    assert len(list((out / "figures").glob("*.png"))) == 14
    page = (out / "icl.html").read_text()
    assert page.count("<svg") == 14 and "http" not in page.replace("http-equiv", "")
    # All is kept: the second time nothing is measured, and the same is said.
    assert cli.main(["lab", "icl", "--quick", "--out", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == found
