"""Every optimiser of optax: growing commutes with the update, or there is a reason.

`docs/optimizers.md` shows the table; it is checked against this file. To write it anew:
`python -c "import runpy; print(runpy.run_path('tests/growth/test_optimizers.py')['table']())"`.
"""

from __future__ import annotations

import inspect
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

from stacking_jax.errors import UserError
from stacking_jax.growth import Scanned, Unrolled, grow, midas
from stacking_jax.growth.layerwise import layerwise
from stacking_jax.growth.moments import grow_opt_state

DEPTH = 4
GROWTH = midas(DEPTH, 2)
LAYOUT = Scanned("layers")
RATE = 0.1
PAGE = Path(__file__).resolve().parents[2] / "docs" / "optimizers.md"


def adam():
    return optax.scale_by_adam()


# Every number of a leaf on its own, with the state that goes with it: the stacked array
# may be updated as it is.
DIRECT = {
    "optax.adabelief": lambda: optax.adabelief(RATE),
    "optax.adadelta": lambda: optax.adadelta(RATE),
    "optax.adagrad": lambda: optax.adagrad(RATE),
    "optax.adam": lambda: optax.adam(RATE),
    "optax.adamax": lambda: optax.adamax(RATE),
    "optax.adamaxw": lambda: optax.adamaxw(RATE),
    "optax.adamw": lambda: optax.adamw(RATE),
    "optax.adan": lambda: optax.adan(RATE),
    "optax.add_decayed_weights": lambda: optax.add_decayed_weights(0.1),
    "optax.amsgrad": lambda: optax.amsgrad(RATE),
    "optax.apply_every": lambda: optax.apply_every(2),
    "optax.apply_if_finite": lambda: optax.apply_if_finite(adam(), 2),
    "optax.chain": lambda: optax.chain(adam(), optax.scale(-1.0)),
    "optax.clip": lambda: optax.clip(0.5),
    "optax.conditionally_mask": lambda: optax.conditionally_mask(adam(), lambda step: step < 9),
    "optax.conditionally_transform":
        lambda: optax.conditionally_transform(adam(), lambda step: step < 9),
    "optax.ema": lambda: optax.ema(0.9),
    "optax.freeze": lambda: optax.freeze(lambda params: jax.tree.map(lambda x: x.ndim < 3, params)),
    "optax.identity": optax.identity,
    "optax.inject_hyperparams": lambda: optax.inject_hyperparams(optax.adam)(RATE),
    "optax.inject_stateful_hyperparams":
        lambda: optax.inject_stateful_hyperparams(optax.adam)(optax.linear_schedule(1, 0, 9)),
    "optax.keep_params_nonnegative": optax.keep_params_nonnegative,
    "optax.lion": lambda: optax.lion(RATE),
    "optax.masked":
        lambda: optax.masked(adam(), lambda params: jax.tree.map(lambda x: x.ndim > 2, params)),
    "optax.multi_transform": lambda: optax.multi_transform(PAIR, by_ndim),
    "optax.MultiSteps": lambda: optax.MultiSteps(adam(), 3).gradient_transformation(),
    "optax.nadam": lambda: optax.nadam(RATE),
    "optax.nadamw": lambda: optax.nadamw(RATE),
    "optax.named_chain": lambda: optax.named_chain(("adam", adam())),
    "optax.optimistic_adam": lambda: optax.optimistic_adam(RATE),
    "optax.optimistic_adam_v2": lambda: optax.optimistic_adam_v2(RATE),
    "optax.optimistic_gradient_descent": lambda: optax.optimistic_gradient_descent(RATE),
    "optax.partition": lambda: optax.partition(PAIR, by_ndim),
    "optax.radam": lambda: optax.radam(RATE),
    "optax.rmsprop": lambda: optax.rmsprop(RATE, momentum=0.9),
    "optax.rprop": lambda: optax.rprop(RATE),
    "optax.scale": lambda: optax.scale(0.5),
    "optax.scale_by_adadelta": optax.scale_by_adadelta,
    "optax.scale_by_adam": optax.scale_by_adam,
    "optax.scale_by_adamax": optax.scale_by_adamax,
    "optax.scale_by_adan": optax.scale_by_adan,
    "optax.scale_by_amsgrad": optax.scale_by_amsgrad,
    "optax.scale_by_belief": optax.scale_by_belief,
    "optax.scale_by_factored_rms": lambda: optax.scale_by_factored_rms(min_dim_size_to_factor=8),
    "optax.scale_by_learning_rate": lambda: optax.scale_by_learning_rate(RATE),
    "optax.scale_by_lion": optax.scale_by_lion,
    "optax.scale_by_optimistic_gradient": optax.scale_by_optimistic_gradient,
    "optax.scale_by_radam": optax.scale_by_radam,
    "optax.scale_by_rms": optax.scale_by_rms,
    "optax.scale_by_rprop": lambda: optax.scale_by_rprop(RATE),
    "optax.scale_by_rss": optax.scale_by_rss,
    "optax.scale_by_schedule": lambda: optax.scale_by_schedule(optax.linear_schedule(1, 0, 9)),
    "optax.scale_by_sign": optax.scale_by_sign,
    "optax.scale_by_stddev": optax.scale_by_stddev,
    "optax.scale_by_yogi": optax.scale_by_yogi,
    "optax.selective_transform": lambda: optax.selective_transform(
        adam(), freeze_mask=lambda params: jax.tree.map(lambda x: x.ndim < 3, params)),
    "optax.set_to_zero": optax.set_to_zero,
    "optax.sgd": lambda: optax.sgd(RATE, momentum=0.9),
    "optax.sign_sgd": lambda: optax.sign_sgd(RATE),
    "optax.signum": lambda: optax.signum(RATE),
    "optax.stateless": lambda: optax.stateless(lambda g, p: jax.tree.map(jnp.add, g, p)),
    "optax.stateless_with_tree_map": lambda: optax.stateless_with_tree_map(lambda g, p: g + p),
    "optax.trace": lambda: optax.trace(0.9),
    "optax.with_extra_args_support": lambda: optax.with_extra_args_support(adam()),
    "optax.yogi": lambda: optax.yogi(RATE),
    "optax.contrib.acprop": lambda: optax.contrib.acprop(RATE),
    "optax.contrib.ademamix": lambda: optax.contrib.ademamix(RATE),
    "optax.contrib.adopt": lambda: optax.contrib.adopt(RATE),
    "optax.contrib.cocob": optax.contrib.cocob,
    "optax.contrib.madgrad": lambda: optax.contrib.madgrad(RATE),
    "optax.contrib.reduce_on_plateau": optax.contrib.reduce_on_plateau,
    "optax.contrib.sam":
        lambda: optax.contrib.sam(optax.adam(RATE), optax.sgd(0.01), sync_period=3),
    "optax.contrib.scale_by_acprop": optax.contrib.scale_by_acprop,
    "optax.contrib.scale_by_ademamix": optax.contrib.scale_by_ademamix,
    "optax.contrib.scale_by_adopt": optax.contrib.scale_by_adopt,
    "optax.contrib.scale_by_cocob": optax.contrib.scale_by_cocob,
    "optax.contrib.scale_by_madgrad": lambda: optax.contrib.scale_by_madgrad(RATE),
    "optax.contrib.scale_by_simplified_ademamix": optax.contrib.scale_by_simplified_ademamix,
    "optax.contrib.schedule_free":
        lambda: optax.contrib.schedule_free(optax.adam(RATE, b1=0.0), RATE),
    "optax.contrib.schedule_free_adamw": lambda: optax.contrib.schedule_free_adamw(RATE),
    "optax.contrib.schedule_free_sgd": lambda: optax.contrib.schedule_free_sgd(RATE),
    "optax.contrib.simplified_ademamix": lambda: optax.contrib.simplified_ademamix(RATE),
    "optax.contrib.split_real_and_imaginary":
        lambda: optax.contrib.split_real_and_imaginary(adam()),
}

