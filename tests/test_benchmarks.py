"""The suites of benchmarks: contenders that must agree, the table, what is kept, what fails.

Nothing is timed here; what was measured is committed, and looked at.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import math
import os
import re
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import (
    cpu_lines,
    depth_reasoning_table,
    floors,
    gpu_lines,
    lab_table,
    methods_table,
    run,
    stack_ways,
)
from benchmarks.contenders import Shape, Torch, agree, initial_params, ours, plain
from benchmarks.measure import interval, windows
from benchmarks.suite import KEYS, Job, Line, Measured, Results, chosen, read_notes
from stacking_jax.lab import IclSettings
from stacking_jax.lab import results as lab_results
from stacking_jax.models import DecoderConfig

ROOT = Path(__file__).resolve().parents[1]
SMALL = Shape(320, 2, 64, 160, 2, rows=2, length=64, dtype="float32")
SUITES = {"cpu": cpu_lines.JOBS, "gpu": gpu_lines.JOBS}
LINES = (Line("1", "speed", 0.97, 0.99), Line("2", "stall", 2.0, 1.0, "lower"), Line("3", "seen"))
JOB = Job("any", LINES, lambda tiny: iter(()), 1.0)


# ---- Contenders ----------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_contenders_agree_and_wrong_attention_is_noticed(dtype):
    packed = dataclasses.replace(SMALL, dtype=dtype, documents=2)
    whole = dataclasses.replace(packed, documents=1)
    params = initial_params(packed)
    found = ours(packed, params).first()
    agree(packed, found, plain(packed, params, stacked=True).first())
    apart = ours(whole, params).first()
    agree(whole, apart, plain(whole, params, kernel="xla").first())
    # What sees across documents computes something else, and is told apart.
    with pytest.raises(AssertionError, match="different things"):
        agree(packed, found, apart)


def test_a_contender_counts_its_own_steps():
    one = ours(SMALL, initial_params(SMALL))
    first = one.first(2)
    assert len(first["loss"]) == len(first["grad_norm"]) == 2
    assert one(3) > 0
    # Updates were done: the same batch does not have the same loss again.
    assert one.first(4)["loss"][3] != first["loss"][0]


def test_a_kernel_without_documents_gets_no_documents():
    packed = dataclasses.replace(SMALL, documents=2)
    with pytest.raises(ValueError, match="one document"):
        plain(packed, None, kernel="xla")
    with pytest.raises(ValueError, match="one document"):
        Torch(packed, None, compiled=False, device="cpu")


def _torch_is_there() -> bool:
    beside = os.pathsep.join([f"{sys.prefix}/parity", os.environ.get("PYTHONPATH", "")])
    asked = subprocess.run(
        [sys.executable, "-c", "import torch, transformers"], capture_output=True,
        env=os.environ | {"PYTHONPATH": beside},
    )
    return asked.returncode == 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gpt", "llama"])
def test_torch_computes_what_we_compute(kind):
    if not _torch_is_there():
        pytest.skip("torch and transformers cannot be used: bash launch/parity.sh")
    params = initial_params(SMALL)
    theirs = Torch(SMALL, params, kind=kind, compiled=False, device="cpu")
    try:
        agree(SMALL, ours(SMALL, params).first(), theirs.first())
        assert theirs(1) > 0
    finally:
        theirs.close()


def test_the_products_are_the_flops_of_the_plan():
    """What the floors time one by one is all that the cost model counts."""
    for shape in (SMALL, *floors.SHAPES.values()):
        forward = sum(
            2 * number * math.prod(left) * right[-1]
            for _, number, left, right in floors.products(shape)
        )
        assert 3 * forward == shape.flops_per_step()


def test_only_settings_that_the_decoder_has_are_given():
    known = {field.name for field in dataclasses.fields(DecoderConfig)}
    assert set(gpu_lines._unpacked(False)) <= known


@pytest.mark.slow
@pytest.mark.parametrize("what", stack_ways.WAYS)
def test_every_way_to_run_the_stack_computes_the_same(what):
    # `here` refuses what does not.
    found = stack_ways.here(SMALL, stack_ways.WAYS[what], rounds=1, per_round=1)["ways"]
    assert list(found) == list(stack_ways.WAYS[what])
    assert all(way["median_seconds"] > 0 for way in found.values())
    if what == "remat":
        assert found["full"]["temporary_bytes"] < found["none"]["temporary_bytes"]


@pytest.mark.parametrize(
    "name",
    [
        path.stem for path in sorted((ROOT / "benchmarks").glob("*.py"))
        # Those need torch, or are read by the evaluation, with what it says in the environment.
        if path.stem != "torch_step" and not path.stem.endswith("_tasks")
    ],
)
def test_every_benchmark_can_be_imported(name):
    importlib.import_module(f"benchmarks.{name}")


# ---- Windows -------------------------------------------------------------------------------


def test_windows_take_turns_and_give_seconds_per_step():
    calls = []

    def contender(name):
        return lambda steps: calls.append((name, steps)) or 2.0 * steps

    seconds = windows({name: contender(name) for name in "ab"}, 5, 3)
    assert seconds == {"a": [2.0] * 5, "b": [2.0] * 5}
    warm, timed = calls[:2], calls[2:]
    assert warm == [("a", 2), ("b", 2)]
    assert [name for name, _ in timed] == list("abbaabbaab")


def test_the_interval_lies_about_the_median():
    values = [1.0, 1.2, 0.9, 1.1, 1.05, 0.97, 1.3]
    found = interval(values)
    assert found["median"] == statistics.median(values)
    assert min(values) <= found["low"] < found["median"] < found["high"] <= max(values)
    assert interval(values) == found
    assert interval([0.5] * 5) == {"median": 0.5, "low": 0.5, "high": 0.5, "windows": 5}


# ---- The table -----------------------------------------------------------------------------


def test_a_line_is_met_in_its_own_direction(tmp_path):
    results = Results("cpu", [JOB], tmp_path)
    for ratio, of_line, met in ((0.98, 0, False), (0.99, 0, True), (1.2, 1, False), (1.0, 1, True)):
        results.put(LINES[of_line], Measured(ratio, "found"))
        assert results.objects()[of_line]["met"] is met
    results.put(LINES[2], Measured(7.0, "found"))
    assert results.objects()[2]["met"] is None
    assert [list(found) for found in results.objects()] == [list(KEYS)] * 3
    assert results.objects()[0]["ratio"] == 0.99
    assert "no, floor reached" not in results.table()


def test_what_misses_its_floor_says_why(tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.suite.read_notes", lambda: {"cpu": {"1": "the disk is slow"}})
    results = Results("cpu", [JOB], tmp_path)
    results.put(LINES[0], Measured(0.5, "found"))
    results.put(LINES[1], Measured(3.0, "found"))
    first, second, third = results.objects()
    assert first["note"].startswith("misses its floor: the disk is slow")
    assert "nobody has said why" in second["note"]
    assert third["ratio"] is None and third["note"] == "not measured"
    assert results.table().count("no, floor missed") == 2


def test_results_are_kept_and_gone_on_with(tmp_path):
    results = Results("cpu", [JOB], tmp_path)
    results.put(LINES[0], Measured(1.0, "found", 0.9, 1.1, {"seconds": [1, 2]}))
    again = Results("cpu", [JOB], tmp_path)
    assert again.objects() == results.objects() and not again.has(JOB)
    # A failure does not wipe out what is known.
    again.put(LINES[0], Measured(None, "not measured: it broke"))
    assert again.objects()[0]["ratio"] == 1.0
    for line in LINES[1:]:
        again.put(line, Measured(1.0, "found"))
    assert Results("cpu", [JOB], tmp_path).has(JOB)
    assert "1 (0.9 to 1.1)" in (tmp_path / "suite_cpu.md").read_text(encoding="utf-8")


def test_lines_are_chosen_by_their_numbers():
    assert [job.name for job in chosen(gpu_lines.JOBS, ["4", "7b"])] == ["1b", "head"]
    assert chosen(gpu_lines.JOBS, []) == list(gpu_lines.JOBS)
    with pytest.raises(KeyError, match="44"):
        chosen(gpu_lines.JOBS, ["4", "44"])


# ---- Running -------------------------------------------------------------------------------


def test_a_job_runs_in_a_process_of_its_own_and_is_not_run_again(tmp_path, capsys):
    command = ["--suite", "cpu", "--only", "8", "--tiny", "--json", "--results", str(tmp_path)]
    assert run.main(command) == 0
    lines = {line["name"]: line for line in json.loads(capsys.readouterr().out)}
    assert lines["8"]["ratio"] > 0 and "MB" in lines["8"]["note"]
    assert lines["1"] == lines["1"] | {"ratio": None, "met": None, "note": "not measured"}
    stored = (tmp_path / "suite_cpu.json").read_bytes()
    assert json.loads(stored)["lines"][0]["machine"]["command"].startswith("python -m benchmarks")
    assert run.main(command) == 0
    captured = capsys.readouterr()
    assert "measured already" in captured.err
    assert (tmp_path / "suite_cpu.json").read_bytes() == stored


def test_a_job_that_fails_is_a_note(tmp_path, capsys):
    job = Job("there is none", LINES, JOB.run, 1.0)
    results = Results("cpu", [job], tmp_path / "results")
    run._run(job, results, argparse.Namespace(suite="cpu", tiny=True), tmp_path, 60.0)
    notes = [found["note"] for found in results.objects()]
    assert all(note.startswith("not measured: it ended with 1") for note in notes)
    assert "StopIteration" in capsys.readouterr().err


def test_what_does_not_fit_is_not_begun(tmp_path, capsys):
    command = ["--suite", "cpu", "--minutes", "0", "--json", "--results", str(tmp_path)]
    assert run.main(command) == 0
    for line in json.loads(capsys.readouterr().out):
        assert line["ratio"] is None and "no time" in line["note"]


def test_a_line_that_is_not_there_is_refused(capsys):
    assert run.main(["--suite", "gpu", "--only", "99", "--tiny"]) == 2
    assert "there is no line '99'" in capsys.readouterr().err


@pytest.mark.skipif(run._has_gpu(), reason="there is a GPU")
def test_without_a_gpu_the_lines_say_so(tmp_path, capsys):
    assert run.main(["--suite", "gpu", "--json", "--results", str(tmp_path)]) == 0
    lines = json.loads(capsys.readouterr().out)
    assert {line["name"].rstrip("ab") for line in lines} >= {str(n) for n in range(1, 13)}
    for line in lines:
        assert line["ratio"] is None and line["met"] is None
        assert line["note"].startswith(run.NO_GPU)


@pytest.mark.parametrize(
    "job", [
        pytest.param(cpu_lines.JOBS[0], id="floors"),
        pytest.param(gpu_lines.JOBS[1], id="step", marks=pytest.mark.slow),
    ],
)
def test_a_job_yields_its_lines(job):
    found = dict(job.run(True))
    assert list(found) == [line.name for line in job.lines]
    assert all(line.ratio > 0 for line in found.values())


# ---- What is committed ---------------------------------------------------------------------


@pytest.mark.parametrize("suite", SUITES)
def test_every_missed_floor_of_the_committed_results_has_its_reason(suite):
    results = Results(suite, SUITES[suite], ROOT / "benchmarks" / "results")
    assert results.path.exists()
    assert "nobody has said why" not in results.table()
    assert results.path.with_suffix(".md").read_text(encoding="utf-8").endswith(results.table())
    names = {line.name for line in results.lines}
    assert set(results.rows) <= names and set(read_notes()[suite]) <= names


def test_the_table_of_the_methods_is_that_of_the_runs():
    results = json.loads(methods_table.RESULTS.read_text(encoding="utf-8"))
    page = methods_table.PAGE.read_text(encoding="utf-8")
    assert page == methods_table.with_table(page, results)
    assert not any(arm["left_out"] for arm in results["arms"].values())
    # Every include but two variants is there, and every seed of every arm.
    includes = {path.stem for path in (ROOT / "gin/methods").glob("*.gin")}
    assert includes - {"plateau", "deep_progressive_zero"} <= set(results["arms"])
    assert len({tuple(arm["loss"]) for arm in results["arms"].values()}) == 1


def test_the_tables_of_the_depth_reasoning_study_are_those_of_its_runs():
    results = json.loads(depth_reasoning_table.RESULTS.read_text(encoding="utf-8"))
    page = depth_reasoning_table.PAGE.read_text(encoding="utf-8")
    assert page == depth_reasoning_table.with_tables(page, results)
    for name in depth_reasoning_table.PICTURES:
        picture = f"pictures/depth_reasoning_{name.replace('-', '_')}.png"
        assert picture in page and (ROOT / "docs" / picture).is_file()


def test_what_is_said_of_the_exploratory_arm_is_what_was_found():
    file = ROOT / "benchmarks/results/depth_reasoning_exploratory.json"
    arms = json.loads(file.read_text(encoding="utf-8"))["arms"]
    page = depth_reasoning_table.PAGE.read_text(encoding="utf-8").replace("*", "")
    for name, arm in arms.items():
        depth_1 = arm["tasks"]["variable_assignment/basic/depth_1/0_shot"].values()
        by_seed = ", ".join(f"{value:.1f}" for value in depth_1)
        loss, score = (statistics.fmean(arm[key].values()) for key in ("loss", "score"))
        assert f"| {name} | {loss:.4f} | {score:.1f} |" in page and f"| {by_seed} |" in page


def test_what_is_said_of_the_lag_is_what_was_found():
    found = json.loads((ROOT / "benchmarks/results/lag_cpu.json").read_text(encoding="utf-8"))
    page = (ROOT / "docs/methods.md").read_text(encoding="utf-8")
    said = page[page.index("results/lag_cpu.json"):page.index("## layer_drop")]
    at = {row["lag"]: row for row in found["curve"]}
    for lag in (0, 26):
        row = at[lag]
        low, high = row["spearman_low"], row["spearman_high"]
        assert f"{row['spearman']:.2f} ({low:.2f} to {high:.2f})" in said
    assert all(f"{at[lag]['spearman']:.2f} after {lag}" in said for lag in (8, 60))
    assert len(found["candidates"]) == 6


def test_the_verdicts_of_the_lab_are_those_of_its_runs():
    found = json.loads(lab_table.RESULTS.read_text(encoding="utf-8"))
    page = lab_table.PAGE.read_text(encoding="utf-8")
    assert page == lab_table.with_table(page, found)
    # With the settings that the command has.
    assert json.loads(json.dumps(IclSettings().to_dict())) == found["settings"]
    for name in lab_table.PICTURES:
        assert f"pictures/icl_{name}.png" in page
        assert (lab_table.PAGE.parent / f"pictures/icl_{name}.png").is_file()
    assert set(lab_table.PICTURES) == set(re.findall(r"pictures/icl_(\w+)\.png", page))


def test_what_the_lab_reads_in_its_runs_is_there():
    found = json.loads(lab_table.RESULTS.read_text(encoding="utf-8"))
    said = " ".join(lab_table.PAGE.read_text(encoding="utf-8").split())
    results = lab_results.Results(found["cells"], IclSettings())

    def final(arm, depth):
        return results.final(arm, depth)[1].mean()  # κ = 16, over seeds.

    for arms, depth, text in (
        (("restricted tied", "restricted untied"), 12, "{:.3f} against {:.3f} at 12 layers"),
        (("full untied", "restricted untied"), 4, "at 4 layers ({:.3f} against {:.3f}, κ = 16)"),
    ):
        assert text.format(*(final(f"linear {arm}", depth) for arm in arms)) in said
    slower = (final(f"{of} restricted untied", 8) for of in ("softmax", "linear"))
    assert "({:.3f} at 8 layers, κ = 16, against {:.3f} of linear ones)".format(*slower) in said
    assert f"at 8 layers ({final('softmax full untied', 8):.3f}, κ = 16)" in said
    few, many = (final("softmax full tied", depth) for depth in (2, 8))
    assert f"({few:.2f} with 2, {many:.2f} with 8)" in said
    assert f"of 12 layers {(results.final('linear full untied', 12) > 1).sum()} of 16" in said
    for arm in ("linear full tied", "linear full tied injected"):
        losses = results.read(arm, 8, "by_position")
        assert f"in {(losses[..., 11] > 1).sum()} of 16 cases, and 24 in all" in said
        assert (losses[..., -1] > 1).all()
    ends = results.read("softmax full tied", 8, "by_position")[..., -1]
    assert f"{(ends > 1).sum()} of 16 end above 1 after 24" in said
    out = [found["violations"][f"linear full tied{of}"]["left_out"] for of in ("", " injected")]
    assert "{}, and {} with injection".format(*out) in said
    zigzag = results.read("softmax restricted tied", 8, "by_position")
    up = zigzag[..., 1:] > 1.01 * zigzag[..., :-1]
    assert up[..., 1::2].all() and not up[..., ::2].any()
    assert (zigzag[..., 2:] < zigzag[..., :-2]).all()
