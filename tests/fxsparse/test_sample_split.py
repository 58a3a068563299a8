import pytest
import torch
from torch import nn

from fxsparse.sample_split import SampleSplit, samples_at_once


class Doubling:
    def __init__(self):
        self.seen = []

    @samples_at_once(2)
    def forward(self, x):
        self.seen.append(tuple(getattr(x, "shape", ())))
        return 2 * x


@pytest.mark.parametrize(("batch", "seen"), [(5, [2, 2, 1]), (4, [2, 2]), (2, [2]), (1, [1]), (0, [0])])
def test_a_method_sees_some_samples_at_a_time(batch, seen):
    model, x = Doubling(), torch.randn(batch, 3, 4, 4)
    assert torch.equal(model.forward(x), 2 * x)
    assert [shape[0] for shape in model.seen] == seen


def test_single_images_and_keywords_arrive_as_they_are():
    model, image, batch = Doubling(), torch.randn(3, 4, 4), torch.randn(5, 3, 4, 4)
    model.forward(image)
    model.forward(x=batch)
    assert model.seen == [(3, 4, 4), (5, 3, 4, 4)]


def graph_of_relu():
    gm = torch.fx.symbolic_trace(nn.Sequential(nn.ReLU()))
    gm.graph.set_codegen(SampleSplit(2))
    gm.recompile()
    return gm


def test_a_graph_is_traced_and_compiled_whole():
    gm = graph_of_relu()
    assert "@samples_at_once(2)\ndef forward(self, input" in gm.code
    again = torch.fx.symbolic_trace(gm)
    assert [node.op for node in again.graph.nodes] == ["placeholder", "call_module", "output"]
    graphs = []

    def backend(graph, _):
        graphs.append([str(node.target) for node in graph.graph.nodes if node.op.startswith("call")])
        return graph.forward

    x = torch.randn(5, 1, 2, 2)
    compiled = torch.compile(gm, backend=backend, fullgraph=True)
    assert torch.equal(compiled(x), x.relu())
    assert [len(calls) for calls in graphs] == [1]
