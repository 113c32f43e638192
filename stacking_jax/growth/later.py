"""Work on arrays that lie on several devices, or span processes: done in one compiled call."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from stacking_jax.errors import UserError


class Later:
    """Work on arrays that lie on several devices, done in one compiled call.

    Only a compiled function may touch an array that spans processes, and only it says
    where its results lie. Everything else is done at once.
    """

    def __init__(self):
        self._jobs: list[tuple[Callable, list[Any], Any]] = []

    def do(
        self, function: Callable, arrays: Sequence[Any], like: Any, name: str,
        reshard: Callable[[Any], Any] = lambda sharding: sharding,
    ) -> Any:
        """`function(*arrays)`, sharded as `like`, or a mark that `finish` replaces.

        `reshard` gives the sharding of the result where its axes are not those of `like`.

        Raises:
          UserError: if the result cannot be divided so.
        """
        if not on_several_devices(like):
            return function(*arrays)
        shape, sharding = jax.eval_shape(function, *arrays).shape, reshard(like.sharding)
        check_divisible(sharding, shape, name)
        arrays = [_moved(array, like) for array in arrays]
        self._jobs.append((function, arrays, sharding))
        return _Mark(len(self._jobs) - 1)

    def finish(self, tree: Any) -> Any:
        """Does the work and puts the results where the marks stand."""
        if not self._jobs:
            return tree
        results: dict[int, Any] = {}
        groups: dict[frozenset, list[int]] = {}
        for number, (_, arrays, _) in enumerate(self._jobs):
            devices = next(a.sharding.device_set for a in arrays if on_several_devices(a))
            groups.setdefault(frozenset(devices), []).append(number)
        for numbers in groups.values():
            functions = [self._jobs[number][0] for number in numbers]
            run = jax.jit(
                lambda inputs, functions=functions: [
                    function(*arrays) for function, arrays in zip(functions, inputs, strict=True)
                ],
                out_shardings=[self._jobs[number][2] for number in numbers],
            )
            done = run([self._jobs[number][1] for number in numbers])
            results.update(zip(numbers, done, strict=True))
        return jax.tree.map(
            lambda leaf: results[leaf.number] if isinstance(leaf, _Mark) else leaf, tree
        )


@dataclasses.dataclass(frozen=True)
class _Mark:
    number: int


def on_several_devices(array: Any) -> bool:
    """Whether it is a concrete array of which no single device holds all."""
    return (
        isinstance(array, jax.Array)
        and not isinstance(array, jax.core.Tracer)
        and len(array.sharding.device_set) > 1
    )


def _moved(array: Any, like: jax.Array) -> Any:
    """What lies elsewhere, a fresh layer or a small matrix, goes where the stack lies."""
    elsewhere = (
        isinstance(array, jax.Array)
        and not isinstance(array, jax.core.Tracer)
        and array.sharding.device_set != like.sharding.device_set
    )
    if not elsewhere or not isinstance(like.sharding, NamedSharding):
        return array
    return jax.device_put(array, NamedSharding(like.sharding.mesh, PartitionSpec()))


def check_divisible(sharding: Any, shape: Sequence[int], name: str) -> None:
    """Refuses a sharding that cannot divide the grown array.

    Raises:
      UserError: naming the leaf.
    """
    if sharding is None:
        return
    try:
        sharding.shard_shape(tuple(shape))
    except ValueError:
        raise UserError(
            f"{name} is sharded as {_shown(sharding)}, which cannot divide the grown shape "
            f"{tuple(shape)}; leave the axis of the layers whole, or grow to a multiple"
        ) from None


def _shown(sharding: Any) -> str:
    return str(getattr(sharding, "spec", sharding))
