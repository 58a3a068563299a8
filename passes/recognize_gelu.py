"""Recognize GELU where a model spells it out, so that a kernel may do it with its product."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Graph, GraphModule, symbolic_trace
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.passes.utils.matcher_utils import InternalMatch, SubgraphMatcher

from fxsparse.pipeline import PassContext

_VIEWS = {torch.ops.aten.view.default, torch.ops.aten.reshape.default, "view", "reshape", torch.reshape}


@dataclass(frozen=True)
class RecognizeGelu:
    """Write the tanh form of GELU as one call, before a view that lies between it and what makes its input.

    The values change by rounding alone.
    """

    name: ClassVar[str] = "recognize-gelu"
    after: ClassVar[tuple[str, ...]] = ("functionalize",)
    preserves_function: ClassVar[bool] = True

    def run(self, gm: GraphModule, ctx: PassContext) -> int:
        """Rewrites the evaluation graph; returns the number of GELUs."""
        found = [match for matcher in _matchers() for match in matcher.match(gm.graph)]
        for match in found:
            _replace(gm.graph, match)
        return len(found)


def _new_gelu(x: Tensor) -> Tensor:
    """As GPT-2 has it."""
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))


def _fast_gelu(x: Tensor) -> Tensor:
    """As GPT-J's family has it."""
    return 0.5 * x * (1.0 + torch.tanh(x * 0.7978845608 * (1.0 + 0.044715 * x * x)))


@cache
def _matchers() -> list[SubgraphMatcher]:
    """Of each spelling, as symbolic tracing and as export write it down."""
    spellings: tuple[Callable[[Tensor], Tensor], ...] = (_new_gelu, _fast_gelu)
    traced = [trace(spelling) for spelling in spellings for trace in (symbolic_trace, _in_aten)]
    return [SubgraphMatcher(gm.graph) for gm in traced]


def _in_aten(spelling: Callable[[Tensor], Tensor]) -> GraphModule:
    return make_fx(spelling)(torch.zeros(2))


def _replace(graph: Graph, match: InternalMatch) -> None:
    (last,), (source,) = match.returning_nodes, match.placeholder_nodes
    spelled = [node for pattern, node in match.nodes_map.items() if pattern.op == "call_function"]
    behind_view = source.target in _VIEWS and set(source.users) <= set(spelled)
    read = source.args[0] if behind_view else source
    with graph.inserting_before(source if behind_view else last):
        made = graph.call_function(F.gelu, (read,), {"approximate": "tanh"})
    if behind_view:
        source.args = (made, *source.args[1:])
    last.replace_all_uses_with(source if behind_view else made)
    for node in sorted(spelled, reverse=True):
        graph.erase_node(node)
