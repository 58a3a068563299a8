"""What one run of a graph on copies shows: whether its weights may be taken for constants."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree

from fxsparse.backend.held import HeldGraph, with_weights_folded
from fxsparse.skeleton import substituted
from fxsparse.verify import RUN_FAILURES

LEAST_ZEROS = 0.1
"""Share of zeros that at least one weight must have: below it no kernel gains, and measuring costs."""


@dataclass(frozen=True)
class Trial:
    """What was seen."""

    refusal: str | None
    """Why no weight is taken for a constant."""
    differentiable: tuple[bool, ...] = ()
    """Of each output, whether a gradient may be asked for."""
    of_values: bool = False
    """Whether other weights in the same graph may be taken for constants."""


def try_graph(held: HeldGraph) -> Trial:
    """Run a held graph once on copies of its tensors and inputs, in the caller's grad mode; nothing of it changes."""
    if reason := _why_not_run(held):
        return Trial(reason)
    weights = [weight for weight in with_weights_folded(held).parameters() if weight.dim() > 1]
    if not weights:
        return Trial("it has no weight of two dimensions or more")
    if reason := _why_unseen(held) or _why_dense(weights):
        return Trial(reason, of_values=True)
    grad = torch.is_grad_enabled()
    with (
        torch.inference_mode(False),
        torch.set_grad_enabled(grad),
        torch.random.fork_rng(),
        substituted(held.root, _copied, _copied),
    ):
        return _run(held)


def _why_not_run(held: HeldGraph) -> str | None:
    own = list(held.tensors().values())
    if any(torch.is_autocast_enabled(kind) for kind in {tensor.device.type for tensor in own}):
        return "autocast is on around it, and kernels are measured in the dtypes of the weights"
    for tensor in (*own, *(value for value in held.examples if isinstance(value, Tensor))):
        if isinstance(tensor, FakeTensor) or tensor.is_meta:
            return "it is compiled without values"
        if type(tensor) not in (Tensor, nn.Parameter):
            return f"it computes with a {type(tensor).__name__}, whose entries no kernel reads"
        if tensor.layout != torch.strided:
            return f"it computes with a tensor of layout {tensor.layout}"
    return None


def _why_unseen(held: HeldGraph) -> str | None:
    unseen = any(tensor.is_inference() for tensor in held.tensors().values())
    return "its weights are inference tensors, whose changes nobody can see" if unseen else None


def _why_dense(weights: Sequence[Tensor]) -> str | None:
    most = max(_zeros(weight) for weight in weights)
    if most < LEAST_ZEROS:
        return f"no weight has more than {most:.1%} zeros, where kernels that skip them start to gain"
    return None


def _run(held: HeldGraph) -> Trial:
    inside = held.tensors()
    versions = {name: tensor._version for name, tensor in inside.items()}
    args = [_copied(value) if isinstance(value, Tensor) else value for value in held.examples]
    given = [(value, value._version) for value in args if isinstance(value, Tensor)]
    drawn = _random_state()
    try:
        outputs = pytree.tree_leaves(held.root(*args))
    except RUN_FAILURES as error:
        return Trial(f"it does not run on copies of its inputs: {type(error).__name__}: {error}")
    differentiable = tuple(isinstance(out, Tensor) and out.requires_grad for out in outputs)
    return Trial(
        _why_written({name: tensor._version - versions[name] for name, tensor in inside.items()})
        or _why_shared(inside, outputs)
        or ("it draws random numbers" if drawn != _random_state() else None)
        or (_why_not_twice(given, outputs) if any(differentiable) else None),
        differentiable,
    )


def _why_written(writes: Mapping[str, int]) -> str | None:
    written = [name for name, count in writes.items() if count]
    return f"it writes to {written[0]}" if written else None


def _why_shared(inside: Mapping[str, Tensor], outputs: Sequence[Any]) -> str | None:
    ours = {tensor.untyped_storage().data_ptr(): name for name, tensor in inside.items() if tensor.numel()}
    found = [ours.get(out.untyped_storage().data_ptr()) for out in outputs if isinstance(out, Tensor)]
    return next((f"an output is {name} or a view of it" for name in found if name), None)


def _why_not_twice(given: Sequence[tuple[Tensor, int]], outputs: Sequence[Any]) -> str | None:
    """Why a backward cannot run the graph a second time."""
    if any(tensor._version != version for tensor, version in given):
        return "it writes to an input, and gradients may be asked for"
    theirs = {tensor.untyped_storage().data_ptr() for tensor, _ in given if tensor.numel()}
    shared = any(isinstance(out, Tensor) and out.untyped_storage().data_ptr() in theirs for out in outputs)
    return "an output is an input or a view of one, and gradients may be asked for" if shared else None


def _copied(tensor: Tensor) -> Tensor:
    copy = tensor.detach().clone()
    return (
        nn.Parameter(copy, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else _like(copy, tensor)
    )


def _like(copy: Tensor, tensor: Tensor) -> Tensor:
    return copy.requires_grad_() if tensor.requires_grad else copy


def _random_state() -> list[bytes]:
    states = [torch.get_rng_state()]
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states.append(torch.cuda.get_rng_state())
    return [state.numpy().tobytes() for state in states]


def _zeros(weight: Tensor) -> float:
    """Share of zeros."""
    return 1 - torch.count_nonzero(weight).item() / max(1, weight.numel())
