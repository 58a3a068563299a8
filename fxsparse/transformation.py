"""Carry out a plan's transformation: a model in, one of other shapes and the sparsity that fits it out."""

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from fxsparse.errors import InvariantError, PlanError
from fxsparse.flops import FlopCount
from fxsparse.graph_model import GraphModel, Origin
from fxsparse.inputs import CPU
from fxsparse.passes import CountFlops, Functionalize, InferShapes, transforming_pipeline
from fxsparse.pipeline import PassContext, Program, Transformed, run_passes
from fxsparse.plans import Plan, fixed_sparsity
from fxsparse.report import Report
from fxsparse.trace import capture
from fxsparse.transforms import SparseDoped, SparseParallel
from fxsparse.transforms.balance import Balance
from fxsparse.transforms.choices import no_layers


def transform(
    model: nn.Module,
    plan: Plan,
    example_inputs: Any,
    *,
    strict: bool = False,
    device: torch.device = CPU,
    tier: str | None = None,
) -> GraphModel:
    """The model that ``plan.transform`` makes of a model (Sparse-IFT, arXiv:2303.11525), dense and with first values.

    The model that is passed in is left untouched; it may be on meta.  `fxsparse.compile` calls this by itself where a
    plan has a transform, and takes what it returns as it takes any model: with the same plan, whose sparsity is then
    replaced by the one in ``.origin.balance``.

    Args:
        model: any model that symbolic tracing or torch.export captures.
        plan: its transform, sparsity, exclude and seed count here.
        example_inputs: as for `fxsparse.compile`; they are needed, for shapes.
        strict, device: as for `fxsparse.compile`.
        tier: the front end to take, without a check; for loading.

    Raises:
        PlanError: no transform or no example inputs, a sparsity that no size makes iso-FLOP, or no layer to transform.
        TraceError: the model cannot be captured as a graph, or its code fixes sizes that changed.
    """
    if plan.transform is None or plan.sparsity is None:
        raise PlanError(
            "transform: expected a plan with a transform, such as Plan(transform=SparseWide(), sparsity=0.75)."
        )
    if example_inputs is None:
        raise PlanError(f"{_name(plan)}: expected example_inputs=, got none: FLOPs depend on shapes.")
    program = capture(model, example_inputs, strict=strict, device=device, tier=tier)
    return transform_program(program, plan, example_inputs, device).train(model.training)


def transform_program(
    program: Program, plan: Plan, example_inputs: Any, device: torch.device = CPU
) -> GraphModel:
    """`transform` of a captured model, which is used up."""
    plan, wanted = _adjusted(plan), plan.transform
    assert wanted is not None
    if program.tier == "walk":
        raise PlanError(
            f"{_name(plan)}: expected a model with a graph, and this one has none: {'; '.join(program.notes)}"
        )
    _own_tensors(program.skeleton)
    ctx = PassContext(replace(plan, overrides=()), "train", program, Report(), example_inputs, device=device)
    run_passes(transforming_pipeline(wanted), ctx)
    before, found = ctx.flops, ctx.transformed
    if before is None or found is None:
        raise PlanError(f"{_name(plan)}: no shapes to count with: {'; '.join(ctx.report.passes[1]['notes'])}")
    if not found.sparse:
        raise no_layers(wanted, found.dense, ctx.excluded)
    outputs = _output_shapes(program.graphs["eval"])
    after = _counted(ctx, plan)
    _check_outputs(outputs, _output_shapes(program.graphs["eval"]), plan)
    balance = _balance(plan, before, after, found)
    _check_zeros(program, plan, found, balance)
    for _, gm in program.distinct_graphs():
        _plain_meta(gm)
    origin = Origin(
        plan, program.tier, found.dense, (*found.sparse, *found.low_rank), balance, program.accepts
    )
    graphs = {mode: gm.graph for mode, gm in program.graphs.items()}
    return GraphModel(program.skeleton, graphs, origin)


def fitted(model: GraphModel, plan: Plan) -> Plan:
    """The plan with the sparsity at which the transformed model is iso-FLOP, as its transform asks for it."""
    return plan if plan.sparsity is None else replace(plan, sparsity=model.origin.balance.sparsity)


def _adjusted(plan: Plan) -> Plan:
    """With the sparsity that a whole number of branches has."""
    if not isinstance(plan.transform, SparseParallel) or plan.sparsity is None:
        return plan
    count = plan.transform.branches(plan.sparsity)
    return replace(plan, sparsity=1 - 1 / count) if plan.transform.adjust else plan


