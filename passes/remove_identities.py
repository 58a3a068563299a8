"""Remove what does nothing in evaluation: Dropout, stochastic depth and Identity."""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import GraphModule, Node
from torch.nn.modules.dropout import _DropoutNd

from fxsparse.graph import argument
from fxsparse.pipeline import PassContext

_DROPOUTS = {
    F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout,
}  # fmt: skip
_ATEN_DROPOUTS = {
    torch.ops.aten.dropout.default,
    torch.ops.aten.feature_dropout.default,
    torch.ops.aten.alpha_dropout.default,
}


@dataclass(frozen=True)
class RemoveIdentities:
    """Erase calls of Identity and of dropouts that are off; later patterns see through them."""

    name: ClassVar[str] = "remove-identities"
    after: ClassVar[tuple[str, ...]] = ("functionalize",)
    preserves_function: ClassVar[bool] = True

    def run(self, gm: GraphModule, ctx: PassContext) -> int:
        """Rewrites the evaluation graph; returns the number of erased calls."""
        found = [node for node in gm.graph.nodes if _does_nothing(gm, node)]
        for node in found:
            node.replace_all_uses_with(argument(node, 0, "input"))
            gm.graph.erase_node(node)
        return len(found)


def _does_nothing(gm: GraphModule, node: Node) -> bool:
    if not isinstance(argument(node, 0, "input"), Node):
        return False
    if node.op == "call_module":
        module = gm.get_submodule(str(node.target))
        return type(module) is nn.Identity or (isinstance(module, _DropoutNd) and not module.training)
    if node.target in _DROPOUTS:
        training = argument(node, 2, "training")
        return training is False or argument(node, 1, "p") == 0.0
    if (
        getattr(node.target, "__name__", "") == "stochastic_depth"
    ):  # torchvision's, which need not be installed
        return argument(node, 3, "training") is False
    return node.target in _ATEN_DROPOUTS and argument(node, 2, "train") is False
