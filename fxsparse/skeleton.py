"""The structural copy of a model that a program runs on, and graphs bound to it."""

import copy
import functools
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Graph, GraphModule

from fxsparse.errors import TraceError
from fxsparse.graph import canonical_names, fetch, owner, strided_parts

SHARED_DICTS = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")


def copy_structure(model: nn.Module) -> nn.Module:
    """New module objects of the same classes that hold the very same parameters and buffers.

    Shared submodules stay shared; lists, dicts, bound methods and partials that mention modules of the tree mention
    their copies.  TorchScript modules cannot be copied this way and are shared.
    """
    copies = {
        id(m): object.__new__(type(m)) for m in model.modules() if not isinstance(m, torch.jit.ScriptModule)
    }
    for module in model.modules():
        if id(module) in copies:
            copies[id(module)].__dict__.update(_copied_dict(module, copies))
    return copies.get(id(model), model)


def without_values(model: nn.Module) -> nn.Module:
    """A structural copy with every parameter and buffer on meta; what is shared stays shared."""
    shell = copy_structure(model)
    made: dict[int, Tensor] = {}
    for module in shell.modules():
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                empty = tensor.detach().to("meta")
                if isinstance(tensor, nn.Parameter):
                    empty = nn.Parameter(empty, tensor.requires_grad)
                setattr(module, name, made.setdefault(id(tensor), empty))
    return shell


def bind(graph: Graph, skeleton: nn.Module) -> GraphModule:
    """A GraphModule that runs `graph` on the skeleton's own dicts of parameters, buffers and modules.

    So ``.to()``, loading, unused parameters, key names and their order are the skeleton's by construction.
    """
    gm = GraphModule(nn.Module(), Graph())
    gm.__dict__.update({name: skeleton.__dict__[name] for name in SHARED_DICTS})
    gm.training = skeleton.training
    graph._tracer_cls = None
    gm.graph = graph
    return gm


def copy_graphs(graphs: Mapping[str, GraphModule], skeleton: nn.Module) -> dict[str, GraphModule]:
    """Graphs bound to another tree; one object stays one object."""
    copies = {id(gm): bind(copy.deepcopy(gm.graph), skeleton) for gm in graphs.values()}
    return {mode: copies[id(gm)] for mode, gm in graphs.items()}


def adopt(graph: Graph, source: nn.Module, skeleton: nn.Module) -> None:
    """Make every name of `graph`, which runs on `source`, a name of the skeleton, in place.

    Parameters get their first name; tensors without a place in the tree become non-persistent buffers of the skeleton
    (one per value); graph modules become its submodules.  TraceError where the trace assigned a buffer of `source`,
    which no node of the graph does.
    """
    for path, module in source.named_modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and not isinstance(buffer, Tensor):
                where = f"{path}.{name}" if path else name
                raise TraceError(
                    f"the forward assigns the buffer {where!r}, which a graph of it would forget"
                )
    names = canonical_names(skeleton)
    buffers = {name for name, _ in skeleton.named_buffers(remove_duplicate=False)}
    for node in graph.find_nodes(op="get_attr"):
        target = str(node.target)
        if target in names:
            node.target = names[target]
        elif target not in buffers:
            node.target = _lift(fetch(source, target), target, skeleton)


@contextmanager
def substituted(
    root: nn.Module,
    parameter: Callable[[nn.Parameter], Tensor] | None = None,
    buffer: Callable[[Tensor], Tensor] | None = None,
) -> Iterator[None]:
    """Inside the block, the tree holds ``parameter(p)`` and ``buffer(b)`` in the places of its tensors.

    Shared tensors stay shared.  Whatever the block does to buffers, in place or by assignment, is undone.
    """
    saved = [(m, dict(m._parameters), dict(m._buffers)) for m in root.modules()]
    made: dict[int, Any] = {}

    def through(change: Callable[[Any], Tensor] | None, tensor: Tensor | None) -> Any:
        if tensor is None or change is None:
            return tensor
        return made.setdefault(id(tensor), change(tensor)) if id(tensor) not in made else made[id(tensor)]

    try:
        for module, parameters, buffers in saved:
            module._parameters.update({name: through(parameter, p) for name, p in parameters.items()})
            module._buffers.update({name: through(buffer, b) for name, b in buffers.items()})
            _refresh_list(module)
        yield
    finally:
        for module, parameters, buffers in saved:
            module._parameters.clear()
            module._parameters.update(parameters)
            module._buffers.clear()
            module._buffers.update(buffers)
            _refresh_list(module)


