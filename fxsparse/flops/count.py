"""FLOPs of a whole graph: per call site, in total, and of training."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sympy import Add, Expr, Integer, Symbol
from torch.fx import GraphModule

from fxsparse.flops.conventions import Convention, resolve
from fxsparse.flops.site import BATCH, CallSite
from fxsparse.flops.site_flops import SiteFlops, Stored, nonzeros, site_flops
from fxsparse.flops.sites import Sites, call_sites
from fxsparse.flops.training import train_flops
from fxsparse.method import Method


@dataclass(frozen=True)
class LayerCount:
    """FLOPs of one forward of one sample at one call site."""

    name: str
    op: str
    weight: str | None
    dense: int
    sparse: int
    """Theoretical: nonzeros only."""
    executed: int
    flops: SiteFlops
    """Symbolic, with the backward and the mask updates."""


@dataclass(frozen=True)
class FlopCount:
    """FLOPs of one forward of one sample, and of training relative to dense training."""

    convention: str
    dense: int
    total: int
    """Theoretical: nonzeros only; equals `dense` without a plan."""
    executed: int
    """What the chosen storage computes."""
    train_ratio: float
    """FLOPs of an average training step over those of a dense one, by RigL's formulas."""
    layers: tuple[LayerCount, ...]
    """Call sites that cost anything, in graph order."""
    symbolic: Expr
    """`total` in the symbols ``batch`` and ``sequence``."""
    uncounted: tuple[str, ...] = ()
    """Modules whose FLOPs are not in any number here, with the reason."""

    def of_weight(self, name: str) -> tuple[int, int, int] | tuple[None, None, None]:
        """(dense, theoretical, executed) of all calls that read a weight; None where none could be counted."""
        rows = [layer for layer in self.layers if layer.weight == name]
        if not rows:
            return None, None, None
        return sum(r.dense for r in rows), sum(r.sparse for r in rows), sum(r.executed for r in rows)


def count_program(
    gm: GraphModule,
    stored: Mapping[str, Stored] | None = None,
    method: Method | None = None,
    convention: str = "mac2",
) -> FlopCount:
    """Count a graph whose nodes hold their values in ``meta["val"]``; sites get their ``meta["flops"]``.

    Args:
        gm: the graph.
        stored: {weight: how it is held}; weights not in it are dense.
        method: whose mask updates and schedule the training FLOPs have.
        convention: "mac2", "rigl" or "cerebras".

    Raises:
        PlanError: an unknown convention.
    """
    count = summarise(call_sites(gm), stored or {}, method, convention)
    flops = {layer.name: layer.flops for layer in count.layers}
    for node in gm.graph.nodes:
        if node.name in flops:
            node.meta["flops"] = flops[node.name]
    return count


def summarise(
    sites: Sites, stored: Mapping[str, Stored], method: Method | None = None, convention: str = "mac2"
) -> FlopCount:
    """`count_program` of call sites; all that has to be known of the graph is in them."""
    rule, sizes = resolve(convention), {BATCH: 1, **sites.sizes}
    layers: list[LayerCount] = []
    totals: list[Expr] = []
    for site in sites.found:
        held = stored.get(site.weight or "")
        flops = site_flops(site, rule, held, method)
        if flops.dense.total != 0:
            at = site_flops(site.at(sizes), rule, held, method)
            dense, sparse, executed = (
                int(phases.forward) // sites.samples for phases in (at.dense, at.sparse, at.executed)
            )
            totals.append(at.sparse.forward)
            layers.append(LayerCount(site.name, site.op, site.weight, dense, sparse, executed, flops))
    scale = BATCH / sites.samples if sites.samples > 1 and BATCH not in sites.sizes else Integer(1)
    return FlopCount(
        convention=convention,
        dense=sum(layer.dense for layer in layers),
        total=int(Add(*totals)) // sites.samples,
        executed=sum(layer.executed for layer in layers),
        train_ratio=_train_ratio([site.at(sizes) for site in sites.found], stored, method, rule),
        layers=tuple(layers),
        symbolic=_plain(Add(*(layer.flops.sparse.forward for layer in layers)) * scale),
        uncounted=sites.uncounted,
    )


def _plain(expression: Expr) -> Expr:
    """With symbols that have a name only, so that ``subs({"batch": 8})`` finds them."""
    return expression.subs({symbol: Symbol(str(symbol)) for symbol in expression.free_symbols})


def _train_ratio(
    sites: Sequence[CallSite], stored: Mapping[str, Stored], method: Method | None, rule: Convention
) -> float:
    def forward(counts: Mapping[str, float]) -> float:
        return float(Add(*(rule.forward(site, entries(site, counts)) for site in sites)))

    def entries(site: CallSite, counts: Mapping[str, float]) -> Expr:
        held = counts.get(site.weight or "")
        return Integer(site.numel) if held is None else nonzeros(site, held)

    numels = {name: held.numel for name, held in stored.items()}
    dense = forward(numels)
    if method is None or not dense:
        return 1.0
    counts = {name: held.entries(rule.nominal) for name, held in stored.items()}
    settled = {name for name, held in stored.items() if held.settled}
    return train_flops(method, forward, counts, numels, settled) / (3 * dense)
