"""What a test runs code under: memory that is NaN until written, no tensor above a size, no number read by the host."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fill every tensor that torch leaves uninitialised with NaN, so that an entry nobody wrote is seen."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # which is what fills them
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


@contextlib.contextmanager
def forbid_tensors_of(numel: int) -> Iterator[None]:
    """Raise AssertionError at the first op inside the block that returns a tensor of `numel` entries or more.

    Every op counts that torch dispatches, backward's too; what one allocates for itself does not, nor what is on
    meta or fake.
    """
    with _Forbid(numel):
        yield


@contextlib.contextmanager
def forbid_host_reads() -> Iterator[None]:
    """Raise AssertionError at the first op inside the block that on a GPU would make the host wait for numbers.

    Those are ``.item()``, ``bool`` and ``int`` of a tensor, and ops whose result has a shape that depends on numbers.
    Every op counts that torch dispatches, backward's too, on any device; what an op does inside itself does not, nor
    copies to the CPU (``.tolist()``, ``.numpy()``, ``.cpu()``).
    """
    with _NoReads():
        yield


class _NoReads(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        shapes = [list(leaf.shape) for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
        assert not _reads(func, args), f"{func} makes the host wait for numbers of {shapes}"
        return func(*args, **(kwargs or {}))


def _reads(func: Any, args: Any) -> bool:
    """Whether the host has to know numbers; an index by positions is tagged as one by a mask, which it has to count."""
    if func is torch.ops.aten.index.Tensor:
        return any(
            isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
    return bool({torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(func.tags))


class _Forbid(TorchDispatchMode):
    def __init__(self, numel: int) -> None:
        super().__init__()
        self.numel = numel

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            large = isinstance(tensor, Tensor) and tensor.numel() >= self.numel
            large = large and not (tensor.is_meta or isinstance(tensor, FakeTensor))
            assert not large, f"{func} made {list(tensor.shape)}: {self.numel} entries or more are forbidden"
        return result
