"""The pass protocol, what passes share, and the runner: order, checks, timing, and a report row for each
pass.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import networkx as nx
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from fxsparse.creation import Draw
from fxsparse.errors import InvariantError, PlanError
from fxsparse.flops.count import FlopCount
from fxsparse.input_check import InputCheck
from fxsparse.inputs import CPU, has_meta
from fxsparse.kernel import Entries
from fxsparse.observed import ProbeSwitch
from fxsparse.pattern import Pattern
from fxsparse.plans import Plan
from fxsparse.prices import Price, Prices
from fxsparse.report import Report
from fxsparse.verify import Observation, compare, observe


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
    hidden: dict[str, str] = field(default_factory=dict)
    """{eligible weight: reason} for weights that no pass can reach, such as those in a module that cannot be
    traced."""
    dense: dict[str, str] = field(default_factory=dict)
    """{weight: reason} for weights that a transformation leaves dense."""
    accepts: dict[str, InputCheck] = field(default_factory=dict)
    """{mode: what its graph asks of a call}, where it asks for anything."""
    computes: str = ""
    """Of training: `fxsparse.computes.digest` of the graphs as they were captured."""
    switch: ProbeSwitch = field(default_factory=ProbeSwitch)
    """Of training: what the probe steps of this program collect."""

    def distinct_graphs(self) -> list[tuple[str, GraphModule]]:
        """(mode, graph) without repeating a graph that serves both modes."""
        return list({id(gm): (mode, gm) for mode, gm in reversed(self.graphs.items())}.values())[::-1]

    def run(self, mode: str, *args: Any, **kwargs: Any) -> Any:
        """Call the program as a model in a mode ("train" or "eval"); leaves the skeleton in that mode."""
        self.skeleton.train(mode == "train")
        return (self.skeleton if self.tier == "walk" else self.graphs[mode])(*args, **kwargs)


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
    trains: bool = True
    """It needs a gradient when it is compiled."""

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()


@dataclass
class Decision:
    """What was decided for one weight; each pass fills its own fields."""

    pattern: Pattern
    sparsity_target: float
    nnz: int = 0
    """What the pattern can hold of the budget."""
    storage: str = "masked"
    format: str = "dense"
    kernel: str = ""
    reason: str = ""
    budget: int = 0
    """What the allocation gave the weight, before the pattern rounded it down."""
    cost: float = 1.0
    """Of an entry, where the plan has a budget: relative to the mean of all entries."""
    price: Price | None = None
    """Of the whole weight by its nonzeros, where the plan has a budget and the weight may be pruned."""
    limit: float = 0.0
    """What all weights that may be pruned may cost together by their prices."""
    dense: bool = False
    """An override keeps the weight dense, outside of what others share."""
    initial: int | None = None
    """Entries before the first update, where the method starts from a sparsity of its own."""
    channels: tuple[int, ...] = ()
    """For each row its channel, for a method that ablates; empty where shapes are unknown."""
    feeds: tuple[str, ...] = ()
    """Weights whose columns are this weight's rows, for a method whose updates go by topology."""
    settled: bool = False
    """It has its final count from the start: the plan keeps it dense, or it does not train."""
    ablates: bool = False
    """The method may ablate neurons of this weight."""
    neurons: str = ""
    """Whether it may, and why not, as the report says it; empty where the method ablates none at all."""
    dense_us: float | None = None
    """Inference: measured time of the best dense kernel at the example inputs, microseconds, over all call sites."""
    sparse_us: float | None = None
    """The same of the best sparse kernel, taken or not."""
    values_dtype: torch.dtype | None = None
    """Inference: what the kernel taken stores the values in where that is not the weight's dtype."""
    values_error: float | None = None
    """What that costs: the largest difference of the outputs, relative to the largest output."""
    limit_us: float | None = None
    """What the FLOPs or the weight bytes of the kernel taken need at the least on this machine."""


