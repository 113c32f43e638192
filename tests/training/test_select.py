"""Ways to grow one checkpoint, held against each other; and going on with the best."""

from __future__ import annotations

import json

import numpy as np
import pytest

from stacking_jax import cli
from stacking_jax.errors import UserError
from stacking_jax.training import decisions, lag_study, train
from stacking_jax.training.lag_study import chance, correlations, spaced
from stacking_jax.training.paired import BatchLoss
from stacking_jax.training.select import Start, branch, select

NOISY = {"operator": "midas", "init": "noise", "init_options": {"relative": 4.0}, "name": "noisy"}


@pytest.fixture(scope="module")
def start(stopped) -> Start:
    """A step before the growth of the plan, which then comes here."""
    return Start.of(stopped, 2)


@pytest.fixture(scope="module")
def decision(start) -> dict:
    return select(start, start.ways([NOISY, "interleave", "midas"]), 2)


@pytest.fixture(scope="module")
def by_hand(config, change, tmp_path_factory, decision) -> dict:
    """The summary of a run whose plan says from the beginning what was decided."""
    growth = {"operator": None, "stages": [(2, 2), (4, 7, decision["map"])]}
    return train(change(config, growth=growth), tmp_path_factory.mktemp("hand") / "run")


def test_the_plan_is_refit_to_a_growth_at_the_checkpoint(start):
    assert [(s.start, s.steps) for s in start.setup.plan.stages] == [(0, 2), (2, 7)]
    assert start.setup.decisions == (
        {"kind": "boundary", "stage": 1, "step": 2, "reason": "select"},
    )


def test_what_was_planted_as_the_worst_comes_last(decision):
    names = [row["name"] for row in decision["ranking"]]
    assert names[-1] == "noisy" and decision["candidate"] == names[0]
    assert decision["ranking"][-1]["low"] > 0 and decision["ranking"][-1]["distinguishable"]
    assert (decision["from_depth"], decision["to_depth"], decision["lag"]) == (2, 4, 2)
    json.dumps(decision, allow_nan=False)


@pytest.mark.slow
def test_the_best_goes_on_in_a_run_of_its_own(
    start, decision, by_hand, tmp_path, read_rows, snapshot, stopped
):
    """Which is that of the plan by hand, to the bit, and keeps the lag that was scored."""
    before = snapshot(stopped)
    out = branch(start, decision, tmp_path / "new")
    assert snapshot(stopped) == before
    from stacking_jax.training.run_directory import read_config

    summary = train(read_config(out), out)
    assert summary["params_digest"] == by_hand["params_digest"]
    assert summary["name"] == "new" and summary["growths"] == [2]
    scored = {row["step"]: row["eval_loss"] for row in read_rows(out, "eval")}
    assert scored[4] == decision["ranking"][0]["loss"]
    assert summary["choice_flops"] == pytest.approx(decision["cost"]["flops"])
    assert [row["step"] for row in read_rows(out, "train")] == list(range(1, 10))
    assert [d["kind"] for d in decisions.read(out)] == ["boundary", "choice"]
    with pytest.raises(UserError, match="exists already"):
        branch(start, decision, out)


@pytest.mark.parametrize(
    ("step", "said"), [(6, "nothing grows after step 6"), (3, "no checkpoint of step 3; there are")]
)
def test_a_checkpoint_that_will_not_do_is_refused(stopped, step, said):
    with pytest.raises(UserError, match=said) as caught:
        Start.of(stopped, step)
    assert "\n" not in str(caught.value)


def test_candidates_and_lags_that_will_not_do_are_refused(start):
    with pytest.raises(UserError, match="lag of 8 steps is longer than the stage"):
        select(start, start.ways(["midas", "interleave"]), 8)
    with pytest.raises(UserError, match="is no lag"):
        select(start, start.ways(["midas", "interleave"]), 0)
    with pytest.raises(UserError, match="name the candidates"):
        start.ways(None)
    with pytest.raises(UserError, match="two or more"):
        start.ways(["midas"])
    with pytest.raises(UserError, match="does not lead from 2 to 4"):
        start.ways(["midas", {"operator": "midas", "block": 3}])


@pytest.mark.slow
def test_the_command_prints_json_and_goes_on(stopped, tmp_path, capsys):
    out = tmp_path / "new"
    code = cli.main([
        "select", "--run_dir", str(stopped), "--step", "2", "--candidates", "midas,interleave",
        "--lag", "2", "--batches", "2", "--json", "--out", str(out), "--stop_at", "5",
    ])  # fmt: skip
    assert code == 0
    found = json.loads(capsys.readouterr().out)
    assert {row["name"] for row in found["ranking"]} == {"midas", "interleave"}
    assert decisions.read(out)[1]["candidate"] == found["candidate"]
    assert (out / "checkpoints" / "5").is_dir()
    assert cli.main(["select", "--run_dir", str(stopped), "--step", "2"]) == 2
    assert "name the candidates" in capsys.readouterr().err


