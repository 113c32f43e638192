"""`stacking-jax plan --topology` from the command line: by formula, here, and compiled."""

from __future__ import annotations

import json
import os
import re

import pytest

from stacking_jax import cli
from stacking_jax.planning.collectives import KINDS

GIN = """
include 'gin/train.gin'
include 'gin/models/tiny.gin'
include 'gin/growth/midas_prop1.gin'
include 'gin/data/stdlib.gin'
DecoderConfig.num_layers = 4
DecoderConfig.d_model = 32
DecoderConfig.d_ff = 64
DecoderConfig.vocab_size = 64
NUM_STAGES = 2
BATCH_SIZE = 16
SEQUENCE_LENGTH = 32
TRAIN_STEPS = 30
"""
KEYS = {
    "hbm_peak_bytes", "hbm_limit_bytes", "fits", "compile_seconds", "collective_bytes",
    "step_seconds_estimate", "mfu_estimate",
}  # fmt: skip


@pytest.fixture
def plan(tmp_path, monkeypatch, capsys):
    """plan("h100:8", ...) -> (exit code, standard output, standard error)"""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.gin").write_text(GIN)

    def run(*arguments):
        code = cli.main(["plan", "--gin_file", "run.gin", "--topology", *arguments])
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


def check(plan):
    """What every plan that fits holds."""
    assert [stage["depth"] for stage in plan["stages"]] == [2, 4]
    for stage in [*plan["stages"], plan["baseline"]]:
        assert stage.keys() >= KEYS
        assert stage["fits"] and 0 < stage["hbm_peak_bytes"] <= stage["hbm_limit_bytes"]
        assert set(stage["collective_bytes"]) <= set(KINDS)
        parts = [stage[f"{part}_seconds"] for part in ("compute", "memory", "link")]
        assert stage["step_seconds_estimate"] == max(parts) > 0
        assert 0 < stage["mfu_estimate"] <= 1
    days = sum(s["steps"] * s["step_seconds_estimate"] for s in plan["stages"]) / 86_400
    whole = plan["baseline"]["step_seconds_estimate"] * 30 / 86_400
    assert plan["estimate"]["days"] == pytest.approx(days)
    assert plan["saving"]["days"] == pytest.approx(whole - days)
    assert plan["topology"]["label"] == "roofline, unverified"


def test_gpus_by_formula_as_json(plan):
    code, out, _ = plan("h100:4x2", "--json", "--gin.PlanConfig.chip_hour_price=2.5")
    made = json.loads(out)
    assert code == 0 and made["topology"]["method"] == "formula"
    check(made)
    assert made["estimate"]["price"] == pytest.approx(2.5 * made["estimate"]["chip_hours"])
    assert made["saving"]["price"] == pytest.approx(2.5 * made["saving"]["chip_hours"])
    assert all(stage["compile_seconds"] is None for stage in made["stages"])


def test_gpus_by_formula_as_a_table(plan):
    code, out, _ = plan("h100:8", "--gin.PlanConfig.chip_hour_price=2.5")
    assert code == 0
    for part in ("speed-up", "roofline, unverified", "by formula", "growing saves", "USD", "full"):
        assert part in out
    # The value of --topology may come from gin.
    code, again, _ = plan(
        "--gin.PlanConfig.topology='h100:8'", "--gin.PlanConfig.chip_hour_price=2.5"
    )
    assert code == 0 and again == out


@pytest.mark.slow
def test_the_devices_here_predicted_and_measured(plan, monkeypatch):
    monkeypatch.setattr("stacking_jax.planning.local._SECONDS_PER_STAGE", 0.0)
    code, out, _ = plan("local", "--json", "--gin.MeshConfig.data=2", "--gin.MeshConfig.fsdp=4")
    made = json.loads(out)
    assert code == 0
    check(made)
    assert made["topology"]["chips"] == 8 and "measured here" in made["topology"]["rates"]
    for stage in made["stages"]:
        assert stage["step_seconds_measured"] > 0 and stage["measured_steps"] >= 3
        axes = {axis for row in stage["collectives"] for axis in row["axes"]}
        assert axes == {"data", "fsdp"}
        assert stage["loops_known"]


def test_what_does_not_fit_is_said_with_what_would(plan):
    big = [
        "--gin.BATCH_SIZE=8192", "--gin.SEQUENCE_LENGTH=2048", "--gin.DecoderConfig.num_layers=64"
    ]
    code, out, err = plan("h100:8", "--json", *big)
    made = json.loads(out)
    assert code == 2 and not made["fits"]
    bad = [stage for stage in made["stages"] if not stage["fits"]]
    assert bad and all(s["hbm_peak_bytes"] > s["hbm_limit_bytes"] for s in bad)
    assert all(s["step_seconds_estimate"] is None and s["collective_bytes"] is None for s in bad)
    assert made["estimate"]["days"] is None
    last = err.strip().splitlines()[-1]
    assert last.startswith("error: stage 2 (64 layers) needs ") and "GiB" in last
    flags = made["advice"]["fits_with"]
    if flags is None:
        assert "no remat policy or mesh that was tried fits" in last
    else:
        assert flags in last


