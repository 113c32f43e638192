"""How linear a layer is: the least-squares map from its input to what it adds to the stream.

After Fig. 6 of the MIDAS paper (Saunshi et al. 2024) and Razzhigaev et al. 2024 (arXiv
2405.12250). The map is fitted on some batches and judged on others: a map of D² numbers
follows any few thousand tokens.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from stacking_jax.analysis.walk import cosine, total

SMALLEST = 1e-6
"""Directions of the input with less than this share of the largest one's variance are left out:
the products are summed in float32, which knows no more of them."""


class LinearFit:
    """The fit of one position.

    Args:
      whole: a sharding that leaves an array whole on every device.
    """

    def __init__(self, whole: jax.sharding.Sharding):
        self._whole = whole
        self._inner = self._outer = 0.0
        self._map: tuple[np.ndarray, np.ndarray] | None = None
        self._sums = {"left": 0.0, "all": 0.0, "cosine": 0.0}
        self.fitted = self.judged = 0

    def fit(self, x: jax.Array, update: jax.Array, weights: jax.Array, tokens: int) -> None:
        """Takes a batch to fit on.

        Args:
          x, update: `[B, L, D]`, input of the layer and what it adds.
          weights: bool `[B, L]`, tokens that count.
          tokens: how many those are.
        """
        pair = products(x, update, weights, whole=self._whole)
        inner, outer = (np.asarray(leaf, np.float64) for leaf in pair)
        self._inner, self._outer = self._inner + inner, self._outer + outer
        self.fitted += tokens

    def judge(self, x: jax.Array, update: jax.Array, weights: jax.Array, tokens: int) -> None:
        """Takes a batch to judge the fit on, after the last one to fit on."""
        if self._map is None:
            self._map = solve(self._inner, self._outer)
            self._inner = self._outer = 0.0
        found = residuals(x, update, weights, *self._map, whole=self._whole)
        for name, value in found.items():
            self._sums[name] += float(value)
        self.judged += tokens

    @property
    def r2(self) -> float | None:
        """1 − Σ ‖update − foretold‖² / Σ ‖update − mean update of the fit‖², over what judges.

        Below 0 where the map foretells worse than that mean; None of a layer that adds nothing.
        """
        if not self._sums["all"]:
            return None
        return 1.0 - self._sums["left"] / self._sums["all"]

    @property
    def cosine(self) -> float:
        """Mean cosine of update and foretold update."""
        return self._sums["cosine"] / max(self.judged, 1)


def solve(inner: np.ndarray, outer: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The map of least squares with its constant, and the mean of the updates.

    Args:
      inner, outer: from `products`, summed.

    Returns:
      float32 `[D + 1, D]` and `[D]`.
    """
    count = max(inner[-1, -1], 1.0)
    mean_x, mean_y = inner[-1, :-1] / count, outer[-1] / count
    covariance = inner[:-1, :-1] - count * np.outer(mean_x, mean_x)
    shared = outer[:-1] - count * np.outer(mean_x, mean_y)
    values, vectors = np.linalg.eigh(covariance)
    kept = values > SMALLEST * max(values[-1], 0.0)
    inverse = np.where(kept, 1.0 / np.where(kept, values, 1.0), 0.0)
    linear = vectors @ (inverse[:, None] * (vectors.T @ shared))
    constant = mean_y - mean_x @ linear
    matrix = np.concatenate([linear, constant[None]])
    return matrix.astype(np.float32), mean_y.astype(np.float32)


@functools.partial(jax.jit, static_argnames="whole")
def products(x, update, weights, whole) -> tuple[jax.Array, jax.Array]:
    """Σ z zᵀ and Σ z updateᵀ over tokens, z being (x, 1): float32 `[D + 1, D + 1]`, `[D + 1, D]`.

    Args:
      x, update: `[B, L, D]`.
      weights: bool `[B, L]`.
      whole: the sharding of the results.
    """
    x, update = (jnp.where(weights[..., None], a.astype(jnp.float32), 0) for a in (x, update))
    z = jnp.concatenate([x, weights[..., None].astype(jnp.float32)], axis=-1)
    pairs = (
        jnp.einsum("blc,bld->cd", z, other, precision="highest") for other in (z, update)
    )
    return tuple(jax.lax.with_sharding_constraint(pair, whole) for pair in pairs)


@functools.partial(jax.jit, static_argnames="whole")
def residuals(x, update, weights, matrix, mean, whole) -> dict[str, jax.Array]:
    """How well (x, 1) · `matrix` foretells the update, in sums over tokens.

    Args:
      x, update: `[B, L, D]`.
      weights: bool `[B, L]`.
      matrix: float32 `[D + 1, D]`.
      mean: float32 `[D]`, of the updates that the matrix was fitted on.
      whole: the sharding of the results.

    Returns:
      `left`: Σ ‖update − foretold‖²; `all`: Σ ‖update − mean‖²; `cosine` of both.
    """
    x, update = (a.astype(jnp.float32) for a in (x, update))
    foretold = jnp.einsum("blc,cd->bld", x, matrix[:-1], precision="highest") + matrix[-1:][None]
    sums = {
        "left": total(jnp.sum(jnp.square(update - foretold), axis=-1), weights),
        "all": total(jnp.sum(jnp.square(update - mean[None, None]), axis=-1), weights),
        "cosine": total(cosine(foretold, update), weights),
    }
    return jax.lax.with_sharding_constraint(sums, whole)
