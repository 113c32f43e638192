"""The walk through a stack, against the model itself and against planted truth."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from stacking_jax.analysis.inside import (
    Injection,
    depth_score,
    effects,
    look,
    overlap_of_neurons,
)
from stacking_jax.growth import grow
from stacking_jax.models import LAYOUT
from stacking_jax.models.attention import rotary_angles
from stacking_jax.models.kernels import attention_mask
from stacking_jax.models.losses import carries_loss, inputs_from_targets
from stacking_jax.models.placement import unconstrained
from stacking_jax.training.step import make_eval_step


@pytest.fixture(scope="module")
def seen(network_of, params, sample):
    return look(network_of(params), sample)


def changed(params, **leaves):
    """The parameters with some of a layer's matrices changed: 'mlp_down': function of it."""
    layers = {part: dict(inner) for part, inner in params["stack"]["layers"].items()}
    for name, change in leaves.items():
        part, leaf = name.split("_")
        layers[part][leaf] = change(layers[part][leaf])
    return {**params, "stack": {"layers": layers}}


def silent(*positions):
    """No output of these layers."""
    return lambda leaf: leaf.at[np.array(positions)].set(0.0)


def test_the_lens_behind_the_last_layer_is_the_model(seen, graph, params, sample):
    step = jax.jit(make_eval_step(graph))
    sums = [step(params, batch) for _, _, batch in sample.batches()]
    nats, tokens = map(sum, zip(*sums, strict=True))
    lens = seen["lens"]
    assert lens["loss"][-1] == pytest.approx(float(nats) / int(tokens), rel=1e-5)
    assert lens["overlap"][-1] == lens["agreement"][-1] == 1.0
    assert len(lens["loss"]) == 5 and 0 <= min(lens["overlap"]) < 0.999
    assert not np.isclose(lens["loss"][:-1], lens["loss"][-1], rtol=1e-4).any()


def test_the_lens_before_is_the_model_without_its_last_layers(seen, network_of, params, sample):
    shorter = look(network_of(params, range(2)), sample, linear=False)
    assert seen["lens"]["loss"][:3] == pytest.approx(shorter["lens"]["loss"], rel=1e-6)
    assert seen["contributions"]["mlp"][:2] == pytest.approx(
        shorter["contributions"]["mlp"], rel=1e-6
    )


def test_contributions_are_those_of_the_branches_computed_alone(seen, graph, params, sample):
    """The first layer's attention, from its own module and on one device."""
    params = jax.tree.map(np.asarray, params)
    model = nnx.merge(graph, params)
    config = model.config
    definition, layers = nnx.split(model.stack.layers)
    layer = nnx.merge(definition, jax.tree.map(lambda leaf: jnp.asarray(leaf[0]), layers))

    @jax.jit
    def shares_of(batch):
        inputs = inputs_from_targets(batch["tokens"], batch["segment_ids"])
        x = jnp.asarray(params["embedding"])[inputs]
        mask = attention_mask(config, inputs.shape, batch["segment_ids"])
        angles = rotary_angles(batch["positions"], config.head_width, config.rope_theta)
        mixed, _ = layer.attention(layer.attention_norm(x), mask, angles, unconstrained)
        share = jnp.linalg.norm(mixed, axis=-1) / jnp.linalg.norm(x, axis=-1)
        return share, carries_loss(batch)

    shares, tokens = 0.0, 0
    for _, _, batch in sample.batches():
        share, counted = map(np.asarray, shares_of(jax.tree.map(np.asarray, batch)))
        shares, tokens = shares + share[counted].sum(), tokens + counted.sum()
    assert seen["contributions"]["attention"][0] == pytest.approx(shares / tokens, rel=1e-4)


def test_an_identity_started_copy_contributes_nothing(network_of, params, sample):
    grown = grow(params, (0, 1, 0, 1), layout=LAYOUT)
    grown = changed(grown, mlp_down=silent(2, 3), attention_out=silent(2, 3))
    found = look(network_of(grown), sample)
    for name in ("attention", "mlp"):
        assert found["contributions"][name][2:] == [0.0, 0.0]
        assert min(found["contributions"][name][:2]) > 0.05
    assert found["lens"]["loss"][2] == found["lens"]["loss"][4]
    assert found["linearity"]["r2"][2:] == [None, None]
    after = effects(network_of(grown), sample)
    assert after["output"][2:] == [0.0, 0.0] and min(after["output"][:2]) > 1e-3
    assert 0 < after["depth_score_output"] < 1


