"""The stage boundary: what grows, where it lies, what it takes."""

from __future__ import annotations

import dataclasses
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stacking_jax.errors import UserError
from stacking_jax.growth import NEW, DepthMap, Stage, grow, midas
from stacking_jax.models import LAYOUT, DecoderConfig
from stacking_jax.training import (
    GrowthConfig,
    MeshConfig,
    OptimizerConfig,
    Stopped,
    sharding,
    train,
)
from stacking_jax.training.generation import sample_from_run
from stacking_jax.training.growing import (
    check_growths,
    growth_program,
    ramp_of,
    refuse_open_ramp,
)
from stacking_jax.training.optimizers import optimizer
from stacking_jax.training.state import abstract_state, sharded_initial_state

MODEL = DecoderConfig(
    vocab_size=64, num_layers=2, d_model=32, d_ff=48, num_heads=4, num_kv_heads=2,
    tied_embeddings=False,
)
OPTIMIZERS = {
    name: optimizer(OptimizerConfig(name=name, weight_decay=0.1), LAYOUT)
    for name in ("adamw", "adafactor", "muon")
}
MESHES = {
    "fsdp8": MeshConfig(),
    "fsdp4_tensor2": MeshConfig(fsdp=4, tensor=2),
    "data2_fsdp2_tensor2": MeshConfig(data=2, fsdp=2, tensor=2),
}
TO_THREE = Stage(3, 5, 4, midas(2, 1))


def single():
    return sharding.make_mesh(MeshConfig(), jax.devices()[:1])


def numbered(shapes):
    """A state in which every number is its own, so that moments and counts tell layers apart."""
    return jax.tree.map(
        lambda leaf: jax.device_put(
            np.arange(1, leaf.size + 1, dtype=leaf.dtype).reshape(leaf.shape), leaf.sharding
        ),
        shapes,
    )


def assert_equal(got, want):
    for (path, one), other in zip(
        jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True
    ):
        np.testing.assert_array_equal(one, other, err_msg=str(path))


def layers_of(state):
    return state.params["stack"]["layers"]


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("mesh", MESHES)
def test_growth_stays_in_its_shards(mesh, name):
    """Equal to the eager growth, sharded as announced, without any talk to anyone."""
    mesh = sharding.make_mesh(MESHES[mesh])
    state = numbered(abstract_state(MODEL, OPTIMIZERS[name], 2, mesh))
    host = jax.tree.map(np.array, state)
    after = abstract_state(MODEL, OPTIMIZERS[name], 3, mesh)
    growth = growth_program(MODEL, GrowthConfig(), OPTIMIZERS[name], TO_THREE, after)
    program = growth.lower(state).compile().as_text()
    grown = growth(state)

    assert_equal(grown, grow(host, midas(2, 1), LAYOUT))
    for want, got in zip(jax.tree.leaves(after), jax.tree.leaves(grown), strict=True):
        assert (want.shape, want.dtype) == (got.shape, got.dtype)
        assert want.sharding.is_equivalent_to(got.sharding, got.ndim)
    for word in (
        "callback", "outfeed", "infeed", "send(", "recv(", "S(5)",
        "all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter",
    ):
        assert word not in program, word


@pytest.mark.parametrize("init", ["copy", "identity"])
def test_it_takes_no_more_than_the_old_and_the_new_state(init):
    # Of a size at which the compiler does not trade memory for fewer loops.
    model = dataclasses.replace(MODEL, d_model=256, d_ff=512, num_layers=12)
    shapes = {
        depth: abstract_state(model, OPTIMIZERS["adamw"], depth, single()) for depth in (8, 12)
    }
    growth = growth_program(
        model, GrowthConfig(init=init), OPTIMIZERS["adamw"], Stage(12, 5, 4, midas(8, 4)),
        shapes[12],
    )
    memory = growth.lower(shapes[8]).compile().memory_analysis()
    size = {
        depth: sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shape))
        for depth, shape in shapes.items()
    }
    assert memory.temp_size_in_bytes == 0
    assert memory.argument_size_in_bytes <= size[8] + 64  # the random key
    assert memory.output_size_in_bytes <= size[12] + 4096  # and a table of addresses
    # Embedding, head and their moments are not copied but handed on.
    outside = 3 * 2 * 4 * model.vocab_size * model.d_model
    assert memory.alias_size_in_bytes >= outside


def test_the_old_state_is_given_away_without_a_word():
    state = numbered(abstract_state(MODEL, OPTIMIZERS["adamw"], 2, single()))
    after = abstract_state(MODEL, OPTIMIZERS["adamw"], 3, single())
    growth = growth_program(MODEL, GrowthConfig(), OPTIMIZERS["adamw"], TO_THREE, after)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        growth(state)
    assert state.params["embedding"].is_deleted()