@dataclass(frozen=True)
class Shrunk:
    """A weight from which rows or columns were taken, of neurons that compute nothing."""

    numel: int
    """Before."""
    neurons: int
    """Rows taken."""


@dataclass
class Transformed:
    """What a transformation (`Plan.transform`) takes and makes; filled by its passes."""

    layers: list[str] = field(default_factory=list)
    """Weights of the model as it came that are transformed."""
    sparse: list[str] = field(default_factory=list)
    """Weights of the transformed model that become sparse."""
    low_rank: list[str] = field(default_factory=list)
    """Weights of the transformed model that stay dense and count as part of the layers (U and V of Sparse Doped)."""
    dense: dict[str, str] = field(default_factory=dict)
    """{weight that stays dense: why}."""


@dataclass
class PassContext:
    """Everything passes share; no decision hides in ``node.meta``."""

    plan: Plan | None
    mode: str
    program: Program
    report: Report
    example_inputs: Any = None
    """As the user gave them; see :func:`fxsparse.inputs.split_inputs`."""
    entries: dict[str, Entries] = field(default_factory=dict)
    """Inference: the weights too large to be made dense.  Until they are lowered, the tree holds theirs on meta."""
    weights: dict[str, WeightSpec] = field(default_factory=dict)
    decisions: dict[str, Decision] = field(default_factory=dict)
    excluded: dict[str, WeightSpec] = field(default_factory=dict)
    """Eligible weights that the plan excluded; they are in `untouched` too."""
    untouched: dict[str, str] = field(default_factory=dict)
    """{parameter name: reason} for every parameter that is not in `weights`."""
    device: torch.device = CPU
    """Where parameters on meta are created."""
    draws: dict[str, Draw] = field(default_factory=dict)
    """How the values of compact weights are drawn that were on meta."""
    strict: bool = False
    """Raise where the default is a row in the report."""
    values_dtype: torch.dtype | None = None
    """Inference: what values may be stored in, too, where that is faster."""
    state: Mapping[str, Tensor] | None = None
    """The state dict of the module that is built again; masks are then taken from it."""
    prices: Prices | None = None
    """What the entries of the weights cost, where the plan has a budget."""
    scores: Mapping[str, Tensor] = field(default_factory=dict)
    """{weight: what its entries are worth before training}, in the user's layout, where the caller gave any."""
    extended: set[str] = field(default_factory=set)
    """Weights that have their mask and the method's tensors beside them."""
    shrunk: dict[str, Shrunk] = field(default_factory=dict)
    """What remove-dead-neurons took, by weight."""
    flops_before: FlopCount | None = None
    """Of the model with all its neurons, where some were removed."""
    flops: FlopCount | None = None
    """What count-flops found."""
    transformed: Transformed | None = None
    """Where a plan's transformation is carried out."""
    notes: list[str] = field(default_factory=list)
    """What the running pass has to say; the runner moves them to its report row."""


class Pass(Protocol):
    """One graph rewrite; a frozen dataclass whose fields are its options."""

    name: ClassVar[str]
    after: ClassVar[tuple[str, ...]]
    preserves_function: ClassVar[bool]

    def run(self, gm: GraphModule, ctx: PassContext) -> int:
        """Edit `gm` in place and return the number of rewrites; called once per distinct graph."""
        ...


def run_passes(passes: Sequence[Pass], ctx: PassContext) -> None:
    """Run the passes, ordered by `after`, on every distinct graph of ``ctx.program``, and write their report
    rows.

    Raises PlanError when the order cannot be met, and InvariantError when a pass breaks a graph, changes the function
    that it claims to preserve, or miscounts its rewrites.
    """
    check = _FunctionCheck(ctx)
    for current in ordered(passes):
        ctx.notes = []
        start = time.perf_counter()
        rewrites = sum(_run_on(current, gm, mode, ctx, check) for mode, gm in ctx.program.distinct_graphs())
        seconds = time.perf_counter() - start
        row = {
            "name": current.name,
            "rewrites": rewrites,
            "seconds": seconds,
            "notes": list(dict.fromkeys(ctx.notes)),
        }
        ctx.report.passes.append(row)


