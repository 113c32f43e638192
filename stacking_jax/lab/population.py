"""The population loss of the tied linear model, in closed form but for the contexts.

With u = 0 and L loops, a prompt whose second moment is M leaves the error x_qᵀ (I − A M)ᴸ w. Over
w ~ N(0, S⁻¹) and x_q ~ N(0, S) the mean square is exactly ‖(I − B W)ᴸ‖_F², where
B = S^½ A S^½ and W = S^-½ M S^-½: n·W is a white Wishart matrix of n degrees of freedom, and the
identity in the limit of many pairs. So L(A) = E_W ‖(I − B W)ᴸ‖_F². It is not divided by two, nor
by d, as in Gatmiry et al. 2024, whose bound is ‖∇L‖² ≥ (1/16) · L^((2ℓ−1)/ℓ) with ℓ loops.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

BOUND = 1 / 16


def draw_contexts(key: jax.Array, count: int, pairs: int, dimension: int) -> jax.Array:
    """White second moments W `[count, d, d]`; pairs 0: the limit, one identity."""
    if pairs == 0:
        return jnp.eye(dimension)[None]
    x = jax.random.normal(key, (count, pairs, dimension))
    return jnp.einsum("bni,bnj->bij", x, x) / pairs


def population_loss(b: jax.Array, contexts: jax.Array, loops: int) -> jax.Array:
    """The mean over `contexts` `[count, d, d]`, exact over weights and queries.

    Args:
      b: `[d, d]`, the preconditioner in white coordinates, S^½ A S^½.
    """
    step = jnp.eye(b.shape[0])[None] - jnp.einsum("ij,bjk->bik", b, contexts)
    error = step
    for _ in range(loops - 1):
        error = error @ step
    return jnp.mean(jnp.sum(error**2, axis=(-2, -1)))


def dominance_ratio(loss: jax.Array, gradient: jax.Array, loops: int) -> jax.Array:
    """‖∇L‖² / L^((2ℓ−1)/ℓ), to be held against `BOUND`."""
    return jnp.sum(gradient**2) / loss ** ((2 * loops - 1) / loops)


def isotropic_ratio(dimension: int, loops: int) -> float:
    """The ratio at A = a·S⁻¹ and n → ∞: 4 ℓ² d^(−(ℓ−1)/ℓ), whatever a < 1.

    By the power mean inequality no symmetric A has a smaller one there.
    """
    return 4 * loops**2 * dimension ** (-(loops - 1) / loops)


def distance(a: jax.Array, root: jax.Array) -> jax.Array:
    """‖S^½ A S^½ − I‖_F / √d: 0 where A is the inverse covariance, about 1 where it is 0.

    Args:
      a: `[..., d, d]`.
      root: `[d, d]`, S^½.
    """
    off = jnp.einsum("ij,...jk,kl->...il", root, a, root)
    off = off - jnp.broadcast_to(jnp.eye(a.shape[-1]), off.shape)
    return jnp.sqrt(jnp.sum(off**2, axis=(-2, -1)) / a.shape[-1])
