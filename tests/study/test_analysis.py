from __future__ import annotations

import json

import pytest

from stacking_jax.study.analysis import NO_EVIDENCE, analyse, first_below
from stacking_jax.study.results import read_study


def test_what_seeds_share_does_not_hide_a_difference(make_study):
    """Seeds differ by 0.1 nats, arms by 0.1: only pairs can tell, and they do."""
    found = analyse(read_study(make_study()))
    against_steps, against_flops = (line for line in found.declared if line.endpoint == "loss")
    assert against_steps.says == "higher" and against_flops.says == "lower"
    assert against_steps.found.mean == pytest.approx(0.1, abs=0.005)
    assert against_steps.found.low > 0.05 and against_flops.found.high < -0.05
    assert against_steps.budget == "equal steps" and against_flops.budget == "equal FLOPs"
    # Four tests share one error rate.
    assert against_steps.found.p < against_steps.adjusted <= 4 * against_steps.found.p


def test_nothing_is_called_lower_where_seeds_decide(make_study):
    found = analyse(read_study(make_study(swing=0.5)))
    assert {line.says for line in found.declared} == {"not distinguishable"}


def test_tables_hold_what_shares_the_budget(make_study):
    found = analyse(read_study(make_study()))
    pairs = {(line.arm, line.reference) for line in found.equal_steps}
    assert pairs == {("midas", "full depth")}
    pairs = {(line.arm, line.reference) for line in found.equal_flops}
    assert pairs == {("midas", "full depth, equal FLOPs")}


def test_a_disturbed_machine_does_not_decide_the_time(make_study):
    """Every tenth step takes ten times as long, and one seed ran on a busy machine."""
    study = read_study(make_study(slow={2: 3.0}))
    assert study.arms["midas"].seconds == pytest.approx(50 * 0.04 + 50 * 0.08 + 1.0)
    for clock in study.arms["midas"].clocks.values():
        assert clock.at(50) == pytest.approx(2.0) and clock.at(51) == pytest.approx(3.08)
    assert study.arms["full depth"].seconds == pytest.approx(8.0)


def test_equal_time_lies_between_references_that_ended_before_and_after(make_study):
    """MIDAS takes 7 s; full depth ended, each by its own schedule, after 6 s and after 8 s."""
    lines = analyse(read_study(make_study())).equal_time
    line = next(line for line in lines if line.endpoint == "loss")
    share = 0.5358  # log(7/6) / log(8/6)
    between = 2.2 + share * (2.0 - 2.2)
    assert line.found.mean == pytest.approx(2.1 - between, abs=0.005)
    assert "interpolated" in line.note


def test_no_reference_that_ended_there_no_figure(make_study):
    config = {"comparisons": [["midas", "full depth, equal FLOPs"]]}
    lines = analyse(read_study(make_study(**config))).equal_time
    line = next(line for line in lines if line.arm == "midas")
    assert line.found is None and line.says == "no reference ended there"


def test_time_to_equal_loss_needs_every_seed(make_study):
    found = {
        (of.arm, of.reference): of for of in analyse(read_study(make_study())).time_to_loss
    }
    never = found["midas", "full depth"]
    assert never.ratio is None and (never.reached, never.pairs) == (0, 4)
    sooner = found["full depth", "full depth, equal FLOPs"]
    assert sooner.reached == 4 and sooner.low <= sooner.ratio <= sooner.high


def test_the_first_point_below_lies_on_the_line_between():
    curve = [(10, 3.0), (20, 2.0), (30, 2.5), (40, 1.0)]
    assert first_below(curve, 2.25) == 17.5
    assert first_below(curve, 5.0) == 10 and first_below(curve, 0.5) is None