def ordered(passes: Sequence[Pass]) -> list[Pass]:
    """The passes in an order that meets every `after`, and otherwise as given."""
    by_name = {p.name: p for p in passes}
    if len(by_name) != len(passes):
        twice = sorted({p.name for p in passes if sum(q.name == p.name for q in passes) > 1})
        raise PlanError(f"every pass may be listed once; got {twice} more than once")
    graph: nx.DiGraph = nx.DiGraph()
    graph.add_nodes_from(by_name)
    for current in passes:
        missing = [name for name in current.after if name not in by_name]
        if missing:
            raise PlanError(
                f"pass {current.name!r} must run after {list(current.after)}, but {missing} is not in the "
                f"pipeline {list(by_name)}; add it"
            )
        graph.add_edges_from((name, current.name) for name in current.after)
    position = {name: k for k, name in enumerate(by_name)}
    try:
        return [by_name[name] for name in nx.lexicographical_topological_sort(graph, position.__getitem__)]
    except nx.NetworkXUnfeasible:
        cycle = [edge[0] for edge in nx.find_cycle(graph)]
        first, last = cycle[0], cycle[-1]
        raise PlanError(
            f"pass {first!r} must run after [{last!r}], but {last!r} itself waits for {first!r}: the passes "
            f"{' -> '.join([*cycle, first])} wait for each other; drop one of their `after` names"
        ) from None


def _run_on(current: Pass, gm: GraphModule, mode: str, ctx: PassContext, check: "_FunctionCheck") -> int:
    check.before(current, gm)
    code, known = gm.code, set(gm.graph.nodes)
    rewrites = current.run(gm, ctx)
    for node in gm.graph.nodes:
        if node not in known:
            node.meta.setdefault("from_pass", current.name)
    try:
        gm.graph.lint()
    except (RuntimeError, AssertionError) as error:
        raise InvariantError(
            f"pass {current.name!r} left a broken {mode} graph: {error}\n{gm.graph}"
        ) from error
    gm.recompile()
    if rewrites == 0 and gm.code != code:
        raise InvariantError(
            f"pass {current.name!r} reported 0 rewrites but changed the {mode} graph:\n{gm.code}"
        )
    check.after(current, gm, changed=rewrites > 0 or gm.code != code)
    return rewrites


class _FunctionCheck:
    """Runs the eval graph on real example inputs before and after each pass that claims to preserve the
    function.
    """

    def __init__(self, ctx: PassContext) -> None:
        program, inputs = ctx.program, ctx.example_inputs
        real = inputs is not None and not has_meta(inputs) and not has_meta(program.skeleton)
        self.graph = program.graphs.get("eval") if real and program.tier != "walk" else None
        self.skeleton, self.inputs = program.skeleton, inputs
        self.seen: Observation | None = None

    def before(self, current: Pass, gm: GraphModule) -> None:
        if gm is self.graph and current.preserves_function and self.seen is None:
            self.seen = self._observe(gm)

    def after(self, current: Pass, gm: GraphModule, *, changed: bool) -> None:
        if gm is not self.graph or not changed:
            return
        if not current.preserves_function or self.seen is None:
            self.seen = None
            return
        now = self._observe(gm)
        if now is not None and (difference := compare(self.seen, now, gm)):
            raise InvariantError(
                f"pass {current.name!r} changed the function of the eval graph: {difference}"
            )
        self.seen = now

    def _observe(self, gm: GraphModule) -> Observation | None:
        if has_meta(self.skeleton):  # a pass took weights out that do not fit as dense ones
            return None
        return observe(self.skeleton, gm, self.inputs, training=False)
