"""Values for a model on the meta device, drawn as its own modules draw them and never dense for a compact weight.

A module's ``reset_parameters`` runs while its compact weights are still on meta.  What it does to them is recorded, and
repeated later on the stored entries alone.
"""

import functools
import inspect
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fxsparse.errors import CheckpointError, PlanError
from fxsparse.graph import owner
from fxsparse.rng import generator_for
from fxsparse.verify import RUN_FAILURES

AT_CREATION = -2
"""The step number that seeds initial values; -1 seeds initial masks."""
_NAMED = 5
"""Further tensors that a message names."""
_RESETS = ("reset_parameters", "_reset_parameters")


@dataclass
class Draw:
    """How a module initialises one weight: ops that treat every entry alike, in order."""

    numel: int
    calls: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)
    """(in-place op, its arguments after the tensor)."""
    refusal: str | None = None
    """Why its entries cannot be drawn one by one."""

    def values(
        self, count: int, dtype: torch.dtype, device: torch.device, generator: torch.Generator
    ) -> Tensor:
        """Values for `count` entries, [count], distributed as those of the dense weight would be."""
        values = torch.empty(count, dtype=dtype, device=generator.device)
        for op, args, kwargs in self.calls:
            random = any(argument.name == "generator" for argument in op._schema.arguments)
            op(values, *args, **(kwargs | {"generator": generator} if random else kwargs))
        return values.to(device)

    def record(self, op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note that `op` wrote to ``args[0]``, the weight or a part of it."""
        if args[0].numel() != self.numel:
            self.refusal = f"{op} initialises a part of it"
        elif any(isinstance(value, Tensor) for value in (*args[1:], *kwargs.values())):
            self.refusal = f"{op} initialises it from other tensors"
        else:
            self.calls.append((op, args[1:], kwargs))


def create_tensors(
    root: nn.Module, device: torch.device, seed: int, compact: Collection[str]
) -> Mapping[str, Draw]:
    """Give every meta tensor of the tree but the `compact` weights memory on `device` and initial values, in place.

    Values come from the module's own ``reset_parameters`` (or ``_reset_parameters``), children first as constructors
    run, then from an ``_init_weights(module)`` of a module above it (transformers, timm); they depend on `seed` and the
    module's path alone.  Tensors that were real keep their values.  Returns how the
    values of each weight in `compact` are to be drawn.

    Raises:
        PlanError: a tensor that no module initialises, or a compact weight whose entries are not drawn alike.
    """
    weights = {name: root.get_parameter(name) for name in compact}
    draws = {_storage(weight): Draw(weight.numel()) for weight in weights.values()}
    kept = {id(t) for t in _own_tensors(*root.modules()) if not t.is_meta}
    _allocate(root, device, {id(weight) for weight in weights.values()})
    writes = _Writes(draws)
    for path, module in reversed(list(root.named_modules())):
        _reset(root, path, module, seed, kept, writes)
    unknown = {}
    for name, tensor in (*root.named_parameters(), *root.named_buffers()):
        refusal = draws.get(_storage(tensor), Draw(0)).refusal
        if tensor.numel() and id(tensor) not in kept and (_storage(tensor) not in writes.seen or refusal):
            unknown[name] = refusal
    if unknown:
        raise PlanError(_not_initialised(root, unknown))
    return {name: draws[_storage(weight)] for name, weight in weights.items()}


def take_tensors(root: nn.Module, values: Mapping[str, Tensor], compact: Collection[str]) -> None:
    """Give every meta tensor of the tree but the `compact` weights the saved value of its name, in place.

    Raises:
        CheckpointError: no value, or one of another shape or dtype.
    """
    left = {id(root.get_parameter(name)) for name in compact}
    named = (*root.named_parameters(remove_duplicate=False), *root.named_buffers(remove_duplicate=False))
    found: dict[int, Tensor] = {}
    for name, tensor in named:
        value = values.get(name)
        if (
            value is not None
            and (value.shape, value.dtype) != (tensor.shape, tensor.dtype)
            and id(tensor) not in left
        ):
            advice = f"Convert the model first: model.to({value.dtype})."
            raise CheckpointError(
                f"{name!r}: expected {tensor.dtype} {list(tensor.shape)} as in the model, got {value.dtype} "
                f"{list(value.shape)}. {advice if value.shape == tensor.shape else 'Is it of another model?'}"
            )
        if value is not None and tensor.is_meta:
            made = value.detach().clone()
            found.setdefault(
                id(tensor),
                nn.Parameter(made, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else made,
            )
    for name, tensor in named:
        if not tensor.is_meta or id(tensor) in left:
            continue
        if id(tensor) not in found:
            raise CheckpointError(f"{name!r}: expected a saved value, got none. Is it of another model?")
        module, leaf = owner(root, name)
        setattr(module, leaf, found[id(tensor)])


class _Writes(TorchDispatchMode):
    """Sees which storages are written inside the block, and records what is done to the watched ones."""

    def __init__(self, draws: Mapping[int, Draw]) -> None:
        super().__init__()
        self.draws, self.seen = draws, set[int]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            for tensor in value if isinstance(value, list | tuple) else (value,):
                self.seen.add(_storage(tensor))
                if _storage(tensor) in self.draws:
                    self.draws[_storage(tensor)].record(func, args, kwargs)
        return func(*args, **kwargs)


def _allocate(root: nn.Module, device: torch.device, left: Collection[int]) -> None:
    """Memory, without values, for every meta tensor whose id is not in `left`; shared tensors stay shared."""
    made: dict[int, Tensor] = {}
    for module in root.modules():
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is None or not tensor.is_meta or id(tensor) in left:
                continue
            if id(tensor) not in made:
                new = torch.empty_like(tensor, device=device)
                made[id(tensor)] = (
                    nn.Parameter(new, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else new
                )
            setattr(
                module, name, made[id(tensor)]
            )  # not into the dict: RNNs keep a second list of their weights


def _reset(
    root: nn.Module, path: str, module: nn.Module, seed: int, kept: Collection[int], writes: _Writes
) -> None:
    """Run the module's initialisation if it has one and something of its own, or all below it, was on meta."""
    resets = _resets(root, path, module)
    below = list(_own_tensors(*module.modules()))
    real = [tensor for tensor in below if id(tensor) in kept]
    own_is_new = any(id(tensor) not in kept for tensor in _own_tensors(module))
    if not resets or not (own_is_new or (below and not real)):
        return
    saved = [tensor.detach().clone() for tensor in real]
    key = int(generator_for(seed, path, AT_CREATION).initial_seed())
    try:
        with torch.random.fork_rng(), torch.no_grad(), writes:
            torch.manual_seed(key)
            for reset in resets:
                reset()
    except RUN_FAILURES as error:
        raise PlanError(
            f"{path or 'the model'} ({type(module).__name__}) is on meta, and its initialisation fails there: "
            f"{type(error).__name__}: {error}. Create this module on a real device{_or_assigned(root, path, module)}; "
            "others may stay on meta."
        ) from error
    with torch.no_grad():
        for tensor, value in zip(real, saved, strict=True):
            tensor.copy_(value)


def _resets(root: nn.Module, path: str, module: nn.Module) -> list[Callable[[], Any]]:
    """The module's own reset, then the ``_init_weights(module)`` of the nearest module above, where there are such."""
    found = [getattr(module, name, None) for name in _RESETS]
    resets = [reset for reset in found if callable(reset)][:1]
    parts = path.split(".") if path else []
    above = (root.get_submodule(".".join(parts[:k])) for k in range(len(parts), -1, -1))
    weights: Any = next((m._init_weights for m in above if hasattr(m, "_init_weights")), None)
    if callable(weights) and len(inspect.signature(weights).parameters) == 1:
        resets.append(functools.partial(weights, module))
    return resets


def _not_initialised(root: nn.Module, unknown: Mapping[str, str | None]) -> str:
    """`unknown`: {tensor: what its initialisation does that cannot be drawn; None without any}."""
    name, *others = unknown
    module, _ = owner(root, name)
    why = unknown[name] or f"{type(module).__name__} has no reset_parameters() that writes it"
    more = (
        f" (so are {', '.join(map(repr, others[:_NAMED]))}{', ...' * (len(others) > _NAMED)})"
        if others
        else ""
    )
    return (
        f"{name!r} is on the meta device and its initial values are unknown{more}: {why}. Assign real values before "
        f"compile, as in `{_assignment(root, name)}`; or give it a reset_parameters() that initialises its tensors, "
        "each compact weight with in-place ops that treat all entries alike (uniform_, normal_, ...)."
    )


def _or_assigned(root: nn.Module, path: str, module: nn.Module) -> str:
    """What else works for a module whose own tensors alone keep it from being left as it is."""
    own = [name for name, t in module.named_parameters(path, recurse=False) if t.is_meta]
    return (
        f", or assign real values to its own parameters, as in `{_assignment(root, own[0])}`" if own else ""
    )


def _assignment(root: nn.Module, name: str) -> str:
    """The statement that gives a tensor of the model memory and zeros."""
    module, leaf = owner(root, name)
    tensor, path = getattr(module, leaf), name.rpartition(".")[0]
    of = f"model.get_submodule({path!r})" if path else "model"
    dtype = "" if tensor.dtype == torch.get_default_dtype() else f", dtype={tensor.dtype}"
    value = f"torch.zeros({', '.join(map(str, tensor.shape)) or '()'}{dtype})"
    return f"{of}.{leaf} = " + (f"nn.Parameter({value})" if isinstance(tensor, nn.Parameter) else value)


def _own_tensors(*modules: nn.Module) -> Iterator[Tensor]:
    for module in modules:
        yield from (t for t in (*module._parameters.values(), *module._buffers.values()) if t is not None)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
