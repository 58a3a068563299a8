"""GraphModel: a model that is its graphs, over a tree of modules that hold its parameters."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.fx import Graph, GraphModule

from fxsparse.graph_pickle import picklable, restored
from fxsparse.input_check import InputCheck, refuse_another_value
from fxsparse.pipeline import Program
from fxsparse.plans import Plan
from fxsparse.skeleton import SHARED_DICTS, bind, copy_structure
from fxsparse.transforms.balance import Balance


@dataclass(frozen=True)
class Origin:
    """What a transformed model was made by, and what came of it."""

    plan: Plan
    """As it was wanted: its sparsity is the nominal one."""
    tier: str
    """The front end that captured the model as it came."""
    dense: Mapping[str, str]
    """{weight that a transformation leaves dense: why}."""
    layers: tuple[str, ...]
    """Weights in the place of the layers that were transformed."""
    balance: Balance
    """FLOPs before and after."""
    accepts: Mapping[str, InputCheck]
    """What the graphs ask of a call."""


class GraphModel(nn.Module):
    """What a transformation of a plan makes: an nn.Module that trains, copies, pickles and compiles as any other.

    Its modules hold the parameters under their names, and its forward runs the graph of the current mode.
    """

    def __init__(self, skeleton: nn.Module, graphs: Mapping[str, Graph], origin: Origin) -> None:
        super().__init__()
        for name in SHARED_DICTS:
            self.__dict__[name] = skeleton.__dict__[name]
        self.training = skeleton.training
        self.origin = origin
        self.graphs = dict(graphs)
        self.bound: dict[str, GraphModule] = {}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        mode = "train" if self.training else "eval"
        if mode in self.origin.accepts:
            self.origin.accepts[mode](args, kwargs)
        try:
            return self._bound(mode)(*args, **kwargs)
        except AssertionError as error:
            refuse_another_value(error)
            raise

    def program(self) -> Program:
        """A program that runs copies of the graphs on a structural copy of this model."""
        skeleton = copy_structure(self)
        made: dict[int, GraphModule] = {}
        for graph in self.graphs.values():
            if id(graph) not in made:
                made[id(graph)] = bind(copy.deepcopy(graph), skeleton)
        graphs = {mode: made[id(graph)] for mode, graph in self.graphs.items()}
        dense, accepts = dict(self.origin.dense), dict(self.origin.accepts)
        return Program(self.origin.tier, skeleton, graphs, [], dense=dense, accepts=accepts)

    def _bound(self, mode: str) -> GraphModule:
        """The graph on this very tree; a structural copy has another tree, and binds anew."""
        found = self.bound.get(mode)
        if found is None or found.__dict__["_modules"] is not self.__dict__["_modules"]:
            self.bound = dict(self.bound)
            self.bound[mode] = found = bind(copy.deepcopy(self.graphs[mode]), self)
        found.training = self.training
        return found

    def __getstate__(self) -> dict[str, Any]:
        made = {id(graph): picklable(graph) for graph in self.graphs.values()}
        graphs = {mode: made[id(graph)] for mode, graph in self.graphs.items()}
        return self.__dict__ | {"graphs": graphs, "bound": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        flat: Any = self.graphs  # as __getstate__ left them
        made = {id(graph): restored(graph) for graph in flat.values()}
        self.graphs = {mode: made[id(graph)] for mode, graph in flat.items()}
