"""Give linear ops on effective weights a backward of the method's own: dX by another mask, dW of another gradient."""

import zlib
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch.fx import GraphModule, Node

from fxsparse.errors import PlanError
from fxsparse.graph import argument
from fxsparse.method import extras_of
from fxsparse.pipeline import PassContext


@dataclass(frozen=True)
class InsertLinearRule:
    """linear(x, reparam(w, ...), b) becomes ``reparam.linear(x, effective, b, mask, *extras, step, key, *numbers)``.

    For a reparametrisation with an attribute ``linear``.  `step` is the buffer ``fxsparse_step`` and `key` a number of
    the call, for random numbers that activation checkpointing and a resumed run draw again.  Whatever else reads the
    weight, a convolution for one, keeps the usual gradient, with a note.

    Raises:
        PlanError: the model runs by its own forward.
    """

    name: ClassVar[str] = "insert-linear-rule"
    after: ClassVar[tuple[str, ...]] = ("insert-reparam",)
    preserves_function: ClassVar[bool] = True

    def run(self, gm: GraphModule, ctx: PassContext) -> int:
        assert ctx.plan is not None
        reparam = ctx.plan.method.reparam
        rule = getattr(reparam, "linear", None)
        if rule is None:
            return 0
        if ctx.program.tier == "walk":
            raise PlanError(
                f"{ctx.plan.method.name} changes the backward of linear ops, which takes a graph of the model, and "
                "none could be captured: expected a model that torch.fx or torch.export can trace (the error of "
                "fxsparse.compile with strict=True says why this one is not)."
            )
        if "fxsparse_step" not in ctx.program.skeleton._buffers:
            ctx.program.skeleton.register_buffer("fxsparse_step", torch.zeros((), dtype=torch.int64))
        function, numbers = reparam.function(dense_grad=False)
        rewrites = 0
        for effective in gm.graph.find_nodes(op="call_function", target=function):
            for place, user in enumerate(list(effective.users)):
                if user.target is not F.linear or argument(user, 1, "weight") is not effective:
                    ctx.notes.append(f"{_weight(effective)}: {user.name} keeps the usual backward")
                    continue
                beside = effective.args[1 : 2 + len(extras_of(reparam))]
                with gm.graph.inserting_before(user):
                    step = gm.graph.get_attr("fxsparse_step")
                key = zlib.crc32(f"{ctx.plan.seed}/{_weight(effective)}/{place}".encode())
                given = (argument(user, 0, "input"), effective, argument(user, 2, "bias"))
                user.target, user.args, user.kwargs = rule, (*given, *beside, step, key, *numbers), {}
                rewrites += 1
        return rewrites


def _weight(effective: Node) -> str:
    read = effective.args[0]
    assert isinstance(read, Node)
    return str(read.target)
