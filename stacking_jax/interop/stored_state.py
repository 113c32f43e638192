"""The arrays of a checkpoint, read and written in pieces.

Orbax describes a checkpoint (its tree, the files, the commit) and keeps every
array in TensorStore (zarr, in one OCDBT database). So the tree is read, and a new
checkpoint is made, by Orbax's own API; what lies between is copied region by
region through TensorStore, whatever the depth of the model.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from stacking_jax.errors import UserError
from stacking_jax.growth.layouts import path_keys
from stacking_jax.models import LAYOUT
from stacking_jax.training import checkpoints

Keys = tuple[str, ...]
Region = tuple[slice, ...]

# A commit writes the database's index anew: one for every region would make the index, in
# hundreds of versions, many times as large as what it points to.
_COMMIT_BYTES = 16 << 20


class StoredState:
    """The state in one checkpoint folder, with its arrays opened but not read.

    Attributes:
      folder: of the checkpoint, named by its step.
      tree: nested dicts and lists with a `jax.ShapeDtypeStruct` for every array and
        None where the state holds none.
    """

    def __init__(self, folder: str | Path):
        """Opens the checkpoint that Orbax committed in `folder`.

        Raises:
          UserError: if there is none that can be read.
        """
        import orbax.checkpoint as ocp

        # Orbax announces what it reads; its errors reach us as exceptions.
        logging.getLogger("absl").setLevel(logging.ERROR)
        self.folder = Path(folder).absolute()
        with one_line_errors(self.folder):
            with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
                described = reader.metadata(self.folder / "state").item_metadata.tree
        self._names = {
            path_keys(path): entry.name
            for path, entry in jax.tree_util.tree_flatten_with_path(described)[0]
        }
        self.tree = jax.tree.map(
            lambda entry: jax.ShapeDtypeStruct(entry.shape, entry.dtype), described
        )

    def shapes(self) -> dict[Keys, jax.ShapeDtypeStruct]:
        """Every array by the keys of its path."""
        return {
            path_keys(path): leaf
            for path, leaf in jax.tree_util.tree_flatten_with_path(self.tree)[0]
        }

    def open(self, keys: Keys, *, write: bool = False) -> Any:
        """One array, as a `tensorstore.TensorStore`."""
        import tensorstore as ts

        with one_line_errors(self.folder):
            return ts.open(self._spec(keys), open=True, read=True, write=write).result()

    def make(self, keys: Keys, leaf: jax.ShapeDtypeStruct, chunk: Sequence[int]) -> None:
        """Puts an array of that shape, with nothing in it, in place of the one there is."""
        import tensorstore as ts

        # Stored as Orbax stores it.
        metadata = {
            "shape": list(leaf.shape), "chunks": list(chunk),
            "compressor": {"id": "zstd", "level": 1},
        }
        spec = {**self._spec(keys), "dtype": np.dtype(leaf.dtype).name, "metadata": metadata}
        ts.open(spec, create=True, delete_existing=True).result()

    def _spec(self, keys: Keys) -> dict[str, Any]:
        return {
            "driver": "zarr",
            "kvstore": {
                "driver": "ocdbt",
                "base": {"driver": "file", "path": f"{self.folder / 'state'}/"},
                "path": f"{self._names[keys]}/",
            },
            # Orbax takes a chunk that is not there for damage, even one of zeros.
            "store_data_equal_to_fill_value": True,
            # Waiting for the disk at every piece would take most of the time.
            "context": {"file_io_sync": False},
        }

    def read(self, keys: Keys, layer: int | None = None) -> np.ndarray:
        """One array, or one layer of it, in memory."""
        array = self.open(keys)
        return self.values(array if layer is None else array[layer])

    def values(self, region: Any) -> np.ndarray:
        """A region of an array that `open` gave, such as `array[3]`, in memory."""
        with one_line_errors(self.folder):
            return region.read().result()


def create(
    folder: Path, tree: Any, meta: Mapping[str, Any], like: StoredState | None = None
) -> StoredState:
    """Makes a checkpoint whose arrays are still to be written, every chunk of them.

    Args:
      folder: of the checkpoint; its name is the step.
      tree: nested containers of `jax.ShapeDtypeStruct`s.
      meta: the JSON object beside the state.
      like: a checkpoint of the same arrays, up to their depth, whose chunks are taken
        over so that a chunk is read for a chunk that is written.
    """
    import orbax.checkpoint as ocp

    # Orbax writes the tree, with a number for each array ...
    numbers = jax.tree.map(lambda leaf: np.zeros((), leaf.dtype), tree)
    handler = ocp.CompositeCheckpointHandler(
        state=ocp.PyTreeCheckpointHandler(), meta=ocp.JsonCheckpointHandler()
    )
    with ocp.Checkpointer(handler) as writer:
        writer.save(
            folder,
            args=ocp.args.Composite(
                state=ocp.args.PyTreeSave(numbers), meta=ocp.args.JsonSave(dict(meta))
            ),
        )
    state = StoredState(folder)
    # ... and TensorStore the arrays in their place.
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        keys = path_keys(path)
        chunk = _chunks(leaf, stacked=LAYOUT.matches(keys))
        if like is not None and (old := chunk_shape(like.open(keys))):
            old = (min(old[0], chunk[0]), *old[1:])
            size = math.prod(old) * np.dtype(leaf.dtype).itemsize
            chunk = old if size <= checkpoints.CHUNK_BYTES else chunk
        state.make(keys, leaf, chunk)
    return StoredState(folder)


def _chunks(leaf: jax.ShapeDtypeStruct, stacked: bool) -> tuple[int, ...]:
    """One layer, cut until it is no larger than `CHUNK_BYTES`."""
    chunk = [max(size, 1) for size in leaf.shape]
    if stacked and chunk:
        chunk[0] = 1
    while math.prod(chunk) * np.dtype(leaf.dtype).itemsize > checkpoints.CHUNK_BYTES:
        widest = max(range(len(chunk)), key=lambda axis: chunk[axis])
        chunk[widest] = -(-chunk[widest] // 2)
    return tuple(chunk)


class Writer:
    """Writes regions of an array and commits them together, before they take much memory.

    To be finished after each array: several at once would commit against each other.
    """

    def __init__(self):
        self._transaction: Any = None
        self._bytes = 0

    def write(self, region: Any, values: np.ndarray) -> None:
        """Writes `values` to a region of a `TensorStore`, such as `array[3]`."""
        import tensorstore as ts

        if self._transaction is None:
            self._transaction = ts.Transaction()
        region.with_transaction(self._transaction).write(values).copy.result()
        self._bytes += values.nbytes
        if self._bytes >= _COMMIT_BYTES:
            self.finish()

    def zeros(self, array: Any, layer: int | None = None) -> None:
        """Writes zeros to one layer of an array, or to all of it, chunk by chunk."""
        shape, chunk = tuple(array.shape), chunk_shape(array)
        zero = np.zeros((), array.dtype.numpy_dtype)
        first = () if layer is None else (layer,)
        for region in regions(shape[len(first) :], chunk[len(first) :]):
            target = array[(*first, *region)]
            # One value that seems to be a whole array.
            self.write(target, np.broadcast_to(zero, target.shape))

    def finish(self) -> None:
        """Commits what has been written so far."""
        if self._transaction is not None:
            self._transaction.commit_async().result()
        self._transaction, self._bytes = None, 0


def regions(shape: Sequence[int], chunk: Sequence[int]) -> Iterator[Region]:
    """The regions of an array of `shape` that each lie in one chunk."""
    steps = [
        [slice(start, min(start + size, length)) for start in range(0, length, size)]
        for length, size in zip(shape, chunk, strict=True)
    ]
    return itertools.product(*steps)


def chunk_shape(array: Any) -> tuple[int, ...]:
    """The shape of the chunks in which a `TensorStore` is read."""
    # A scalar has no chunks.
    return tuple(array.chunk_layout.read_chunk.shape or ())


def nbytes(leaf: jax.ShapeDtypeStruct) -> int:
    return math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize


@contextlib.contextmanager
def one_line_errors(folder: Path) -> Iterator[None]:
    """Turns what Orbax and TensorStore say about a damaged checkpoint into a `UserError`."""
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
        raise UserError(f"the checkpoint {folder} cannot be read: {first}") from error
