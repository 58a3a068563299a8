"""Does a program compute what the model computes?  One eval pass and one seeded train step, compared tensor
by tensor.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from math import inf
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from fxsparse.graph import strided_parts
from fxsparse.inputs import CPU, has_meta, on_device, split_inputs, stand_in
from fxsparse.skeleton import substituted

RUN_FAILURES = (
    RuntimeError,
    TypeError,
    ValueError,
    AttributeError,
    LookupError,
    AssertionError,
    NotImplementedError,
)
_RELATIVE = {torch.float64: 1e-8, torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 3e-2}
"""Rounding that a reordered sum may cost, relative to a tensor's largest entry; a wrong trace is off by
about 1."""
_NOISE = 1e-2
"""Share of that which gradients of exactly zero (a bias before BatchNorm) may show, relative to the largest
gradient."""


@dataclasses.dataclass(frozen=True)
class Observation:
    """What one call showed: output structure, and tensors by name (outputs, then gradients and buffers)."""

    structure: Any
    tensors: dict[str, Tensor]


def observe(
    root: nn.Module,
    call: Callable[..., Any],
    example_inputs: Any,
    *,
    training: bool,
    device: torch.device = CPU,
) -> Observation:
    """Run `call` on copies of the inputs with the tree `root` in a mode, seeded; nothing of `root` changes.

    Also the buffers that the call wrote, or assigned.  In training also the gradients of a fixed random projection of
    the float outputs (their plain sum is constant for a softmax), and all buffers after the call.  Where a tensor is on
    meta only shapes are seen, of fake tensors that stand on `device` for those on meta.
    """
    fake = FakeTensorMode(allow_non_fake_inputs=True) if has_meta(root) or has_meta(example_inputs) else None
    device = on_device(root, device)
    with frozen_state(root, training=training, fake=fake, device=device):
        args, kwargs = copied_inputs(example_inputs, fake=fake, device=device)
        before = {name: (buffer, _stamp(buffer)) for name, buffer in root.named_buffers()}
        with torch.set_grad_enabled(training):
            output = call(*args, **kwargs)
        leaves, structure = pytree.tree_flatten(output)
        seen = {
            f"output {k}{suffix}": part
            for k, leaf in enumerate(leaves)
            if _is_number(leaf)
            for suffix, part in strided_parts(_as_tensor(leaf)).items()
        }
        if training:
            seen |= _gradients(root, list(seen.values()))
        seen |= {
            f"buffer {name}{suffix}": part.detach().clone()
            for name, buffer in root.named_buffers()
            if training or _is_written(buffer, *before.get(name, (None, 0)))
            for suffix, part in strided_parts(buffer).items()
        }
    return Observation(structure, {name: tensor.detach() for name, tensor in seen.items()})


def compare(expected: Observation, got: Observation, graph: GraphModule | None = None) -> str | None:
    """The first thing that differs, in words with its size; None where all is equal up to rounding.

    `graph`: whose values' dtypes say how coarsely is rounded on the way to outputs of finer ones.
    """
    if expected.structure != got.structure:
        return f"the output should be {expected.structure}, got {got.structure}"
    values = () if graph is None else [node.meta.get("val") for node in graph.graph.nodes]
    dtypes = {leaf.dtype for leaf in pytree.tree_leaves(values) if isinstance(leaf, Tensor)}
    return first_difference(expected.tensors, got.tensors, max(map(_rounding, dtypes), default=0.0))


def first_difference(
    expected: Mapping[str, Tensor], got: Mapping[str, Tensor], rounding: float = 0.0
) -> str | None:
    """The first of the expected tensors that is missing or different, with its largest error; None if there
    is none.  `rounding`: what may differ in any, relative to its largest entry.
    """
    scales: dict[str, float] = {}
    for name, want in expected.items():
        scales[name.split()[0]] = max(scales.get(name.split()[0], 0.0), _largest(want))
    for name, want in expected.items():
        if name not in got:
            return f"{name} is missing"
        if reason := _difference(want, got[name], scales[name.split()[0]], rounding):
            return f"{name} {reason}"
    return None


def largest_error(expected: Observation, got: Observation) -> float:
    """Largest difference in a tensor of floats relative to its largest entry; of what was rounded on purpose.

    inf where structure, shapes, dtypes or the entries that are finite differ.
    """
    if expected.structure != got.structure or expected.tensors.keys() != got.tensors.keys():
        return inf
    pairs = [(want, got.tensors[name]) for name, want in expected.tensors.items()]
    return max((_error(want, have) for want, have in pairs if _rounding(want.dtype)), default=0.0)


@contextmanager
def frozen_state(
    root: nn.Module,
    *,
    training: bool,
    fake: FakeTensorMode | None = None,
    device: torch.device = CPU,
) -> Iterator[None]:
    """Inside the block `root` is in a mode, with copies of its buffers and seeded random numbers.

    Afterwards mode, buffers and the random state are as before.  With `fake`, that mode is on inside and fake tensors
    stand in for those of `root`.
    """
    modes = [(module, module.training) for module in root.modules()]
    parameter, buffer = None, lambda b: b.detach().clone()
    if fake is not None:
        parameter, buffer = (lambda t: stand_in(t, fake, device),) * 2
    try:
        with substituted(root, parameter, buffer), torch.random.fork_rng(), fake or nullcontext():
            torch.manual_seed(0)
            root.train(training)
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def copied_inputs(
    example_inputs: Any, *, fake: FakeTensorMode | None = None, device: torch.device = CPU
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments with every tensor cloned, so that in-place ops do no harm, or faked.

    What is one tensor stays one.
    """
    made: dict[int, Tensor] = {}

    def copy(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        if id(leaf) not in made:
            made[id(leaf)] = leaf.detach().clone() if fake is None else stand_in(leaf, fake, device)
        return made[id(leaf)]

    return pytree.tree_map(copy, split_inputs(example_inputs))


def _is_written(buffer: Tensor, before: Tensor | None, stamp: Tensor | int) -> bool:
    """Whether a call changed a buffer that was there before; the values are looked at where another took its place."""
    if before is None or isinstance(buffer, FakeTensor):
        return False
    if buffer is before and isinstance(stamp, int):
        return buffer._version != stamp
    was = stamp if isinstance(stamp, Tensor) else before
    return buffer.shape != was.shape or buffer.dtype != was.dtype or not torch.equal(buffer, was)


def _stamp(buffer: Tensor) -> Tensor | int:
    """What tells whether it was written: a number that grows, or a copy where inference mode counts no writes."""
    return buffer.clone() if buffer.is_inference() else buffer._version


def _gradients(root: nn.Module, outputs: list[Tensor]) -> dict[str, Tensor]:
    wanted = {name: p for name, p in root.named_parameters() if p.requires_grad}
    losses = [_projection(out) for out in outputs if out.requires_grad]
    if not losses or not wanted:
        return {}
    grads = torch.autograd.grad(torch.stack(losses).sum(), list(wanted.values()), allow_unused=True)
    return {
        f"gradient of {name}{suffix}": part
        for name, grad in zip(wanted, grads, strict=True)
        if grad is not None
        for suffix, part in strided_parts(grad).items()
    }


def _projection(out: Tensor) -> Tensor:
    out = _real(out)
    weights = torch.arange(out.numel(), device=out.device, dtype=torch.float32).cos().view(out.shape)
    return (out * weights).sum().float()


def _difference(want: Tensor, have: Tensor, scale: float, rounding: float) -> str | None:
    if want.shape != have.shape or want.dtype != have.dtype:
        return f"should be {want.dtype} {tuple(want.shape)}, got {have.dtype} {tuple(have.shape)}"
    if isinstance(want, FakeTensor) or isinstance(have, FakeTensor) or not want.numel():
        return None
    want, have = _real(want), _real(have)
    if not want.is_floating_point():
        return (
            None
            if torch.equal(want, have)
            else f"differs in {int((want != have).sum())} of {want.numel()} entries"
        )
    error = _largest(_wide(want) - _wide(have))
    if not torch.equal(want.isfinite(), have.isfinite()):
        return "differs in which entries are finite"
    tolerance = max(rounding, _rounding(want.dtype))
    if error <= tolerance * (_largest(want) + _NOISE * scale):
        return None
    return f"differs by {error:.3g} where its largest entry is {_largest(want):.3g}"


def _error(want: Tensor, have: Tensor) -> float:
    if want.shape != have.shape or want.dtype != have.dtype:
        return inf
    if not torch.equal(want.isfinite(), have.isfinite()):
        return inf
    want, have = _real(want), _real(have)
    return _largest(want - have) / max(_largest(want), torch.finfo(torch.float32).tiny)


def _largest(tensor: Tensor) -> float:
    if isinstance(tensor, FakeTensor) or not tensor.numel() or not tensor.is_floating_point():
        return 0.0
    return torch.nan_to_num(_wide(tensor), posinf=0.0, neginf=0.0).abs().max().item()


def _rounding(dtype: torch.dtype) -> float:
    """Relative to the largest entry; 0 for whole numbers and truths."""
    if dtype.is_complex:
        dtype = dtype.to_real()
    return _RELATIVE.get(dtype, 3e-2) if dtype.is_floating_point else 0.0


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _real(tensor: Tensor) -> Tensor:
    """Complex numbers as pairs."""
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def _is_number(leaf: Any) -> bool:
    return isinstance(leaf, (Tensor, bool, int, float))


def _as_tensor(leaf: Any) -> Tensor:
    return leaf if isinstance(leaf, Tensor) else torch.tensor(leaf)
