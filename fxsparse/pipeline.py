"""The pass protocol and what passes share."""

from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import torch
from torch import nn
from torch.fx import GraphModule

from fxsparse.pattern import Pattern
from fxsparse.plans import Plan
from fxsparse.report import Report


@dataclass
class Program:
    """A captured model: its parameter tree, and one graph per mode that runs on that tree."""

    tier: str
    """"symbolic", "export" or "walk"."""
    skeleton: nn.Module
    """A structural copy of the user's model: own module objects, the same Parameters and buffers."""
    graphs: dict[str, GraphModule]
    """"train" and "eval"; the same object where the code does not differ; sites only on the walk tier."""
    notes: list[str] = field(default_factory=list)
    """One line per front end that was tried and why it was left."""


@dataclass(frozen=True)
class WeightSpec:
    """Facts about one eligible weight."""

    name: str
    op: str
    """"linear", "conv1d" to "conv3d", "conv_transpose1d" to "conv_transpose3d"."""
    shape: tuple[int, ...]
    dtype: torch.dtype
    transposed: bool = False
    """Stored [in_features, out_features], as in GPT-2's Conv1D."""
    aliases: tuple[str, ...] = ()
    """Other names of the same Parameter."""
    groups: int = 1

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()


@dataclass
class Decision:
    """What was decided for one weight; each pass fills its own fields."""

    pattern: Pattern
    sparsity_target: float
    nnz: int = 0
    storage: str = "masked"
    format: str = "dense"
    kernel: str = ""
    reason: str = ""


@dataclass
class PassContext:
    """Everything passes share; no decision hides in ``node.meta``."""

    plan: Plan | None
    mode: str
    program: Program
    report: Report
    example_inputs: tuple[Any, ...] | None = None
    weights: dict[str, WeightSpec] = field(default_factory=dict)
    decisions: dict[str, Decision] = field(default_factory=dict)
    excluded: dict[str, WeightSpec] = field(default_factory=dict)
    """Eligible weights that the plan excluded; they are in `untouched` too."""
    untouched: dict[str, str] = field(default_factory=dict)
    """{parameter name: reason} for every parameter that is not in `weights`."""


class Pass(Protocol):
    """One graph rewrite; a frozen dataclass whose fields are its options."""

    name: ClassVar[str]
    after: ClassVar[tuple[str, ...]]
    preserves_function: ClassVar[bool]

    def run(self, gm: GraphModule, ctx: PassContext) -> int:
        """Edit `gm` in place and return the number of rewrites; called once per distinct graph."""
        ...
