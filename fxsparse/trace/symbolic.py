"""Front end S: ``torch.fx`` symbolic tracing that keeps buffers, modes and random numbers right."""

import inspect
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.proxy import TraceError as FxTraceError
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd
from torch.overrides import TorchFunctionMode

from fxsparse.errors import TraceError
from fxsparse.graph import attribute_nodes, canonical_names, is_product, operation_name, sites
from fxsparse.trace.attention import traceable_forward
from fxsparse.trace.modules import FUNCTIONAL, eligible_below, has_hooks, refuses_functional, site_type
from fxsparse.trace.user_code import reason

TRACE_FAILURES = (
    FxTraceError, TypeError, ValueError, RuntimeError, AttributeError, LookupError, NameError,
    AssertionError,
)  # fmt: skip
"""What user code raises when it meets a proxy: control flow, sizes as Python numbers, attribute checks."""

_LEAVES = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, _DropoutNd, nn.Embedding, nn.EmbeddingBag)
_OPEN = (nn.Sequential, nn.Transformer)
_FACTORIES = (
    torch.rand, torch.randn, torch.randint, torch.randperm, torch.normal, torch.bernoulli, torch.zeros,
    torch.ones,
    torch.empty, torch.full, torch.arange, torch.linspace, torch.eye, torch.tensor,
)  # fmt: skip


def trace_symbolic(
    root: nn.Module, arguments: Mapping[str, Any] | None = None
) -> tuple[fx.Graph, dict[str, str]]:
    """Trace a module in its present mode; returns its graph and {module path: why it stayed opaque}.

    `arguments`: example values by parameter name of ``forward``; the rest keep their defaults.  Values that are no
    tensors are fixed: the graph raises when called with another.  `root` may be left with proxies in its attributes,
    so pass a copy.  Raises TraceError where the forward of `root` itself cannot be traced.
    """
    if has_hooks(root):
        raise TraceError(f"{type(root).__name__} has hooks, which a trace would run once and forget")
    tracer = SiteTracer()
    try:
        with _RecordFactories(tracer):
            graph = tracer.trace(root, _fixed_arguments(root, arguments))
    except TRACE_FAILURES as error:
        raise TraceError(f"forward of {type(root).__name__}: {reason(error)}") from error
    for node in graph.nodes:
        # Otherwise generated code registers it with fx by a dotted name, which breaks every later trace.
        node.meta.pop("is_wrapped", None)
    for node in graph.find_nodes(op="placeholder"):
        node.target = tracer.parameter_names.get(str(node.target), node.target)
    return graph, tracer.opaque


def hidden_weights(gm: fx.GraphModule, opaque: Mapping[str, str]) -> dict[str, str]:
    """{eligible weight: reason} for those that the graph uses where no pass can rewrite them."""
    hidden: dict[str, str] = {}
    for node in gm.graph.find_nodes(op="call_module"):
        path = str(node.target)
        module = gm.get_submodule(path)
        refusal = refuses_functional(module)
        if refusal is None:
            continue
        why = opaque.get(path) or (refusal if site_type(module) else f"{path} runs as one module")
        hidden.update(dict.fromkeys(eligible_below(module, path), why))
    reached = {site.weight.target for site in sites(gm)}
    names = canonical_names(gm)
    for name in {names[name] for name in eligible_below(gm)}:
        for node in attribute_nodes(gm.graph, name) if name not in reached else ():
            odd = [operation_name(user) for user in node.users if not is_product(user)]
            hidden.update({name: f"its op is {', '.join(odd)}"} if odd else {})
    return hidden


class SiteTracer(fx.Tracer):
    """Tracer whose leaves are what passes want to see, and which falls back to a leaf where a trace fails."""

    def __init__(self) -> None:
        super().__init__(autowrap_functions=_FACTORIES)
        self._autowrap_search.append(torch)
        self.opaque: dict[str, str] = {}
        self.parameter_names: dict[str, str] = {}
        self._names: dict[int, str] = {}
        self._attributes: dict[str, fx.Proxy] = {}

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        self._names = {id(tensor): name for name, tensor in (*root.named_buffers(), *root.named_parameters())}
        self.parameter_names = {f"{name}_1": name for name in concrete_args or {}}
        return super().trace(root, concrete_args)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if has_hooks(m) or isinstance(m, (torch.jit.ScriptModule, *_LEAVES)):
            return True
        if traceable_forward(m) is not None or isinstance(m, _OPEN):
            return False
        if isinstance(m, tuple(FUNCTIONAL)):
            return site_type(m) is not None
        return type(m).__module__.startswith("torch.nn")

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        path = self.path_of_module(m)
        rewritten = traceable_forward(m)
        last, stack = self.graph._root.prev, self.module_stack.copy()
        try:
            return super().call_module(m, partial(rewritten, m) if rewritten else forward, args, kwargs)
        except TRACE_FAILURES as error:
            self._erase_after(last)
            self.module_stack = stack
            self.opaque[path] = f"{path} ({type(m).__name__}) runs as one module: {reason(error)}"
            return self.create_proxy("call_module", path, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, fx.Proxy]) -> Any:
        name = self._names.get(id(attr_val)) if isinstance(attr_val, Tensor) else None
        if name is None:
            return attr_val
        if name not in self._attributes:
            self._attributes[name] = self.create_proxy("get_attr", name, (), {})
        return self._attributes[name]

    def _erase_after(self, last: fx.Node) -> None:
        while self.graph._root.prev is not last:
            self.graph.erase_node(self.graph._root.prev)
        alive = set(self.graph.find_nodes(op="get_attr"))
        self._attributes = {name: proxy for name, proxy in self._attributes.items() if proxy.node in alive}


class _RecordFactories(TorchFunctionMode):
    """Makes ``torch.rand(2)`` and ``torch.zeros(2)`` nodes; otherwise the trace would keep one result for
    ever.
    """

    def __init__(self, tracer: SiteTracer) -> None:
        super().__init__()
        self.tracer = tracer

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _FACTORIES:
            return self.tracer.create_proxy("call_function", func, args, kwargs or {})
        return func(*args, **(kwargs or {}))


def _fixed_arguments(root: nn.Module, arguments: Mapping[str, Any] | None) -> dict[str, Any]:
    """Arguments of forward that are no tensors: their example values, else their defaults."""
    fixed = {}
    for name, parameter in inspect.signature(type(root).forward).parameters.items():
        if name == "self" or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        value = (arguments or {}).get(name, parameter.default)
        if value is None or isinstance(value, (bool, int, float, str)):
            fixed[name] = value
    return fixed
