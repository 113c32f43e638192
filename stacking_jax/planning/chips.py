"""Published rates of accelerators, and what their compiler says of their memory.

TPUs: the tables of jax-ml/scaling-book (`tpus.md`, 'Here are some specific numbers for our
chips'), which hold Google Cloud's figures. NVIDIA: the same book (`gpus.md`) and NVIDIA's
data sheets, dense bfloat16 without sparsity. Links are one-way figures.
"""

from __future__ import annotations

import dataclasses

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One chip of a kind.

    Attributes:
      name: as in a topology, 'v5p'.
      peak_flops: dense bfloat16 FLOP/s.
      hbm_bytes: what a program may use, in bytes.
      hbm_bandwidth: bytes/s.
      link_bandwidth: bytes/s one way: of one ICI link (TPU), of a GPU into NVLink.
      network_bandwidth: bytes/s per chip between slices or nodes (DCN, InfiniBand).
      dimensions: axes of its torus; 0 where every chip of a node sees every other.
      wrap: an axis of the torus closes to a ring if its length is a multiple of this.
      vendor: 'tpu' or 'gpu'.
      device_kinds: what JAX calls it.
    """

    name: str
    peak_flops: float
    hbm_bytes: int
    hbm_bandwidth: float
    link_bandwidth: float
    network_bandwidth: float
    dimensions: int = 0
    wrap: int = 0
    vendor: str = "tpu"
    device_kinds: tuple[str, ...] = ()


_DCN_PER_HOST = 2.5e10  # bytes/s, scaling-book tpus.md


def _tpu(name, flops, limit_gib, bandwidth, link, dimensions, wrap, per_host, kinds):
    # The limit is what libtpu 0.0.42 names as 'available HBM' when it refuses a program: less
    # than the 32, 16, 96 and 32 GiB of the data sheets, since the runtime keeps a part.
    return Chip(
        name, flops, int(limit_gib * GIB), bandwidth, link, _DCN_PER_HOST / per_host,
        dimensions, wrap, "tpu", kinds,
    )


def _gpu(name, flops, gib, bandwidth, link, network, kinds):
    # 92 % of the nominal memory: the context, NCCL's buffers and fragmentation take the rest.
    # JAX itself preallocates three quarters unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise.
    return Chip(
        name, flops, int(0.92 * gib * GIB), bandwidth, link, network, vendor="gpu",
        device_kinds=kinds,
    )


CHIPS = {
    chip.name: chip
    for chip in (
        _tpu("v4", 2.75e14, 30.75, 1.2e12, 4.5e10, 3, 4, 4, ("TPU v4",)),
        _tpu("v5e", 1.97e14, 15.75, 8.1e11, 5e10, 2, 16, 8, ("TPU v5 lite", "TPU v5e")),
        _tpu("v5p", 4.59e14, 95.74, 2.8e12, 1e11, 3, 4, 4, ("TPU v5", "TPU v5p")),
        _tpu("v6e", 9.20e14, 31.25, 1.6e12, 1e11, 2, 16, 8, ("TPU v6 lite", "TPU v6e")),
        # NVLink per GPU one way: 300 (A100), 450 (Hopper), 900 GB/s (Blackwell).
        # InfiniBand per GPU: 200 Gbit/s (A100), 400 Gbit/s (later).
        _gpu("a100-40", 3.12e14, 40, 1.555e12, 3e11, 2.5e10, ("A100-SXM4-40GB",)),
        _gpu("a100", 3.12e14, 80, 2.039e12, 3e11, 2.5e10, ("A100-SXM4-80GB",)),
        _gpu("h100", 9.89e14, 80, 3.35e12, 4.5e11, 5e10, ("H100 80GB HBM3", "H100")),
        _gpu("h200", 9.89e14, 141, 4.8e12, 4.5e11, 5e10, ("H200",)),
        _gpu("b200", 2.25e15, 180, 8.0e12, 9e11, 5e10, ("B200",)),
    )
}


def chip_of_kind(device_kind: str) -> Chip | None:
    """The chip that JAX calls `device_kind`, None where it is not in the table."""
    for chip in CHIPS.values():
        for kind in chip.device_kinds:
            exact = chip.vendor == "tpu"
            if (device_kind == kind) if exact else (kind in device_kind):
                return chip
    return None
