"""What ``torch.compile(model, backend="fxsparse", mode=..., options=...)`` may say."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import _inductor

from fxsparse.backend.planned import read_plan
from fxsparse.errors import PlanError
from fxsparse.plans import Plan

MODES = ("auto", "infer", "train")


@dataclass(frozen=True)
class Options:
    """What a user asked the backend for."""

    mode: str = "auto"
    """"auto", "infer": outputs carry no gradients, or "train": weights stay as they are, nothing is measured."""
    plan: Plan | None = None
    """Draws masks for the weights of the graph; None leaves them as they are."""
    inductor: Mapping[str, Any] = field(default_factory=dict)
    """Settings of Inductor."""


def read_options(mode: str | None, options: Mapping[str, Any] | None) -> Options:
    """The options that ``torch.compile`` hands on; PlanError for what neither this backend nor Inductor knows.

    `mode` is Inductor's ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"), as for
    ``backend="inductor"``.  ``options["mode"]`` and ``options["plan"]`` (see `read_plan`) are this backend's; every
    other option is Inductor's.
    """
    given = dict(options or {})
    ours = given.pop("mode", None)
    ours = MODES[0] if ours is None else ours
    if ours not in MODES:
        advice = "; an Inductor mode goes to torch.compile(mode=...)" if ours in _inductor_modes() else ""
        raise PlanError(
            f"backend 'fxsparse': expected options['mode'] in {list(MODES)}, got {ours!r}{advice}."
        )
    plan = read_plan(given.pop("plan", None))
    known = {name.replace("-", "_"): value for name, value in given.items()}
    unknown = sorted(known.keys() - set(_inductor.list_options()))
    if unknown:
        raise PlanError(
            f"backend 'fxsparse': unknown option {unknown[0]!r}; expected 'mode', 'plan', or one of Inductor's options "
            "(torch._inductor.list_options())."
        )
    return Options(ours, plan, {**_of_mode(mode), **known})


def _inductor_modes() -> list[str]:
    return list(_inductor.list_mode_options())


def _of_mode(mode: str | None) -> Mapping[str, Any]:
    if mode is not None and mode not in _inductor_modes():
        raise PlanError(
            f"backend 'fxsparse': expected mode in {_inductor_modes()}, got {mode!r}; 'infer' and 'train' are "
            "options={'mode': ...}."
        )
    return _inductor.list_mode_options(mode) if mode else {}