# ---- Does the loss after a lag say which is best? ---------------------------------------


def batches(losses) -> list[BatchLoss]:
    return [BatchLoss("text", 1.0, 100 * float(loss), 100) for loss in losses]


def test_the_correlations_are_those_of_textbooks():
    """Ranks 1 to 5 against 2, 1, 4, 3, 5: Spearman 0.8, Kendall 0.6."""
    final = [batches([rank] * 4) for rank in (1, 2, 3, 4, 5)]
    swapped = [batches([rank] * 4) for rank in (2, 1, 4, 3, 5)]
    turned = [batches([rank] * 4) for rank in (5, 4, 3, 2, 1)]
    at_lags = [list(of) for of in zip(turned, swapped, final, strict=True)]
    found = correlations(at_lags, final, [0, 1, 2])
    assert [row["spearman"] for row in found["curve"]] == pytest.approx([-1, 0.8, 1])
    assert [row["kendall"] for row in found["curve"]] == pytest.approx([-1, 0.6, 1])
    assert [row["best_is_best"] for row in found["curve"]] == [False, False, True]
    # Batches that all say the same leave nothing to chance.
    assert found["curve"][1]["spearman_low"] == pytest.approx(0.8)
    assert found["curve"][1]["spearman_high"] == pytest.approx(0.8)


def test_the_interval_is_as_wide_as_the_batches_differ():
    dice = np.random.default_rng(0)
    final = [batches(3 + 0.1 * rank + dice.normal(0, 0.3, 12)) for rank in range(5)]
    now = [[batches(3 + 0.1 * rank + dice.normal(0, 0.3, 12))] for rank in range(5)]
    [row] = correlations(now, final, [7])["curve"]
    assert row["lag"] == 7 and row["spearman_low"] < row["spearman_high"]
    assert row["spearman_low"] <= row["spearman"] <= row["spearman_high"]
    again = correlations(now, final, [7])["curve"]
    assert again == [row], "the resampling has a seed"


def test_a_candidate_that_diverged_has_no_rank():
    final = [batches([rank] * 3) for rank in (1, 2, 3)]
    now = [[batches([rank] * 3)] for rank in (1, float("nan"), 3)]
    [row] = correlations(now, final, [1])["curve"]
    assert row["spearman"] is None and row["kendall_low"] is None and row["best_is_best"]
    none = [[batches([float("nan")] * 3)] for _ in range(3)]
    [row] = correlations(none, final, [1])["curve"]
    assert row["spearman"] is None and not row["best_is_best"]


@pytest.mark.parametrize(
    # The one-sided critical values at 5 % of the tables: 0.9, 0.829 and 0.714 are just beyond.
    ("count", "below"), [(3, 1.0), (4, 0.8), (5, 0.8), (6, 0.7714285714), (7, 0.6785714286)],
)
def test_what_chance_reaches_is_that_of_the_tables(count, below):
    assert chance(count) == pytest.approx(below)


def test_lags_are_spaced_by_their_logarithm():
    assert spaced(64, 8) == [0, 1, 2, 4, 8, 16, 32, 64]
    assert spaced(3, 12) == [0, 1, 2, 3] and spaced(1, 5) == [0, 1]
    assert len(spaced(1000, 12)) <= 12
    with pytest.raises(UserError, match="--points"):
        spaced(10, 1)


@pytest.mark.slow
def test_a_study_ends_where_runs_end_and_goes_on_where_it_stopped(
    start, decision, by_hand, tmp_path, monkeypatch
):
    ways = start.ways(["midas", "gradstack", "interleave", NOISY])
    study = lag_study.lag_study(start, ways, 4, tmp_path, points=4)
    losses = {one["name"]: one for one in study["candidates"]}
    assert list(losses) == ["midas", "interleave", "noisy"]  # GradStack is MIDAS here.
    assert study["same"] == [["midas", "gradstack"]] and study["lags"] == [0, 1, 2, 4]
    assert losses[decision["candidate"]]["final_loss"] == by_hand["eval_loss"]
    for row in decision["ranking"]:
        assert losses[row["name"]]["losses"][0] == row["loss_at_growth"]
        assert losses[row["name"]]["losses"][2] == row["loss"]
    assert json.loads((tmp_path / "lag.json").read_text()) == json.loads(json.dumps(study))

    def never(*args, **options):
        raise AssertionError("it is trained again")

    monkeypatch.setattr(lag_study, "try_out", never)
    assert lag_study.lag_study(start, ways, 4, tmp_path, points=4) == study
    with pytest.raises(UserError, match="takes three or more"):
        lag_study.lag_study(start, start.ways(["midas", "gradstack", "interleave"]), 4, tmp_path)
