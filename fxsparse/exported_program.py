"""Programs that ``torch.export`` made: graphs already, which check their inputs by hooks and refuse modes."""

import copy

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.fx.graph import _PyTreeCodeGen

from fxsparse.errors import TraceError
from fxsparse.graph import owner
from fxsparse.skeleton import SHARED_DICTS, bind, copy_structure

_MARK = "fxsparse_exported"


def is_exported(model: nn.Module) -> bool:
    """Whether this is the ``module()`` of an exported program, or what `opened` made of it."""
    return isinstance(model, GraphModule) and (_MARK in model.meta or _refuses_modes(model))


def opened(model: nn.Module) -> nn.Module:
    """A structural copy of an exported program's module without guards and hooks; any other model itself.

    TraceError for a size of an input that is computed from another, such as ``2 * batch``.
    """
    if not isinstance(model, GraphModule) or not _refuses_modes(model):
        return model
    graph = copy.deepcopy(model.graph)
    for node in graph.find_nodes(op="call_module", target="_guards_fn"):
        graph.erase_node(node)
    for node in graph.find_nodes(op="placeholder"):
        value = node.meta.get("val")
        for size in value.shape if isinstance(value, Tensor) else ():
            if isinstance(size, torch.SymInt) and not size.node.expr.is_Atom:
                raise TraceError(
                    f"expected an exported program whose input sizes are numbers or symbols, got {list(value.shape)} "
                    f"as {node.target!r}: export the model with a Dim of its own for every size."
                )
    skeleton = copy_structure(model)
    skeleton._modules.pop("_guards_fn", None)
    for node in graph.find_nodes(op="get_attr"):
        module, leaf = owner(skeleton, str(node.target))
        if isinstance(vars(module).get(leaf), Tensor):  # a constant
            module.register_buffer(leaf, module.__dict__.pop(leaf), persistent=False)
    gm = bind(graph, skeleton)
    gm.meta[_MARK] = True
    return gm


def tree_of(model: nn.Module) -> nn.Module:
    """The modules below an exported graph, which is kept beside them; any other model itself."""
    if not is_exported(model):
        return model
    tree = nn.Module()
    tree.__dict__.update({name: model.__dict__[name] for name in (*SHARED_DICTS, "training")})
    return tree


def refuse_exported(model: nn.Module, call: str) -> None:
    """Raise TraceError for an exported program's module."""
    if is_exported(model):
        raise TraceError(
            f"{call}: expected a model that trains and evaluates, got the module of an exported program, whose graph "
            "is that of one mode; pass the model that was exported. mode='infer' and count_flops take such modules."
        )


def _refuses_modes(model: GraphModule) -> bool:
    return "train" in vars(model) and isinstance(model.graph._codegen, _PyTreeCodeGen)
