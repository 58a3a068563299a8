"""Questions about graphs, and edits that keep what acts in place."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Graph, symbolic_trace

from fxsparse import graph
from fxsparse.graph import (
    canonical_names,
    eliminate_dead_code,
    fetch,
    insert_get_attr,
    is_pure,
    replace,
    sites,
)


class Uses(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(6, 2))

    def forward(self, x: Tensor) -> Tensor:
        first = F.linear(x, self.w)
        second = F.linear(first, self.w.t())
        third = F.linear(x, self.w.chunk(3)[0])
        return second + third + F.linear(x, self.w[:2] * 2)


def test_sites_see_through_transposes_and_slices_but_not_through_arithmetic() -> None:
    found = sites(symbolic_trace(Uses()), "w")
    assert [(site.op, site.transposed, site.sliced) for site in found] == [
        ("linear", False, False),
        ("linear", True, False),
        ("linear", False, True),
    ]
    assert sites(symbolic_trace(Uses()), "v") == []


def test_sites_of_one_name_are_those_of_all_names_and_look_at_no_other_call(monkeypatch) -> None:
    gm = symbolic_trace(Uses())
    every = sites(gm)
    assert sites(gm, "w") == [site for site in every if site.weight.target == "w"]

    class Many(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.ParameterList(torch.ones(2, 2) for _ in range(9))

        def forward(self, x: Tensor) -> Tensor:
            for w in self.w:
                x = F.linear(x, w)
            return x

    asked = []
    monkeypatch.setattr(graph, "fetch", lambda root, name: asked.append(name) or fetch(root, name))
    assert len(sites(symbolic_trace(Many()), "w.3")) == 1
    assert asked == ["w.3"]


def test_tied_names_have_one_canonical_name() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].weight = model[0].weight
    names = {"0.weight": "0.weight", "0.bias": "0.bias", "1.weight": "0.weight", "1.bias": "1.bias"}
    assert canonical_names(model) == names


def test_replace_and_insert_keep_meta_and_order() -> None:
    gm = symbolic_trace(Uses())
    (old, *_) = sites(gm, "w")
    old.node.meta["flops"] = 3
    weight = insert_get_attr(gm.graph, "w")
    new = replace(old.node, F.linear, (old.node.args[0], weight))
    gm.graph.lint()
    assert new.meta["flops"] == 3
    assert new.all_input_nodes[1] is weight


def test_in_place_random_and_unknown_nodes_are_never_dead() -> None:
    graph = Graph()
    x = graph.placeholder("x")
    kept = [
        graph.call_method("add_", (x, 1)),
        graph.call_function(torch.rand, (2,)),
        graph.call_function(F.dropout, (x,)),
        graph.call_function(F.relu, (x,), {"inplace": True}),
        graph.call_function(torch.ops.aten.add_.Tensor, (x, 1)),
        graph.call_function(torch.ops.aten.bernoulli.default, (x,)),
        graph.call_function(torch.add, (x, x), {"out": x}),
        graph.call_function(print, (x,)),
        graph.call_module("lin", (x,)),
    ]
    unread = graph.call_function(torch.ops.aten.add.Tensor, (x, 1))
    graph.call_function(torch.add, (unread, 1))
    graph.output(x)
    assert not any(is_pure(node) for node in kept)
    assert eliminate_dead_code(graph) == 2
    assert [node for node in graph.nodes if node.op not in ("placeholder", "output")] == kept
