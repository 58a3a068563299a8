"""Runs a captured model over batches block by block, so that what a block reads comes from blocks that are done."""

import copy
import itertools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from torch import Tensor, fx
from torch.fx import GraphModule, Node

from fxsparse.cuts import cuts, dependent, last_user
from fxsparse.errors import PlanError
from fxsparse.graph import Site, argument, sites
from fxsparse.pipeline import Program
from fxsparse.skeleton import bind
from fxsparse.verify import RUN_FAILURES, copied_inputs

See = Callable[[Site, Tensor], None]
"""Called with a call site and what its op is about to read."""


class Runs(Protocol):
    """A model cut into blocks, and the batches that go through it."""

    @property
    def blocks(self) -> Sequence[Sequence[str]]:
        """Names of the weights of each block, in the order in which the model comes to them; every weight once."""
        ...

    def look(self, block: int, see: See) -> None:
        """Run `block` on every batch as it is now; nothing that later runs start from changes."""
        ...

    def advance(self, block: int, see: See | None) -> None:
        """Run `block` on every batch for good: the next block starts from what this leaves."""
        ...


def runs_of(program: Program, names: Collection[str], batches: Sequence[Any]) -> Runs:
    """`program` in eval mode, cut around the weights `names`; its tree has to be in eval mode.

    A graph is cut where the fewest values are alive, as between the layers of a transformer; every node runs twice.
    What is held are the values alive at one cut, for every batch.  Without a graph (the walk over modules) blocks are
    what lies below the first number in a name, such as ``h.3``; the whole model runs twice for each, and only the
    batches are held.
    """
    graph = program.graphs["eval"]
    found = [site for site in sites(graph) if site.weight.target in names]
    if program.tier == "walk":
        return WalkRuns(program, found, batches)
    return GraphRuns(program, graph, found, batches)


class GraphRuns:
    """The nodes of a graph in runs, and the values that each batch has alive between two of them."""

    def __init__(
        self, program: Program, graph: GraphModule, found: Sequence[Site], batches: Sequence[Any]
    ) -> None:
        self.sites = {site.node: site for site in found}
        self.nodes = list(graph.graph.nodes)
        self.place = {node: k for k, node in enumerate(self.nodes)}
        self.dependent = dependent(self.nodes)
        self.ends = cuts(self.place, self.dependent, found)
        self.blocks = _names(self.nodes, self.ends, self.sites)
        self.interpreter = fx.Interpreter(graph, garbage_collect_values=False)
        self.states = [_bound(program, graph, batch, k) for k, batch in enumerate(batches)]

    def look(self, block: int, see: See) -> None:
        for batch, state in enumerate(self.states):
            self._run(block, self._copied(state), see, batch)

    def advance(self, block: int, see: See | None) -> None:
        for batch, state in enumerate(self.states):
            self._run(block, state, see, batch)

    def _copied(self, state: Mapping[Node, Any]) -> dict[Node, Any]:
        """What depends on the inputs, copied at once, so that views stay views of one another; the rest as it is."""
        nodes = [node for node in state if node in self.dependent]
        values = copy.deepcopy([state[node] for node in nodes])
        return {**state, **dict(zip(nodes, values, strict=True))}

    def _run(self, block: int, state: dict[Node, Any], see: See | None, batch: int) -> None:
        """Execute the nodes of a block; `state` then holds what is alive behind it."""
        first, last = self.ends[block], self.ends[block + 1]
        self.interpreter.env = state
        with _failures(batch):
            for node in self.nodes[first:last]:
                if node in state or node.op == "output":
                    continue
                site = self.sites.get(node)
                if site is not None and see is not None:
                    see(site, state[argument(node, 0, "input")])
                state[node] = self.interpreter.run_node(node)
                for used in node.all_input_nodes:
                    if last_user(used, self.place) == self.place[node]:
                        state.pop(used, None)


class WalkRuns:
    """The module itself, run whole for each block, with hooks on the layers of the block."""

    def __init__(self, program: Program, found: Sequence[Site], batches: Sequence[Any]) -> None:
        self.program, self.batches = program, batches
        members: dict[str, list[Site]] = {}
        for site in found:
            members.setdefault(_below_first_number(str(site.weight.target)), []).append(site)
        self.members = list(members.values())
        self.blocks = [list(dict.fromkeys(str(s.weight.target) for s in group)) for group in self.members]

    def look(self, block: int, see: See) -> None:
        with self._hooked(self.members[block], see):
            for batch, inputs in enumerate(self.batches):
                args, kwargs = copied_inputs(inputs)
                with _failures(batch):
                    self.program.run("eval", *args, **kwargs)

    def advance(self, block: int, see: See | None) -> None:
        if see is not None:
            self.look(block, see)

    @contextmanager
    def _hooked(self, members: Sequence[Site], see: See) -> Iterator[None]:
        def hook_of(site: Site) -> Callable[..., None]:
            return lambda module, args, kwargs: see(site, next(iter((*args, *kwargs.values()))))

        handles = []
        for site in members:
            path = argument(site.node, 0, "input").meta["module"]
            module = self.program.skeleton.get_submodule(path)
            handles.append(module.register_forward_pre_hook(hook_of(site), with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


@contextmanager
def _failures(batch: int) -> Iterator[None]:
    try:
        yield
    except PlanError:
        raise
    except RUN_FAILURES as error:
        lines = str(error).strip().splitlines() or ["no message"]
        raise PlanError(
            f"prune: expected a calibration batch that the model takes, it fails on batch {batch}: "
            f"{type(error).__name__}: {lines[0]}. Give batches as example_inputs are given, on the model's device."
        ) from error


def _bound(program: Program, graph: GraphModule, batch: Any, number: int) -> dict[Node, Any]:
    """{placeholder: value} of a batch, as the graph's own code binds and flattens arguments."""
    args, kwargs = copied_inputs(batch)
    with _failures(number):
        if "eval" in program.accepts:
            program.accepts["eval"](args, kwargs)
        values = _binding(graph)(*args, **kwargs)
    return dict(zip(graph.graph.find_nodes(op="placeholder"), values, strict=True))


def _binding(graph: GraphModule) -> GraphModule:
    """A graph with the same arguments that returns its placeholders."""
    codegen = copy.copy(graph.graph._codegen)
    info = getattr(codegen, "pytree_info", None)
    if info is not None:
        codegen.pytree_info = info._replace(out_spec=None)  # type: ignore[attr-defined]
    made = fx.Graph()
    made.set_codegen(codegen)
    seen = {}
    made.output(tuple(made.node_copy(node, seen.get) for node in graph.graph.find_nodes(op="placeholder")))
    return bind(made, graph)


def _names(nodes: Sequence[Node], ends: Sequence[int], read: Mapping[Node, Site]) -> list[list[str]]:
    """Weights that each block reads, without repeats."""
    blocks = [nodes[first:last] for first, last in itertools.pairwise(ends)]
    return [list(dict.fromkeys(str(read[n].weight.target) for n in block if n in read)) for block in blocks]


def _below_first_number(name: str) -> str:
    """``h.3`` of ``h.3.attn.weight``; of a name without a number the module."""
    parts = name.split(".")
    end = next((k + 1 for k, part in enumerate(parts) if part.isdecimal()), len(parts) - 1)
    return ".".join(parts[:end])
