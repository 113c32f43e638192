"""Where the wall time went: every second is in one category, those of dead processes too."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from stacking_jax.training import train
from stacking_jax.training.goodput import LOST, Goodput
from stacking_jax.training.telemetry import Clock

STAGE = {"depth": 2, "steps": 3, "seconds": 1.0, "compile_seconds": 2.0, "grow_seconds": 0.0}
KEPT = {"step": 30.0, "compile": 15.0, "init": 5.0}


def account_of(run_dir: Path) -> dict:
    return json.loads((run_dir / "goodput.json").read_text(encoding="utf-8"))


def assert_adds_up(account: dict) -> None:
    seconds = account["seconds"]
    assert set(seconds) == {*Clock.CATEGORIES, *LOST} and min(seconds.values()) >= 0
    assert account["wall_seconds"] == pytest.approx(sum(seconds.values()))
    assert account["goodput"] == pytest.approx(seconds["step"] / account["wall_seconds"])
    assert sum(account["badput"].values()) + seconds["step"] == pytest.approx(
        account["wall_seconds"]
    )
    # Two clocks, one of them monotonic, have measured the same time.
    passed = account["unix_time"] - account["began_unix_time"]
    assert account["wall_seconds"] == pytest.approx(passed, abs=0.5)


# ---- Whole runs -----------------------------------------------------------------------------


def test_an_undisturbed_run(reference, read_summary):
    account = account_of(reference)
    assert account == read_summary(reference)["goodput"]
    assert_adds_up(account)
    assert all(account["seconds"][name] > 0 for name in Clock.CATEGORIES)
    assert [account["seconds"][name] for name in LOST] == [0, 0] and account["restarts"] == []
    stages = account["stages"]
    assert [(stage["depth"], stage["steps"]) for stage in stages] == [(2, 3), (4, 6)]
    compiling = sum(stage["compile_seconds"] for stage in stages)
    assert 0 < compiling <= account["seconds"]["compile"]


def test_a_run_that_was_stopped_and_then_killed(stopped, config, tmp_path, read_rows):
    run_dir = Path(shutil.copytree(stopped, tmp_path / "run"))
    first = account_of(run_dir)
    assert_adds_up(first)
    assert first["step"] == 6
    # Work that no checkpoint holds, as if it had been killed just now.
    for step in (4, 6):
        shutil.rmtree(run_dir / f"checkpoints/{step}")
    train(config, run_dir)
    account = account_of(run_dir)
    assert_adds_up(account)
    assert account["began_unix_time"] == first["began_unix_time"] and account["step"] == 9
    [restart] = account["restarts"]
    assert restart["step"] == 2
    # What the first process did after its checkpoint of step 2.
    assert 0 < restart["recomputed_seconds"] < first["wall_seconds"]
    assert restart["down_seconds"] == pytest.approx(
        restart["unix_time"] - first["unix_time"], abs=1e-6
    )
    assert {name: restart[f"{name}_seconds"] for name in LOST} == {
        name: account["seconds"][name] for name in LOST
    }
    [event] = read_rows(run_dir, "resume")
    assert event["down_seconds"] == restart["down_seconds"]


# ---- By the numbers -------------------------------------------------------------------------


@pytest.fixture
def begin(tmp_path):
    """begin(began, last_sign, ...): a process that starts now; times in seconds before that."""

    def make(began=None, last_sign=0.0, last_row=None, lost=(0.0, 0.0), kept=KEPT):
        clock = Clock()
        now = clock.began_unix_time
        if began is not None:
            seconds = dict(zip(LOST, lost, strict=True))
            (tmp_path / "goodput.json").write_text(json.dumps({
                "began_unix_time": now - began, "unix_time": now - last_sign,
                "seconds": seconds, "restarts": [],
            }))
        if last_row is not None:
            (tmp_path / "metrics.jsonl").write_text(
                json.dumps({"kind": "train", "unix_time": now - last_row}) + '\n{"kind": "tr'
            )
        clock.go_on_from(kept)
        goodput = Goodput(tmp_path, clock)
        cost = goodput.begin(7, kept)
        assert_adds_up(goodput.read(7, [STAGE]))
        return {name: round(cost[f"{name}_seconds"], 3) for name in LOST}

    return make


def test_nothing_is_lost_by_a_new_run_or_a_grown_one(begin):
    assert begin(kept={}) == {"recomputed": 0, "down": 0}
    assert begin() == {"recomputed": 0, "down": 0}


@pytest.mark.parametrize(
    ("old", "recomputed", "down"),
    [
        # 50 of 100 seconds are in the checkpoint; the last sign of life is the newest.
        ({"began": 100, "last_sign": 30}, 20, 30),
        ({"began": 100, "last_sign": 30, "last_row": 12}, 38, 12),
        ({"began": 100, "last_sign": 30, "last_row": 40}, 20, 30),
        # An earlier restart has cost 10 + 15 already.
        ({"began": 125, "last_sign": 30, "lost": (10, 15)}, 20, 30),
        # Killed before it could save at all.
        ({"began": 100, "last_sign": 30, "kept": {}}, 70, 30),
    ],
)
def test_what_a_restart_costs(begin, old, recomputed, down):
    assert begin(**old) == {"recomputed": recomputed, "down": down}


def test_a_clock_that_was_set_back_makes_no_time_negative(tmp_path):
    now = Clock().began_unix_time
    for began, sign in ((now + 3600, now + 7200), (now - 10, now + 50)):
        (tmp_path / "goodput.json").write_text(json.dumps({
            "began_unix_time": began, "unix_time": sign, "restarts": [],
            "seconds": {"recomputed": 2.0, "down": 3.0},
        }))
        goodput = Goodput(tmp_path, Clock())
        assert goodput.begin(7, KEPT) == {"recomputed_seconds": 0.0, "down_seconds": 0.0}
        assert sum(goodput.lost.values()) == 5.0


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"seconds": 3}', '{"began_unix_time": "x"}'])
def test_an_account_that_cannot_be_read_begins_anew(tmp_path, text):
    (tmp_path / "goodput.json").write_text(text)
    (tmp_path / "metrics.jsonl").write_text("\n[]\n{}\n")
    goodput = Goodput(tmp_path, Clock())
    assert goodput.begin(0, {}) == {"recomputed_seconds": 0.0, "down_seconds": 0.0}
    goodput.write(0, [STAGE])
    assert_adds_up(account_of(tmp_path))


def test_only_one_process_writes(tmp_path):
    goodput = Goodput(tmp_path, Clock(), writes=False)
    goodput.begin(0, {})
    goodput.write(0, [STAGE])
    goodput.close()
    assert list(tmp_path.iterdir()) == []
