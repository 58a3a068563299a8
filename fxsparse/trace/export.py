"""Front end E: ``torch.export`` once per mode, for what symbolic tracing cannot follow."""

import copy
import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim, ShapesCollection
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils import _pytree as pytree

from fxsparse.errors import TraceError
from fxsparse.exported_program import is_exported
from fxsparse.inputs import CPU, has_meta, has_sequence, on_device, split_inputs, stand_in
from fxsparse.skeleton import bind, substituted
from fxsparse.trace.modules import has_hooks
from fxsparse.trace.user_code import reason
from fxsparse.verify import RUN_FAILURES, copied_inputs


def trace_export(
    root: nn.Module, example_inputs: Any, device: torch.device = CPU
) -> tuple[fx.GraphModule, list[str]]:
    """Export a module in its present mode, with a dynamic batch where the model allows one.

    Returns a graph module that owns what the graph names, and notes.  Inputs and outputs keep their
    structure (kwargs, output classes).  A module with tensors on meta is exported as if they were on `device`,
    without their memory.  A program's module keeps its graph, and the sizes that it is for.  Raises TraceError where
    export fails or would forget hooks.
    """
    if is_exported(root):
        assert isinstance(root, fx.GraphModule)
        gm = bind(copy.deepcopy(root.graph), root)
        _refuse_vmap(gm)
        _clean(gm)
        return gm, _fixed_batches(gm, "as it was exported")
    if not has_meta(root) and not has_meta(example_inputs):
        return _trace(root, example_inputs)
    fake, device = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True), on_device(root, device)
    args, kwargs = copied_inputs(example_inputs, fake=fake, device=device)
    with substituted(root, *(lambda tensor: stand_in(tensor, fake, device),) * 2):
        return _trace(root, (*args, kwargs))


def _trace(root: nn.Module, example_inputs: Any) -> tuple[fx.GraphModule, list[str]]:
    hooked = next((path for path, module in root.named_modules() if has_hooks(module)), None)
    if hooked is not None:
        raise TraceError(f"{hooked or 'the model'} has hooks, which an export would run once and forget")
    args, kwargs = _at_least_two(split_inputs(example_inputs))
    try:
        gm, notes = _export(root, args, kwargs, _free_batch(args, kwargs)), []
    except RUN_FAILURES as error:  # torch's own errors (Dynamo, guards, constraints) derive from these
        gm, notes = None, [f"the batch size is fixed, as export with a free one fails: {reason(error)}"]
    if gm is None:
        args, kwargs = split_inputs(example_inputs)
        try:
            gm = _export(root, args, kwargs, None)
        except RUN_FAILURES as error:  # torch's own errors (Dynamo, guards, constraints) derive from these
            raise TraceError(f"torch.export failed: {reason(error)}") from error
    _refuse_vmap(gm)
    _clean(gm)
    return gm, notes or _fixed_batches(gm, "the model's code depends on it")


def _export(root: nn.Module, args: Any, kwargs: Any, shapes: ShapesCollection | None) -> fx.GraphModule:
    with without_chatter():
        program = torch.export.export(root, args, kwargs, dynamic_shapes=shapes, strict=False)
        module = program.module()
    assert isinstance(module, fx.GraphModule)
    return module


@contextmanager
def without_chatter() -> Iterator[None]:
    """PyTorch warns of its own internals, and prints graphs that it could not finish; its errors say what counts."""
    log = logging.getLogger("torch.fx.experimental.symbolic_shapes")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)


def _free_batch(args: Any, kwargs: Any) -> ShapesCollection | None:
    shapes, tensors = ShapesCollection(), _tensors((args, kwargs))
    for tensor in tensors:
        shapes[tensor] = {0: Dim.AUTO, 1: Dim.AUTO} if has_sequence(tensor) else {0: Dim.AUTO}
    return shapes if tensors else None


def _at_least_two(inputs: Any) -> Any:
    """Inputs of batch 1 repeated once: export would take the 1 for a constant."""
    if any(tensor.shape[0] != 1 for tensor in _tensors(inputs)):
        return inputs
    made = {id(tensor): torch.cat([tensor, tensor]) for tensor in _tensors(inputs)}
    return pytree.tree_map(lambda leaf: made.get(id(leaf), leaf), inputs)


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor) and leaf.dim()]


def _refuse_vmap(gm: fx.GraphModule) -> None:
    """A graph that enters ``torch.vmap`` leaves PyTorch inside of it where it fails, and its layers see no batch."""
    for node in gm.graph.nodes:
        if getattr(node.target, "__module__", "") == "torch._functorch.predispatch":
            raise TraceError("the forward calls torch.vmap, inside of which layers see one sample each")


def _clean(gm: fx.GraphModule) -> None:
    """Remove input guards and metadata checks, which pin the example's sizes, dtype and device.

    Sizes are read by the method, as the op has no batching rule for ``torch.vmap``.
    """
    for region in [gm, *(module for module in gm.modules() if isinstance(module, fx.GraphModule))]:
        for node in list(region.graph.nodes):
            if node.target in ("_guards_fn", torch.ops.aten._assert_tensor_metadata.default):
                region.graph.erase_node(node)
            elif node.target is torch.ops.aten.sym_size.int:
                with region.graph.inserting_before(node):
                    size = region.graph.call_method("size", node.args)
                size.meta = node.meta
                node.replace_all_uses_with(size)
                region.graph.erase_node(node)
        region.recompile()


def _fixed_batches(gm: fx.GraphModule, why: str) -> list[str]:
    vals = [node.meta.get("val") for node in gm.graph.find_nodes(op="placeholder")]
    batches = [v.shape[0] for v in vals if isinstance(v, Tensor) and v.dim()]
    fixed = {int(size) for size in batches if isinstance(size, int) or not size.node.expr.free_symbols}
    return [f"the batch size is fixed at {sorted(fixed)}: {why}"] if fixed else []
