"""In-context linear regression: prompts of n pairs (x, w·x) and a query.

The tasks of Gatmiry et al. 2024 (arXiv:2410.08292, 2410.21698): x ~ N(0, S) and
w ~ N(0, S⁻¹), so that w·x has the same variance d whatever S, and every direction of S
counts alike. Every prompt is a pure function of its key, in float32.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Prompts(NamedTuple):
    """Tokens and answers.

    Attributes:
      tokens: `[batch, n + 1, d + 1]`: rows (x_i, y_i), and last (x_query, 0).
      answers: `[batch]`: y of the query.
    """

    tokens: jax.Array
    answers: jax.Array


class Covariances(NamedTuple):
    """S = basis · diag(eigenvalues) · basisᵀ: `[batch, d, d]` and `[batch, d]`."""

    basis: jax.Array
    eigenvalues: jax.Array


def draw_covariances(
    key: jax.Array, batch: int, dimension: int, kappa: jax.Array | float, condition: str
) -> Covariances:
    """Covariances with largest eigenvalue 1 and condition numbers in [1, kappa].

    Args:
      condition: `log_uniform`, `uniform` or `fixed`; see `IclSettings`.
    """
    of_condition, of_values, of_basis = jax.random.split(key, 3)
    share = jax.random.uniform(of_condition, (batch,))
    worst = {
        "log_uniform": lambda: kappa**share,
        "uniform": lambda: 1 + (kappa - 1) * share,
        "fixed": lambda: jnp.full((batch,), kappa, jnp.float32),
    }[condition]()
    between = jax.random.uniform(of_values, (batch, max(dimension - 2, 0)))
    ends = [jnp.zeros((batch, 1)), jnp.ones((batch, 1))][:dimension]
    powers = jnp.concatenate([*ends, between], axis=1)
    basis = orthonormal(jax.random.normal(of_basis, (batch, dimension, dimension)))
    return Covariances(basis, worst[:, None] ** -powers)


def draw_prompts(key: jax.Array, covariances: Covariances, pairs: int, context: str) -> Prompts:
    """One prompt per covariance, with a regression vector of its own.

    Args:
      context: `gaussian`: x_i ~ N(0, S); `whitened`: such that (1/n) Σ x_i x_iᵀ = S exactly.
    """
    of_context, of_query, of_weights = jax.random.split(key, 3)
    basis, eigenvalues = covariances
    batch, dimension = eigenvalues.shape
    root = jnp.sqrt(eigenvalues)
    white = jax.random.normal(of_context, (batch, pairs, dimension))
    if context == "whitened":
        white = orthonormal(white) * jnp.sqrt(1.0 * pairs)
    query = jax.random.normal(of_query, (batch, dimension))
    weights = jax.random.normal(of_weights, (batch, dimension))  # √S · w in the basis of S.
    white = jnp.concatenate([white, query[:, None]], axis=1)
    x = jnp.einsum("bnd,bed->bne", white * root[:, None], basis)
    y = jnp.einsum("bnd,bd->bn", white, weights)
    shown = y.at[:, -1].set(0.0)
    return Prompts(jnp.concatenate([x, shown[..., None]], axis=-1), y[:, -1])


def orthonormal(x: jax.Array) -> jax.Array:
    """Orthonormal columns that span those of x, by Gram-Schmidt, each column cleaned twice.

    Of Gaussian matrices it gives Haar's measure. `jnp.linalg.qr` would do, but jaxlib's batched
    QR on CPUs waits, on a thread of XLA's pool, for work that it gives to the same pool: two of
    them at a time have stopped a machine of two cores for ever (jaxlib 0.10.2).

    Args:
      x: `[..., rows, columns]`, few columns, of full rank.

    Returns:
      The same shape.
    """
    done = x[..., :0]
    for column in range(x.shape[-1]):
        left = x[..., column]
        for _ in range(2):
            left = left - jnp.einsum("...rc,...sc,...s->...r", done, done, left)
        left = left / jnp.linalg.norm(left, axis=-1, keepdims=True)
        done = jnp.concatenate([done, left[..., None]], axis=-1)
    return done
