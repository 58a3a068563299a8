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
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv
from torch.fx.graph import _PyTreeCodeGen
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from fxsparse.graph import fetch, has_sparse_layout, sizes_by_data
from fxsparse.inputs import has_meta, has_sequence, on_device, split_inputs, stand_in
from fxsparse.pipeline import PassContext
from fxsparse.skeleton import copy_structure, substituted
from fxsparse.verify import RUN_FAILURES, copied_inputs, frozen_state


@dataclass(frozen=True)
class InferShapes:
    """Put a fake tensor, without memory, into ``node.meta["val"]`` of every node.

    The batch is dimension 0 of the inputs; the sequence is dimension 1 of float inputs ``[batch, sequence,
    features]`` and of integer inputs ``[batch, sequence]``.  ``gm.meta["symbols"]`` maps "batch" and "sequence" to
    their sympy symbols, as far as they stayed free; a dimension that the model fixes has a note.  Where sizes depend on
    the values of inputs, as those of ``x[mask]`` do, one run of the graph finds what their symbols are for the example
    inputs, and ``gm.meta["by_data"]`` has that in proportion to the batch.  On the walk tier only sites have shapes,
    taken from a run of the model itself.  Parameters and buffers are not touched.
    """

    name: ClassVar[str] = "infer-shapes"
    after: ClassVar[tuple[str, ...]] = ("functionalize",)
    preserves_function: ClassVar[bool] = True

    def run(self, gm: GraphModule, ctx: PassContext) -> int:
        """Annotates only, so it returns 0."""
        if ctx.example_inputs is None:
            ctx.notes.append("shapes are unknown without example_inputs")
            return 0
        for names in (("batch", "sequence"), ("batch",), ()):
            symbols = _Symbols(names)
            try:
                _annotate(gm, ctx, symbols)
            except RUN_FAILURES as error:
                lines = str(error).strip().splitlines()
                ctx.notes.append(
                    f"no symbolic {' and '.join(names)}: {lines[0] if lines else type(error).__name__}"
                )
                continue
            gm.meta["symbols"] = symbols.free()
            ctx.notes.extend([*symbols.fixed(), *_learn_sizes(gm, ctx, symbols)])
            return 0
        ctx.notes[-1] = ctx.notes[-1].replace("no symbolic ", "shapes are unknown")
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


def _annotate(gm: GraphModule, ctx: PassContext, symbols: _Symbols) -> None:
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
        _run(gm, ctx, args, kwargs, _put)


def _learn_sizes(gm: GraphModule, ctx: PassContext, symbols: _Symbols) -> list[str]:
    """Let a run on the example inputs say what the sizes are that depend on their values; notes."""
    first = next((node for node in gm.graph.nodes if sizes_by_data(node.meta.get("val"))), None)
    if first is None:
        return []
    where = f"sizes depend on the values of inputs, first at {first.name}"
    if has_meta(ctx.program.skeleton) or has_meta(ctx.example_inputs):
        return [f"{where}: they stay unknown, as there are no values on meta"]
    found: dict[Any, int] = {}
    with frozen_state(ctx.program.skeleton, training=_trains(gm, ctx)), torch.no_grad():
        _run(gm, ctx, *copied_inputs(ctx.example_inputs), partial(_learn, found))
    free = gm.meta["symbols"].get("batch")
    share = 1 if free is None else free / symbols.sizes["batch"][1]
    gm.meta["by_data"] = {symbol: size * share for symbol, size in found.items()}
    return [f"{where}: they count as in the example inputs, in proportion to the batch"]


def _trains(gm: GraphModule, ctx: PassContext) -> bool:
    return gm is not ctx.program.graphs.get("eval")


def _put(node: Node, value: Any) -> None:
    node.meta["val"] = value


def _learn(found: dict[Any, int], node: Node, value: Any) -> None:
    """Add to `found` what the symbols without an example in ``meta["val"]`` are in `value`."""
    pairs = zip(pytree.tree_leaves(node.meta["val"]), pytree.tree_leaves(value), strict=True)
    for symbolic, real in pairs:
        sizes = (
            zip(symbolic.shape, real.shape, strict=True) if isinstance(real, Tensor) else [(symbolic, real)]
        )
        for size, seen in sizes:
            if isinstance(size, SymInt) and size.node.expr in sizes_by_data(size):
                found[size.node.expr] = seen


def _run(gm: GraphModule, ctx: PassContext, args: Any, kwargs: Any, see: Callable[[Node, Any], None]) -> None:
    """Run the graph, and show every node with its value to `see`."""
    if ctx.program.tier == "walk":
        model = copy_structure(
            ctx.program.skeleton
        )  # the user's own forward, which may write Python attributes
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
