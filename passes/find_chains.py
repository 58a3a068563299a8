"""Find the weights whose columns are exactly the rows of another, for methods that go by topology."""

from dataclasses import dataclass
from typing import ClassVar

from torch import nn
from torch.fx import GraphModule, Node

from fxsparse.channels.reading import Reader, is_pointwise
from fxsparse.graph import SITE_OPS, Site, argument, sites
from fxsparse.method import Probe
from fxsparse.pipeline import PassContext

_BY_NEURON = ("dropout", "alpha_dropout", "batch_norm")
_MODULES_BY_NEURON = (nn.Dropout, nn.AlphaDropout, nn.BatchNorm1d)
"""Besides pointwise ops: what treats every neuron by itself."""


@dataclass(frozen=True)
class FindChains:
    """Fill `feeds` of every decision, for a method whose rule has Probe.TOPOLOGY; rewrites nothing.

    One weight feeds another where the output of its only call goes, through ops that treat every neuron by itself and
    that nothing else reads, into the only call of the other: linear layers both, stored [out, in] and read whole.  A
    residual connection, attention or a convolution between or beside them ends the chain, with a note.
    """

    name: ClassVar[str] = "find-chains"
    after: ClassVar[tuple[str, ...]] = ("allocate-nnz",)
    preserves_function: ClassVar[bool] = True

    def run(self, gm: GraphModule, ctx: PassContext) -> int:
        rule = None if ctx.plan is None else ctx.plan.method.rule
        if rule is None or rule.probe is not Probe.TOPOLOGY or gm is not ctx.program.graphs["train"]:
            return 0
        if ctx.program.tier == "walk":
            ctx.notes.append("no weight is known to feed another: the module walk sees no calls in order")
            return 0
        reader = Reader(gm)
        found = {name: sites(gm, name) for name in ctx.decisions}
        alone = {of[0].node: name for name, of in found.items() if len(of) == 1 and _is_plain(of[0])}
        for node, name in alone.items():
            fed = alone.get(_next_site(reader, node))
            ctx.decisions[name].feeds = () if fed is None else (fed,)
        apart = [name for name in ctx.decisions if not ctx.decisions[name].feeds]
        ctx.notes += [f"{name} feeds no other sparse weight alone" for name in apart]
        return 0


def _is_plain(site: Site) -> bool:
    return site.op == "linear" and not site.transposed and not site.sliced


def _next_site(reader: Reader, node: Node) -> Node | None:
    """The call of a linear layer or convolution that alone reads what a node computes."""
    while len(node.users) == 1:
        user = next(iter(node.users))
        if user.op == "call_function" and user.target in SITE_OPS:
            return user if argument(user, 0, "input") is node else None
        computed = [given for given in user.all_input_nodes if given.op != "get_attr"]
        if computed != [node] or not _by_neuron(reader, user):
            return None
        node = user
    return None


def _by_neuron(reader: Reader, node: Node) -> bool:
    if type(reader.module(node)) in _MODULES_BY_NEURON:
        return True
    operation = reader.operation(node)
    return operation in _BY_NEURON or (operation is not None and is_pointwise(operation))
