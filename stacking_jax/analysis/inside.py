"""What happens on the way through the stack, position by position, on held-out tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from stacking_jax.analysis.linear_fit import LinearFit
from stacking_jax.analysis.sample import Sample
from stacking_jax.analysis.sums import Sums
from stacking_jax.analysis.walk import Walk
from stacking_jax.models.losses import carries_loss

NEURONS = 0.01
"""Share of a layer's MLP neurons that count as its most active ones (MIDAS, Fig. 2 a)."""

_SEEN = ("attention", "mlp", "attention_cosine", "mlp_cosine")


class Injection(NamedTuple):
    """What a loop adds to the stream at the start of every turn but the first.

    Attributes:
      source: the position whose input it is.
      positions: at which it is added, each the first of a turn.
    """

    source: int
    positions: frozenset[int]


@dataclasses.dataclass(frozen=True)
class Network:
    """The network that is looked at.

    Attributes:
      walk: its programs.
      params: its parameters.
      sources: the stored layer of each position, nearest the input first.
      width: of the stream, D.
      injection: where a loop has its input injected; None for a plain depth map.
    """

    walk: Walk
    params: Any
    sources: tuple[int, ...]
    width: int
    injection: Injection | None = None

    @property
    def positions(self) -> int:
        return len(self.sources)


class _Way:
    """One stream on its way through the positions, with what a loop injects into it."""

    def __init__(self, network: Network, given: Any = None):
        self._network, self._given = network, given

    def enter(self, position: int, x: Any) -> Any:
        """The stream that a position reads, from the one behind the position before it."""
        injection = self._network.injection
        if injection is None:
            return x
        if position == injection.source:
            self._given = x
        return self._network.walk.add(x, self._given) if position in injection.positions else x

    def branch(self) -> _Way:
        """A stream that has come the same way until here."""
        return _Way(self._network, self._given)