def test_compiled_ahead_it_is_the_same_growth():
    shapes = {
        depth: abstract_state(MODEL, OPTIMIZERS["adamw"], depth, single()) for depth in (2, 3)
    }
    jitted, compiled = (
        growth_program(MODEL, GrowthConfig(), OPTIMIZERS["adamw"], TO_THREE, shapes[3])
        for _ in range(2)
    )
    assert compiled.compile(shapes[2]) is compiled
    assert_equal(compiled(numbered(shapes[2])), jitted(numbered(shapes[2])))
    with pytest.raises(TypeError, match="compiled"):
        compiled(numbered(shapes[3]))


def test_how_copies_start_and_what_their_moments_become():
    shapes = {
        depth: abstract_state(MODEL, OPTIMIZERS["adamw"], depth, single()) for depth in (2, 3)
    }
    settings = GrowthConfig(init="identity", moments="reset_copies")
    growth = growth_program(MODEL, settings, OPTIMIZERS["adamw"], TO_THREE, shapes[3])
    host = jax.tree.map(np.array, numbered(shapes[2]))
    grown = growth(numbered(shapes[2]))
    layers, before = layers_of(grown), layers_of(host)
    for branch, name in (("attention", "out"), ("mlp", "down")):
        assert not np.any(layers[branch][name][1])
        np.testing.assert_array_equal(layers[branch][name][2], before[branch][name][1])
    np.testing.assert_array_equal(layers["mlp"]["up"][1], before["mlp"]["up"][0])
    adam = grown.opt_state.stacked["stack"]["layers"][0]
    assert adam.count.tolist() == [1, 0, 2]
    assert not np.any(jax.tree.leaves(adam.mu)[0][1]) and np.all(jax.tree.leaves(adam.mu)[0][2])


@pytest.mark.slow
def test_noise_and_new_layers_are_those_of_seed_and_step():
    after = abstract_state(MODEL, OPTIMIZERS["adamw"], 3, single())

    def grown(growth, grow_map, **settings):
        step, seed = settings.get("step", 4), settings.get("seed", 0)
        state = sharded_initial_state(
            MODEL, OPTIMIZERS["adamw"], 0, abstract_state(MODEL, OPTIMIZERS["adamw"], 2, single())
        )
        program = growth_program(
            MODEL, growth, OPTIMIZERS["adamw"], Stage(3, 5, step, grow_map), after, seed=seed
        )
        return np.asarray(layers_of(program(state))["mlp"]["up"])

    noise = GrowthConfig(init="noise", init_options={"relative": 0.1})
    one = grown(noise, midas(2, 1))
    np.testing.assert_array_equal(one, grown(noise, midas(2, 1)))
    ratio = np.linalg.norm(one[1] - one[0]) / np.linalg.norm(one[0])
    assert 0.08 < ratio < 0.12
    for other in ({"seed": 1}, {"step": 5}):
        assert not np.array_equal(one, grown(noise, midas(2, 1), **other))

    new = DepthMap([0, NEW, 1])
    drawn = grown(GrowthConfig(), new)
    np.testing.assert_array_equal(drawn[[0, 2]], one[[0, 2]])
    # Anew: no layer of the first stage, and no other growth's.
    assert np.abs(drawn[1] - drawn[0]).max() > 0.1 and np.abs(drawn[1] - drawn[2]).max() > 0.1
    assert not np.array_equal(drawn, grown(GrowthConfig(), new, step=5))
    np.testing.assert_allclose(drawn[1].std(), drawn[0].std(), rtol=0.1)
    np.testing.assert_array_equal(grown(GrowthConfig(init="random"), midas(2, 1)), drawn)


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_from_no_layers_all_of_them_are_new(name):
    transform = OPTIMIZERS[name]
    shapes = {depth: abstract_state(MODEL, transform, depth, single()) for depth in (0, 2)}
    host = jax.tree.map(np.array, numbered(shapes[0]))

    def grown(init):
        stage = Stage(2, 5, 4, DepthMap([NEW] * 2, stored=0))
        settings = GrowthConfig(init=init)
        return growth_program(MODEL, settings, transform, stage, shapes[2])(numbered(shapes[0]))

    state = grown("copy")
    up = np.asarray(layers_of(state)["mlp"]["up"])
    np.testing.assert_allclose(up.std(), 32**-0.5, rtol=0.1)
    assert np.abs(up[0] - up[1]).max() > 0.1
    # As if the optimiser had begun with them; what is no layer's goes on.
    assert_equal(state.opt_state.stacked, transform.init(state.params).stacked)
    assert_equal(state.opt_state.rest, host.opt_state.rest)
    np.testing.assert_array_equal(state.params["embedding"], host.params["embedding"])
    assert state.step == host.step
    silent = layers_of(grown("identity"))
    assert not np.any(silent["mlp"]["down"]) and not np.any(silent["attention"]["out"])
    np.testing.assert_array_equal(silent["mlp"]["up"], up)


