"""Whole looped runs: stopped anywhere they go on to the same bits, and what they leave is read."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from stacking_jax.errors import UserError
from stacking_jax.evaluation.model import RunModels
from stacking_jax.growth.layouts import path_keys
from stacking_jax.interop import export_run, grow_folder
from stacking_jax.models import LAYOUT
from stacking_jax.training import Stopped, train
from stacking_jax.training.checkpoints import Checkpoints
from stacking_jax.training.generation import sample_from_run
from stacking_jax.training.growing import growth_program
from stacking_jax.training.loop_config import LoopConfig
from stacking_jax.training.setup import Setup
from stacking_jax.training.stack_runs import inference_stack
from stacking_jax.training.state import abstract_params
from stacking_jax.training.step import make_eval_step
from stacking_jax.training.telemetry import Clock

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def untied(config, change):
    """0 (1 2)×1 3, then twice, then six layers of their own: boundaries at 3 and 6 of 9."""
    return change(
        config, model={"num_layers": 6}, growth={"operator": None}, checkpoint_every=1,
        keep_checkpoints=9,
        loops=LoopConfig(loops=2, first=1, last=1, curriculum=[1, 2], untie_at=0.6667),
    )


@pytest.fixture(scope="module")
def tied(config, change):
    """Grown by MIDAS from 2 to 4 layers at step 3, tied into 0 (1)×3 at step 5 of 9."""
    return change(
        config, checkpoint_every=1, keep_checkpoints=9,
        loops=LoopConfig(
            loops=3, first=1, inject="stream", loss_loops=2, backprop_loops=2, tie_at=0.5556,
            tie="average",
        ),
    )


@pytest.fixture(scope="module")
def run_of(tmp_path_factory):
    made = {}

    def run(config, name):
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name) / "run"
            train(config, made[name])
        return made[name]

    return run


@pytest.mark.parametrize(
    ("name", "stops"), [("untied", (2, 3, 5, 6)), ("tied", (5, 7))]
)
def test_a_run_stopped_within_stages_and_at_their_ends_ends_alike(
    name, stops, request, run_of, tmp_path, read_summary, read_rows
):
    config = request.getfixturevalue(name)
    whole = run_of(config, name)
    for stop in stops:
        with pytest.raises(Stopped):
            train(config, tmp_path / "run", stop_at=stop)
    train(config, tmp_path / "run")
    ours, theirs = read_summary(tmp_path / "run"), read_summary(whole)
    for key in ("params_digest", "eval_loss", "train_loss", "model_flops", "tokens"):
        assert ours[key] == theirs[key]
    losses = [
        [(row["step"], row["loss"]) for row in read_rows(run, "train")]
        for run in (tmp_path / "run", whole)
    ]
    assert losses[0] == losses[1]


def test_a_summary_says_what_is_stored_and_what_runs(untied, tied, run_of, read_summary, read_rows):
    summary = read_summary(run_of(untied, "untied"))
    assert summary["method"] == "middle looped, untied"
    assert (summary["depth"], summary["run_depth"], summary["growths"]) == (6, 6, [6])
    # Four stored layers run once, then six positions of them, then six layers.
    rows = read_rows(run_of(untied, "untied"), "train")
    flops = np.diff([0, *(row["model_flops"] for row in rows)])
    assert flops[0] < flops[3] == pytest.approx(flops[8])
    assert [row["depth"] for row in rows] == [4] * 6 + [6] * 3
    summary = read_summary(run_of(tied, "tied"))
    assert summary["method"] == "midas + tied, middle looped"
    assert (summary["depth"], summary["run_depth"], summary["growths"]) == (2, 4, [3, 5])


def flat(state):
    leaves = jax.tree_util.tree_flatten_with_path(jax.device_get(state))[0]
    return {path_keys(path): np.array(leaf) for path, leaf in leaves}


def params_at(config, run_dir, step, setup):
    checkpoints = Checkpoints(run_dir / "checkpoints", read_only=True)
    try:
        return checkpoints.restore_params(
            step, lambda depth: abstract_params(config.model, depth, setup.mesh)
        )
    finally:
        checkpoints.close()


def test_untying_keeps_the_function_to_the_bit_and_the_moments(untied, run_of, tmp_path):
    run_dir = run_of(untied, "untied")
    setup = Setup.of(untied, tmp_path, Clock())
    before, after = setup.plan.stages[1:]
    looped = params_at(untied, run_dir, 6, setup)
    layers = jax.tree.map(
        lambda leaf: leaf[np.array(before.run_map.sources)], looped["stack"]["layers"]
    )
    plain = {**looped, "stack": {"layers": layers}}
    tokens = np.random.default_rng(0).integers(1, 256, (8, 64)).astype(np.int32)
    batch = {
        "tokens": tokens, "segment_ids": np.ones_like(tokens),
        "positions": np.broadcast_to(np.arange(64, dtype=np.int32), tokens.shape),
    }  # fmt: skip
    losses = [
        jax.jit(make_eval_step(setup.graph, inference_stack(untied, stage)))(params, batch)[0]
        for stage, params in ((before, looped), (after, plain))
    ]
    assert losses[0] == losses[1]
    # What the run itself made of them: moments and parameters are those of the map.
    checkpoints = Checkpoints(run_dir / "checkpoints", read_only=True)
    state = checkpoints.restore(6, setup.shapes(before.depth))
    checkpoints.close()
    old = flat(state)
    grown = flat(growth_program(
        untied.model, untied.growth, setup.optimizer, after, setup.shapes(6)
    )(state))  # fmt: skip
    in_stack = [keys for keys in grown if LAYOUT.matches(keys)]
    assert len(in_stack) == 9 * 3 + 1  # parameters, both moments, and the layers' own count
    for keys in in_stack:
        np.testing.assert_array_equal(grown[keys], old[keys][np.array(before.run_map.sources)])


def test_a_checkpoint_is_read_as_its_own_stage_ran_it(untied, tied, run_of):
    models = RunModels(run_of(untied, "untied"))
    seen = {step: models.load(step) for step in (3, 6, 9)}
    assert [seen[step].loop and seen[step].loop.turns for step in (3, 6, 9)] == [1, 2, None]
    assert seen[6].depth_map.sources == (0, 1, 2, 1, 2, 3) and seen[9].depth_map is None
    loop = RunModels(run_of(tied, "tied")).load(9).loop
    assert (loop.turns, loop.inject, loop.exits, loop.backprop) == (3, "stream", 1, None)


def test_more_loops_than_in_training(tied, untied, run_of):
    run_dir = run_of(tied, "tied")
    options = dict(max_new_tokens=8, temperature=0.0)
    assert len(sample_from_run(run_dir, "ab", loops=7, **options)) == 1
    with pytest.raises(UserError, match="checkpoint 4 has no loop, so it cannot run 7"):
        sample_from_run(run_dir, "ab", loops=7, step=4, **options)


def test_tied_layers_are_averages_of_those_that_they_stand_for(tied, run_of, tmp_path):
    setup = Setup.of(tied, tmp_path, Clock())
    before, after = setup.plan.stages[1:]
    checkpoints = Checkpoints(run_of(tied, "tied") / "checkpoints", read_only=True)
    state = checkpoints.restore(5, setup.shapes(4))
    checkpoints.close()
    old = flat(state.params)
    grown = growth_program(tied.model, tied.growth, setup.optimizer, after, setup.shapes(2))(state)
    for keys, leaf in flat(grown.params).items():
        if LAYOUT.matches(keys):
            np.testing.assert_array_equal(leaf[0], old[keys][0])
            np.testing.assert_allclose(leaf[1], old[keys][1:].mean(axis=0), rtol=1e-5, atol=1e-7)
        else:
            np.testing.assert_array_equal(leaf, old[keys])


def test_an_export_holds_a_layer_for_every_time_that_it_runs(untied, tied, run_of, tmp_path):
    from safetensors.numpy import load_file

    run_dir = run_of(untied, "untied")
    export_run(run_dir, tmp_path / "hf", step=6)
    (file,) = (tmp_path / "hf").glob("*.safetensors")
    tensors = load_file(file)
    layers = RunModels(run_dir).load(6).params["stack"]["layers"]
    for number, source in enumerate((0, 1, 2, 1, 2, 3)):
        np.testing.assert_array_equal(
            tensors[f"model.layers.{number}.mlp.up_proj.weight"],
            np.asarray(layers["mlp"]["up"][source]).T,
        )
    assert "model.layers.6.mlp.up_proj.weight" not in tensors
    with pytest.raises(UserError, match="LoopConfig.inject = 'stream' adds to the stream"):
        export_run(run_of(tied, "tied"), tmp_path / "no")
    export_run(run_of(tied, "tied"), tmp_path / "plain", step=4)


def test_a_run_with_loops_does_not_grow_on_disk(untied, run_of, tmp_path):
    with pytest.raises(UserError, match=r"trains with loops \(LoopConfig.loops = 2\)"):
        grow_folder(run_of(untied, "untied"), tmp_path / "deeper", [0, 1, 2, 3, 4, 5, 5])
    assert not (tmp_path / "deeper").exists()
