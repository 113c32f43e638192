"""The paths of steps: their law, that they cost what they are long, what they leave alone."""

from __future__ import annotations

import dataclasses
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stacking_jax.errors import UserError
from stacking_jax.growth import DepthMap, Plan, Stage
from stacking_jax.models import LAYOUT, DecoderConfig
from stacking_jax.training import MeshConfig, OptimizerConfig, Stopped, sharding, train
from stacking_jax.training.optimizers import optimizer
from stacking_jax.training.path_config import PathConfig
from stacking_jax.training.paths import draw_path, path_stack
from stacking_jax.training.state import initial_state, model_graph
from stacking_jax.training.step import make_train_step

RAPTR = PathConfig("raptr")
DROP = PathConfig("layer_drop", keep_first=0, keep_last=0, scaling="inverse")


def many(chances, length, count=6000):
    keys = jax.random.split(jax.random.key(0), count)
    return np.asarray(jax.jit(jax.vmap(lambda key: draw_path(key, chances, length)))(keys))


@pytest.mark.parametrize(
    ("config", "depth", "length"),
    [(RAPTR, 12, 6), (RAPTR, 4, 2), (DROP, 8, 6), (DROP, 72, 54)],
)
def test_a_path_is_sorted_and_drawn_by_its_law(config, depth, length):
    chances = config.probabilities(depth, length)
    assert sum(chances) == pytest.approx(length)
    paths = many(chances, length)
    assert paths.shape[1] == length and (np.diff(paths, axis=1) > 0).all()
    assert paths.min() >= 0 and paths.max() < depth
    often = np.bincount(paths.ravel(), minlength=depth) / len(paths)
    spread = np.sqrt(np.multiply(chances, np.subtract(1, chances)) / len(paths))
    assert (np.abs(often - chances) <= 5 * spread).all()
    for position in (*range(config.keep_first), *range(depth - config.keep_last, depth)):
        assert often[position] == 1


def test_every_path_of_raptr_is_as_likely_as_any_other():
    paths = many(RAPTR.probabilities(7, 4), 4)
    found = {path: 0 for path in itertools.combinations(range(7), 4) if {0, 6} <= set(path)}
    for path in map(tuple, paths.tolist()):
        found[path] += 1
    expected = len(paths) / len(found)
    assert len(found) == 10
    # χ² of 9 degrees of freedom is above 33.7 once in ten thousand.
    assert sum((count - expected) ** 2 / expected for count in found.values()) < 33.7


def test_layer_drop_draws_each_layer_as_often_as_the_paper():
    theta = 0.5
    paper = [1 - (1 - theta) * i / 24 for i in range(1, 25)]
    length = round(sum(paper))
    ours = DROP.probabilities(24, length)
    assert length == 18
    # Of this length, exactly its law, with the θ that has this length on average.
    theta = 1 - 2 * (24 - length) / 25
    assert ours == pytest.approx([1 - (1 - theta) * i / 24 for i in range(1, 25)])


def test_a_path_is_a_function_of_seed_and_step_alone():
    stage = Stage(12, 100, 0, path=6)
    stack = path_stack(RAPTR, 3, stage)
    under_jit = jax.jit(lambda step: stack(step)["depth_map"])
    eager = [tuple(stack(jnp.int32(step))["depth_map"].tolist()) for step in range(12)]
    assert eager == [tuple(under_jit(jnp.int32(step)).tolist()) for step in range(12)]
    assert under_jit._cache_size() == 1, "a step compiled anew"
    assert len(set(eager)) > 6
    other = path_stack(RAPTR, 4, stage)
    assert eager != [tuple(other(jnp.int32(step))["depth_map"].tolist()) for step in range(12)]
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    for step in range(4):
        everywhere = under_jit(jax.device_put(jnp.int32(step), whole))
        assert {tuple(map(int, part.data)) for part in everywhere.addressable_shards} == {
            eager[step]
        }


@pytest.mark.parametrize(
    ("scaling", "gates"),
    [("none", None), ("inverse", lambda q: 1 / q), ("root", lambda q: q**-0.5)],
)
def test_branches_are_rescaled_by_the_probability_of_being_drawn(scaling, gates):
    config = dataclasses.replace(RAPTR, scaling=scaling)
    runs = path_stack(config, 0, Stage(8, 10, 0, path=5))(jnp.int32(1))
    if gates is None:
        assert set(runs) == {"depth_map"}
        return
    wanted = [1.0 if i in (0, 7) else gates(3 / 6) for i in runs["depth_map"].tolist()]
    np.testing.assert_allclose(runs["gates"], wanted, rtol=1e-6)


