"""A trace of chosen steps, and of no others."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path

import pytest

from stacking_jax.errors import UserError
from stacking_jax.training import Stopped, train
from stacking_jax.training.profiling import Profile, parse_steps


@pytest.mark.parametrize(("text", "steps"), [("10:15", (10, 15)), ("3", (3, 3)), ("1:1", (1, 1))])
def test_steps_are_counted_from_one_both_ends_included(text, steps):
    assert parse_steps(text) == steps


@pytest.mark.parametrize("text", ["", "0:3", "5:4", "a:b", "1:2:3", "-1:4", "2:", ":4"])
def test_what_is_no_range_is_refused(text):
    with pytest.raises(UserError, match="--profile takes FIRST:LAST"):
        parse_steps(text)


@pytest.mark.slow
def test_a_run_traces_its_steps_and_says_where(config, tmp_path, capsys):
    with pytest.raises(Stopped):
        train(config, tmp_path / "run", stop_at=4, profile=(2, 3))
    said = capsys.readouterr().err
    trace = Path(re.search(r"drop (\S+) on https://ui.perfetto.dev", said)[1])
    assert f"xprof --logdir {tmp_path / 'run/profile'}" in said
    assert trace.is_relative_to(tmp_path / "run/profile")
    assert list(trace.parent.glob("*.xplane.pb"))
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    steps = [event["args"]["step_num"] for event in events if event.get("name") == "train"]
    assert sorted(steps) == ["2", "3"]


def test_a_run_that_ends_first_writes_what_it_has(config, tmp_path, capsys):
    with pytest.raises(Stopped):
        train(config, tmp_path / "run", stop_at=2, profile=(2, 30))
    assert list((tmp_path / "run/profile").rglob("*.xplane.pb"))
    assert capsys.readouterr().err.count("trace: ") == 1


def test_without_being_asked_nothing_is_traced(reference):
    assert not (reference / "profile").exists()


def test_a_bucket_is_no_place_for_a_trace(bucket):
    from stacking_jax.paths import open_path

    with pytest.raises(UserError, match="--profile writes to a local disk"):
        Profile(open_path("gs://bucket/run"), (1, 2))
    Profile(open_path("gs://bucket/run"), None).close()