def test_the_advice_holds(plan):
    """A batch that fits with less kept: the command with its own advice exits with 0."""
    big = [
        "--gin.BATCH_SIZE=4096", "--gin.SEQUENCE_LENGTH=512", "--gin.DecoderConfig.num_layers=96"
    ]
    code, out, _ = plan("h100:8", "--json", *big)
    assert code == 2
    flags = json.loads(out)["advice"]["fits_with"]
    assert flags is not None
    unquoted = [re.sub(r"='(.*)'$", r"=\1", flag) for flag in flags.split()]
    code, out, err = plan("h100:8", *big, *unquoted)
    assert code == 0, err
    assert "NO" not in out


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["v9:2x2"], "no chip 'v9'"), ([], "--topology needs a value"),
        (["h100:8", "--gin.BATCH_SIZE=12"], "cannot be divided over 8 devices"),
    ],
)
def test_what_cannot_be_planned_is_one_line(plan, arguments, part):
    code, out, err = plan(*arguments)
    assert (code, out) == (2, "")
    assert part in err and err.count("error:") == 1


def test_without_the_compiler_one_line_says_what_to_install(plan, monkeypatch):
    from stacking_jax.planning import compiler

    real = compiler.importlib.util.find_spec
    monkeypatch.setattr(compiler, "BESIDE", compiler.BESIDE / "nothing")
    monkeypatch.setattr(
        compiler.importlib.util, "find_spec",
        lambda name, *rest: None if name == "libtpu" else real(name, *rest),
    )
    code, out, err = plan("v5e:2x2")
    assert (code, out) == (2, "")
    assert "stacking_jax[tpu]" in err and len(err.strip().splitlines()) == 1


@pytest.mark.slow
def test_a_tpu_compiled_then_remembered(plan, libtpu, tmp_path, monkeypatch):
    """The real compiler, and the same plan again without it."""
    monkeypatch.setenv("STACKING_JAX_CACHE", str(tmp_path / "cache"))
    code, out, err = plan("v5e:2x2", "--json", "--gin.DecoderConfig.dtype='bfloat16'")
    assert code == 0, err
    made = json.loads(out)
    check(made)
    assert made["topology"]["method"] == "compiler" and made["topology"]["chips"] == 4
    first, last = made["stages"]
    assert not first["cached"] and not last["cached"] and last["compile_seconds"] > 0
    # Full depth throughout is the last stage's program.
    assert made["baseline"]["program"] == last["program"]
    assert last["argument_bytes"] > first["argument_bytes"]
    # Each of two layers more is gathered or summed: matrices of 2 bytes in each pass.
    layer = 2 * (4 * 32 * 32 + 3 * 32 * 64)
    more = sum(last["collective_bytes"].values()) - sum(first["collective_bytes"].values())
    assert first["loops_known"] and more > 2 * 2 * layer
    # What the compiler prints while it starts stays in its own process.
    assert "libtpu" not in err and "E0000" not in err

    monkeypatch.setattr(os, "environ", dict(os.environ))
    from stacking_jax.planning import compiler

    monkeypatch.setattr(compiler.subprocess, "Popen", None)  # Nothing is started.
    code, out, _ = plan("v5e:2x2", "--json", "--gin.DecoderConfig.dtype='bfloat16'")
    again = json.loads(out)
    assert code == 0 and all(stage["cached"] for stage in again["stages"])
    for before, now in zip(made["stages"], again["stages"], strict=True):
        assert before | {"cached": True} == now | {"cached": True}


@pytest.mark.slow
def test_a_tpu_that_is_too_small(plan, libtpu, tmp_path, monkeypatch):
    """The compiler's own refusal, its numbers, and a policy that it has agreed to."""
    monkeypatch.setenv("STACKING_JAX_CACHE", str(tmp_path / "cache"))
    big = [
        "--gin.BATCH_SIZE=64", "--gin.SEQUENCE_LENGTH=1024", "--gin.DecoderConfig.num_layers=48",
        "--gin.DecoderConfig.num_heads=16", "--gin.NUM_STAGES=1", "--gin.DecoderConfig.d_model=128",
        "--gin.GrowthConfig.operator=None", "--gin.DecoderConfig.dtype='bfloat16'",
    ]
    code, out, err = plan("v5e:2x2", "--json", *big)
    made = json.loads(out)
    stage = made["stages"][0]
    assert code == 2 and not stage["fits"]
    assert stage["hbm_limit_bytes"] == round(15.75 * 2**30) < stage["hbm_peak_bytes"]
    assert "RESOURCE_EXHAUSTED" in stage["error"]
    assert made["advice"]["fits_with"] == "--gin.DecoderConfig.remat='\"dots\"'"
    assert made["advice"]["fits_with"] in err and "(compiled)" in err
