"""What a kernel must know of an attention to say whether it can run it."""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
from collections.abc import Iterator

from stacking_jax.models.config import DecoderConfig
from stacking_jax.models.placement import Placement

_interpreted = contextvars.ContextVar("interpreted", default=False)

BLOCK = 128
"""Kernels take tokens by blocks of this many."""


@contextlib.contextmanager
def interpreted() -> Iterator[None]:
    """Programs traced within run kernels in Pallas's interpreter: anywhere, and very slowly.

    For tests of the kernels' mathematics on machines that have no such accelerator.
    """
    token = _interpreted.set(True)
    try:
        yield
    finally:
        _interpreted.reset(token)


@dataclasses.dataclass(frozen=True)
class Asked:
    """The attention of one program.

    Attributes:
      platform: that the program is compiled for: 'cpu', 'gpu', 'tpu'.
      capability: the CUDA compute capability, such as 9.0; None for no NVIDIA GPU.
      dtype: of queries, keys and values.
      batch, length: of the whole arrays.
      heads, kv_heads, width: query heads, key heads, and the width of one.
      packed: whether a row may hold several documents, or padding.
      prompts: whether tokens of a prompt see each other.
      max_documents: the most documents of a row; None where that is not known.
      parts: into how many parts the devices cut "batch", "length", "heads" and "keys".
      interpreted: whether kernels run in the interpreter.
    """

    platform: str
    capability: float | None
    dtype: str
    batch: int
    length: int
    heads: int
    kv_heads: int
    width: int
    packed: bool
    prompts: bool
    max_documents: int | None
    parts: tuple[tuple[str, int], ...]
    interpreted: bool = False

    @classmethod
    def of(
        cls, config: DecoderConfig, shape: tuple[int, int], packed: bool, prompts: bool,
        placement: Placement,
    ) -> Asked:
        """The attention of `config` over tokens of `shape` `[B, L]`, where they are placed."""
        device = placement.device
        return cls(
            device.platform, _capability(device), config.dtype, *shape, config.num_heads,
            config.kv_heads, config.head_width, packed, prompts,
            config.max_documents if packed else 1,
            tuple((name, placement.parts(name)) for name in ("batch", "length", "heads", "keys")),
            _interpreted.get(),
        )

    def cut(self, name: str) -> int:
        """Into how many parts an axis is cut."""
        return dict(self.parts)[name]

    def undivided(self) -> str | None:
        """Why the arrays cannot be dealt out to the devices for any kernel; None if they can."""
        for name, size in (("batch", self.batch), ("length", self.length), ("heads", self.heads)):
            if size % self.cut(name):
                return f"{self.cut(name)} devices do not divide the {name} of {size}"
        if self.cut("keys") > 1:
            return "MeshConfig.rules divides 'keys', and every query needs them whole"
        return None

    def no_nvidia(self, least: float) -> str | None:
        """Why this is no NVIDIA GPU of at least this compute capability; None if it is."""
        if self.interpreted:
            return None
        if self.capability is None:
            return f"it needs an NVIDIA GPU, and the program is compiled for {self.platform!r}"
        if self.capability < least:
            return f"it needs compute capability {least}, and this GPU has {self.capability}"
        return None


def _capability(device) -> float | None:
    """'9.0' -> 9.0; None where a device has none, or not NVIDIA's."""
    try:
        return float(getattr(device, "compute_capability", ""))
    except ValueError:
        return None
