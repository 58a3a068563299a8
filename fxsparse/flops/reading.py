"""What counting has to know about a graph to read one of its calls."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from sympy import Expr, Integer, Symbol, sympify
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from fxsparse.einsum import Label, einsum_call, labels
from fxsparse.flops.site import BATCH, SEQUENCE, CallSite, Shape, with_sizes
from fxsparse.graph import (
    argument,
    canonical_names,
    example_size,
    factors,
    fetch,
    sizes_by_data,
    weight_source,
)

PRODUCTS = ("matmul", "addmm", "einsum", "attention")
NORMS_AND_POOLS = ("batch_norm", "layer_norm", "max_pool", "adaptive_avg_pool")


@dataclass(frozen=True)
class Reading:
    """A graph, its symbolic sizes by our names, and the nodes that depend on a trained parameter."""

    gm: GraphModule
    symbols: Mapping[Symbol, Expr]
    differentiable: frozenset[Node]
    names: Mapping[str, str]
    """{every name of a parameter: its first name}"""
    sizes: Mapping[Symbol, int]
    """Example size of every symbol but `BATCH`, and of that too where `samples` is above 1."""
    samples: int
    """The example's batch where it is not symbolic, or other sizes depend on values; else 1."""

    @classmethod
    def of(cls, gm: GraphModule) -> "Reading":
        """Look through a graph once."""
        given = [node.meta.get("val") for node in gm.graph.nodes if node.op == "placeholder"]
        inputs = pytree.tree_leaves(given)
        inputs = [value for value in inputs if isinstance(value, Tensor) and value.dim()]
        named = {"batch": BATCH, "sequence": SEQUENCE}
        known = gm.meta.get("symbols")
        symbols = _symbols(inputs) if known is None else {known[name]: named[name] for name in known}
        symbolic = BATCH in symbols.values()
        by_data = {size: with_sizes(at, symbols) for size, at in gm.meta.get("by_data", {}).items()}
        samples = 1 if symbolic or not inputs else example_size(inputs[0].shape[0], gm) or 1
        samples = gm.meta.get("example_batch", samples)
        sizes = _sizes(inputs, symbols) | ({BATCH: samples} if symbolic and samples > 1 else {})
        return cls(gm, symbols | by_data, _differentiable(gm), canonical_names(gm), sizes, samples)

    def site(self, node: Node, op: str) -> CallSite:
        """The call at a node that is known to run `op`."""
        if op in PRODUCTS:
            return _product(self, node, op)
        if op in NORMS_AND_POOLS:
            return _norm_or_pool(self, node, op)
        if node.op == "call_module":
            return _weight_module(self, node, op)
        return _weight_call(self, node, op)

    def has_values(self, node: Node) -> bool:
        """Whether the shapes of a call are known."""
        metas = [part.meta for part in (node, *node.all_input_nodes)]
        return all("val" in meta and sizes_by_data(meta["val"]) <= self.symbols.keys() for meta in metas)

    def shape(self, node: Any) -> Shape:
        """The sizes of a node's value, of the first one where there are several."""
        value = pytree.tree_leaves(node.meta["val"])[0]
        return tuple(_expression(size, self.symbols) for size in value.shape)

    def gradients(self, *inputs: Any) -> int:
        """How many of these values need a gradient."""
        return sum(node in self.differentiable for node in inputs)


def _symbols(inputs: Iterable[Tensor]) -> dict[Symbol, Symbol]:
    names: dict[Symbol, Symbol] = {}
    for value in inputs:
        tokens = value.dim() == 3 or (value.dim() == 2 and not value.is_floating_point())
        for size, name in zip(value.shape, (BATCH, SEQUENCE) if tokens else (BATCH,), strict=False):
            expression = _expression(size)
            if isinstance(expression, Symbol):
                names.setdefault(expression, name)
    return names


def _sizes(inputs: Iterable[Tensor], symbols: Mapping[Symbol, Symbol]) -> dict[Symbol, int]:
    sizes: dict[Expr, Any] = {_expression(size, symbols): size for value in inputs for size in value.shape}
    symbolic = {s: size.node.hint for s, size in sizes.items() if isinstance(s, Symbol) and s != BATCH}
    return {s: size for s, size in symbolic.items() if size is not None}


def _expression(size: Any, symbols: Mapping[Symbol, Expr] | None = None) -> Expr:
    if not isinstance(size, torch.SymInt):
        return sympify(size)
    return with_sizes(size.node.expr, symbols or {})


def _differentiable(gm: GraphModule) -> frozenset[Node]:
    found: set[Node] = set()
    for node in gm.graph.nodes:
        trained = False
        if node.op == "get_attr":
            value = fetch(gm, str(node.target))
            trained = isinstance(value, Tensor) and value.requires_grad
        elif node.op == "placeholder":
            # A graph of sites only has the inputs of layers here, which parameters come before.
            trained = "module" in node.meta
        elif node.op == "call_module":
            trained = any(p.requires_grad for p in gm.get_submodule(str(node.target)).parameters())
        if trained or not found.isdisjoint(node.all_input_nodes):
            found.add(node)
    return frozenset(found)


