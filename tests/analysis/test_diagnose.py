"""The command on a run: what it writes, prints, draws and refuses."""

from __future__ import annotations

import dataclasses
import json
import shutil

import pytest

from stacking_jax.analysis.diagnose import default_block, injection_of, sources_of
from stacking_jax.cli import main
from stacking_jax.reporting import compare_runs, read_run, report_html
from stacking_jax.training import GrowthConfig, train
from stacking_jax.training.loop_config import LoopConfig

# Whole runs, of some seconds each.
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def diagnosed(run_dir, tmp_path_factory):
    copy = tmp_path_factory.mktemp("diagnosed") / "run"
    shutil.copytree(run_dir, copy)
    assert main(["diagnose", "--run_dir", str(copy), "--batches", "4"]) == 0
    return copy


@pytest.fixture(scope="module")
def found(diagnosed):
    return json.loads((diagnosed / "diagnostics" / "3.json").read_text())


def test_everything_is_there_and_the_loss_is_that_of_the_run(found, diagnosed):
    summary = json.loads((diagnosed / "summary.json").read_text())
    assert found["maps"]["loss"] == pytest.approx(summary["eval_loss"], rel=1e-5)
    assert found["lens"]["loss"][-1] == pytest.approx(summary["eval_loss"], rel=1e-5)
    assert (found["step"], found["depth"], found["block"]) == (3, 4, 2)
    assert found["positions"] == [0, 1, 2, 3]
    assert len(found["maps"]["interventions"]) == 18
    assert len(found["linearity"]["r2"]) == 4
    assert {"similarity", "lens", "contributions", "neurons", "effects"} < set(found)
    picture = (diagnosed / "diagnostics" / "3.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 20_000


def test_the_table_has_a_line_per_layer(run_dir, tmp_path, capsys):
    where = ["--out", str(tmp_path / "out"), "--parts", "similarity,maps", "--batches", "1"]
    assert main(["diagnose", "--run_dir", str(run_dir), *where]) == 0
    shown = capsys.readouterr().out
    assert "inside the stack" in shown and "cosine of the weights" in shown
    assert "skip blocks of 2" in shown and "linear" not in shown
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["3.json", "3.png"]
    assert not (run_dir / "diagnostics").exists()


def test_json_is_one_object_and_similarity_needs_no_data(run_dir, tmp_path, capsys):
    argv = ["diagnose", "--run_dir", str(run_dir), "--parts", "similarity", "--json",
            "--blocks", "1", "--out", str(tmp_path)]  # fmt: skip
    assert main(argv) == 0
    said = json.loads(capsys.readouterr().out)
    assert said == json.loads((tmp_path / "3.json").read_text())
    assert "batches" not in said and len(said["similarity"]["mean"]["blocks"]) == 4


def test_the_report_shows_runs_that_were_diagnosed_and_no_others(diagnosed, run_dir):
    page = report_html(compare_runs([read_run(run_dir), read_run(diagnosed)]))
    assert page.count("Inside the stack") == 1
    assert page.count("Similarity of layers") == 1
    # The page's policy forbids images, even those that are within it.
    assert "Early exit" in page and "data:image" not in page and "<image" not in page
    assert "Inside the stack" not in report_html(compare_runs([read_run(run_dir)]))


def test_broken_and_foreign_files_are_passed_over(diagnosed, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(diagnosed, copy)
    (copy / "diagnostics" / "9.json").write_text("{")
    (copy / "diagnostics" / "8.json").write_text('{"format": 99}')
    assert "Inside the stack" in report_html(compare_runs([read_run(copy)]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--blocks", "3"], "blocks of 3 layers do not fill a stack of 4; these do: 1, 2, 4"),
        (["--step", "7"], "holds no checkpoint of step 7; it has 3"),
        (["--batches", "0"], "--batches is at least 1; got 0"),
        (["--parts", "skips"], "there is no part skips; the parts are similarity, maps"),
    ],
)
def test_bad_input_gets_one_line(run_dir, options, message, capsys):
    assert main(["diagnose", "--run_dir", str(run_dir), *options]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert message in line


def test_a_looped_checkpoint_runs_its_map_and_one_grown_on_disk_every_layer():
    stage = {"depth": 2, "run_map": [0, 1, 0, 1]}
    meta = {"depth": 2, "stage": 0, "step": 5, "plan": [stage]}
    assert sources_of(meta) == (0, 1, 0, 1)
    assert default_block(meta, 4) == 2
    assert sources_of({**meta, "depth": 4}) == (0, 1, 2, 3)
    loop = {"start": 1, "block": 1, "turns": 3, "inject": "stream"}
    stage = {"depth": 3, "run_map": [0, 1, 1, 1, 2], "loop": loop}
    meta = {"depth": 3, "stage": 0, "step": 5, "plan": [stage]}
    assert injection_of(meta) == (1, {2, 3})
    assert injection_of({**meta, "depth": 4}) is None
    assert injection_of({**meta, "plan": [{**stage, "loop": {**loop, "inject": None}}]}) is None
    assert injection_of({**meta, "plan": [{**stage, "loop": {**loop, "inject": "input"}}]}) == (
        0, {2, 3}
    )


@pytest.mark.parametrize("inject", ["input", "stream"])
def test_a_loop_with_injection_is_looked_at_as_it_runs(inject, config, tmp_path, capsys):
    """The stream that the walk brings to its end has the loss that the run measured."""
    config = dataclasses.replace(
        config, growth=GrowthConfig(operator=None),
        loops=LoopConfig(loops=3, first=1, block=1, inject=inject),
    )
    train(config, tmp_path / "run")
    argv = ["diagnose", "--run_dir", str(tmp_path / "run"), "--batches", "4"]
    assert main(argv) == 0
    assert "'maps' is left out" in capsys.readouterr().err
    found = json.loads((tmp_path / "run/diagnostics/3.json").read_text())
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert found["lens"]["loss"][-1] == pytest.approx(summary["eval_loss"], rel=1e-5)
    assert found["positions"] == [0, 1, 1, 1] and "maps" not in found
    assert main([*argv, "--parts", "maps"]) == 2
    assert "has its input injected" in capsys.readouterr().err


def test_blocks_by_default():
    def of(first, positions):
        return default_block({"plan": [{"depth": first}]}, positions)

    assert of(3, 12) == 3
    assert [of(n, n) for n in (12, 24, 7, 1)] == [3, 4, 1, 1]
    assert default_block({}, 16) == 4
