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


def test_what_is_read_lies_where_new_tensors_lie_and_outlives_the_file(tmp_path):
    odd = {str(n): torch.full((n,), float(n)) for n in (3, 5, 33, 1001)}
    checkpoint.write(tmp_path / "file", odd, {})
    tensors, _ = checkpoint.read(tmp_path / "file")
    with open(tmp_path / "file", "r+b") as file:
        file.write(bytes((tmp_path / "file").stat().st_size))
    assert [tensor.data_ptr() % 64 for tensor in tensors.values()] == [0] * len(odd)
    assert all(torch.equal(tensors[name], odd[name]) for name in odd)


def test_what_is_read_has_the_dtype_and_the_order_in_memory_that_was_written(tmp_path):
    image = torch.randn(2, 3, 4, 5)
    number = torch.randn(3, 4, dtype=torch.complex128)
    given = {
        "last": image.contiguous(memory_format=torch.channels_last),
        "transposed": torch.randn(4, 3).t(),
        "permuted": image.permute(3, 0, 2, 1),
        "gaps": image[:, ::2],
        "spread": torch.randn(3, 1).expand(3, 4),
        "pairs": number.t(),
        "one": torch.tensor(1 + 2j, dtype=torch.complex128),
        "none": torch.empty(2, 0, dtype=torch.complex128),
        "conjugate": number.conj(),
        "negative": number.conj().imag,
        "single": torch.randn(2, 3, dtype=torch.complex64).t(),
    }
    checkpoint.write(tmp_path / "file", given, {})
    tensors, _ = checkpoint.read(tmp_path / "file")
    assert all(torch.equal(tensors[name], given[name]) for name in given)
    assert {name: tensor.dtype for name, tensor in tensors.items()} == {n: t.dtype for n, t in given.items()}
    dense = {"last", "transposed", "permuted", "pairs", "single"}
    assert {name for name in given if not tensors[name].is_contiguous()} == dense
    assert all(tensors[name].stride() == given[name].stride() for name in dense)


@pytest.mark.parametrize(
    ("field", "found"), [("orders", {"a": [0, 0]}), ("orders", {"a": [1]}), ("pairs", ["a"]), ("pairs", 3)]
)
def test_an_order_or_a_dtype_that_cannot_be_is_refused(tmp_path, monkeypatch, field, found):
    whole = json.dumps
    monkeypatch.setattr(json, "dumps", lambda header: whole({**header, field: found}))
    checkpoint.write(tmp_path / "file", {"a": torch.randn(3, 4)}, {})
    with pytest.raises(CheckpointError, match="its header is damaged"):
        checkpoint.read(tmp_path / "file")


def test_a_dtype_that_no_file_has_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"dtypes that safetensors has, got torch\.uint2"):
        checkpoint.write(tmp_path / "file", {"a": torch.empty(4, dtype=torch.uint8).view(torch.uint2)}, {})
    assert not list(tmp_path.iterdir())


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
    with pytest.raises(CheckpointError, match="got a folder"):
        checkpoint.write(folder, TENSORS, {})
    with pytest.raises(CheckpointError, match="a folder that exists"):
        checkpoint.write(path.parent / "no" / "file", TENSORS, {})
    assert path.read_bytes() == before
    assert sorted(entry.name for entry in path.parent.iterdir()) == ["file", "folder"]


KILLED = """
import os, sys, threading, time
import torch
from fxsparse import checkpoint

threading.Thread(target=checkpoint.write, args=(sys.argv[1], {"a": torch.ones(20_000_000)}, {}), daemon=True).start()
folder = os.path.dirname(sys.argv[1])
while not any(size for d, _, names in os.walk(folder) for size in [os.path.getsize(os.path.join(d, n)) for n in names
              if n != "[file]"]):
    time.sleep(0.001)
os.kill(os.getpid(), 9)
"""


def test_what_a_killed_write_leaves_goes_with_the_next(tmp_path):
    path = tmp_path / "[file]"
    checkpoint.write(path, TENSORS, {})
    killed = subprocess.run([sys.executable, "-c", KILLED, path], check=False)
    assert killed.returncode == -9
    assert len(list(tmp_path.iterdir())) == 2
    assert checkpoint.read(path)[0]["step"] == 7
    checkpoint.write(path, TENSORS, {})
    assert [entry.name for entry in tmp_path.iterdir()] == ["[file]"]


def test_a_write_leaves_those_that_run_alone_and_clears_its_own(path):
    host = checkpoint.socket.gethostname()
    own, busy = (path.with_name(f".file.{host}.{pid}.partial") for pid in (os.getpid(), os.getppid()))
    for folder in (own, busy):
        folder.mkdir()
        (folder / "whole").write_text("half")
    checkpoint.write(path, TENSORS, {})
    assert not own.exists()
    assert busy.exists()


def test_a_file_has_the_mode_of_the_umask(tmp_path):
    for mask, mode in ((0o022, 0o644), (0o027, 0o640), (0o002, 0o664)):
        before = os.umask(mask)
        try:
            checkpoint.write(tmp_path / "file", TENSORS, {})
        finally:
            os.umask(before)
        assert (tmp_path / "file").stat().st_mode & 0o777 == mode


def test_a_link_is_followed(tmp_path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "latest").symlink_to(tmp_path / "runs" / "file")
    for step in (torch.tensor(1), torch.tensor(2)):
        checkpoint.write(tmp_path / "latest", {"step": step}, {})
        assert (tmp_path / "latest").is_symlink()
        assert checkpoint.read(tmp_path / "runs" / "file")[0]["step"] == step
    assert [entry.name for entry in (tmp_path / "runs").iterdir()] == ["file"]