def test_what_cannot_be_shows_before_the_run(config, tmp_path):
    """Adafactor keeps no first moment; nothing has been written then."""
    impossible = dataclasses.replace(
        config,
        optimizer=dataclasses.replace(config.optimizer, name="adafactor"),
        growth=dataclasses.replace(config.growth, moments="copy_first"),
    )
    with pytest.raises(UserError, match="copy_first knows Adam's moments"):
        train(impossible, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("init", ["identity", "scale", "noise", "average", "interpolate", "random"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_start_is_possible_with_every_optimiser(config, init, name):
    settings = dataclasses.replace(
        config,
        optimizer=dataclasses.replace(config.optimizer, name=name),
        growth=dataclasses.replace(config.growth, init=init, moments="reset_copies"),
    )
    transform = optimizer(settings.optimizer, LAYOUT)
    check_growths(
        settings, transform, settings.plan(),
        lambda depth: abstract_state(settings.model, transform, depth, single()),
    )


# ---- Whole runs ----------------------------------------------------------------------


@pytest.mark.slow
def test_two_ways_to_keep_the_function_begin_with_the_same_loss(
    config, reference, tmp_path, read_rows
):
    """That of the small model on the next batch: its copies add nothing yet."""
    silent = dataclasses.replace(
        config, growth=dataclasses.replace(config.growth, init="identity")
    )
    gated = dataclasses.replace(
        config, growth=dataclasses.replace(config.growth, ramp_steps=6)
    )
    train(silent, tmp_path / "silent")
    train(gated, tmp_path / "gated")
    runs = {"silent": tmp_path / "silent", "gated": tmp_path / "gated", "copied": reference}
    losses = {
        name: {row["step"]: row["loss"] for row in read_rows(run, "train")}
        for name, run in runs.items()
    }
    assert losses["silent"][4] == losses["gated"][4], "zeroed outputs, and closed gates"
    assert losses["silent"][5] != losses["gated"][5]
    assert losses["silent"][3] == losses["copied"][3]
    assert losses["silent"][4] != losses["copied"][4]


@pytest.fixture(scope="module")
def ramped(config):
    growth = dataclasses.replace(
        config.growth, ramp_steps=4, rewarm_steps=3, init="noise", moments="reset_copies"
    )
    return dataclasses.replace(
        config, growth=growth, checkpoint_every=1, keep_checkpoints=20,
        optimizer=dataclasses.replace(config.optimizer, name="muon"),
    )


@pytest.fixture(scope="module")
def ramped_run(ramped, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ramped") / "run"
    train(ramped, folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("stop", [3, 5])
def test_a_run_with_all_of_it_resumes_to_the_bit(
    ramped, ramped_run, tmp_path, stop, read_summary
):
    from stacking_jax.training import Stopped

    with pytest.raises(Stopped):
        train(ramped, tmp_path / "run", stop_at=stop)
    again = train(ramped, tmp_path / "run")
    whole = read_summary(ramped_run)
    for name in ("params_digest", "eval_loss", "train_loss"):
        assert again[name] == whole[name], name


def test_the_rate_drops_at_the_growth_and_climbs_back(ramped_run, reference, read_rows):
    with_drop, without = (
        {row["step"]: row["learning_rate"] for row in read_rows(run, "train")}
        for run in (ramped_run, reference)
    )
    ratios = [with_drop[step] / without[step] for step in sorted(without)]
    np.testing.assert_allclose(ratios, [1, 1, 1, 0.1, 0.4, 0.7, 1, 1, 1], rtol=1e-6)


def test_a_half_open_checkpoint_is_refused_and_named(ramped, ramped_run):
    # The growth is after step 3; its gates are open from step 7 on.
    for step in (4, 5, 6):
        with pytest.raises(UserError, match="growth at step 3 .* until step 7"):
            sample_from_run(ramped_run, "ab", step=step, max_new_tokens=2)
    for step in (3, 7, 9):
        refuse_open_ramp(ramped, step, "use")
    gates = ramp_of(ramped, ramped.plan().stages[1])
    np.testing.assert_array_equal(gates(jnp.int32(3)), [1, 1, 0, 0])
    np.testing.assert_array_equal(gates(jnp.int32(7)), [1, 1, 1, 1])
    assert ramp_of(ramped, ramped.plan().stages[0]) is None


@pytest.mark.slow
def test_layers_change_places_at_equal_depth(config, tmp_path):
    """A growth that adds nothing is carried out all the same, once, however often it is resumed."""
    turned = dataclasses.replace(
        config, growth=GrowthConfig(stages=[(4, 4), (4, 4, [3, 2, 1, 0])]), total_steps=8,
        checkpoint_every=2,
    )
    left_alone = dataclasses.replace(turned, growth=GrowthConfig(stages=[(4, 8)]))
    whole = train(turned, tmp_path / "whole")
    with pytest.raises(Stopped):
        train(turned, tmp_path / "parts", stop_at=4)
    with pytest.raises(Stopped):
        train(turned, tmp_path / "parts", stop_at=5)
    parts = train(turned, tmp_path / "parts")

    assert parts["params_digest"] == whole["params_digest"]
    assert train(left_alone, tmp_path / "alone")["params_digest"] != whole["params_digest"]
