"""``compile``, ``plan_report`` and ``allocate``: what a user calls."""

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fxsparse import optimizer_state
from fxsparse.calibration import batches_of
from fxsparse.compile_checks import (
    check_call,
    check_dense,
    check_device,
    check_model,
    check_optimizer,
    check_plan,
    check_values,
)
from fxsparse.computes import digest
from fxsparse.dense_copies import copied_model
from fxsparse.errors import PlanError
from fxsparse.exported_program import opened
from fxsparse.flops import FlopCount
from fxsparse.graph import comment, owner, set_parameter
from fxsparse.graph_model import GraphModel
from fxsparse.inference import compile_for_inference
from fxsparse.initial import target_of
from fxsparse.initial_scores import check_scores
from fxsparse.input_check import as_captured
from fxsparse.inputs import CPU
from fxsparse.module import Emitted, Recipe, SparseModule
from fxsparse.one_shot import check_pruning, prune_program
from fxsparse.parameter_groups import add_groups, extras_held
from fxsparse.passes import planning_pipeline, training_pipeline
from fxsparse.pipeline import PassContext, run_passes
from fxsparse.plans import Plan
from fxsparse.report import Report
from fxsparse.skeleton import copy_structure
from fxsparse.storage import CompactWeight
from fxsparse.summary import add_balance, stored_bytes, summarize, warn_of_nothing
from fxsparse.topology import TopologyHistory
from fxsparse.trace import capture
from fxsparse.transformation import fitted, transform
from fxsparse.undisturbed import without_autocast
from fxsparse.updates import MaskUpdates
from fxsparse.walk import swap_leaves


def compile(
    model: nn.Module,
    plan: Plan | None = None,
    *,
    mode: str = "train",
    example_inputs: Any = None,
    optimizer: Optimizer | None = None,
    device: torch.device | str | None = None,
    strict: bool = False,
    values: str | None = None,
    initial_scores: Mapping[str, Tensor] | None = None,
) -> SparseModule:
    """Compile `model` for sparse training with a `plan`, or for inference of the zeros it has.

    Sparse kernels skip zeros: where an input is infinite or NaN, a product with zeros that makes a dense output NaN
    (0 * inf) leaves theirs as it is.

    Args:
        model: any nn.Module.  For training in masked storage its Parameters are shared and pruned entries zeroed in
            place; in compact storage and for inference it is left untouched, with the buffers that its forward writes.
            Parameters on the meta device are created, in the module that is returned alone: compact weights at the
            size of their nonzeros, never dense.  For inference, weights that masks of ``torch.nn.utils.prune`` or
            parametrizations compute are plain ones in the module that is returned, and the ``module()`` of an exported
            program is taken, too, for the sizes that the program is for.
        plan: what is wanted; required for training, refused for inference (use `fxsparse.prune` first).
        mode: "train" or "infer".
        example_inputs: a tensor, or a tuple of positional inputs whose last item may be a dict of keyword inputs.
            With them the captured graphs are run against the model before anything is changed, and storage and
            kernels are chosen by measurement.
        optimizer: of training; attached, and in compact storage made to hold the stored values instead of the dense
            Parameters.
        device: where parameters on meta are created; the CPU by default.
        strict: raise where the default is a row in the report.
        values: of inference: "int8" (with a scale for each row) or "bfloat16", what the nonzeros of linear layers are
            stored in where that measured faster; inputs, sums and outputs keep their dtypes.  The report says what each
            layer and the whole model lose by it.
        initial_scores: of training: {weight name: score of each entry}, as `fxsparse.saliency` makes them, for a
            method whose initial mask goes by them (``init="snip"``) and for ``allocation="global_score"``.

    Raises:
        PlanError: a plan that does not fit this model, or arguments that do not fit together.
        PatternError: a weight whose shape the pattern cannot have.
        TraceError: TorchScript modules; in strict mode, a model that cannot be captured as a graph.
        UnsupportedError: in strict mode, a storage that a weight cannot have.
    """
    check_call(model, plan, mode)
    check_values(values, mode)
    check_optimizer(optimizer, mode)
    check_device(model, device, optimizer)
    check_scores(initial_scores, plan, model)
    if plan is None:
        with without_autocast():
            return compile_for_inference(model, example_inputs, strict=strict, values=values)
    place = torch.device(device or "cpu")
    # A caller's no_grad is not meant for what the module will train with, nor for the times of its kernels.
    with torch.inference_mode(False), torch.enable_grad(), without_autocast():
        return _train(model, plan, example_inputs, optimizer, place, strict, initial_scores)


def plan_report(
    model: nn.Module,
    plan: Plan,
    example_inputs: Any = None,
    *,
    initial_scores: Mapping[str, Tensor] | None = None,
) -> Report:
    """What `compile` would select, allocate and count; nothing is measured and the model is left untouched.

    The model may be on the meta device.
    """
    return _planned(model, plan, example_inputs, initial_scores).report


