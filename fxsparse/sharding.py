"""Tensors that FSDP2 (``fully_shard``) holds in shards: the whole of one, the part of it that is here, and its place.

A tensor in one piece is its own whole and its own part, so that those who ask need not know.
"""

import sys
from typing import Any

import torch
from torch import Tensor, nn

from fxsparse.errors import UnsupportedError
from fxsparse.graph import owner

Index = tuple[Tensor, ...]
"""One index tensor for each dimension, as `torch.unravel_index` gives them."""


def is_sharded(tensor: Any) -> bool:
    """Whether a tensor is a DTensor, of which this process holds a part."""
    loaded = sys.modules.get(
        "torch.distributed.tensor"
    )  # without it there is none, and it takes a second to import
    return loaded is not None and isinstance(tensor, loaded.DTensor)


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, detached; where it is sharded a new one, which all ranks have to ask for together."""
    return tensor.detach().full_tensor() if is_sharded(tensor) else tensor.detach()  # type: ignore[operator]


def here(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds, detached: a view, to be written to."""
    return tensor.detach().to_local() if is_sharded(tensor) else tensor.detach()  # type: ignore[operator]


def part(like: Tensor, tensor: Tensor) -> Tensor:
    """Of a whole tensor what lies where `here(like)` does: a view."""
    if not is_sharded(like):
        return tensor
    dim, first, size = _place(like)
    return tensor.narrow(dim, first, size)


def entries(like: Tensor, index: Index) -> Index:
    """An index into the whole of `like`, as one into `here(like)` of those entries of it that lie there."""
    if not is_sharded(like):
        return index
    dim, first, size = _place(like)
    inside = (index[dim] >= first) & (index[dim] < first + size)
    return tuple(axis[inside] - first * (d == dim) for d, axis in enumerate(index))


@torch.no_grad()
def shard_like(parameter: Tensor, tensor: Tensor) -> Tensor:
    """`tensor`, in one piece and the same on all ranks, in the shards of `parameter` and on its device."""
    from torch.distributed.tensor import DTensor

    assert isinstance(parameter, DTensor)
    local = part(parameter, tensor).to(parameter.device)
    return DTensor.from_local(
        local.contiguous(),
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=tensor.shape,
        stride=tensor.contiguous().stride(),
    )


def reshard(module: nn.Module) -> None:
    """Let a module that `fully_shard` was called on hold its shards, as after every backward."""
    if _is_fsdp(module):
        module.reshard()  # type: ignore[operator]


def release_sharded(shell: nn.Module, module: nn.Module) -> None:
    """Put those parameters of `shell` on meta that `module` holds in shards by now: no rank keeps them whole."""
    held, empty = dict(module.named_parameters(remove_duplicate=False)), {}
    for name, parameter in list(shell.named_parameters(remove_duplicate=False)):
        if not parameter.is_meta and is_sharded(held.get(name)):
            meta = nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
            parent, leaf = owner(shell, name)
            parent._parameters[leaf] = empty.setdefault(id(parameter), meta)


def refuse_flattened(name: str, parameter: Tensor, mask: Tensor) -> None:
    """Raise UnsupportedError where a weight has no longer the shape of its mask."""
    if parameter.shape != mask.shape:
        raise UnsupportedError(
            f"attach: {name!r} has shape {tuple(parameter.shape)} where its mask has {tuple(mask.shape)}: expected a "
            "weight in its own shape, which FullyShardedDataParallel flattens. Use "
            "torch.distributed.fsdp.fully_shard(sparse), or DistributedDataParallel."
        )


def refuse_shards(module: nn.Module, call: str) -> None:
    """Raise UnsupportedError where `module` holds shards, of which `call` would write one rank's."""
    sharded = [name for name, parameter in module.named_parameters() if is_sharded(parameter)]
    if sharded:
        raise UnsupportedError(
            f"{call}: the module is sharded ({sharded[0]!r} is a DTensor): expected one in one piece. Save shards with "
            "torch.distributed.checkpoint (docs/distributed.md), or call sparse.dense_state_dict() on all ranks and "
            "save what one of them gets."
        )


def refuse_sharded_parts(module: nn.Module, tier: str, error: RuntimeError) -> None:
    """Raise UnsupportedError if `error` comes of submodules that `fully_shard` was called on, which a graph inlines."""
    parts = [path for path, child in module.named_modules() if path and _is_fsdp(child)]
    if parts and tier != "walk":
        raise UnsupportedError(
            f"{parts[0]!r} is sharded by itself: expected fully_shard(sparse) on the compiled module alone, as its "
            "graph runs the ops of its submodules and not their forward, where fully_shard would gather them. "
            f"Call fully_shard on the whole module once. ({error})"
        ) from error


def _is_fsdp(module: nn.Module) -> bool:
    loaded = sys.modules.get("torch.distributed.fsdp")
    return loaded is not None and isinstance(module, loaded.FSDPModule)


def _place(tensor: Any) -> tuple[int, int, int]:
    """(dimension, first, how many) of the slice that this process holds; all of dimension 0 of a replicated tensor."""
    mesh, at = tensor.device_mesh, [d for d, p in enumerate(tensor.placements) if p.is_shard()]
    coordinate = mesh.get_coordinate()
    strided = [p for p in tensor.placements if type(p).__name__ == "_StridedShard"]
    if len(at) > 1 or strided or coordinate is None:
        raise UnsupportedError(
            f"a parameter of shape {tuple(tensor.shape)} is placed as {tuple(tensor.placements)} on {mesh}: expected "
            "shards along one dimension, on a mesh that this rank is part of, as fully_shard(sparse) makes them. "
            "Leave tensor parallelism out."
        )
    if not at:
        return 0, 0, tensor.shape[0]
    dim = tensor.placements[at[0]].dim % tensor.dim()
    length = -(-tensor.shape[dim] // mesh.size(at[0]))
    first = min(coordinate[at[0]] * length, tensor.shape[dim])
    return dim, first, min(length, tensor.shape[dim] - first)