def test_inverse_scaling_is_the_whole_network_on_average():
    """Of branches that do not see each other, exactly: Σ gate · branch has their sum as mean."""
    config = dataclasses.replace(RAPTR, scaling="inverse")
    stack = path_stack(config, 0, Stage(8, 10, 0, path=5))
    branches = jnp.arange(1.0, 9)

    def total(step):
        runs = stack(step)
        return jnp.sum(runs["gates"] * branches[runs["depth_map"]])

    totals = np.asarray(jax.jit(jax.vmap(total))(jnp.arange(8000)))
    assert abs(totals.mean() - 36) < 5 * totals.std() / math.sqrt(8000)


# ---- Plans ----------------------------------------------------------------------------------


def spans(config, depth, steps):
    plan = config.apply(Plan.constant(depth, steps))
    assert {stage.depth for stage in plan.stages} == {depth}
    assert not any(stage.grows for stage in plan.stages)
    return [(stage.positions, stage.steps) for stage in plan.stages]


def test_the_stages_of_bert():
    assert spans(RAPTR, 12, 400) == [(6, 100), (8, 100), (10, 100), (12, 100)]
    assert spans(RAPTR, 24, 4) == [(12, 1), (16, 1), (20, 1), (24, 1)]
    plan = RAPTR.apply(Plan.constant(12, 400))
    assert [stage.path for stage in plan.stages] == [6, 8, 10, None]
    assert plan.final_run_depth == 12 and plan.growth_steps == ()


def test_stages_may_be_set():
    warm = dataclasses.replace(
        RAPTR, warmup_fraction=0.1, lengths=[4, 8], stage_fractions=[0.25, 0.75]
    )
    assert spans(warm, 8, 100) == [(8, 10), (4, 22), (8, 68)]
    twice = dataclasses.replace(RAPTR, fractions=[0.5, 0.5, 1.0])
    assert spans(twice, 8, 90) == [(4, 60), (8, 30)], "stages that run alike are one"


def test_layer_drop_follows_its_schedule():
    found = spans(DROP, 24, 10000)
    assert [length for length, _ in found] == [24, 22, 20, 18]
    assert sum(steps for _, steps in found) == 10000
    # The expected number of layers passes half way between two lengths where one gives way.
    start = 0
    for (length, steps), (after, _) in itertools.pairwise(found):
        start += steps
        theta = 0.5 + 0.5 * math.exp(-100 * start / 10000)
        expected = sum(1 - (1 - theta) * i / 24 for i in range(1, 25))
        assert expected == pytest.approx((length + after) / 2, abs=0.1)


def test_without_a_method_the_plan_is_as_it_was():
    plan = Plan.constant(8, 10)
    assert PathConfig().apply(plan) is plan


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({"lengths": [9, 8]}, "a path of 9 layers must hold the 2"),
        ({"lengths": [1, 8]}, "a path of 1 layers must hold the 2"),
        ({"lengths": [2.5]}, "PathConfig.lengths must be a whole number"),
        ({"lengths": 4}, "lengths is a list, one entry per stage"),
        ({"fractions": [0.5, 1.5]}, "above 0 and at most 1"),
        ({"keep_first": 5, "keep_last": 4}, "keep_last = 9 layers, but the model has 8"),
        ({"stage_fractions": [0.5, 0.5]}, "2 entries for 4 stages"),
        ({"stage_fractions": [0.5, 0.6]}, "add up to 1"),
        ({"warmup_fraction": 1.5}, "warmup_fraction is a share from 0 to 1"),
        ({"method": "drop"}, "method is one of None, raptr, layer_drop"),
        ({"scaling": "sqrt"}, "scaling is one of none, root, inverse"),
        ({"undrawn": "freeze"}, "undrawn is one of dense, skip"),
        ({"method": "layer_drop", "lengths": [4]}, "PathConfig.lengths is RaPTr's"),
    ],
)
def test_what_does_not_fit_is_one_line(settings, part):
    with pytest.raises(UserError) as caught:
        dataclasses.replace(RAPTR, **settings).apply(Plan.constant(8, 40))
    assert part in str(caught.value) and "\n" not in str(caught.value)


def test_probabilities_of_layer_drop_are_not_negative():
    with pytest.raises(UserError, match="set PathConfig.final_keep higher"):
        DROP.probabilities(8, 3)


def test_a_plan_that_grows_has_no_paths():
    grown = Plan.prop(8, 2, 10)
    with pytest.raises(UserError, match="one plain stack of one depth"):
        RAPTR.apply(grown)


