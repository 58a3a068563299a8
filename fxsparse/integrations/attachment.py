"""The SparseModules inside a trainer's model, and which of its optimizers each one follows."""

from collections.abc import Sequence

from torch import nn
from torch.optim import Optimizer

from fxsparse.errors import PlanError
from fxsparse.module import SparseModule


def trained_modules(model: nn.Module) -> dict[str, SparseModule]:
    """{path: module} of what was compiled with a plan, `model` itself under ""; those for inference are left out.

    Raises:
        PlanError: there is none.
    """
    found = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, SparseModule) and module.plan is not None
    }
    if not found:
        raise PlanError(
            f"SparseCallback: expected a module compiled with a plan inside {type(model).__name__}, got none. Put "
            "fxsparse.compile(model, plan, example_inputs=...) in the model's place, or leave the callback out."
        )
    return found


def attach_all(model: nn.Module, optimizers: Sequence[Optimizer]) -> None:
    """Attach each of `trained_modules` to the optimizer that holds most of its parameters.

    Raises:
        PlanError: there is no such module, no optimizer, or a weight that none of them holds.
    """
    for path, module in trained_modules(model).items():
        if not optimizers:
            raise PlanError(
                f"SparseCallback: expected an optimizer that holds the parameters of {path or 'the model'!r}, got "
                "none from the trainer. Return one from configure_optimizers, or leave the callback out."
            )
        own = {id(parameter) for parameter in module.parameters()}
        module.attach(max(optimizers, key=lambda optimizer: _held(optimizer, own)))


def _held(optimizer: Optimizer, own: set[int]) -> int:
    return sum(id(parameter) in own for group in optimizer.param_groups for parameter in group["params"])
