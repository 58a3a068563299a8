"""Checks of options of methods and schedules: a PlanError names the option, what it may be and what it is."""

import inspect
from collections.abc import Collection
from math import isfinite

from fxsparse.errors import PlanError


def is_number(value: object) -> bool:
    """Whether an option is a finite int or float, and no bool."""
    return isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value)


def is_integer(value: object, lowest: int) -> bool:
    """Whether an option is an int from `lowest` on, and no bool."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= lowest


def check_integer(name: str, value: object, lowest: int) -> None:
    """PlanError unless an option is an integer from `lowest` on."""
    if not is_integer(value, lowest):
        raise PlanError(f"expected {name} as an integer >= {lowest}, got {value!r}.")


def check_steps(name: str, value: object, lowest: int) -> None:
    """PlanError unless an option is a number of optimizer steps from `lowest` on."""
    if not is_integer(value, lowest):
        raise PlanError(f"expected {name} as a number of optimizer steps, at least {lowest}, got {value!r}.")


def check_number(name: str, value: float, lowest: float) -> None:
    """PlanError unless an option is a number from `lowest` on."""
    if not is_number(value) or value < lowest:
        raise PlanError(f"expected {name} as a number >= {lowest}, got {value!r}.")


def check_positive(name: str, value: float, hint: str = "") -> None:
    """PlanError unless an option is a number above 0; `hint`, a sentence, ends the message."""
    if not is_number(value) or value <= 0:
        raise PlanError(f"expected {name} as a number above 0, got {value!r}.{hint and ' ' + hint}")


def check_share(name: str, value: float) -> None:
    """PlanError unless an option is a share from 0 to below 1."""
    if not is_number(value) or not 0 <= value < 1:
        raise PlanError(f"expected {name} as a share from 0 to below 1, got {value!r}.")


def check_one_of(name: str, value: object, known: Collection[str]) -> None:
    """PlanError unless an option is one of the names in `known`."""
    if value not in tuple(known):
        raise PlanError(f"expected {name} as one of {', '.join(known)}, got {value!r}.")


def check_flag(name: str, value: object) -> None:
    """PlanError unless an option is True or False."""
    if not isinstance(value, bool):
        raise PlanError(f"expected {name} as True or False, got {value!r}.")


def check_is(what: str, value: object, kind: type) -> None:
    """PlanError unless this is a `kind`."""
    if not isinstance(value, kind):
        raise PlanError(f"expected {what} to be a {kind.__name__}, got {type(value).__name__}.")


def check_defaults(name: str, signature: inspect.Signature) -> None:
    """PlanError unless every parameter of a method's function is an option with a name and a default."""
    for option, parameter in signature.parameters.items():
        if (
            parameter.default is inspect.Parameter.empty
            or parameter.kind is inspect.Parameter.POSITIONAL_ONLY
        ):
            raise PlanError(
                f"method {name!r}: expected options with a name and a default, as Plan.preset and plans in TOML leave "
                f"them out, got {parameter}. Write {option}=..., a number, string or bool, or None."
            )
