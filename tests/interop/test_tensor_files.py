"""Safetensors in pieces: the library reads what we write, and we what it writes."""

from __future__ import annotations

import json
import struct

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from stacking_jax.errors import UserError
from stacking_jax.interop import tensor_files
from stacking_jax.interop.tensor_files import Tensor, read_file, read_folder, write_file

DTYPES = [np.float32, np.float16, ml_dtypes.bfloat16, np.int64, np.int32, np.uint8, np.bool_]


def _some(dtype, shape=(3, 5)) -> np.ndarray:
    return (np.arange(np.prod(shape)) % 2 * 1.5).reshape(shape).astype(dtype)


def _lazy(tensors: dict[str, np.ndarray]) -> list[Tensor]:
    return [
        Tensor.lazy(name, values.dtype, values.shape, lambda values=values: values)
        for name, values in tensors.items()
    ]


def _same(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        assert a[name].shape == b[name].shape, name
        assert a[name].tobytes() == b[name].tobytes(), name


def test_the_library_reads_what_is_written(tmp_path):
    tensors = {f"t{i}": _some(dtype, (i + 1, 3)) for i, dtype in enumerate(DTYPES)}
    tensors["scalar"] = np.array(2.5, np.float32)
    tensors["empty"] = np.zeros((0, 4), np.float32)
    write_file(tmp_path / "a.safetensors", _lazy(tensors))
    _same(load_file(tmp_path / "a.safetensors"), tensors)
    with safe_open(tmp_path / "a.safetensors", "numpy") as file:
        assert file.metadata() == {"format": "pt"}


def test_what_the_library_writes_is_read(tmp_path):
    tensors = {f"t{i}": _some(dtype, (i + 1, 3)) for i, dtype in enumerate(DTYPES)}
    save_file(tensors, tmp_path / "a.safetensors")
    _same({k: t.read() for k, t in read_file(tmp_path / "a.safetensors").items()}, tensors)


@settings(max_examples=25, deadline=None)
@given(
    st.dictionaries(
        st.text(min_size=1, max_size=8).filter(lambda name: name != "__metadata__"),
        hnp.arrays(
            st.sampled_from([np.float32, np.float16, np.int32, np.uint8]),
            hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=5),
        ),
        max_size=5,
    )
)
def test_any_tensors_make_the_round_trip(tmp_path_factory, tensors):
    path = tmp_path_factory.mktemp("round") / "a.safetensors"
    write_file(path, _lazy(tensors))
    _same({name: tensor.read() for name, tensor in read_file(path).items()}, tensors)
    _same(load_file(path), tensors)


def test_a_tensor_longer_than_a_piece_is_copied_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(tensor_files, "PIECE", 100)
    values = np.arange(1000, dtype=np.float32)
    save_file({"a": values}, tmp_path / "a.safetensors")
    tensor = read_file(tmp_path / "a.safetensors")["a"]
    assert [len(part) for part in tensor.parts()] == [100] * 40
    write_file(tmp_path / "b.safetensors", [tensor, Tensor("z", "F32", (75,), None).zeros()])
    _same(
        load_file(tmp_path / "b.safetensors"), {"a": values, "z": np.zeros(75, np.float32)}
    )


def test_shards_are_filled_in_order_and_indexed(tmp_path, load_folder):
    tensors = {f"t{i}": np.full((10,), i, np.float32) for i in range(5)}
    tensors["big"] = np.zeros((100,), np.float32)
    tensor_files.write_folder(tmp_path, _lazy(tensors), max_shard_size=80)
    index = json.loads((tmp_path / tensor_files.INDEX).read_text())
    assert index["metadata"]["total_size"] == 5 * 40 + 400
    files = ["model-00001-of-00004.safetensors", "model-00002-of-00004.safetensors",
             "model-00003-of-00004.safetensors", "model-00004-of-00004.safetensors"]
    assert sorted(path.name for path in tmp_path.glob("*.safetensors")) == files
    assert index["weight_map"] == dict(
        t0=files[0], t1=files[0], t2=files[1], t3=files[1], t4=files[2], big=files[3]
    )
    _same(load_folder(tmp_path), tensors)
    _same({name: tensor.read() for name, tensor in read_folder(tmp_path).items()}, tensors)


