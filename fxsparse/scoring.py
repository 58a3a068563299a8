"""``saliency``: scores of a model's weights before training, for initial masks and for counts."""

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fxsparse.allocation import Target
from fxsparse.compile_checks import check_call, check_dense
from fxsparse.dropout_off import dropout_off
from fxsparse.errors import NumericsError, PlanError
from fxsparse.passes import planning_pipeline
from fxsparse.pipeline import PassContext, run_passes
from fxsparse.plans import Plan
from fxsparse.report import Report
from fxsparse.saliencies import snip as snip
from fxsparse.scores import SALIENCIES, Given, Scoring
from fxsparse.summary import why_none
from fxsparse.trace import capture


def saliency(
    model: nn.Module,
    plan: Plan,
    loss_fn: Callable[[nn.Module, Any], Tensor] | None = None,
    batches: Iterable[Any] = (),
    *,
    example_inputs: Any = None,
) -> dict[str, Tensor]:
    """{weight: score of each entry} of every weight that the plan selects, by the score that its method names.

    For ``compile(model, plan, initial_scores=...)``.  A copy of the model is scored in train mode with dropout off,
    that of functions and attention too; `model` and torch's generators are left as they are.  With
    ``Plan(allocation="global_score")`` the largest of all scores together decide how many entries each weight keeps, as
    in SNIP, GraSP and SynFlow; any other allocation gives the counts, and scores only rank the entries of a weight.
    Ranks of a process group score alone: where their batches differ, ``dist.all_reduce`` every score before `compile`
    (docs/distributed.md).

    Args:
        loss_fn: (model, batch) -> scalar loss.
        batches: whatever `loss_fn` takes; all are used.
        example_inputs: as for `compile`; "synflow" takes their shapes and no batches.

    Raises:
        PlanError: the plan's method names no such score or the plan selects no weight; the model has no values; a loss
            that is no scalar or that no weight takes part in; a registered score that returns anything but a tensor
            of the weight's shape for every weight.
        NumericsError: a score that is inf or NaN.
    """
    check_dense(model, "saliency")
    check_call(model, plan, "train", planning=True)
    _check_arguments(loss_fn, batches)
    init = plan.method.init
    if not isinstance(init, Given) or init.name not in SALIENCIES:
        raise PlanError(
            f"saliency: expected a method whose init names one of {', '.join(sorted(SALIENCIES))}, such as "
            f"static(score='snip'), got {plan.method.name} with another."
        )
    if plan.transform is not None:
        raise PlanError("saliency: this plan transforms the model first, so its weights do not exist yet.")
    meta = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if meta:
        raise PlanError(
            f"saliency: {meta[0]!r} is on the meta device and has no values to score; load them first."
        )
    # A caller's no_grad is not meant for gradients that nobody but the score sees.
    with torch.inference_mode(False), torch.enable_grad():
        names, density = _selected(model, plan, example_inputs)
        own = copy.deepcopy(model).train()
        for name in names:
            own.get_parameter(name).requires_grad_(True)
        scoring = Scoring(own, names, loss_fn, list(batches), density, example_inputs)
        with dropout_off(own):
            found = SALIENCIES[init.name](scoring)
        for name, weight in scoring.weights().items():
            _check_found(init.name, found, name, weight)
        return {name: found[name].detach().clone() for name in names}


def _check_arguments(loss_fn: Any, batches: Any) -> None:
    if loss_fn is not None and not callable(loss_fn):
        raise PlanError(f"saliency: expected loss_fn(model, batch) -> loss, got {type(loss_fn).__name__}.")
    if not isinstance(batches, Iterable):
        raise PlanError(
            "saliency: expected batches as an iterable of whatever loss_fn takes, such as a list or a DataLoader, got "
            f"{type(batches).__name__}."
        )


def _check_found(score: str, found: Any, name: str, weight: Tensor) -> None:
    scores = found.get(name) if isinstance(found, Mapping) else found
    if not isinstance(found, Mapping) or not isinstance(scores, Tensor) or scores.shape != weight.shape:
        got = f"shape {tuple(scores.shape)}" if isinstance(scores, Tensor) else type(scores).__name__
        raise PlanError(
            f"saliency {score!r}: expected a function that returns {{weight: tensor of its shape}} for every name in "
            f"scoring.names, {tuple(weight.shape)} for {name!r}, got {got}. Mend that function."
        )
    if not bool(scores.isfinite().all()):
        raise NumericsError(
            f"saliency {score!r} of {name!r}: expected finite scores, got inf or NaN. Look at the loss on these "
            "batches, and at the dtype of the model."
        )


def _selected(model: nn.Module, plan: Plan, example_inputs: Any) -> tuple[tuple[str, ...], float]:
    """Names of the plan's weights, and the share of their entries that is to stay."""
    ctx = PassContext(plan, "train", capture(model, example_inputs), Report(), example_inputs)
    run_passes(planning_pipeline(None), ctx)
    specs = list(ctx.weights.values())
    if not specs:
        raise PlanError(
            "saliency: expected a plan that selects a weight, got one that selects none of the model's "
            f"{len(ctx.untouched)} parameters: {why_none(ctx)}. Look at its include and exclude."
        )
    return tuple(ctx.weights), Target(plan.sparsity or 0.0).free_total(specs) / sum(s.numel for s in specs)