# ---- Steps ----------------------------------------------------------------------------------

MODEL = DecoderConfig(vocab_size=64, num_layers=4, d_model=16, d_ff=24, num_heads=2)
STAGE = Stage(4, 10, 0, path=2)
QUICKLY = {"xla_backend_optimization_level": 0}


def batch(rows=4, length=16):
    dice = np.random.default_rng(0)
    return {
        "tokens": dice.integers(1, 64, (rows, length)).astype(np.int32),
        "segment_ids": np.ones((rows, length), np.int32),
        "positions": np.tile(np.arange(length, dtype=np.int32), (rows, 1)),
    }


def step_of(config=RAPTR, name="adamw", model=MODEL, rates=None, **settings):
    transform = optimizer(OptimizerConfig(name=name, weight_decay=0.1, depth_rates=rates), LAYOUT)
    config = dataclasses.replace(config, keep_first=0, keep_last=1)
    step = make_train_step(
        model_graph(model), transform, lambda number: 1e-2, stack=path_stack(config, 0, STAGE),
        **settings,
    )
    state = initial_state(model, transform, 4, 0)
    return jax.jit(step, compiler_options=QUICKLY), state, path_stack(config, 0, STAGE)


def layers_of(tree):
    """Path -> `[layers, ...]`, of every leaf of the stack."""
    flat = jax.tree_util.tree_flatten_with_path(tree)[0]
    keys = lambda path: tuple(str(getattr(k, "key", getattr(k, "name", k))) for k in path)  # noqa: E731
    return {keys(path): np.asarray(leaf) for path, leaf in flat if LAYOUT.matches(keys(path))}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adamw", "adafactor", "muon"])
def test_skip_leaves_undrawn_layers_and_their_moments_alone(name):
    step, state, stack = step_of(name=name, skip_undrawn=True)
    for _ in range(3):
        path = set(stack(state.step)["depth_map"].tolist())
        after, _ = step(state, batch())
        for before, now in ((state.params, after.params), (state.opt_state, after.opt_state)):
            old, new = layers_of(before), layers_of(now)
            assert old
            for layer in range(4):
                same = [np.array_equal(old[key][layer], new[key][layer]) for key in old]
                assert all(same) if layer not in path else not all(same)
        state = after


def test_dense_decays_undrawn_layers_and_drawn_ones_are_as_with_skip():
    (dense, state, stack), (skip, *_) = step_of(), step_of(skip_undrawn=True)
    path = stack(state.step)["depth_map"].tolist()
    one, _ = dense(state, batch())
    other, _ = skip(state, batch())
    old, new, skipped = map(layers_of, (state.params, one.params, other.params))
    for key, before in old.items():
        for layer in range(4):
            if layer in path:
                np.testing.assert_array_equal(new[key][layer], skipped[key][layer])
            elif before.ndim > 2:
                # No gradient yet: weight decay alone.
                decayed = before[layer] * (1 - 1e-2 * 0.1)
                np.testing.assert_allclose(new[key][layer], decayed, rtol=1e-5)


def test_a_path_trains_as_the_small_network_of_its_layers():
    """Loss and gradient norm of a step are those of the drawn layers as a network."""
    step, state, stack = step_of()
    _, metrics = step(state, batch())
    path = DepthMap(stack(state.step)["depth_map"].tolist(), stored=4)
    transform = optimizer(OptimizerConfig(), LAYOUT)
    static = make_train_step(
        model_graph(MODEL), transform, lambda number: 1e-2, stack=lambda step: {"depth_map": path}
    )
    state = initial_state(MODEL, transform, 4, 0)
    _, wanted = jax.jit(static, compiler_options=QUICKLY)(state, batch())
    for name in ("loss", "grad_norm"):
        np.testing.assert_allclose(metrics[name], wanted[name], rtol=1e-6)


def test_microbatches_share_the_path():
    (whole, state, _), (parts, *_) = step_of(), step_of(microbatches=2)
    one, other = whole(state, batch())[1], parts(state, batch())[1]
    np.testing.assert_allclose(one["loss"], other["loss"], rtol=1e-6)
    np.testing.assert_allclose(one["grad_norm"], other["grad_norm"], rtol=1e-5)


