"""What all processes of a run must know alike: values of any kind, by way of JSON.

Every function here is a collective: all processes call it, in the same order.
With one process nothing is sent.
"""

from __future__ import annotations

import json
from typing import Any

import jax

from stacking_jax.training import distributed


def from_first(value: Any) -> Any:
    """The value of process 0, on every process; anything that JSON holds."""
    if jax.process_count() == 1:
        return value
    return every(value)[0]


def every(value: Any) -> list[Any]:
    """The values of all processes, in their order, on every process."""
    if jax.process_count() == 1:
        return [value]
    return [json.loads(said) for said in distributed.gather("consensus", json.dumps(value))]
