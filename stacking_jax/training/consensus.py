"""What all processes of a run must know alike: values of any kind, by way of JSON.

Every function here is a collective: all processes call it, in the same order.
With one process nothing is sent.
"""

from __future__ import annotations

import json
from typing import Any

import jax
import numpy as np


def from_first(value: Any) -> Any:
    """The value of process 0, on every process; anything that JSON holds."""
    if jax.process_count() == 1:
        return value
    return every(value)[0]


def every(value: Any) -> list[Any]:
    """The values of all processes, in their order, on every process."""
    if jax.process_count() == 1:
        return [value]
    from jax.experimental import multihost_utils

    data = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(data.size)).ravel()
    # All send as much as the longest, filled up with zeros.
    padded = np.zeros(int(sizes.max()), np.uint8)
    padded[: data.size] = data
    rows = np.asarray(multihost_utils.process_allgather(padded)).reshape(len(sizes), -1)
    return [
        json.loads(bytes(row[:size]).decode()) for row, size in zip(rows, sizes, strict=True)
    ]