# A leaf, or a matrix, as a whole: one layer at a time, under `layerwise`.
LAYERWISE = {
    "optax.adafactor": lambda: optax.adafactor(RATE, min_dim_size_to_factor=8),
    "optax.adaptive_grad_clip": lambda: optax.adaptive_grad_clip(0.01),
    "optax.centralize": optax.centralize,
    "optax.clip_by_block_rms": lambda: optax.clip_by_block_rms(0.1),
    "optax.fromage": lambda: optax.fromage(RATE),
    "optax.lamb": lambda: optax.lamb(RATE),
    "optax.lars": lambda: optax.lars(RATE),
    "optax.novograd": lambda: optax.novograd(RATE),
    "optax.scale_by_distance_over_gradients": optax.scale_by_distance_over_gradients,
    "optax.scale_by_novograd": optax.scale_by_novograd,
    "optax.scale_by_param_block_norm": optax.scale_by_param_block_norm,
    "optax.scale_by_param_block_rms": optax.scale_by_param_block_rms,
    "optax.scale_by_sm3": optax.scale_by_sm3,
    "optax.scale_by_trust_ratio": optax.scale_by_trust_ratio,
    "optax.sm3": lambda: optax.sm3(RATE),
    "optax.zero_nans": optax.zero_nans,
    "optax.contrib.galore": lambda: optax.contrib.galore(RATE, rank=2),
    "optax.contrib.muon": lambda: optax.contrib.muon(RATE),
    "optax.contrib.scale_by_galore": lambda: optax.contrib.scale_by_galore(rank=2),
    "optax.contrib.scale_by_muon": lambda: optax.masked(
        optax.contrib.scale_by_muon(weight_dimension_numbers=lambda params: jax.tree.map(
            lambda x: optax.contrib.MuonDimensionNumbers(), params)),
        lambda params: jax.tree.map(lambda x: x.ndim == 2, params)),
}