def look(
    network: Network, sample: Sample, linear: bool = True,
    advance: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Early exits, contributions of sublayers, neurons and linearity, in two forward passes.

    Args:
      network, sample: what is looked at, and on what.
      linear: whether to fit linear maps, which takes two float64 `[D + 1, D + 1]` of the host's
        memory per position.
      advance: is told of every batch that is done.

    Returns:
      Plain data: `lens`, `contributions`, `neurons`, `linearity`; see docs/diagnostics.md.
    """
    walk, params = network.walk, network.params
    sums = [Sums(sample.rates) for _ in range(network.positions + 1)]
    fits = [LinearFit(sample.mesh.sharding(())) for _ in network.sources] if linear else []

    def one_batch(source, batch, judge):
        weights, tokens = carries_loss(batch), int(walk.tokens(batch))
        start = x = walk.embed(params, batch)
        way = _Way(network)
        for position, layer in enumerate(network.sources):
            x = walk.step(params, batch, jnp.int32(layer), way.enter(position, x))
        best, x, way = walk.best(params, x), start, _Way(network)
        for position, layer in enumerate(network.sources):
            read = walk.read(params, batch, x, best)
            x = way.enter(position, x)
            after, update, seen = walk.look(params, batch, jnp.int32(layer), x)
            sums[position].add(source, tokens, **read, **seen._asdict())
            if fits:
                take = fits[position].judge if judge else fits[position].fit
                take(x, update, weights, tokens)
            x = after
        sums[-1].add(source, tokens, **walk.read(params, batch, x, best))

    # Of every source the even batches first, on which the linear maps are fitted; the odd ones
    # judge them.
    for half in (0, 1):
        for source, _, batch in sample.batches(half, 2):
            one_batch(source, batch, judge=half == 1)
            advance()
    return {
        "lens": {"top": walk.top} | {
            name: [float(at.mean(name)) for at in sums]
            for name in ("loss", "overlap", "agreement")
        },
        "contributions": {
            name: [float(at.mean(name)) for at in sums[:-1]] for name in _SEEN
        },
        "neurons": overlap_of_neurons(np.stack([at.mean("neurons") for at in sums[:-1]])),
        "linearity": _linearity(fits, network.width),
    }


def overlap_of_neurons(activity: np.ndarray, share: float = NEURONS) -> dict[str, Any]:
    """Intersection over union of the most active neurons of every two layers.

    Args:
      activity: `[positions, F]`, mean |activation| of each neuron.
      share: of the neurons that count, one at least.

    Returns:
      `count` of them per layer, `iou` `[positions, positions]`, and `chance`, the expected
      intersection over the union that goes with it, for layers that have nothing in common.
    """
    total = activity.shape[1]
    count = max(1, round(share * total))
    chosen = np.zeros(activity.shape, bool)
    np.put_along_axis(chosen, np.argsort(-activity, axis=1, kind="stable")[:, :count], True, 1)
    shared = chosen.astype(np.float64) @ chosen.T
    expected = count**2 / total
    return {
        "count": count, "of": total, "iou": (shared / (2 * count - shared)).tolist(),
        "chance": expected / (2 * count - expected),
    }


def effects(
    network: Network, sample: Sample, advance: Callable[[], None] = lambda: None
) -> dict[str, Any]:
    """What skipping a layer changes behind it, after Csordás et al. 2025 (arXiv 2505.13898).

    A layer is skipped at all tokens. Its effect on a later layer is the mean over tokens of
    ‖change of what that layer adds to the stream‖ / ‖what it adds‖; that on the output is the
    mean of ‖change of the probabilities of the next token‖. The depth score is the mean number
    of a layer, the first being 0, weighted by effects. It takes a forward pass per position.

    Returns:
      `later` `[skipped, layer]`, 0 where a layer is not later; `output` `[skipped]`;
      `depth_score_layers`, from the mean effect on later layers, and `depth_score_output`; None
      where nothing has any effect.
    """
    walk, params, count = network.walk, network.params, network.positions
    sums = Sums(sample.rates)
    for source, _, batch in sample.batches():
        later, output = np.zeros((count, count)), np.zeros(count)
        x, way = walk.embed(params, batch), _Way(network)
        for skipped in range(count):
            x = way.enter(skipped, x)
            after = base = walk.step(params, batch, jnp.int32(network.sources[skipped]), x)
            ways, moved = (way.branch(), way.branch()), []
            for position in range(skipped + 1, count):
                base, x = (at.enter(position, y) for at, y in zip(ways, (base, x), strict=True))
                layer = jnp.int32(network.sources[position])
                base, x, change = walk.pair(params, batch, layer, base, x)
                moved.append(change)
            apart = walk.apart(params, batch, base, x)
            later[skipped, skipped + 1 :] = [float(change) for change in moved]
            output[skipped] = float(apart)
            x = after
        sums.add(source, int(walk.tokens(batch)), later=later, output=output)
        advance()
    later, output = sums.mean("later"), sums.mean("output")
    behind = np.maximum(np.arange(count)[::-1], 1)
    return {
        "later": later.tolist(), "output": output.tolist(),
        "depth_score_layers": depth_score(later.sum(axis=1) / behind),
        "depth_score_output": depth_score(output),
    }


def depth_score(effect: Sequence[float] | np.ndarray) -> float | None:
    """Σ l · effect_l / Σ effect_l, l counting from 0 (Csordás et al. 2025); None for no effect."""
    effect = np.asarray(effect, np.float64)
    whole = effect.sum()
    return float(np.arange(len(effect)) @ effect / whole) if whole > 0 else None


def _linearity(fits: list[LinearFit], width: int) -> dict[str, Any] | None:
    if not fits:
        return None
    fitted, judged = fits[0].fitted, fits[0].judged
    counts = {"fit_tokens": fitted, "test_tokens": judged}
    least = 2 * (width + 1)
    if fitted < least or not judged:
        reason = (
            f"a map of a stream of {width} needs {least} tokens to fit on and others to judge it; "
            f"there are {fitted} and {judged}"
        )
        return counts | {"r2": None, "cosine": None, "reason": reason}
    return counts | {"r2": [fit.r2 for fit in fits], "cosine": [fit.cosine for fit in fits]}
