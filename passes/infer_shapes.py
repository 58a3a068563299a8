"""Know the shape of every value, with batch and sequence as symbols where the model allows it."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import SymInt, Tensor, nn
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule, Interpreter, Node
from torch.fx.experimental.symbolic_shapes import DimDynamic, GuardOnDataDependentSymNode, ShapeEnv
from torch.fx.graph import _PyTreeCodeGen
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from fxsparse.graph import fetch, has_sparse_layout, sizes_by_data
from fxsparse.inputs import has_meta, has_sequence, on_device, split_inputs, stand_in
from fxsparse.pipeline import PassContext
from fxsparse.skeleton import copy_structure, substituted
from fxsparse.trace.export import without_chatter
from fxsparse.verify import RUN_FAILURES, copied_inputs, frozen_state

_AS_IN_EXAMPLE = "FLOPs and times are those of the sizes in the example inputs"


@dataclass(frozen=True)
class InferShapes:
    """Put a fake tensor, without memory, into ``node.meta["val"]`` of every node.

    The batch is dimension 0 of the inputs; the sequence is dimension 1 of float inputs ``[batch, sequence,
    features]`` and of integer inputs ``[batch, sequence]``.  ``gm.meta["symbols"]`` maps "batch" and "sequence" to
    their sympy symbols, as far as they stayed free; a dimension that the model fixes has a note.  Where sizes depend on
    the values of inputs, as those of ``x[mask]`` do, one run of the graph finds what their symbols are for the example
    inputs; ``gm.meta["by_data"]`` has that in proportion to the batch, ``gm.meta["example_batch"]``.  On the walk tier
    only sites have shapes, taken from a run of the model itself.  Parameters and buffers are not touched.
    """

    name: ClassVar[str] = "infer-shapes"
    after: ClassVar[tuple[str, ...]] = ("functionalize",)
    preserves_function: ClassVar[bool] = True

    def run(self, gm: GraphModule, ctx: PassContext) -> int:
        """Annotates only, so it returns 0."""
        if ctx.example_inputs is None:
            ctx.notes.append("shapes are unknown without example_inputs")
            return 0
        failure = ""
        for names in (("batch", "sequence"), ("batch",), ()):
            symbols = _Symbols(names)
            try:
                symbols = _annotate(gm, ctx, symbols)
            except RUN_FAILURES as error:
                failure = _first_line(error)
                ctx.notes += [f"no symbolic {' and '.join(names)}: {failure}"] if names else []
                continue
            gm.meta["symbols"] = symbols.free()
            ctx.notes.extend([*symbols.fixed(), *_learn_sizes(gm, ctx)])
            return 0
        if ctx.program.tier == "walk" and _annotate_as_run(gm, ctx):
            ctx.notes.append(f"{_AS_IN_EXAMPLE}: {failure}")
        else:
            ctx.notes.append(f"shapes are unknown: {failure}")
        return 0


class _Symbols:
    """Symbolic sizes for the dimensions of the inputs."""

    def __init__(self, names: Sequence[str]) -> None:
        self.environment = ShapeEnv(duck_shape=False)
        self.mode = FakeTensorMode(shape_env=self.environment, allow_non_fake_inputs=False)
        self.names = names
        self.sizes: dict[str, tuple[SymInt, int]] = {}

    def size(self, name: str, value: int) -> Any:
        """The symbol of this name where `value` is the size that it stands for, else the value."""
        if name not in self.names:
            return value
        if name not in self.sizes:
            # Not with the package: this imports PyTorch's compiler, which takes seconds.
            from torch._dynamo.source import ConstantSource

            # 0 and 1 would be taken for constants.
            hint, source = max(value, 2), ConstantSource(name)
            symbol = self.environment.create_symbol(hint, source, DimDynamic.DYNAMIC)
            made = self.environment.create_symintnode(symbol, hint=hint, source=source)
            assert isinstance(made, SymInt)
            self.sizes[name] = (made, value)
        symbol, stands_for = self.sizes[name]
        return symbol if value == stands_for else value

    def fake(self, tensor: Tensor, device: torch.device) -> Tensor:
        """A fake of a parameter or buffer; on `device` for one on meta."""
        if tensor.is_meta:
            return stand_in(tensor, self.mode, device)
        return self.mode.from_tensor(tensor, static_shapes=True)

    def input(self, tensor: Tensor, device: torch.device) -> Tensor:
        """A fake of an input."""
        if has_sparse_layout(tensor):
            return self.mode.from_tensor(tensor, static_shapes=True)
        shape: list[Any] = list(tensor.shape)
        if shape:
            shape[0] = self.size("batch", shape[0])
        if has_sequence(tensor):
            shape[1] = self.size("sequence", shape[1])
        with self.mode:
            return torch.empty(shape, dtype=tensor.dtype, device=device if tensor.is_meta else tensor.device)

    def free(self) -> dict[str, Any]:
        """{name: sympy symbol} of the sizes that stayed symbolic."""
        return {name: size.node.expr for name, (size, _) in self.sizes.items() if size.node.expr.is_Symbol}

    def fixed(self) -> list[str]:
        return [
            f"the {name} is fixed at {size.node.expr} by the model"
            for name, (size, _) in self.sizes.items()
            if not size.node.expr.is_Symbol
        ]


def _annotate(gm: GraphModule, ctx: PassContext, symbols: _Symbols) -> _Symbols:
    """Fill ``meta["val"]``; returns the symbols in it: new ones where an op asked for a size that depends on values."""
    try:
        _run_on_fakes(gm, ctx, symbols, _put)
        return symbols
    except GuardOnDataDependentSymNode:
        if _on_meta(ctx):
            raise
    symbols = _Symbols(symbols.names)
    with without_chatter():
        _run_on_fakes(
            gm, ctx, symbols, partial(_put_and_answer, symbols.environment, _sizes_of_a_run(gm, ctx))
        )
    return symbols


def _run_on_fakes(
    gm: GraphModule, ctx: PassContext, symbols: _Symbols, see: Callable[[Node, Any], None]
) -> None:
    skeleton = ctx.program.skeleton
    device = on_device(skeleton, ctx.device)
    args, kwargs = pytree.tree_map_only(
        Tensor, lambda tensor: symbols.input(tensor, device), split_inputs(ctx.example_inputs)
    )
    fake = partial(symbols.fake, device=device)
    with (
        frozen_state(skeleton, training=_trains(gm, ctx)),
        substituted(skeleton, fake, fake),
        symbols.mode,
        enable_python_dispatcher(),  # the C++ bodies of some ops (pad) turn symbols into numbers
    ):
        _run(gm, ctx, args, kwargs, see)


def _annotate_as_run(gm: GraphModule, ctx: PassContext) -> bool:
    """Fill ``meta["val"]`` with the shapes of a run on the example inputs; whether there can be one."""
    mode = _Symbols(()).mode

    def see(node: Node, value: Any) -> None:
        _put(node, pytree.tree_map_only(Tensor, partial(mode.from_tensor, static_shapes=True), value))

    if _on_meta(ctx):
        return False
    try:
        _run_as_given(gm, ctx, see)
    except RUN_FAILURES:  # the note of the run on fakes says why
        return False
    gm.meta |= {"symbols": {}, "example_batch": _batch(ctx)}
    return True


def _learn_sizes(gm: GraphModule, ctx: PassContext) -> list[str]:
    """Let a run on the example inputs say what the sizes are that depend on their values; notes."""
    first = next((node for node in gm.graph.nodes if sizes_by_data(node.meta.get("val"))), None)
    if first is None:
        return []
    where = f"sizes depend on the values of inputs, first at {first.name}"
    if _on_meta(ctx):
        return [f"{where}: they stay unknown, as there are no values on meta"]
    found: dict[Any, int] = {}
    try:
        for node, sizes in _sizes_of_a_run(gm, ctx).items():
            found |= _by_data(node, sizes)
    except RUN_FAILURES as error:
        return [f"{where}: they stay unknown, as the graph fails on example_inputs: {_first_line(error)}"]
    free, batch = gm.meta["symbols"].get("batch"), _batch(ctx)
    share = 1 if free is None else free / batch
    gm.meta |= {"by_data": {symbol: size * share for symbol, size in found.items()}, "example_batch": batch}
    return [f"{_AS_IN_EXAMPLE}: {where}"]


def _sizes_of_a_run(gm: GraphModule, ctx: PassContext) -> dict[Node, list[Any]]:
    """{node: shapes of its tensors, and its numbers} on the example inputs."""
    seen: dict[Node, list[Any]] = {}

    def see(node: Node, value: Any) -> None:
        leaves = pytree.tree_leaves(value)
        seen[node] = [tuple(leaf.shape) if isinstance(leaf, Tensor) else leaf for leaf in leaves]

    _run_as_given(gm, ctx, see)
    return seen


def _run_as_given(gm: GraphModule, ctx: PassContext, see: Callable[[Node, Any], None]) -> None:
    with frozen_state(ctx.program.skeleton, training=_trains(gm, ctx)), torch.no_grad():
        _run(gm, ctx, *copied_inputs(ctx.example_inputs), see)


def _on_meta(ctx: PassContext) -> bool:
    return has_meta(ctx.program.skeleton) or has_meta(ctx.example_inputs)


def _batch(ctx: PassContext) -> int:
    """Samples in the example inputs."""
    tensors = [x for x in pytree.tree_leaves(ctx.example_inputs) if isinstance(x, Tensor) and x.dim()]
    return max(1, tensors[0].shape[0]) if tensors else 1


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _trains(gm: GraphModule, ctx: PassContext) -> bool:
    return gm is not ctx.program.graphs.get("eval")


def _put(node: Node, value: Any) -> None:
    node.meta["val"] = value


def _put_and_answer(environment: ShapeEnv, known: dict[Node, list[Any]], node: Node, value: Any) -> None:
    """`_put`, and what an op gets to know that asks for a size by data, as batch_norm does, is that of the example."""
    _put(node, value)
    for symbol, size in _by_data(node, known[node]).items():
        environment.set_real_tensor_prop_unbacked_vals(symbol, size)


def _by_data(node: Node, sizes: list[Any]) -> dict[Any, int]:
    """{symbol: what it is} of the symbols in ``meta["val"]`` that have no example; `sizes`: those of a run."""
    found = {}
    for symbolic, real in zip(pytree.tree_leaves(node.meta["val"]), sizes, strict=True):
        pairs = zip(symbolic.shape, real, strict=True) if isinstance(symbolic, Tensor) else [(symbolic, real)]
        for size, seen in pairs:
            if isinstance(size, SymInt) and size.node.expr in sizes_by_data(size):
                found[size.node.expr] = seen
    return found


def _run(gm: GraphModule, ctx: PassContext, args: Any, kwargs: Any, see: Callable[[Node, Any], None]) -> None:
    """Run the graph, and show every node with its value to `see`."""
    if ctx.program.tier == "walk":
        # The user's own forward, which may write Python attributes.
        model = copy_structure(ctx.program.skeleton)
        with _seen_inputs(model) as seen:
            model(*args, **kwargs)
        _show_sites(gm, seen, see)
    else:
        _Shown(gm, see).run(*_placeholder_values(gm, args, kwargs), enable_io_processing=False)


class _Shown(Interpreter):
    def __init__(self, gm: GraphModule, see: Callable[[Node, Any], None]) -> None:
        super().__init__(gm)
        self.see = see

    def run_node(self, n: Node) -> Any:
        result = super().run_node(n)
        self.see(n, result)
        return result


def _placeholder_values(gm: GraphModule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """One value per placeholder; exported graphs take the leaves of nested arguments."""
    if isinstance(gm.graph._codegen, _PyTreeCodeGen):
        return list(pytree.tree_leaves((args, kwargs)))
    left = iter(args)
    return [
        next(left, kwargs.get(str(node.target), node.args[0] if node.args else None))
        for node in gm.graph.find_nodes(op="placeholder")
    ]


@contextmanager
def _seen_inputs(root: nn.Module) -> Iterator[dict[str, tuple[Any, ...]]]:
    """Collects {path: positional arguments} of every module call inside the block."""
    seen: dict[str, tuple[Any, ...]] = {}

    def remember(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen[path] = (*args, *kwargs.values())

        return hook

    handles = [
        m.register_forward_pre_hook(remember(path), with_kwargs=True) for path, m in root.named_modules()
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _show_sites(gm: GraphModule, seen: dict[str, tuple[Any, ...]], see: Callable[[Node, Any], None]) -> None:
    values: dict[Node, Any] = {}
    for node in gm.graph.nodes:
        if node.op == "placeholder":
            # An attention reads its out_proj without calling it; what goes in has the shape of the query.
            path = node.meta["module"]
            inputs = seen.get(path) or seen.get(path.removesuffix(".out_proj"), ())
            value = next((x for x in inputs if isinstance(x, Tensor)), None)
        elif node.op == "get_attr":
            value = fetch(gm, str(node.target))
        elif node.op != "output":
            value = _value_of(node, values)
        else:
            continue
        if value is not None:
            values[node] = value
            see(node, value)


def _value_of(node: Node, values: dict[Node, Any]) -> Any:
    if any(argument not in values for argument in node.all_input_nodes):
        return None  # the forward never called this layer
    args, kwargs = map_arg((node.args, node.kwargs), values.__getitem__)
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    assert callable(node.target)
    return node.target(*args, **kwargs)