def allocate(
    model: nn.Module,
    plan: Plan,
    example_inputs: Any = None,
    *,
    initial_scores: Mapping[str, Tensor] | None = None,
) -> dict[str, int]:
    """{weight name: nonzeros} that the plan gives; the model is left untouched and may be on the meta device."""
    planned = _planned(model, plan, example_inputs, initial_scores)
    return {name: decision.nnz for name, decision in planned.decisions.items()}


def count_flops(
    model: nn.Module,
    example_inputs: Any,
    plan: Plan | None = None,
    convention: str = "mac2",
    *,
    initial_scores: Mapping[str, Tensor] | None = None,
) -> FlopCount:
    """FLOPs of one sample, dense and as `plan` would have them; the model may be on the meta device.

    Args:
        model: left untouched.
        example_inputs: as for `compile`; they give the shapes.
        plan: None counts the model as it is, dense.  Weights in compact storage execute their nonzeros alone; for
            storage="auto" they count as masked, since `compile` decides by measured times.
        convention: "mac2" (2 x multiply-add), "rigl" (arXiv:1911.11134's counter) or "cerebras" (arXiv:2303.11525's).
        initial_scores: as for `compile`, where the plan's counts go by them (``allocation="global_score"``).

    Raises:
        PlanError: an unknown convention, or a model whose shapes the example inputs do not tell.
    """
    check_model(model)
    model = opened(model)
    check_plan(plan, "count_flops")
    check_dense(model, "count_flops")
    if initial_scores is not None:
        check_scores(initial_scores, plan, model)
    model, plan = _transformed(model, plan, example_inputs)
    ctx = PassContext(plan, "train", capture(model, example_inputs), Report(), example_inputs)
    ctx.scores = initial_scores or {}
    run_passes(planning_pipeline(plan, convention), ctx)
    if ctx.flops is None:
        inferred = next(row["notes"] for row in ctx.report.passes if row["name"] == "infer-shapes")
        why = "; ".join(dict.fromkeys([*ctx.program.notes, *inferred]))
        raise PlanError(
            f"count_flops: expected example_inputs that tell the shapes of a graph, got no shapes: {why}. Count the "
            "parts of the model that can be traced on their own."
        )
    return ctx.flops


def prune(
    model: nn.Module,
    plan: Plan,
    example_inputs: Any = None,
    *,
    calibration: Iterable[Any] | None = None,
    report: Report | None = None,
) -> nn.Module:
    """A copy of a trained dense model with the plan's zeros in it, in one shot and without training.

    Args:
        model: left untouched.
        plan: its method is ``static(score)``, or one that looks at what layers read: ``wanda()``, ``sparsegpt()``.
        example_inputs: as for `compile`; the first batch where there is `calibration`.
        calibration: batches, each written as `example_inputs`; read once and held.  The model runs on them in eval mode
            block by block, so that what a layer reads comes from pruned layers.  Held besides are the activations
            between two blocks, for every batch, and sums over the inputs of one block.
        report: an empty Report to fill; with `calibration` its layers have "output_error", the relative error of
            their output on these batches.

    Raises:
        PlanError: the plan's method moves masks during training, or needs calibration; batches that the model does not
            take; a model on meta.
        NumericsError: weights or inputs that are not finite, or too few inputs for SparseGPT; it names the weight.
    """
    check_dense(model, "prune")
    check_call(model, plan, "train", planning=True)
    check_pruning(model, plan, calibration, report)
    batches = None if calibration is None else batches_of(model, calibration)
    if example_inputs is None and batches is not None:
        example_inputs = batches[0]
    with without_autocast():
        made, plan = _transformed(copied_model(model, "prune"), plan, example_inputs)
        program = capture(made, example_inputs)
        ctx = PassContext(plan, "train", program, Report() if report is None else report, example_inputs)
        run_passes(planning_pipeline(plan), ctx)
        errors = prune_program(ctx, batches, measured=report is not None)
    warn_of_nothing(ctx, "prune")
    summarize(ctx)
    ctx.report.notes += ctx.notes
    for row in ctx.report.layers:
        row.update({"output_error": errors[row["name"]]} if row["name"] in errors else {})
    return made


def _planned(
    model: nn.Module, plan: Plan, example_inputs: Any, scores: Mapping[str, Tensor] | None = None
) -> PassContext:
    check_call(model, plan, "train", planning=True)
    if scores is not None:
        check_scores(scores, plan, model)
    model, plan = _transformed(model, plan, example_inputs)
    ctx = PassContext(plan, "train", capture(model, example_inputs), Report(), example_inputs)
    ctx.scores = scores or {}
    run_passes(planning_pipeline(plan), ctx)
    summarize(ctx)
    add_balance(model, ctx)
    return ctx


