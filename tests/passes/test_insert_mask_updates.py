"""The update graph and the probe variant of the training graph."""

import torch
from torch import nn

from fxsparse import Plan, compile
from fxsparse.methods import rigl, set_, static


def build(method, storage="masked"):
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    return compile(model, Plan(sparsity=0.5, method=method, storage=storage))


def test_the_update_graph_has_one_node_per_weight():
    calls = [node for node in build(set_()).update_graph.graph.nodes if node.op == "call_function"]
    assert [(node.name, node.args[3]) for node in calls] == [
        ("update_mask", "0.weight"),
        ("update_mask_1", "2.weight"),
    ]


def test_a_static_mask_has_no_node():
    graph = build(static()).update_graph.graph
    assert [node.op for node in graph.nodes] == ["placeholder", "output"]


def test_only_a_rule_that_ranks_dense_gradients_has_a_probe_graph():
    assert "probe" not in build(set_())._emitted.program.graphs
    probe = build(rigl())._emitted.program.graphs["probe"].graph
    targets = {getattr(node.target, "__name__", "") for node in probe.nodes}
    assert "hard_mask_dense_grad" in targets
    assert "hard_mask" not in targets
    compact = build(rigl(), "compact")._emitted.program.graphs["probe"].graph
    keys = [node.kwargs["probe_key"] for node in compact.nodes if "probe_key" in node.kwargs]
    assert len(set(keys)) == 2


def test_the_forward_graph_has_no_node_that_changes_a_mask():
    sparse = build(rigl())
    before = sparse.masks()
    for _ in range(3):
        sparse(torch.randn(2, 8)).sum().backward()
    assert all(torch.equal(mask, before[name]) for name, mask in sparse.masks().items())
    assert "update_mask" not in str(sparse.forward_graph.graph)


def test_step_and_seed_are_saved_with_the_model():
    state = build(rigl()).state_dict()
    assert int(state["fxsparse_step"]) == 0
    assert int(state["fxsparse_rng"]) == 0