WHOLE = "couples the layers: {}; keep it outside of `layerwise`, once"
ESTIMATE = "couples the layers: one estimate of the step size from norms over all parameters"
NOISE = "draws random noise: copies shall have draws of their own"
CLOSURE = "calls the loss during the update, which a grown model computes otherwise"
QUASI = "couples the layers: inner products over the whole gradient"

EXCLUDED = {
    "optax.add_noise": NOISE,
    "optax.clip_by_global_norm": WHOLE.format("the norm of the whole gradient"),
    "optax.flatten": "couples the layers: one vector of all parameters",
    "optax.lbfgs": QUASI,
    "optax.lookahead": "wraps the parameters as well; tested by itself, below",
    "optax.measure_with_ema": "measures, and changes no update",
    "optax.monitor": "measures, and changes no update",
    "optax.noisy_sgd": NOISE,
    "optax.normalize_by_update_norm": WHOLE.format("the norm of the whole gradient"),
    "optax.polyak_sgd": WHOLE.format("the norm of the whole gradient"),
    "optax.scale_by_backtracking_linesearch": CLOSURE,
    "optax.scale_by_lbfgs": QUASI,
    "optax.scale_by_polyak": WHOLE.format("the norm of the whole gradient"),
    "optax.scale_by_zoom_linesearch": CLOSURE,
    "optax.snapshot": "measures, and changes no update",
    "optax.contrib.dadapt_adamw": ESTIMATE,
    "optax.contrib.differentially_private_aggregate": NOISE,
    "optax.contrib.dog": ESTIMATE,
    "optax.contrib.dowg": ESTIMATE,
    "optax.contrib.dpsgd": NOISE,
    "optax.contrib.hutchinson_estimator_diag_hessian": NOISE,
    "optax.contrib.mechanize": ESTIMATE,
    "optax.contrib.momo": ESTIMATE,
    "optax.contrib.momo_adam": ESTIMATE,
    "optax.contrib.normalize": WHOLE.format("the norm of the whole gradient"),
    "optax.contrib.prodigy": ESTIMATE,
    "optax.contrib.sophia": NOISE,
}

# Of those that are excluded since they couple the layers: shown to do so.
COUPLED = {
    "optax.clip_by_global_norm": lambda: optax.clip_by_global_norm(0.1),
    "optax.flatten": lambda: optax.flatten(optax.clip_by_block_rms(0.1)),
    "optax.lbfgs": lambda: optax.lbfgs(RATE, linesearch=None),
    "optax.normalize_by_update_norm": optax.normalize_by_update_norm,
    "optax.polyak_sgd": optax.polyak_sgd,
    "optax.scale_by_lbfgs": optax.scale_by_lbfgs,
    "optax.scale_by_polyak": optax.scale_by_polyak,
    "optax.contrib.dadapt_adamw": lambda: optax.contrib.dadapt_adamw(RATE),
    "optax.contrib.dog": lambda: optax.contrib.dog(RATE),
    "optax.contrib.dowg": lambda: optax.contrib.dowg(RATE),
    "optax.contrib.mechanize": lambda: optax.contrib.mechanize(optax.sgd(RATE)),
    "optax.contrib.momo": lambda: optax.contrib.momo(RATE),
    "optax.contrib.momo_adam": lambda: optax.contrib.momo_adam(RATE),
    "optax.contrib.normalize": optax.contrib.normalize,
    "optax.contrib.prodigy": lambda: optax.contrib.prodigy(RATE),
}