def test_scanned_and_unrolled_paths_agree():
    results = []
    for mode in ("scan", "unroll"):
        step, state, _ = step_of(
            dataclasses.replace(RAPTR, scaling="inverse"),
            model=dataclasses.replace(MODEL, stack=mode),
        )
        results.append(step(state, batch())[1])
    np.testing.assert_allclose(results[0]["loss"], results[1]["loss"], rtol=1e-6)
    np.testing.assert_allclose(results[0]["grad_norm"], results[1]["grad_norm"], rtol=1e-5)


def test_the_mesh_does_not_change_the_path():
    config = dataclasses.replace(RAPTR, scaling="root")
    step, state, _ = step_of(config)
    _, alone = step(state, batch(8))
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    step, state, _ = step_of(config, constrain=sharding.constrainer(mesh))
    _, spread = step(state, sharding.place_batch(batch(8), mesh))
    np.testing.assert_allclose(spread["loss"], alone["loss"], rtol=2e-6)


# ---- Learning rates by depth ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rates", "factors"),
    [([1.0, 0.4], [1, 0.8, 0.6, 0.4]), ([1, 2, 3, 0], [1, 2, 3, 0]), ([0.5], [0.5] * 4)],
)
def test_depth_rates_are_factors_of_what_each_layer_moves(rates, factors):
    (plain, state, _), (rated, other, _) = step_of(), step_of(rates=rates)
    assert jax.tree.structure(state.opt_state) == jax.tree.structure(other.opt_state)
    one, two = plain(state, batch())[0], rated(state, batch())[0]
    before, without, with_rates = map(layers_of, (state.params, one.params, two.params))
    for key in before:
        for layer, factor in enumerate(factors):
            moved = factor * (without[key][layer] - before[key][layer])
            np.testing.assert_allclose(
                with_rates[key][layer] - before[key][layer], moved, atol=2e-7
            )
    np.testing.assert_array_equal(one.params["embedding"], two.params["embedding"])


def test_depth_rates_that_are_none_are_one_line():
    for rates in ([], [-1.0], "linear", [1, "2"]):
        with pytest.raises(UserError, match="depth_rates is a list of factors"):
            OptimizerConfig(depth_rates=rates)


# ---- Runs -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_jump_of_the_loss_at_each_stage_is_told(config, change, tmp_path, read_rows):
    """Also of a run that was stopped between the steps that it is told from."""
    drawn = change(
        config, paths=RAPTR, growth={"operator": None}, eval_every=0, total_steps=16,
        checkpoint_every=0,
    )
    plan = drawn.plan()
    assert [(stage.positions, stage.steps) for stage in plan.stages] == [(2, 4), (3, 8), (4, 4)]
    whole = train(drawn, tmp_path / "whole")
    for step in (5, 11):
        with pytest.raises(Stopped):
            train(drawn, tmp_path / "parts", stop_at=step)
    parts = train(drawn, tmp_path / "parts")
    assert parts["params_digest"] == whole["params_digest"] and whole["method"] == "raptr"

    for run_dir in (tmp_path / "whole", tmp_path / "parts"):
        rows = read_rows(run_dir, "train")
        loss = {row["step"]: row["loss"] for row in rows}
        held_out = {row["step"]: row["eval_loss"] for row in read_rows(run_dir, "eval")}
        assert sorted(held_out) == [4, 12, 16]
        told = read_rows(run_dir, "run_depth")
        shown = ("step", "start", "from_run_depth", "to_run_depth")
        assert [tuple(row[name] for name in shown) for row in told] == [
            (8, 4, 2, 3), (14, 12, 3, 4)
        ]
        for row, before, after in zip(
            told, ([3, 4], [9, 10, 11, 12]), ([5, 6, 7, 8], [13, 14]), strict=True
        ):
            assert row["loss_before"] == pytest.approx(np.mean([loss[step] for step in before]))
            assert row["loss_after"] == pytest.approx(np.mean([loss[step] for step in after]))
            assert row["loss_jump"] == row["loss_after"] - row["loss_before"]
            assert row["eval_loss"] == held_out[row["start"]]
    stages = whole["stages"]
    assert [stage["eval_loss"] for stage in stages] == [held_out[step] for step in (4, 12, 16)]
    assert stages[1]["first_loss"] == told[0]["loss_after"]
    # What was computed is what was planned, and less than at full depth.
    costs = drawn.model.costs(drawn.data.sequence_length)
    full = drawn.tokens_per_step * 16 * costs.flops_per_token(4)
    assert whole["model_flops"] == pytest.approx(
        drawn.tokens_per_step
        * sum(steps * costs.flops_per_token(depth) for depth, steps in ((2, 4), (3, 8), (4, 4)))
    )
    assert whole["model_flops"] < full
