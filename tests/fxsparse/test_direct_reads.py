"""Generated code reads from the dicts of modules and keeps its function."""

import copy
import pickle

import torch
from torch import nn
from torch.fx import symbolic_trace

from fxsparse.direct_reads import DirectReads, read_directly


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.BatchNorm1d(4), nn.ReLU())).eval()


def test_no_attribute_is_searched_any_more() -> None:
    net, x = model(), torch.randn(2, 4)
    gm = symbolic_trace(net)
    assert 'getattr(getattr(self, "1"), "0")(' in gm.code
    read_directly(gm)
    assert "self._modules['1']._modules['0'](" in gm.code
    assert "getattr(" not in gm.code
    assert torch.equal(gm(x), net(x))


def test_tensors_are_read_at_every_call() -> None:
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    graph.output(graph.call_function(torch.add, (x, graph.get_attr("bias"))))
    gm = torch.fx.GraphModule(nn.Linear(4, 4), graph)
    read_directly(gm)
    assert "self._parameters['bias']" in gm.code
    gm.bias = nn.Parameter(torch.full((4,), 3.0))
    assert torch.equal(gm(torch.zeros(4)), torch.full((4,), 3.0))
    assert gm.to(torch.bfloat16)(torch.zeros(4, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_a_plain_attribute_is_still_searched() -> None:
    root = nn.Module()
    root.constant = torch.ones(2)  # neither parameter nor buffer
    graph = torch.fx.Graph()
    graph.output(graph.get_attr("constant"))
    gm = torch.fx.GraphModule(root, graph)
    gm._buffers.clear()
    gm.constant = root.constant
    read_directly(gm)
    assert "self.constant" in gm.code


def test_copies_and_pickles_of_the_graph_read_directly_too() -> None:
    net = model()
    gm = symbolic_trace(net)
    read_directly(gm)
    gm.graph._tracer_cls = None
    for graph in (copy.deepcopy(gm.graph), pickle.loads(pickle.dumps(copy.deepcopy(gm.graph)))):
        again = torch.fx.GraphModule(net, graph)
        assert again.code == gm.code


def test_a_name_that_begins_like_another_is_not_cut() -> None:
    rewrite = DirectReads({"self.fc": "self._modules['fc']", "self.fc.bias": "B"})
    assert rewrite(["a = self.fc.bias\n", "b = self.fc(a)\n", "c = self.fc2(b)\n"]) == [
        "a = B\n",
        "b = self._modules['fc'](a)\n",
        "c = self.fc2(b)\n",
    ]
    assert DirectReads({})(["a = self.fc\n"]) == ["a = self.fc\n"]