def test_later_evaluations_do_not_move_a_declared_endpoint(make_study):
    """A cell that `evaluate` is run on once more, with fewer examples and another task."""
    folder = make_study()
    before = read_study(folder).arms["midas"].values("score")
    later = folder / "cells/midas/seed-1/evaluations/step-100"
    later.mkdir(parents=True)
    rows = {name: {"value": 3.0, "group": "primitives"} for name in ("primitive/a", "other")}
    (later / "results.json").write_text(json.dumps(rows))
    assert read_study(folder).arms["midas"].values("score") == before


def test_a_cell_that_lacks_a_task_is_left_out_by_name(make_study):
    folder = make_study()
    metrics = folder / "cells/midas/seed-1/metrics.jsonl"
    kept = [line for line in metrics.read_text().splitlines() if "primitive/b" not in line]
    metrics.write_text("\n".join(kept) + "\n")
    assert read_study(folder).arms["midas"].left_out == {
        1: "it was not scored at its end on primitive/b"
    }


def test_an_arm_with_the_flops_of_another_is_a_reference_undeclared(make_study):
    study = read_study(make_study(comparisons=[]))
    assert [arm.name for arm in study.references] == ["full depth", "full depth, equal FLOPs"]
    assert {(line.arm, line.reference) for line in analyse(study).equal_flops} == {
        ("midas", "full depth, equal FLOPs")
    }


def test_scores_too_high_are_no_evidence(make_study):
    rule = {"informative": ["full depth", 30, 90]}
    high = analyse(read_study(make_study(score=97.0, **rule)))
    assert {x.says for x in high.declared if x.endpoint == "score"} == {NO_EVIDENCE}
    assert any("No evidence" in note for note in high.notes)
    fine = analyse(read_study(make_study(folder="fine", **rule)))
    assert NO_EVIDENCE not in {line.says for line in fine.declared}


def test_a_cell_with_other_data_is_left_out_by_name(make_study):
    odd = {("midas", 1): {"data_digest": "77aa"}}
    study = read_study(make_study(compare=odd))
    assert "data digest" in study.arms["midas"].left_out[1]
    assert sorted(study.arms["midas"].runs) == [0, 2, 3]
    assert analyse(study).declared[0].found.pairs == 3


def test_what_is_declared_to_differ_may(make_study):
    odd = {("midas", seed): {"peak_learning_rate": 0.001} for seed in range(4)}
    assert read_study(make_study(compare=odd)).arms["midas"].left_out
    kept = read_study(
        make_study(folder="other", compare=odd, may_differ=["peak_learning_rate"])
    )
    assert not kept.arms["midas"].left_out


@pytest.mark.parametrize("key", ["schedule", "optimizer_settings"])
def test_another_schedule_is_left_out_unless_it_is_declared(make_study, key):
    arms = ("full depth", "full depth, equal FLOPs", "midas")
    told = {(arm, seed): {key: "one"} for arm in arms for seed in range(4)}
    odd = told | {("midas", seed): {key: "another"} for seed in range(4)}
    study = read_study(make_study(compare=odd))
    assert key.partition("_")[2] in study.arms["midas"].left_out[0]
    assert not study.arms["full depth"].left_out
    kept = read_study(make_study(folder="other", compare=odd, may_differ=[key]))
    assert not any(arm.left_out for arm in kept.arms.values())
    called = key.replace("_", " ")
    assert analyse(kept).notes[-1] == (
        f"By the study's own design, arms may differ in {called} (midas); in brackets, those that "
        "differ from most."
    )
    # Cells of a version that did not record it belong to the others.
    half = {cell: of for cell, of in told.items() if cell[1] < 2}
    mixed = read_study(make_study(folder="mixed", compare=half))
    assert not any(arm.left_out for arm in mixed.arms.values())


def test_a_study_cut_short_is_read_over_the_seeds_there_are(make_study):
    study = read_study(make_study(leave=[("midas", 3), ("full depth", 2)]))
    found = analyse(study)
    assert found.declared[0].found.pairs == 2
    assert any("Lacking: full depth, midas" in note for note in found.notes)