def _train(
    model: nn.Module,
    plan: Plan,
    example_inputs: Any,
    optimizer: Optimizer | None,
    device: torch.device,
    strict: bool,
    scores: Mapping[str, Tensor] | None,
) -> SparseModule:
    if plan.transform is not None and optimizer is not None and not isinstance(model, GraphModel):
        raise PlanError(
            f"compile: {type(plan.transform).__name__} makes parameters that no optimizer can hold yet; make the "
            "optimizer from sparse.parameters() afterwards and call sparse.attach(optimizer)."
        )
    model, plan = _transformed(model, plan, example_inputs, strict=strict, device=device)
    program = capture(model, example_inputs, strict=strict, device=device)
    program.computes = digest(program)
    ctx = PassContext(plan, "train", program, Report(), example_inputs, strict=strict, device=device)
    ctx.scores = scores or {}
    run_passes(training_pipeline, ctx)
    warn_of_nothing(ctx, "compile")
    sparse = _emit(model, ctx)
    if optimizer is not None:
        for name, weight in sparse.weights():
            if isinstance(weight, CompactWeight):
                optimizer_state.rehome(optimizer, model.get_parameter(name), weight.values, weight.active())
        add_groups(optimizer, extras_held(sparse.weights(), plan.method.extras))
        sparse.attach(optimizer)
    return sparse


def rebuild(
    recipe: Recipe,
    state: Mapping[str, Tensor],
    training: bool,
    history: Mapping[str, Any],
    more: Mapping[str, Tensor] | None = None,
) -> SparseModule:
    """The module that was pickled or saved: the same decisions, without measuring again, then its state.

    `history`: the state of the record of its updates.  `more`: values of tensors on meta that a state dict leaves out.
    """
    model = copy_structure(recipe.shell)
    program = capture(model, as_captured(recipe.example_inputs, recipe.accepts), tier=recipe.tier)
    program.accepts |= recipe.accepts
    program.computes = digest(program)
    decisions, known = copy.deepcopy(recipe.decisions), {**state, **(more or {})}
    ctx = PassContext(
        recipe.plan, "train", program, Report(), recipe.example_inputs, decisions=decisions, state=known
    )
    run_passes(training_pipeline, ctx)
    sparse = _emit(model, ctx)
    loaded: Any = copy.copy(state)
    loaded |= {name: value for name, value in (more or {}).items() if _is_persistent(sparse, name)}
    sparse.load_state_dict(loaded)
    sparse.report.topology.load_state_dict(history)
    return sparse.train(training)


def _is_persistent(module: nn.Module, name: str) -> bool:
    """Whether ``load_state_dict`` asks for a buffer; those of FakeSparsity of ``torch.ao`` are in no ``state_dict``."""
    holder, leaf = owner(module, name)
    return leaf not in holder._non_persistent_buffers_set


def _transformed(
    model: nn.Module, plan: Any, example_inputs: Any, *, strict: bool = False, device: torch.device = CPU
) -> tuple[nn.Module, Any]:
    """The model and the plan that the passes work with, where the plan has a transform."""
    if plan is None or plan.transform is None:
        return model, plan
    if not isinstance(model, GraphModel):
        model = transform(model, plan, example_inputs, strict=strict, device=device)
    elif model.origin.plan.transform != plan.transform:
        raise PlanError(
            f"Plan.transform: this model was transformed by {model.origin.plan.transform} already, got "
            f"{plan.transform}; expected the same, or none."
        )
    return model, fitted(model, plan)


def _emit(model: nn.Module, ctx: PassContext) -> SparseModule:
    """The module that runs what the passes left in `ctx`."""
    assert ctx.plan is not None
    program, plan = ctx.program, ctx.plan
    targets = {name: target_of(ctx, name) for name in ctx.decisions}
    for _, gm in program.distinct_graphs():
        comment(
            gm, {node.name: f"FLOP: {node.meta['flops']}" for node in gm.graph.nodes if "flops" in node.meta}
        )
    ctx.report.topology = history = TopologyHistory({name: target.shape for name, target in targets.items()})
    update_graph = program.graphs.pop("update")
    updates = MaskUpdates(update_graph, plan.method, targets, plan.seed, program.switch, history)
    if program.tier == "walk":
        swap_leaves(program.skeleton, ctx.decisions, plan.method, program.switch)
    summarize(ctx)
    add_balance(model, ctx)
    weights = updates.weights()
    ctx.report.totals["bytes_sparse"] = stored_bytes(weight for _, weight in weights)
    shell = _shell(
        model,
        program.skeleton,
        [name for name, decision in ctx.decisions.items() if decision.storage == "compact"],
    )
    recipe = Recipe(shell, plan, ctx.example_inputs, ctx.decisions, program.tier, program.accepts)
    return SparseModule(
        Emitted(program, ctx.report, tuple(model.state_dict()), targets, recipe, rebuild, updates)
    )


def _shell(model: nn.Module, skeleton: nn.Module, compact: Iterable[str]) -> nn.Module:
    """The user's model over the same tensors (those created for meta ones too), without dense compact weights."""
    shell = copy_structure(model)
    for path, module in shell.named_modules():
        created = skeleton.get_submodule(path)
        for held, new in ((module._parameters, created._parameters), (module._buffers, created._buffers)):
            for name in [
                n for n, tensor in held.items() if tensor is not None and tensor.is_meta and n in new
            ]:
                setattr(module, name, new[name])
    for name in compact:
        set_parameter(shell, name, shell.get_parameter(name).detach().to("meta"))
    return shell
