"""Where a model's activations lie: all that models know of the devices of a run."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

Names = Sequence[str | None]


class Placement(abc.ABC):
    """Places activations by the names of their axes, and says for which devices that is.

    A plain function `(x, names) -> x` may stand in its place wherever a model takes one; it
    says nothing of the devices, so that attention is then XLA's own (`models.kernels`).
    """

    @property
    @abc.abstractmethod
    def device(self) -> jax.Device:
        """One of the devices that the program is compiled for; they are all alike."""

    @abc.abstractmethod
    def __call__(self, x: jax.Array, names: Names) -> jax.Array:
        """`x`, laid out by the names of its axes."""

    @abc.abstractmethod
    def parts(self, name: str | None) -> int:
        """Into how many parts an axis of this name is cut."""

    @abc.abstractmethod
    def spec(self, names: Names) -> PartitionSpec:
        """The partition of an array whose axes have these names."""

    @abc.abstractmethod
    def sharding(self, names: Names) -> NamedSharding | None:
        """The same on the devices; None where there is one device alone."""

    @abc.abstractmethod
    def on_each_device(
        self, function: Callable[..., Any], takes: Any, gives: Any
    ) -> Callable[..., Any]:
        """`function`, run by every device on its own parts: what the compiler cannot divide.

        Args:
          function: of arrays, or of trees of them.
          takes: a tuple of the arguments' `spec`s, or trees of specs.
          gives: those of the result.
        """


@dataclasses.dataclass(frozen=True)
class Unplaced(Placement):
    """Leaves everything to the compiler, for the device that JAX takes by default."""

    @property
    def device(self) -> jax.Device:
        chosen = jax.config.jax_default_device
        if isinstance(chosen, str):
            return jax.local_devices(backend=chosen)[0]
        return jax.local_devices()[0] if chosen is None else chosen

    def __call__(self, x, names):
        del names
        return x

    def parts(self, name):
        del name
        return 1

    def spec(self, names):
        return PartitionSpec(*(None for _ in names))

    def sharding(self, names):
        return None

    def on_each_device(self, function, takes, gives):
        del takes, gives
        return function


unconstrained = Unplaced()
"""Leaves the sharding of an activation to the compiler."""