def test_neurons_of_tied_layers_and_of_layers_that_share_none():
    activity = np.zeros((3, 300))
    activity[0, [5, 6, 7]] = activity[1, [5, 6, 7]] = [3, 2, 1]
    activity[2, [7, 8, 9]] = [3, 2, 1]
    found = overlap_of_neurons(activity)
    assert found["count"] == 3
    assert found["iou"][0] == [1.0, 1.0, 1 / 5]
    random = np.random.default_rng(0).random((200, 300))
    among = np.array(overlap_of_neurons(random, 0.1)["iou"])
    mean = among[~np.eye(200, dtype=bool)].mean()
    assert mean == pytest.approx(overlap_of_neurons(random, 0.1)["chance"], rel=0.05)


def test_effects_are_those_of_the_skipped_network(network_of, params, sample, seen):
    found = effects(network_of(params), sample)
    later = np.array(found["later"])
    assert (np.tril(later) == 0).all() and (later[np.triu_indices(4, 1)] > 0).all()
    assert min(found["output"]) > 0
    behind = later.sum(axis=1) / [3, 2, 1, 1]
    assert found["depth_score_layers"] == pytest.approx(depth_score(behind))
    assert depth_score([0, 0, 2, 0]) == 2 and depth_score([1, 1, 1]) == 1
    assert depth_score([0, 0]) is None


def test_a_silent_layer_of_a_loop_with_injection_has_no_effect(network_of, params, sample):
    """Both streams, with the layer and without it, are injected with what is their own."""
    params = changed(params, attention_out=silent(1), mlp_down=silent(1))
    # Layer 0, then layers 1 and 2 three times over, with what layer 0 gave.
    network = dataclasses.replace(
        network_of(params, (0, 1, 2, 1, 2, 1, 2)), injection=Injection(1, frozenset({3, 5}))
    )
    found = effects(network, sample)
    later, output = np.array(found["later"]), np.array(found["output"])
    assert not later[[1, 3, 5]].any() and not output[[1, 3, 5]].any()
    assert (later[0, [2, 4, 6]] > 0).all() and (output[[0, 2, 4, 6]] > 0).all()
    plain = effects(dataclasses.replace(network, injection=None), sample)
    assert not np.allclose(plain["output"], output, rtol=0.01)


@pytest.mark.slow
def test_whole_logits_and_logits_in_columns_agree(network_of, params, sample, monkeypatch):
    from stacking_jax.analysis import walk

    whole = look(network_of(params), sample, linear=False)["lens"]
    network = network_of(params)
    monkeypatch.setattr(walk, "LOGIT_BYTES", 4 * 320 * 16)
    fresh = walk.Walk(network.walk._graph, sample.mesh)
    cut = look(type(network)(fresh, params, network.sources, 16), sample, linear=False)["lens"]
    for name in ("loss", "overlap", "agreement"):
        assert cut[name] == pytest.approx(whole[name], rel=1e-5)


@pytest.mark.slow
def test_one_device_sees_what_eight_see(seen, graph, params, config):
    from stacking_jax.analysis.inside import Network
    from stacking_jax.analysis.sample import Sample
    from stacking_jax.analysis.walk import Walk
    from stacking_jax.training.mesh import make_decoding_mesh

    alone = make_decoding_mesh(config.mesh, jax.devices()[:1])
    params = jax.device_put(jax.tree.map(np.asarray, params), jax.devices()[0])
    network = Network(Walk(graph, alone), params, tuple(range(4)), 16)
    found = look(network, Sample.open(config, alone, batches=4))
    for part in ("lens", "contributions"):
        for name, values in found[part].items():
            assert values == pytest.approx(seen[part][name], rel=2e-4), name
    assert found["neurons"] == seen["neurons"]
    assert found["linearity"]["r2"] == pytest.approx(seen["linearity"]["r2"], abs=1e-3)
