"""Forwards and backwards that leave a module as it was."""

from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn


@contextmanager
def undisturbed(tree: nn.Module, still: Collection[int] = ()) -> Iterator[None]:
    """Inside the block gradients start from None; after it every ``.grad``, buffer and generator is as it was before.

    Buffers keep their identity, and are copied but for those whose ``id`` is in `still`; generators are torch's own,
    of the CPU and of the CUDA devices that the parameters are on.
    """
    parameters = list(tree.parameters())
    gradients = [(parameter, parameter.grad, _kept(parameter.grad)) for parameter in parameters]
    buffers = [(module, dict(module._buffers)) for module in tree.modules()]
    saved = [(b, b.clone()) for b in tree.buffers() if id(b) not in still]
    devices = {parameter.device for parameter in parameters if parameter.is_cuda}
    try:
        for parameter in parameters:
            parameter.grad = None
        with torch.random.fork_rng(devices):
            yield
    finally:
        for module, held in buffers:
            module._buffers.clear()
            module._buffers.update(held)
        with torch.no_grad():
            for buffer, before in saved:
                # BatchNorm writes its statistics without counting a version.  What nobody wrote stays untouched: a
                # backward from before the block may still need it.
                if not torch.equal(buffer, before):
                    buffer.copy_(before)
            for parameter, gradient, before in gradients:
                parameter.grad = gradient
                if gradient is not None and before is not None:
                    gradient.copy_(before)


def _kept(gradient: Tensor | None) -> Tensor | None:
    """A copy where DistributedDataParallel may write over it: its ``.grad`` can be a view of the reducer's bucket."""
    distributed = dist.is_available() and dist.is_initialized()
    return gradient.clone() if gradient is not None and distributed else None


@contextmanager
def without_autocast() -> Iterator[None]:
    """Autocast off inside the block: what is compared and measured has the dtypes of the tensors."""
    with ExitStack() as stack:
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield
