"""The checkpoint file: safetensors and a JSON header, checked by a hash, never pickled, written whole or not at all."""

import glob
import hashlib
import json
import os
import shutil
import socket
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fxsparse.destination import destination
from fxsparse.errors import CheckpointError
from fxsparse.graph import has_sparse_layout

MALFORMED = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)
"""What reading a header raises that holds other values than `write` was given."""

FORMAT = 1
"""Raised when an older fxsparse could misread a file."""
_HEADER, _HASH = "fxsparse", "fxsparse_hash"


def write(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
    """Write a file that appears at `path` whole or not at all, whenever the process is killed.

    `header`: plain JSON values.  Tensors that are the same memory are written once, and all are read with the order of
    dimensions in memory that they have here.  The file has the mode that the
    umask gives, and the target of a link is written, not the link.  What a killed process leaves, the next write of
    the same path on the same machine removes.

    Raises:
        CheckpointError: the folder cannot be written, something else than a file lies there, or a dtype or
            layout that safetensors does not have.
    """
    path = destination(path)
    found, aliases = _without_repeats(tensors)
    orders = {name: order for name, tensor in found.items() if (order := _order(tensor))}
    pairs = [name for name, tensor in found.items() if tensor.dtype == torch.complex128]
    unique = {
        name: (torch.view_as_real(tensor) if name in pairs else tensor).contiguous()
        for name, tensor in found.items()
    }
    text = json.dumps({"format": FORMAT, **header, "aliases": aliases, "orders": orders, "pairs": pairs})
    partial = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.partial")
    try:
        _remove_leftovers(path)
        # A folder of its own: safetensors writes to a name that nobody could tell from other files, of mode 0600.
        partial.mkdir()
        whole = partial / "whole"
        save_file(unique, whole, {_HEADER: text, _HASH: _hash(text, unique)})
        whole.chmod(partial.stat().st_mode & 0o666)
        with open(whole, "rb") as written:
            os.fsync(written.fileno())
        os.replace(whole, path)
        partial.rmdir()
        _sync_folder(path.parent)
    except KeyError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(
            f"{path}: expected tensors of dtypes that safetensors has, got {error}."
        ) from error
    except (OSError, SafetensorError, ValueError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(
            f"{path}: expected a file in a folder that exists and may be written, with room for it; got "
            f"{type(error).__name__}: {error}"
        ) from error


def read(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The (tensors, header) that `write` wrote, on the CPU.

    Raises:
        CheckpointError: no such file; truncated, changed, of another format, or of a newer version.
    """
    try:
        with safe_open(os.fspath(path), framework="pt") as file:
            found = file.metadata() or {}
            header = _header(path, found)
            views = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  it is no mapping
    except (OSError, SafetensorError, TypeError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(
            f"{path}: expected a whole file written by fxsparse.save, got {type(error).__name__}: {error}. It is "
            "missing or truncated, or a folder or something else; take another checkpoint."
        ) from error
    if _hash(found[_HEADER], views) != found.get(_HASH):
        raise CheckpointError(
            f"{path}: its contents do not match the hash written with them, so it was changed or damaged after "
            "fxsparse.save; take another checkpoint."
        )
    try:
        tensors = {name: _placed(view, name, header) for name, view in views.items()}
        return tensors | {alias: tensors[name] for alias, name in header["aliases"].items()}, header
    except MALFORMED as error:
        raise CheckpointError(
            f"{path}: its header is damaged ({error!r}); take another checkpoint."
        ) from error


def _header(path: str | os.PathLike[str], found: Mapping[str, str]) -> dict[str, Any]:
    if _HEADER not in found:
        raise CheckpointError(
            f"{path}: expected a file written by fxsparse.save, got a safetensors file of something else; a plain "
            "state dict goes into load_state_dict."
        )
    try:
        header = json.loads(found[_HEADER], object_pairs_hook=_once)
        version = header["format"]
    except MALFORMED as error:
        raise CheckpointError(
            f"{path}: its header is damaged ({error!r}); take another checkpoint."
        ) from error
    if version != FORMAT or type(version) is not int:
        raise CheckpointError(
            f"{path}: expected format {FORMAT}, got {version!r} written by fxsparse {header.get('fxsparse')}; load it "
            "with that version."
        )
    return header


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; readers do not agree on which of two values of one key they take."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("an object has the same key twice")
    return found


def _without_repeats(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(name: tensor) of different memory, and {other name: name of the same tensor}."""
    unique: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    first: dict[Any, str] = {}
    memory: set[int] = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach()
        if has_sparse_layout(tensor):
            raise CheckpointError(
                f"{name!r} is in {tensor.layout}, and a file holds strided tensors: pickle the module, pass the tensor "
                "as an input, or keep its indices and values in buffers."
            )
        place = tensor.untyped_storage().data_ptr()
        key = (place, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype)
        if tensor.numel() and key in first:
            aliases[name] = first[key]
            continue
        first[key] = name
        partial = (
            tensor.numel() * tensor.element_size() != tensor.untyped_storage().nbytes() or place in memory
        )
        memory.add(place)
        unique[name] = (tensor.clone() if partial else tensor).resolve_conj().resolve_neg()
    return unique, aliases


def _order(tensor: Tensor) -> list[int] | None:
    """The dimensions from the slowest to the fastest in memory; None where that is how they are numbered."""
    order = sorted(range(tensor.dim()), key=lambda dim: -tensor.stride(dim))
    return None if tensor.is_contiguous() or not tensor.permute(order).is_contiguous() else order


def _placed(view: Tensor, name: str, header: Mapping[str, Any]) -> Tensor:
    """A tensor as it was written: views of the file lie at any address, where kernels give other last bits, and change
    with the file.
    """
    tensor = _complex(view, name) if name in header.get("pairs", ()) else view
    order = header.get("orders", {}).get(name, [*range(tensor.dim())])
    if sorted(order) != [*range(tensor.dim())]:
        raise ValueError(f"{name!r} has its dimensions in the order {order}")
    made = torch.empty_like(tensor.permute(order), memory_format=torch.contiguous_format)
    return made.permute([order.index(dim) for dim in range(tensor.dim())]).copy_(tensor)


def _complex(view: Tensor, name: str) -> Tensor:
    if view.dtype != torch.float64 or view.shape[-1:] != (2,):
        raise ValueError(f"{name!r} should hold pairs of numbers, got {view.dtype} {list(view.shape)}")
    return torch.view_as_complex(view.clone())


def _hash(text: str, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.blake2b(text.encode(), digest_size=16)
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.cpu().reshape(-1).view(torch.uint8).numpy())  # pyright: ignore[reportArgumentType]
    return digest.hexdigest()


def _remove_leftovers(path: Path) -> None:
    """Drop what killed processes of this machine left of earlier writes to the same path."""
    for left in path.parent.glob(glob.escape(f".{path.name}.{socket.gethostname()}.") + "*.partial"):
        pid = left.name.split(".")[-2]
        if pid.isdecimal() and not _is_running(int(pid)):
            shutil.rmtree(left, ignore_errors=True)


def _is_running(pid: int) -> bool:
    """Whether another process of this number runs; containers that start again number their processes alike."""
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _sync_folder(folder: Path) -> None:
    """So that the new name survives a power cut; not every system lets a folder be opened."""
    with suppress(PermissionError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
