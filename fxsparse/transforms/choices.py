"""The names that the fields of a transformation may hold."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fxsparse.errors import PlanError

SIGMAS = ("none", "norm", "relu", "norm+relu")
"""What follows a branch or lies between two factors: BatchNorm after convolutions, LayerNorm after linear layers."""
MATCHES = ("layers", "model", "nominal")
"""What costs as much as before: the transformed layers, the whole model, or nothing exactly."""


def check_sigma(value: object, where: str) -> None:
    """Raise PlanError unless `value` is one of SIGMAS."""
    check_choice(value, SIGMAS, f"{where}.sigma")


def check_match(value: object, where: str) -> None:
    """Raise PlanError unless `value` is one of MATCHES."""
    check_choice(value, MATCHES, f"{where}.match")


def check_flag(value: object, where: str) -> None:
    """Raise PlanError unless `value` is True or False."""
    if not isinstance(value, bool):
        raise PlanError(f"{where}: expected True or False, got {value!r}.")


def check_choice(value: object, known: Sequence[str], where: str) -> None:
    """Raise PlanError unless `value` is one of the `known` names."""
    if value not in known:
        raise PlanError(f"{where}: expected one of {', '.join(known)}, got {value!r}.")


def no_layers(transform: object, dense: Mapping[str, str], excluded: Iterable[str]) -> PlanError:
    """The refusal of a plan that finds nothing to transform; `dense`: {weight: why it stays as it is}."""
    reasons = [f"{name}: {why}" for name, why in dense.items()]
    reasons += [f"{name}: the plan excludes it" for name in excluded]
    more = f"; and {len(reasons) - 5} more" if len(reasons) > 5 else ""
    return PlanError(
        f"{type(transform).__name__}: expected layers to transform, found none: "
        f"{'; '.join(reasons[:5]) or 'the model has no linear layer or convolution'}{more}. It takes those between "
        "others, which neither read the model's input nor make its output; leave the transform out for this model."
    )


def globs(value: Any, where: str) -> tuple[str, ...]:
    """The value as a tuple of globs of weight names."""
    if not isinstance(value, tuple | list) or not all(isinstance(item, str) for item in value):
        raise PlanError(f"{where}: expected a tuple of globs such as ('*.shortcut.*',), got {value!r}.")
    return tuple(value)