def _refresh_list(module: nn.Module) -> None:
    """RNNs keep a second list of their weights, and compute with that."""
    if isinstance(module, nn.RNNBase):
        module.__dict__["_flat_weights"] = [
            module._parameters.get(name) for name in module._flat_weights_names
        ]


def _copied_dict(module: nn.Module, copies: dict[int, Any]) -> dict[str, Any]:
    rebuilt: dict[int, Any] = {}
    state = {key: _rebuilt(value, copies, rebuilt) for key, value in module.__dict__.items()}
    for name in ("_parameters", "_buffers"):
        state[name] = module.__dict__[name].copy()
    return state


def _rebuilt(value: Any, copies: dict[int, Any], rebuilt: dict[int, Any]) -> Any:
    """The value with every module of the tree replaced by its copy; containers are new objects."""
    if id(value) in copies:
        return copies[id(value)]
    if id(value) in rebuilt:
        return rebuilt[id(value)]
    again = functools.partial(_rebuilt, copies=copies, rebuilt=rebuilt)
    if type(value) in (dict, OrderedDict):
        rebuilt[id(value)] = new = type(value)()
        new.update((key, again(item)) for key, item in value.items())
        return new
    if type(value) is list:
        rebuilt[id(value)] = new = []
        new.extend(again(item) for item in value)
        return new
    if type(value) in (tuple, set):
        return type(value)(again(item) for item in value)
    if type(value) is MethodType and id(value.__self__) in copies:
        return MethodType(value.__func__, copies[id(value.__self__)])
    if type(value) is functools.partial:
        return functools.partial(again(value.func), *map(again, value.args), **again(value.keywords))
    return value


def _lift(value: Any, target: str, skeleton: nn.Module) -> str:
    if isinstance(value, GraphModule):
        return _lift_module(value, skeleton)
    if not isinstance(value, Tensor):
        raise TraceError(
            f"the graph reads {target!r}, a {type(value).__name__}; only tensors can be kept in it"
        )
    if isinstance(value, FakeTensor):
        raise TraceError(
            f"the graph reads {target!r}, a tensor without values, which torch.export leaves of what it does not "
            "follow, such as torch.func.grad"
        )
    value = value.detach()
    for name, buffer in skeleton._buffers.items():
        if name.startswith("_constant_") and _same_constant(buffer, value):
            return name
    holder, last = _place(skeleton, target)
    name = last if holder is not skeleton else _fresh(skeleton, "_constant_")
    holder.__dict__.pop(name, None)
    holder.register_buffer(name, value, persistent=False)
    return target if holder is not skeleton else name


def _place(skeleton: nn.Module, target: str) -> tuple[nn.Module, str]:
    """Where a plain tensor attribute of a submodule stays; constants of a trace go to the root."""
    try:
        holder, last = owner(skeleton, target)
    except AttributeError:
        return skeleton, target
    return (holder, last) if isinstance(holder.__dict__.get(last), Tensor) else (skeleton, target)


def _lift_module(region: GraphModule, skeleton: nn.Module) -> str:
    """Keep a region of an exported graph (no_grad, autocast, a branch of cond) as a submodule of the skeleton."""
    for node in region.graph.find_nodes(op="get_attr"):
        inner = fetch(region, str(node.target))
        if not isinstance(inner, GraphModule):
            raise TraceError(f"a region of the exported graph owns {node.target!r}; it should be an argument")
    for inner in region.modules():
        if isinstance(inner, GraphModule):
            inner._tracer_cls = None  # torch 2.11 cannot make that of an export again from a pickle
    name = _fresh(skeleton, "_region_")
    skeleton.add_module(name, region)
    return name


def _fresh(skeleton: nn.Module, prefix: str) -> str:
    return next(f"{prefix}{k}" for k in range(10**6) if not hasattr(skeleton, f"{prefix}{k}"))


def _same_constant(ours: Tensor | None, theirs: Tensor) -> bool:
    if ours is None or ours.is_meta or theirs.is_meta or type(ours) is not type(theirs):
        return ours is theirs
    if (ours.dtype, ours.device, ours.layout) != (theirs.dtype, theirs.device, theirs.layout):
        return False
    pairs = zip(strided_parts(ours).values(), strided_parts(theirs).values(), strict=True)
    return all(torch.equal(one, other) for one, other in pairs)
