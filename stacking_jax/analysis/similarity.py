"""How alike the weights of layers and of blocks are.

Cosines of whole matrices, flattened, as in the MIDAS paper (Saunshi et al. 2024, Fig. 2 b, c)
and in the regulariser of Saunshi et al. 2025 (arXiv 2502.17416, Eq. 3), whose R_G(k) is
`by_distance(cosines)[k]`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from stacking_jax.errors import UserError

GROUPS = {
    "query": ("attention", "query"),
    "key": ("attention", "key"),
    "value": ("attention", "value"),
    "out": ("attention", "out"),
    "gate": ("mlp", "gate"),
    "up": ("mlp", "up"),
    "down": ("mlp", "down"),
}
"""Name of a group -> where its matrices lie below the layers. Norm scales are left out: they
start equal and stay near 1, so that all of them are alike."""


def grams(layers: Any) -> dict[str, np.ndarray]:
    """Inner products of the matrices of every two layers.

    Args:
      layers: the stacked parameters, nested dicts of arrays `[stored, in, out]`, sharded or not.

    Returns:
      Group -> float64 `[stored, stored]`.
    """
    found = {
        name: functools.reduce(lambda tree, key: tree[key], path, layers)
        for name, path in GROUPS.items()
    }
    products = _grams(found)
    return {name: np.asarray(products[name], np.float64) for name in GROUPS}


@jax.jit
def _grams(matrices):
    def gram(leaf):
        wide = leaf.astype(jnp.float32)
        return jnp.einsum("iab,jab->ij", wide, wide, precision="highest")

    return jax.tree.map(gram, matrices)


def of_positions(gram: np.ndarray, sources: Sequence[int]) -> np.ndarray:
    """The same products between positions of a network, where position i runs `sources[i]`."""
    return gram[np.ix_(sources, sources)]


def of_blocks(gram: np.ndarray, block: int) -> np.ndarray:
    """The products of blocks of `block` layers, each block's matrices put end to end.

    Args:
      gram: `[layers, layers]`.
      block: layers of one.

    Returns:
      `[layers / block, layers / block]`.

    Raises:
      UserError: if blocks do not fill the stack.
    """
    check_block(len(gram), block)
    count = len(gram) // block
    inside = gram.reshape(count, block, count, block)
    return np.einsum("ibjb->ij", inside)


def cosines(gram: np.ndarray) -> np.ndarray:
    """Cosines from inner products. A matrix of zeros has the cosine 0 with every other one."""
    norms = np.sqrt(np.diagonal(gram))
    scale = np.outer(norms, norms)
    return np.divide(gram, scale, out=np.zeros_like(gram), where=scale > 0)


def by_distance(matrix: np.ndarray) -> list[float]:
    """The mean of a symmetric matrix over all pairs that are d apart, for d = 0, 1, ..."""
    return [float(np.mean(np.diagonal(matrix, offset))) for offset in range(len(matrix))]


def similarity(layers: Any, sources: Sequence[int], block: int) -> dict[str, Any]:
    """All of it, as plain data.

    Args:
      layers: as in `grams`.
      sources: which stored layer runs at each position.
      block: layers of a block.

    Returns:
      `groups`: group -> `layers` and `blocks`, matrices of cosines, and `by_distance`, the mean
      over layers so far apart; `mean`: the same of the mean over all groups.
    """
    found = {}
    for name, gram in grams(layers).items():
        gram = of_positions(gram, sources)
        found[name] = cosines(gram), cosines(of_blocks(gram, block))
    mean = [np.mean([pair[i] for pair in found.values()], axis=0) for i in (0, 1)]
    return {
        "groups": {name: _plain(*pair) for name, pair in found.items()}, "mean": _plain(*mean)
    }


def check_block(depth: int, block: int) -> None:
    """Raises UserError unless blocks of `block` layers fill a stack of `depth`."""
    if block < 1 or depth % block:
        fitting = ", ".join(str(n) for n in range(1, depth + 1) if depth % n == 0)
        raise UserError(
            f"blocks of {block} layers do not fill a stack of {depth}; these do: {fitting}"
        )


def _plain(layers: np.ndarray, blocks: np.ndarray) -> dict[str, Any]:
    return {
        "layers": layers.tolist(), "blocks": blocks.tolist(), "by_distance": by_distance(layers)
    }