@pytest.mark.parametrize(
    "text, size", [("5GB", 5 * 10**9), ("1.5MB", 1_500_000), ("2 KiB", 2048), (77, 77)]
)
def test_sizes(text, size):
    assert tensor_files.parse_size(text) == size


@pytest.mark.parametrize("text", ["", "5 apples", "-1GB", "0", "nan", "inf"])
def test_no_sizes(text):
    with pytest.raises(UserError, match="a size is a number of bytes"):
        tensor_files.parse_size(text)


# Damage


@pytest.fixture
def stored(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"a": np.zeros((4, 4), np.float32), "b": np.zeros(3, np.float16)}, path)
    return path


def _with_header(path, change) -> None:
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    text = change(header)
    text = json.dumps(header if text is None else text) if not isinstance(text, str) else text
    path.write_bytes(struct.pack("<Q", len(text)) + text.encode() + data[8 + length :])


@pytest.mark.parametrize("keep", [0, 3, 8, 20])
def test_a_file_cut_short_in_its_header(stored, keep):
    stored.write_bytes(stored.read_bytes()[:keep])
    with pytest.raises(UserError, match=r"model\.safetensors is cut short or no safetensors"):
        read_file(stored)


def test_a_file_cut_short_names_the_tensor(stored):
    stored.write_bytes(stored.read_bytes()[:-2])
    with pytest.raises(UserError, match=r"safetensors is cut short: tensor b ends at byte"):
        read_folder(stored.parent)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda h: "{not json", "has no safetensors header"),
        (lambda h: "[1]", "it is no JSON object"),
        (lambda h: '{"a": {}, "a": {}}', "a name stands in it twice"),
        (lambda h: h["a"].update(shape=[4, 5]), r"tensor a of F32 \[4, 5\] takes 80 bytes.*64"),
        (lambda h: h["a"].update(shape=[-4, 4]), "tensor a has the shape"),
        (lambda h: h["a"].update(dtype="X8"), "tensor a has the dtype 'X8'"),
        (lambda h: h["b"].update(data_offsets=[60, 66]), "tensor b begins at 60, expected 64"),
        (lambda h: h["b"].update(data_offsets=[70, 64]), "tensor b has no data_offsets"),
        (lambda h: h.pop("b"), "6 bytes after its last tensor"),
    ],
)
def test_a_header_that_does_not_fit(stored, change, message):
    def apply(header):
        result = change(header)
        return result if isinstance(result, str) else header

    _with_header(stored, apply)
    with pytest.raises(UserError, match=message) as caught:
        read_file(stored)
    assert "\n" not in str(caught.value) and str(stored) in str(caught.value)


def test_an_index_that_does_not_fit(tmp_path, make_folder):
    folder = make_folder(tmp_path / "m", max_shard=20)
    shards = sorted(folder.glob("*.safetensors"))
    index = folder / tensor_files.INDEX
    good = json.loads(index.read_text())

    def with_map(**changes):
        index.write_text(json.dumps({"weight_map": good["weight_map"] | changes}))

    with_map(ghost=shards[0].name)
    with pytest.raises(UserError, match=f"says that {shards[0].name} holds the tensor ghost"):
        read_folder(folder)
    with_map(ghost="../elsewhere.safetensors")
    with pytest.raises(UserError, match="which is not in its folder"):
        read_folder(folder)
    index.write_text('{"weight_map": [1]}')
    with pytest.raises(UserError, match="has no weight_map"):
        read_folder(folder)
    with_map()
    shards[1].unlink()
    with pytest.raises(UserError, match=f"names the shard {shards[1].name}, which is missing"):
        read_folder(folder)


def test_a_folder_without_safetensors(tmp_path):
    with pytest.raises(UserError, match="holds neither model.safetensors nor"):
        read_folder(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UserError, match="no pickle is read, such as pytorch_model.bin"):
        read_folder(tmp_path)


def test_a_source_that_shrinks_while_it_is_read_is_noticed(stored, tmp_path):
    tensors = read_file(stored)
    stored.write_bytes(stored.read_bytes()[:-10])
    with pytest.raises(UserError, match="it changed while it was read"):
        write_file(tmp_path / "b.safetensors", tensors.values())