# Public functions without a declared result that are no transforms.
OTHERS = {
    "optax.apply_updates", "optax.bias_correction", "optax.global_norm",
    "optax.incremental_update", "optax.init_empty_state",
    "optax.matrix_inverse_pth_root", "optax.microbatch", "optax.multi_normal", "optax.nnls",
    "optax.per_example_global_norm_clip", "optax.per_example_layer_norm_clip",
    "optax.periodic_update", "optax.power_iteration", "optax.safe_increment",
    "optax.safe_int32_increment", "optax.safe_norm", "optax.safe_root_mean_squares",
    "optax.scale_gradient", "optax.skip_large_updates", "optax.skip_not_finite",
    "optax.tree_map_params", "optax.update_infinity_moment", "optax.update_moment",
    "optax.update_moment_per_elem_norm", "optax.value_and_grad_from_state",
    "optax.contrib.schedule_free_eval_params",
}

NEED_THE_LOSS = {
    "optax.polyak_sgd", "optax.scale_by_polyak", "optax.contrib.momo", "optax.contrib.momo_adam",
    "optax.contrib.reduce_on_plateau",
}

PAIR = {"matrix": optax.adam(RATE), "vector": optax.sgd(RATE, momentum=0.9)}


def by_ndim(params):
    return jax.tree.map(lambda x: "matrix" if x.ndim > 2 else "vector", params)


def table() -> str:
    """The rows of the page."""
    rows = [(name, "as it is", "") for name in DIRECT]
    rows += [(name, "in `layerwise`", "") for name in LAYERWISE]
    rows += [(name, "excluded", reason) for name, reason in EXCLUDED.items()]
    lines = ["| optimiser | tested | why not |", "|---|---|---|"]
    lines += [f"| `{name}` | {how} | {reason} |" for name, how, reason in sorted(rows)]
    return "\n".join(lines)


def public_transforms() -> set[str]:
    """Whatever optax offers that may be a transform: all functions that nobody has named."""
    found = {"optax.MultiSteps"}
    for module in (optax, optax.contrib):
        for name in dir(module):
            thing = getattr(module, name)
            is_type = inspect.isclass(thing) or "typing" in type(thing).__module__
            if name.startswith("_") or not callable(thing) or is_type:
                continue
            is_schedule = hasattr(optax.schedules, name) and "inject" not in name
            if not is_schedule and not hasattr(optax.losses, name):
                found.add(f"{module.__name__}.{name}")
    return found - OTHERS


def tree(seed: int, depth: int = DEPTH) -> dict:
    """Parameters or gradients whose layers differ in size, so that what mixes them shows."""
    keys = jax.random.split(jax.random.key(seed), 4)
    size = 10.0 ** jnp.linspace(-1, 1, depth)[:, None]
    return {
        "embedding": jax.random.normal(keys[0], (5, 6)),
        "layers": {
            "bias": jax.random.normal(keys[1], (depth, 3)),
            "kernel": size[:, :, None] * jax.random.normal(keys[2], (depth, 8, 9)),
            "scale": size * jax.random.normal(keys[3], (depth, 8)),
        },
    }


def in_layout(params: dict, layout) -> dict:
    """The same numbers in another layout."""
    layers = params["layers"]
    if isinstance(layout, Unrolled):
        numbered = {
            f"layers_{i}": jax.tree.map(lambda leaf: leaf[i], layers)
            for i in range(layers["bias"].shape[0])
        }
        return {"embedding": params["embedding"], **numbered}
    moved = jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 0, layout.axis), layers)
    return {**params, "layers": moved}


def difference(one, other) -> float:
    """The largest, as a share of the largest number of each leaf's layer (axis 0)."""
    assert jax.tree.structure(one) == jax.tree.structure(other)
    worst = 0.0
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        size = np.abs(b).max(axis=tuple(range(1, b.ndim)), keepdims=True, initial=1e-30)
        worst = max(worst, float((np.abs(a - b) / size).max(initial=0)))
    return worst


def trained(optimizer, layout, extra):
    """Parameters and state after two steps."""
    params = in_layout(tree(0), layout)
    state = optimizer.init(params)
    for seed in (1, 2):
        step, state = optimizer.update(in_layout(tree(seed), layout), state, params, **extra)
        params = jax.tree.map(lambda leaf, change: leaf + 0.01 * change, params, step)
    return params, state


