"""Safetensors files, read and written in pieces.

The `safetensors` library maps whole files into memory to read, and wants all
tensors at once to write. A checkpoint that is larger than memory needs neither:
the format is eight bytes (the length of the header, little-endian), a JSON
header {name: {dtype, shape, data_offsets}} and the bytes of the tensors without
gaps (https://huggingface.co/docs/safetensors). What is written here is read by
that library, and the reverse; the tests hold both to it.
"""

from __future__ import annotations

import dataclasses
import json
import math
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from stacking_jax.errors import UserError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MAX_SHARD_SIZE = "5GB"
PIECE = 8 << 20
"""Bytes that are in memory at a time when a tensor is copied from file to file."""

DTYPES: dict[str, np.dtype] = {
    name: np.dtype(kind)
    for name, kind in {
        "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16,
        "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2,
        "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8,
        "U64": np.uint64, "U32": np.uint32, "U16": np.uint16, "U8": np.uint8, "BOOL": np.bool_,
    }.items()
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_LONGEST_HEADER = 100_000_000  # The library's own limit.


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor whose values need not be in memory.

    Attributes:
      name: as in the file.
      dtype: safetensors' name of it, such as 'BF16'.
      shape: row-major, outermost axis first.
      parts: yields the bytes of the values in order, in pieces of any length.
      source: where the values lie, for messages.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    parts: Callable[[], Iterable[Any]]
    source: str = ""

    @classmethod
    def lazy(
        cls, name: str, dtype: np.dtype, shape: Iterable[int], read: Callable[[], np.ndarray]
    ) -> Tensor:
        """A tensor that `read` makes when it is written, cast to `dtype` then."""
        shape, dtype = tuple(shape), np.dtype(dtype)

        def parts():
            values = np.asarray(read(), dtype=dtype, order="C")
            if values.shape != shape:
                raise UserError(f"{name} has shape {values.shape}, expected {shape}")
            yield values.reshape(-1).view(np.uint8).data

        return cls(name, _NAMES[dtype], shape, parts)

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize

    def zeros(self) -> Tensor:
        """As many zeros."""
        size = self.nbytes

        def parts():
            for start in range(0, size, PIECE):
                yield bytes(min(PIECE, size - start))

        return dataclasses.replace(self, parts=parts)

    def read(self) -> np.ndarray:
        """The values, in memory."""
        buffer, at = np.empty(self.nbytes, np.uint8), 0
        for part in self.parts():
            size = len(part)
            buffer[at : at + size] = np.frombuffer(part, np.uint8)
            at += size
        return buffer.view(DTYPES[self.dtype]).reshape(self.shape)


def read_file(path: str | Path) -> dict[str, Tensor]:
    """The tensors of one file, in the order of their bytes. Reads the header only.

    Raises:
      UserError: if the file is missing, cut short, or no safetensors file.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            start = file.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else None
            if length is None or length > size - 8 or length > _LONGEST_HEADER:
                raise UserError(
                    f"{path} is cut short or no safetensors file: its {size} bytes do not hold "
                    "the header that the first eight announce"
                )
            text = file.read(length)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_without_duplicates)
        if not isinstance(header, dict):
            raise ValueError("it is no JSON object")
    except ValueError as error:
        raise UserError(f"{path} has no safetensors header: {error}") from None
    header.pop("__metadata__", None)
    tensors, at = {}, 0
    entries = sorted(header.items(), key=lambda item: _offsets(path, *item))
    for name, entry in entries:
        first, last = _offsets(path, name, entry)
        tensor = _stored(path, name, entry, 8 + length + first)
        if last - first != tensor.nbytes:
            raise UserError(
                f"{path}: tensor {name} of {tensor.dtype} {list(tensor.shape)} takes "
                f"{tensor.nbytes} bytes, but the header gives it {last - first}"
            )
        if 8 + length + last > size:
            raise UserError(
                f"{path} is cut short: tensor {name} ends at byte {8 + length + last}, but the "
                f"file has {size}"
            )
        if first != at:
            raise UserError(f"{path}: tensor {name} begins at {first}, expected {at}")
        tensors[name], at = tensor, last
    if 8 + length + at != size:
        raise UserError(f"{path} has {size - 8 - length - at} bytes after its last tensor")
    return tensors


def write_file(
    path: Path, tensors: Iterable[Tensor], advance: Callable[[int], None] = lambda nbytes: None
) -> None:
    """Writes one file, holding one piece of one tensor in memory at a time.

    Args:
      path: of the file.
      tensors: what to write.
      advance: told how many bytes were written.
    """
    # Wide types first, as the library does, so that every tensor is aligned to its own.
    tensors = sorted(tensors, key=lambda tensor: -DTYPES[tensor.dtype].itemsize)
    # What `transformers` asks for before it reads a file.
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for tensor in tensors:
        header[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [at, at + tensor.nbytes],
        }
        at += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors:
            written = 0
            for part in tensor.parts():
                written += file.write(part)
                advance(len(part))
            if written != tensor.nbytes:
                raise UserError(
                    f"{tensor.source or tensor.name} gave {written} bytes of {tensor.nbytes} "
                    f"for {tensor.name}; it changed while it was read"
                )


def read_folder(folder: str | Path) -> dict[str, Tensor]:
    """The tensors of a Hugging Face folder: one file, or shards with an index.

    Raises:
      UserError: if there are none, a shard is missing, or the index names a
        tensor that its shard does not hold.
    """
    folder = Path(folder)
    index = folder / INDEX
    if not index.exists():
        single = folder / SINGLE
        if single.exists():
            return read_file(single)
        pickles = sorted(entry.name for entry in folder.glob("*.bin"))
        hint = (
            f" (no pickle is read, such as {pickles[0]}: save it again with "
            "save_pretrained(..., safe_serialization=True))" if pickles else ""
        )
        raise UserError(f"{folder} holds neither {SINGLE} nor {INDEX}{hint}")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(
        isinstance(shard, str) for shard in weight_map.values()
    ):
        raise UserError(f"{index} has no weight_map from the names of tensors to files")
    shards = {}
    for shard in dict.fromkeys(weight_map.values()):
        # A name that leaves the folder would read what nobody meant.
        if Path(shard).name != shard:
            raise UserError(f"{index} names the file {shard!r}, which is not in its folder")
        if not (folder / shard).exists():
            raise UserError(f"{index} names the shard {shard}, which is missing")
        shards[shard] = read_file(folder / shard)
    tensors = {}
    for shard, held in shards.items():
        for name, tensor in held.items():
            if weight_map.get(name, shard) == shard:
                tensors[name] = tensor
    for name, shard in weight_map.items():
        if name not in shards[shard]:
            raise UserError(f"{index} says that {shard} holds the tensor {name}; it does not")
    return tensors


def write_folder(
    folder: Path,
    tensors: Iterable[Tensor],
    max_shard_size: int,
    advance: Callable[[int], None] = lambda nbytes: None,
) -> None:
    """Writes one file, or shards and their index if that would be larger than a shard.

    Args:
      folder: exists already.
      tensors: in the order in which they fill the shards.
      max_shard_size: bytes of tensors in a file; a larger tensor has a file alone.
      advance: told how many bytes were written.
    """
    shards: list[list[Tensor]] = [[]]
    filled = 0
    for tensor in tensors:
        if shards[-1] and filled + tensor.nbytes > max_shard_size:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += tensor.nbytes
    if len(shards) == 1:
        write_file(folder / SINGLE, shards[0], advance)
        return
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_file(folder / name, shard, advance)
        weight_map |= {tensor.name: name for tensor in shard}
    total = sum(tensor.nbytes for shard in shards for tensor in shard)
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def parse_size(size: int | str) -> int:
    """Bytes of '5GB', '200MB', '1GiB' or a plain number.

    Raises:
      UserError: if it is none of these or not positive.
    """
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
    text = str(size).strip().upper()
    unit = next((unit for unit in units if text.endswith(unit)), "")
    try:
        value = int(float(text.removesuffix(unit)) * units.get(unit, 1))
    except (ValueError, OverflowError):
        value = 0
    if value < 1:
        raise UserError(f"a size is a number of bytes or such as '5GB' or '200MB'; got {size!r}")
    return value


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
      UserError: if it cannot be read or is none.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
    except ValueError as error:
        raise UserError(f"{path} is no JSON file: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} holds no JSON object")
    return value


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _stored(path: Path, name: str, entry: Mapping[str, Any], start: int) -> Tensor:
    dtype, shape = entry.get("dtype"), entry.get("shape")
    if dtype not in DTYPES:
        raise UserError(
            f"{path}: tensor {name} has the dtype {dtype!r}; known are {', '.join(DTYPES)}"
        )
    if not isinstance(shape, list) or not all(_is_size(size) for size in shape):
        raise UserError(f"{path}: tensor {name} has the shape {shape!r}")

    def parts() -> Iterator[bytes]:
        left = tensor.nbytes
        with open(path, "rb") as file:
            file.seek(start)
            while left and (piece := file.read(min(PIECE, left))):
                left -= len(piece)
                yield piece

    tensor = Tensor(name, dtype, tuple(shape), parts, source=str(path))
    return tensor


def _offsets(path: Path, name: str, entry: Any) -> tuple[int, int]:
    offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
    if (
        not isinstance(offsets, list) or len(offsets) != 2
        or not all(_is_size(offset) for offset in offsets) or offsets[0] > offsets[1]
    ):
        raise UserError(f"{path}: tensor {name} has no data_offsets [first, last] in the header")
    return offsets[0], offsets[1]


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("a name stands in it twice")
    return values
