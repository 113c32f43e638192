"""Operators that copy the whole stack, or loop through it."""

from __future__ import annotations

from stacking_jax.errors import UserError
from stacking_jax.growth.depth_map import DepthMap, Segment
from stacking_jax.growth.operators.guards import between, guarded, whole


def g_stack(depth: int, times: int, *, keep_first: int = 0, keep_last: int = 0) -> DepthMap:
    """G_stack: the whole stack, `times` times: 0 1 2 0 1 2.

    Du et al. 2024, "Stacking Your Transformers" (arXiv 2405.15319), who find a growth
    factor g = 4 best.

    Args:
      depth: the present number of layers.
      times: g, at least 2.
      keep_first, keep_last: layers at the ends that stand once.

    Returns:
      A map of length g · depth (of what is not kept) over `depth` stored layers.

    Raises:
      UserError: if `times` is less than 2.
    """
    inner = between("g_stack", depth, keep_first, keep_last)
    times = whole("g_stack: times", times, least=2)
    return guarded([*range(inner)] * times, depth, keep_first, keep_last)


def progressive(depth: int, *, keep_first: int = 0, keep_last: int = 0) -> DepthMap:
    """Progressive stacking: the stack on top of itself, M(f) = f ∘ f.

    Gong et al. 2019, "Efficient Training of BERT by Progressively Stacking": the depth
    doubles at every growth, so depths between are not defined. One doubling is
    `g_stack` with times 2.

    Args:
      depth: the present number of layers.
      keep_first, keep_last: layers at the ends that stand once.

    Returns:
      A map of length 2 · depth (of what is not kept) over `depth` stored layers.
    """
    inner = between("progressive", depth, keep_first, keep_last)
    return guarded([*range(inner)] * 2, depth, keep_first, keep_last)


def interleave(
    depth: int, times: int = 2, *, keep_first: int = 0, keep_last: int = 0
) -> DepthMap:
    """Interleaved growth: every layer `times` times in a row: 0 0 1 1 2 2.

    The 'interpolation' of Chang et al. 2018 ("Multi-level Residual Networks from
    Dynamical Systems View") and Dong et al. 2020, as LiGO (Wang et al. 2023, arXiv
    2303.00980) compares with it.

    Args:
      depth: the present number of layers.
      times: how often each layer stands, at least 2.
      keep_first, keep_last: layers at the ends that stand once.

    Returns:
      A map of length times · depth (of what is not kept) over `depth` stored layers.

    Raises:
      UserError: if `times` is less than 2.
    """
    inner = between("interleave", depth, keep_first, keep_last)
    times = whole("interleave: times", times, least=2)
    return guarded(
        [layer for layer in range(inner) for _ in range(times)], depth, keep_first, keep_last
    )


def solar(depth: int, drop: int, *, keep_first: int = 0, keep_last: int = 0) -> DepthMap:
    """SOLAR's depth up-scaling: two copies that overlap, without the layers at the seam.

    The last `drop` layers of the lower copy and the first `drop` of the upper one are
    left out, so n layers become 2n − 2 · drop; 32 layers and drop 8 give the 48 of
    SOLAR 10.7B (Kim et al. 2023, arXiv 2312.15166). drop 0 is `progressive`.

    Args:
      depth: the present number of layers.
      drop: layers left out of each copy: from 0 to less than half of them.
      keep_first, keep_last: layers at the ends that stand once.

    Returns:
      A map of length 2 · depth − 2 · drop (of what is not kept) over `depth` layers.

    Raises:
      UserError: if `drop` is so large that the stack would not grow.
    """
    inner = between("solar", depth, keep_first, keep_last)
    drop = whole("solar: drop", drop, least=0)
    if 2 * drop >= inner:
        raise UserError(
            f"solar: without {drop} layers of each copy, {inner} layers would not become more; "
            f"drop at most {(inner - 1) // 2}"
        )
    return guarded(
        [*range(inner - drop), *range(drop, inner)], depth, keep_first, keep_last
    )


def single_layer(to: int) -> DepthMap:
    """One layer to full depth: 0 0 0 0.

    The one-layer start of Bu 2025, "Deep Progressive Training: scaling up depth
    capacity of zero/one-layer models" (arXiv 2511.04981), its copying variant. (Zero
    layers to full depth is `inherit_first(0, 0, to)`: all new.)

    Args:
      to: the depth to grow to.

    Returns:
      A map of length `to` over one stored layer.
    """
    return DepthMap([Segment((0,), whole("single_layer: to", to, least=1))], stored=1)


def loop(k: int, times: int, prefix: int = 0, suffix: int = 0) -> DepthMap:
    """A looped stack, (k ⊗ times), or middle looping with independent ends.

    Saunshi et al. 2025, "Reasoning with Latent Thoughts" (arXiv 2502.17416). Run, the
    weights stay tied and nothing is copied; materialised by `grow`, it unties a
    looped model into the stack that computes the same. (4 ⊗ 1, 4, 1) there, the
    middle looped four times, is `loop(4, 4, prefix=4, suffix=4)` here.

    Args:
      k: layers of the block that is looped.
      times: how often the block runs.
      prefix, suffix: layers before and after it that run once.

    Returns:
      A map of length prefix + k · times + suffix over prefix + k + suffix stored
      layers, as segments × repeats.
    """
    k = whole("loop: k", k, least=1)
    times = whole("loop: times", times, least=1)
    prefix = whole("loop: prefix", prefix, least=0)
    suffix = whole("loop: suffix", suffix, least=0)
    stored = prefix + k + suffix
    return DepthMap(
        [
            Segment(tuple(range(prefix))),
            Segment(tuple(range(prefix, prefix + k)), times),
            Segment(tuple(range(prefix + k, stored))),
        ],
        stored=stored,
    )