def commutation(name, make, layout=LAYOUT) -> float:
    """How far grow(update(...)) is from update(grow(...)), in updates and state."""
    optimizer = optax.with_extra_args_support(make())
    extra = {"value": jnp.float32(1.5)} if name in NEED_THE_LOSS else {}
    params, state = trained(optimizer, layout, extra)
    gradient = in_layout(tree(3), layout)

    def grown(opt_state):
        return grow_opt_state(opt_state, GROWTH, layout, params=params, optimizer=optimizer)

    step, after = optimizer.update(gradient, state, params, **extra)
    grown_step, grown_after = optimizer.update(
        grow(gradient, GROWTH, layout), grown(state), grow(params, GROWTH, layout), **extra
    )
    return max(
        difference(grown_step, grow(step, GROWTH, layout)), difference(grown_after, grown(after))
    )


@pytest.fixture(autouse=True)
def leave_optax_alone():
    """Some of its transforms are deprecated, and some broadcast [1] against a matrix."""
    with warnings.catch_warnings(), jax.numpy_rank_promotion("allow"):
        warnings.simplefilter("ignore", DeprecationWarning)
        yield


@pytest.mark.parametrize("name", DIRECT)
def test_growing_commutes_with_the_update(name):
    assert commutation(name, DIRECT[name]) < 1e-6


@pytest.mark.parametrize("name", LAYERWISE)
def test_growing_commutes_with_the_update_of_each_layer(name):
    assert commutation(name, lambda: layerwise(LAYERWISE[name](), LAYOUT)) < 1e-6


@pytest.mark.parametrize("layout", [Scanned("layers", axis=1), Unrolled("layers_{}")], ids=str)
@pytest.mark.parametrize("name", ["optax.adafactor", "optax.contrib.muon"])
def test_it_does_in_every_layout(name, layout):
    assert commutation(name, lambda: layerwise(LAYERWISE[name](), layout), layout) < 1e-6


@pytest.mark.parametrize("layout", [Scanned("layers", axis=1), Unrolled("layers_{}")], ids=str)
@pytest.mark.parametrize("name", ["optax.adamw", "optax.MultiSteps", "optax.scale_by_factored_rms"])
def test_stacked_arrays_do_in_every_layout(name, layout):
    assert commutation(name, DIRECT[name], layout) < 1e-6


@pytest.mark.parametrize("name", LAYERWISE)
def test_those_in_layerwise_need_it(name):
    """On the stacked array they do something else than on its layers, or growth is refused."""
    stacked, per_layer = LAYERWISE[name](), layerwise(LAYERWISE[name](), LAYOUT)
    params = tree(0)
    steps = [one.update(tree(3), one.init(params), params)[0] for one in (stacked, per_layer)]
    try:
        grow_opt_state(stacked.init(params), GROWTH, LAYOUT, params=params)
        assert difference(*steps) > 1e-4
    except UserError as error:
        assert "layerwise" in str(error)


@pytest.mark.parametrize("name", COUPLED)
def test_those_excluded_for_coupling_layers_do(name):
    try:
        assert commutation(name, COUPLED[name]) > 1e-5
    except UserError as error:
        assert "layerwise" in str(error)


def test_lookahead_grows_both_of_its_copies():
    lookahead = optax.lookahead(optax.adam(RATE), sync_period=3, slow_step_size=0.5)
    params = optax.LookaheadParams.init_synced(tree(0))
    state = lookahead.init(params)
    for seed in (1, 2):
        step, state = lookahead.update(tree(seed), state, params)
        params = optax.apply_updates(params, step)
    grown = lambda one: grow_opt_state(one, GROWTH, LAYOUT, params=params)  # noqa: E731
    step, after = lookahead.update(tree(3), state, params)
    grown_step, grown_after = lookahead.update(
        grow(tree(3), GROWTH, LAYOUT), grown(state), grow(params, GROWTH, LAYOUT)
    )
    assert difference(grown_step, grow(step, GROWTH, LAYOUT)) < 1e-6
    assert difference(grown_after, grown(after)) < 1e-6


def test_every_public_transform_of_optax_is_in_the_table():
    named = [*DIRECT, *LAYERWISE, *EXCLUDED]
    assert len(named) == len(set(named))
    public = public_transforms()
    assert public - set(named) == set(), "classify these"
    assert set(named) - public == set(), "optax has no such thing (any more)"
    assert set(COUPLED) <= set(EXCLUDED)
    coupling = {name for name, reason in EXCLUDED.items() if reason.startswith("couples")}
    assert coupling == set(COUPLED)


def test_the_page_shows_this_table():
    text = PAGE.read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith(("| `optax", "| optimiser"))]
    assert rows == [line for line in table().splitlines() if not line.startswith("|---")]
    counts = f"{len(DIRECT)} as they are, {len(LAYERWISE)} in `layerwise`, {len(EXCLUDED)} excluded"
    assert counts in " ".join(text.split())