def _weight_call(reading: Reading, node: Node, op: str) -> CallSite:
    x, weight = argument(node, 0, "input"), argument(node, 1, "weight")
    source = weight_source(reading.gm, weight)
    seen = tuple(int(size) for size in weight.meta["val"].shape)
    parameter = None if source is None else fetch(reading.gm, str(source[0].target))
    return CallSite(
        name=node.name,
        op=op,
        operands=(reading.shape(x),),
        output=reading.shape(node),
        weight=None if source is None else reading.names[str(source[0].target)],
        weight_shape=seen,
        fraction=Integer(1) if parameter is None else Integer(prod(seen)) / parameter.numel(),
        bias=argument(node, 2, "bias") is not None,
        stride=() if op == "linear" else _tuple(_default(argument(node, 3, "stride"), 1), len(seen) - 2),
        groups=1 if op == "linear" else _default(argument(node, 6, "groups"), 1),
        grad_input=reading.gradients(x),
        grad_weight=reading.gradients(weight) > 0,
    )


def _weight_module(reading: Reading, node: Node, op: str) -> CallSite:
    """A Linear or convolution that could not be written as a function, because it has hooks for example."""
    module = reading.gm.get_submodule(str(node.target))
    x, weight = argument(node, 0, "input"), fetch(module, "weight")
    return CallSite(
        name=node.name,
        op=op,
        operands=(reading.shape(x),),
        output=reading.shape(node),
        weight=reading.names.get(f"{node.target}.weight"),
        weight_shape=tuple(weight.shape),
        bias=getattr(module, "bias", None) is not None,
        stride=getattr(module, "stride", ()),
        groups=getattr(module, "groups", 1),
        grad_input=reading.gradients(x),
        grad_weight=weight.requires_grad,
    )


def _product(reading: Reading, node: Node, op: str) -> CallSite:
    equation = ""
    if op == "attention":
        given = [argument(node, i, name) for i, name in enumerate(("query", "key", "value"))]
    elif op == "einsum":
        equation, given = einsum_call(node.args)
    else:
        given = factors(node, 1 if op == "addmm" else 0)
    shapes = tuple(reading.shape(factor) for factor in given)
    output = reading.shape(node)
    needs = [factor in reading.differentiable for factor in given]
    products, gradients = _multiply_adds(op, equation, shapes, output, needs)
    kind = "attention" if op == "attention" else "matmul"
    return CallSite(node.name, kind, shapes, output, products=products, grad_products=gradients)


def _multiply_adds(
    op: str, equation: str, shapes: tuple[Shape, ...], output: Shape, needs: Sequence[bool]
) -> tuple[Expr, Expr]:
    """(multiply-adds of the forward, those of the gradients of the factors that need one)."""
    if op == "einsum":
        read, made = labels(equation, [*map(len, shapes)])
        # A dimension of 1 is broadcast along those of the others.
        sizes = [
            {label: size for label, size in zip(of, shape, strict=True) if size != 1}
            for of, shape in zip(read, shapes, strict=True)
        ]
        return _pairwise([*zip(sizes, needs, strict=True)], made)
    if op == "attention":
        query, key, value = shapes
        products = prod(query[:-1], start=Integer(1)) * key[-2] * (query[-1] + value[-1])
        return products, Integer(2 * any(needs)) * products  # two products of two factors each
    products = prod(output, start=Integer(1)) * shapes[0][-1]
    return products, Integer(sum(needs)) * products


def _pairwise(
    factors: Sequence[tuple[Mapping[Label, Expr], bool]], made: Sequence[Label]
) -> tuple[Expr, Expr]:
    """The same of factors, {label: size} and whether one needs a gradient, that are multiplied from left to right.

    As PyTorch does where opt_einsum chooses no other order: labels that only one factor has are summed before; a pair
    that nothing is summed over is multiplied by elements, and no product of matrices.
    """
    forward = backward = Integer(0)
    (left, trained), *rest = factors
    for k, (right, also) in enumerate(rest, 1):
        later = {*made, *(label for sizes, _ in factors[k + 1 :] for label in sizes)}
        both = {
            label: size
            for label, size in {**left, **right}.items()
            if label in later or (label in left and label in right)
        }
        left = {label: size for label, size in both.items() if label in later}
        products = prod(both.values(), start=Integer(1)) if len(left) < len(both) else Integer(0)
        forward, backward = forward + products, backward + (trained + also) * products
        trained = trained or also
    return forward, backward


def _norm_or_pool(reading: Reading, node: Node, op: str) -> CallSite:
    x, kernel, affine = argument(node, 0, "input"), (), False
    module = reading.gm.get_submodule(str(node.target)) if node.op == "call_module" else None
    shape = reading.shape(x)
    if op == "max_pool":
        window = argument(node, 1, "kernel_size") if module is None else module.kernel_size
        kernel = _tuple(window, len(shape) - 2)
    elif op.endswith("norm"):
        at = 3 if op == "batch_norm" and node.target is torch.nn.functional.batch_norm else 1
        at = 2 if op == "layer_norm" else at
        affine = (
            argument(node, at, "weight") if module is None else getattr(module, "weight", None)
        ) is not None
    return CallSite(
        node.name,
        op,
        (shape,),
        reading.shape(node),
        bias=affine,
        kernel=kernel,
        grad_input=reading.gradients(x),
    )


def _default(value: Any, default: Any) -> Any:
    return default if value is None else value


def _tuple(value: Any, n: int) -> tuple[int, ...]:
    return (value,) * n if isinstance(value, int) else tuple(value) * (n if len(value) == 1 else 1)
