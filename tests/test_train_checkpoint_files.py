"""safetensors in pieces: what the library writes and we read, the reverse, and files that are damaged."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from octofold.backends.errors import UserError
from octofold.train.checkpoint.safetensors_files import (
    DTYPES,
    SLAB_BYTES,
    OutputTensor,
    read_header,
    read_rows,
    slabs_of,
    write_file,
)


def random_tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.randint(0, 120, (5, 3), generator=generator).to(torch.uint8).view(torch.uint8).to(dtype)
        for name, dtype in DTYPES.items()
    }
    return {**tensors, "scalar": torch.tensor(3.5), "empty": torch.empty(0, 4), "cube": torch.randn(4, 2, 3)}


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    flat = [x.contiguous().flatten().view(torch.uint8) for x in (a, b)]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*flat)


def test_reading_what_the_library_writes(tmp_path):
    tensors = random_tensors()
    save_file(tensors, tmp_path / "a.safetensors", metadata={"format": "pt"})
    stored, metadata = read_header(tmp_path / "a.safetensors")
    assert metadata == {"format": "pt"}
    assert stored.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert (stored[name].dtype, stored[name].shape) == (tensor.dtype, tuple(tensor.shape))
        if tensor.ndim:
            assert same(read_rows(stored[name], 0, len(tensor)), tensor), name
            assert same(read_rows(stored[name], len(tensor) // 2, len(tensor)), tensor[len(tensor) // 2 :])


def test_the_library_reads_what_we_write(tmp_path):
    tensors = random_tensors()
    outputs = [
        OutputTensor(name, t.dtype, tuple(t.shape), lambda t=t: t.split(2) if t.ndim else [t])  # type: ignore[misc]
        for name, t in tensors.items()
    ]
    write_file(tmp_path / "a.safetensors", outputs, {"format": "pt"})
    with safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert set(file.keys()) == tensors.keys()
        for name, tensor in tensors.items():
            assert same(file.get_tensor(name), tensor), name
    assert read_header(tmp_path / "a.safetensors")[0].keys() == tensors.keys()


def written(path: Path, header: object, data: bytes = b"") -> Path:
    document = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(document).to_bytes(8, "little") + document + data)
    return path


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("header", "data", "reason"),
    [
        (b"{not json", b"", "its header is no JSON"),
        ([1], b"", "its header is no JSON object"),
        ({"a": ENTRY}, bytes(7), r"it holds \d+ bytes, and its header describes"),
        ({"a": ENTRY}, bytes(9), r"it holds \d+ bytes, and its header describes"),
        ({"a": {**ENTRY, "dtype": "F3"}}, bytes(8), "a has the dtype F3; known are F64"),
        ({"a": {**ENTRY, "shape": [3]}}, bytes(8), "a needs 12 bytes and has 8"),
        ({"a": {**ENTRY, "shape": [-2]}}, bytes(8), r"a has the shape \[-2\]"),
        ({"a": {"dtype": "F32", "shape": [2]}}, bytes(8), "nothing of where a lies"),
        ({"a": ENTRY, "b": {**ENTRY, "data_offsets": [4, 12]}}, bytes(12), "b does not begin where"),
    ],
)
def test_damaged_headers(header, data, reason, tmp_path):
    path = written(tmp_path / "a.safetensors", header, data)
    with pytest.raises(UserError, match=rf"a\.safetensors cannot be read: .*{reason}"):
        read_header(path)


def test_files_cut_short(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.arange(8.0)}, path)
    whole = path.read_bytes()
    (stored, _) = read_header(path)
    path.write_bytes(whole[:-4])
    with pytest.raises(UserError, match="it ends inside a"):
        read_rows(stored["a"], 4, 8)
    for length in (0, 5, 20):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match="does not fit"):
            read_header(path)
    path.unlink()
    for read in (lambda: read_header(path), lambda: read_rows(stored["a"], 0, 1)):
        with pytest.raises(UserError, match="No such file"):
            read()


@given(rows=st.integers(0, 10**6), row_bytes=st.integers(0, 10**8), multiple=st.integers(1, 128))
def test_slabs(rows, row_bytes, multiple):
    windows = list(slabs_of(rows, row_bytes, multiple))
    assert sum(last - first for first, last in windows) == rows
    assert [first for first, _ in windows[1:]] == [last for _, last in windows[:-1]]
    assert all(last % multiple == 0 for _, last in windows[:-1])
    assert all((last - first) * row_bytes <= max(SLAB_BYTES, multiple * row_bytes) for first, last in windows)
