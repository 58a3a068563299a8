"""The file: whole, checked, and nothing in it is ever run."""

import json
import os
import struct
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from fxsparse import checkpoint
from fxsparse.errors import CheckpointError

TENSORS = {
    "a": torch.randn(3, 4),
    "b": torch.randn(4, 3).t(),
    "none": torch.empty(0, 5),
    "bits": torch.tensor([True, False]),
    "half": torch.randn(5).bfloat16(),
    "step": torch.tensor(7),
}


@pytest.fixture
def path(tmp_path):
    checkpoint.write(tmp_path / "file", TENSORS, {"kind": "training"})
    return tmp_path / "file"


def test_what_is_read_is_what_was_written(path):
    tensors, header = checkpoint.read(path)
    assert tensors.keys() == TENSORS.keys()
    assert all(torch.equal(tensors[name], TENSORS[name]) for name in TENSORS)
    assert {name: tensor.dtype for name, tensor in tensors.items()} == {
        n: t.dtype for n, t in TENSORS.items()
    }
    assert (header["kind"], header["format"]) == ("training", checkpoint.FORMAT)
    assert [entry.name for entry in path.parent.iterdir()] == ["file"]


def test_the_same_memory_is_written_once_and_a_part_of_it_alone(tmp_path):
    whole = torch.randn(1000)
    checkpoint.write(tmp_path / "file", {"a": whole, "tied": whole, "part": whole[:10]}, {})
    assert (tmp_path / "file").stat().st_size < 4 * 1000 + 40 + 1000
    tensors, _ = checkpoint.read(tmp_path / "file")
    assert torch.equal(tensors["tied"], whole)
    assert torch.equal(tensors["part"], whole[:10])


def flipped(contents: bytes) -> bytes:
    return contents[:-3] + bytes([contents[-3] ^ 1]) + contents[-2:]


def renamed(contents: bytes) -> bytes:
    return contents.replace(b"training", b"trainink")


def newer(contents: bytes) -> bytes:
    return contents.replace(b'\\"format\\": 1', b'\\"format\\": 2')


def huge(contents: bytes) -> bytes:
    header = json.dumps({"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}).encode()
    return struct.pack("<Q", len(header)) + header


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda contents: contents[:-10], "missing or truncated"),
        (lambda contents: contents[:20], "missing or truncated"),
        (lambda contents: b"", "missing or truncated"),
        (lambda contents: b"\x80\x04" + contents, "missing or truncated"),
        (huge, "missing or truncated"),
        (flipped, "do not match the hash written with them"),
        (renamed, "do not match the hash written with them"),
        (newer, "expected format 1, got 2 written by fxsparse None"),
    ],
    ids=["short", "header cut", "empty", "shifted", "huge", "bit", "header", "newer"],
)
def test_a_damaged_file_is_refused(path, damage, message):
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(CheckpointError, match=message):
        checkpoint.read(path)


def test_files_of_something_else_are_refused(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "plain")
    with pytest.raises(CheckpointError, match="a safetensors file of something else"):
        checkpoint.read(tmp_path / "plain")
    torch.save({"a": torch.ones(2)}, tmp_path / "pickle")
    with pytest.raises(CheckpointError, match=r"expected a whole file written by fxsparse.save"):
        checkpoint.read(tmp_path / "pickle")
    with pytest.raises(CheckpointError, match="missing or truncated"):
        checkpoint.read(tmp_path / "nothing")


def test_a_failed_write_leaves_the_old_file_and_nothing_else(path):
    before = path.read_bytes()
    folder = path.parent / "folder"
    folder.mkdir()
    with pytest.raises(CheckpointError, match="may be written"):
        checkpoint.write(folder, TENSORS, {})
    with pytest.raises(CheckpointError, match="a folder that exists"):
        checkpoint.write(path.parent / "no" / "file", TENSORS, {})
    assert path.read_bytes() == before
    assert sorted(entry.name for entry in path.parent.iterdir()) == ["file", "folder"]


def test_the_leftovers_of_a_killed_write_go_with_the_next(path):
    gone = subprocess.run(
        [sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True
    )
    host, dead, alive = checkpoint.socket.gethostname(), int(gone.stdout), os.getppid()
    left, busy = (path.with_name(f".file.{host}.{pid}.partial") for pid in (dead, alive))
    left.write_text("half")
    busy.write_text("of a process that runs")
    checkpoint.write(path, TENSORS, {})
    assert not left.exists()
    assert busy.exists()
