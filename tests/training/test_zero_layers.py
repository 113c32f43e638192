"""A run that begins without layers, and what is made of its first checkpoint."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest

from stacking_jax.analysis.diagnose import diagnose
from stacking_jax.errors import UserError
from stacking_jax.evaluation.model import RunModels
from stacking_jax.interop import export_run, grow_folder
from stacking_jax.training import train
from stacking_jax.training.generation import sample_from_run

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run_dir(config, change, tmp_path_factory):
    """No layers until step 3 of 6, then four new ones; checkpoints 2, 4, 6."""
    grown = change(
        config, total_steps=6,
        growth={
            "operator": "inherit_first", "stage_depths": [0, 1.0], "stage_fractions": [0.5, 0.5]
        },
    )
    made = tmp_path_factory.mktemp("zero") / "run"
    train(grown, made)
    return made


def test_every_layer_is_new_and_the_first_stage_trains_the_rest(run_dir, read_rows):
    models = RunModels(run_dir)
    before, after = (models.load(step).params for step in (2, 4))
    assert {leaf.shape[0] for leaf in jax.tree.leaves(before["stack"])} == {0}
    assert {leaf.shape[0] for leaf in jax.tree.leaves(after["stack"])} == {4}
    assert np.abs(np.asarray(after["embedding"]) - np.asarray(before["embedding"])).max() > 0
    losses = [row["loss"] for row in read_rows(run_dir, "train")]
    assert len(losses) == 6 and losses[2] < losses[0]
    [growth] = read_rows(run_dir, "grow")
    assert (growth["from_depth"], growth["to_depth"], growth["map"]) == (0, 4, [-1] * 4)
    summary = json.loads((run_dir / "summary.json").read_text(encoding="utf-8"))
    assert [stage["depth"] for stage in summary["stages"]] == [0, 4]


def test_a_checkpoint_without_layers_speaks_and_is_no_llama(run_dir, tmp_path):
    # Of what stands before it, a token sees the last one alone.
    texts = [
        sample_from_run(run_dir, prompt, step=2, max_new_tokens=4, temperature=0.0)
        for prompt in ("ab", "cab")
    ]
    assert texts[0] == texts[1] and len(texts[0][0]) > 0
    with pytest.raises(UserError, match="checkpoint 2 .* without layers, .* nothing to look into"):
        diagnose(run_dir, step=2)
    with pytest.raises(UserError, match="checkpoint 2 .* without layers, .* at least one"):
        export_run(run_dir, tmp_path / "out", step=2)
    for depth_map in ([-1], []):
        with pytest.raises(UserError, match="layers without a source|stores no layers"):
            grow_folder(run_dir, tmp_path / "out", depth_map, step=2)
    assert not (tmp_path / "out").exists()
    export_run(run_dir, tmp_path / "out")
