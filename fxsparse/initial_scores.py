"""Scores that the caller hands to ``compile``: what is asked of them, and what they give to initial masks."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fxsparse.errors import PlanError
from fxsparse.pipeline import PassContext
from fxsparse.plans import Plan
from fxsparse.scores import Given

GLOBAL = "global_score"
"""The allocation that ranks them all together."""


def check_scores(scores: Mapping[str, Tensor] | None, plan: Plan | None, model: nn.Module) -> None:
    """Raise PlanError where a plan needs scores and has none, where nothing would read them, or they fit no weight."""
    asks = plan is not None and (isinstance(plan.method.init, Given) or plan.allocation == GLOBAL)
    if scores is None:
        if asks and plan is not None:
            raise PlanError(_needed(plan))
        return
    if not asks:
        raise PlanError(
            "initial_scores: nothing reads them: expected a method such as static(score='snip') or rigl(init='given'), "
            f"or Plan(allocation={GLOBAL!r}). Leave them out, or change the plan."
        )
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, score in scores.items():
        known = parameters.get(name)
        got = tuple(score.shape) if isinstance(score, Tensor) else type(score).__name__
        if known is None or got != tuple(known.shape):
            expected = "the name of a parameter of the model" if known is None else f"{tuple(known.shape)}"
            raise PlanError(f"initial_scores[{name!r}]: expected {expected}, got {got}.")
        if not bool(score.isfinite().all()):
            raise PlanError(f"initial_scores[{name!r}]: expected finite numbers, got inf or NaN.")


def given_score(ctx: PassContext, name: str) -> Tensor:
    """The score of a weight in the user's layout, on the device where the weight is."""
    assert ctx.plan is not None
    if name not in ctx.scores:
        known = ", ".join(list(ctx.scores)[:3]) or "no weight"
        raise PlanError(
            f"initial_scores: expected one for {name!r}, got those of {known}. {_needed(ctx.plan)}"
        )
    weight = ctx.program.skeleton.get_parameter(name)
    device = ctx.device if weight.is_meta else weight.device
    return ctx.scores[name].detach().to(device, torch.promote_types(ctx.scores[name].dtype, torch.float32))


def _needed(plan: Plan) -> str:
    name = plan.method.init.name if isinstance(plan.method.init, Given) else "given"
    made = "your own" if name == "given" else "fxsparse.saliency(model, plan, loss_fn, batches)"
    return (
        f"The initial masks or counts of this plan go by scores ({name!r}): pass compile(..., initial_scores={made}), "
        "a tensor of the weight's shape for every selected weight."
    )