def _own_tensors(skeleton: nn.Module) -> None:
    """A transformed model shares no tensor with the model it was made from."""
    made: dict[int, Any] = {}
    for module in skeleton.modules():
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                if tensor is not None:
                    held[name] = made.setdefault(id(tensor), copy.deepcopy(tensor))


def _counted(ctx: PassContext, plan: Plan) -> FlopCount:
    """FLOPs of the transformed program; its graphs get the shapes of their new values."""
    for _, gm in ctx.program.distinct_graphs():
        for node in gm.graph.nodes:
            node.meta.pop("val", None)
    # On meta: a run of a graph whose sizes do not fit any more would raise where nobody catches it.
    inputs = pytree.tree_map_only(torch.Tensor, lambda x: x.to("meta"), ctx.example_inputs)
    again = PassContext(plan, "train", ctx.program, Report(), inputs, device=ctx.device)
    run_passes((Functionalize(), InferShapes(), CountFlops()), again)
    notes = again.report.passes[1]["notes"]
    ends = [gm.graph.output_node() for _, gm in ctx.program.distinct_graphs()]
    if again.flops is None or any("val" not in end.meta for end in ends):
        raise PlanError(
            f"{_name(plan)}: the model's code fixes sizes that changed: "
            f"{'; '.join(note for note in notes if note.startswith('shapes are'))}.{_unruled(ctx)} The other three "
            "transformations keep widths."
        )
    return again.flops


def _unruled(ctx: PassContext) -> str:
    notes = next((row["notes"] for row in ctx.report.passes if row["name"] == "widen-channels"), [])
    return f" What these read keeps its width: {'; '.join(notes)}." if notes else ""


def _balance(plan: Plan, before: FlopCount, after: FlopCount, found: Transformed) -> Balance:
    assert plan.transform is not None
    assert plan.sparsity is not None
    unsolved = _unsolved(plan)
    balance = Balance(
        name=plan.transform.name,
        nominal=plan.sparsity,
        sparsity=plan.sparsity,
        layers_before=_sum(before, found.layers),
        sparsifiable=_sum(after, found.sparse),
        low_rank=_sum(after, found.low_rank),
        model_before=before.dense,
        model_after=after.dense,
        match="nominal" if unsolved else plan.transform.match,
        unsolved=unsolved,
    )
    return replace(balance, sparsity=balance.solved())


def _check_zeros(program: Program, plan: Plan, found: Transformed, balance: Balance) -> None:
    """Refuse a sparsity that gives no weight a zero, where nothing else in the plan does."""
    largest = max(program.skeleton.get_parameter(name).numel() for name in found.sparse)
    if largest * balance.sparsity < 0.5 and not plan.overrides and isinstance(plan.allocation, str):
        raise PlanError(
            f"{_name(plan)}: expected a sparsity that leaves zeros, got {plan.sparsity:.6g}, for which "
            f"{balance.sparsity:.6g} is taken: {', '.join(found.sparse[:5])} would stay dense. Raise Plan.sparsity, "
            "or leave the transform out."
        )


def _unsolved(plan: Plan) -> str:
    """Why the nominal sparsity is taken: the plan says how sparse each weight is, or nothing can match; else ""."""
    transform = plan.transform
    assert transform is not None
    if plan.allocation != "uniform":
        return f"allocation={plan.allocation!r} shares nonzeros unevenly, and the nominal sparsity is taken"
    if fixed_sparsity(plan.pattern) is not None:
        return f"{plan.pattern} fixes the counts"
    if isinstance(transform, SparseDoped) and transform.low_rank == "sparse":
        return "low_rank='sparse' masks the factors too"
    return "match='nominal' takes the plan's sparsity" if transform.match == "nominal" else ""


def _sum(count: FlopCount, names: list[str]) -> int:
    return sum(count.of_weight(name)[0] or 0 for name in names)


def _output_shapes(gm: GraphModule) -> list[str]:
    [output] = gm.graph.find_nodes(op="output")
    return [
        str(tuple(x.shape)) for x in pytree.tree_leaves(output.meta.get("val")) if isinstance(x, torch.Tensor)
    ]


def _check_outputs(before: list[str], after: list[str], plan: Plan) -> None:
    if before != after:
        raise InvariantError(f"{_name(plan)}: outputs should keep their shapes {before}, got {after}")


def _plain_meta(gm: GraphModule) -> None:
    """Without fake values, which would be copied and pickled with the model."""
    gm.meta.clear()
    for node in gm.graph.nodes:
        node.meta = {}


def _name(plan: Plan) -> str:
    assert plan.transform is not None
    return type(plan.transform).__name__
