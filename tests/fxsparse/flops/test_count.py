from typing import ClassVar

import pytest
import torch
from sympy import Add, Integer, symbols, sympify
from torch import nn
from torch.backends import opt_einsum
from torch.utils.flop_counter import FlopCounterMode

import fxsparse
from fxsparse import Plan
from fxsparse.errors import PlanError
from fxsparse.flops import Stored, count_program
from fxsparse.flops.site import BATCH
from fxsparse.methods import static
from fxsparse.transforms import SparseWide


class Tokens(nn.Module):
    """An embedding, self-attention by hand and an MLP: sequence enters squared."""

    def __init__(self):
        super().__init__()
        self.table, self.qkv = nn.Embedding(11, 8), nn.Linear(8, 24)
        self.mlp = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))

    def forward(self, tokens):
        q, k, v = self.qkv(self.table(tokens)).chunk(3, -1)
        return self.mlp((q @ k.transpose(1, 2)).softmax(-1) @ v)


def conv_net():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 12, 3, stride=2),
        nn.ConvTranspose2d(12, 5, 2, stride=2),
        nn.Flatten(),
        nn.Linear(5 * 36, 7),
    )


CASES = {
    "mlp": (lambda: nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 4)), torch.randn(5, 6)),
    "convolutions": (conv_net, torch.randn(3, 3, 14, 14)),
    "tokens": (Tokens, torch.randint(0, 11, (3, 7))),
}


@pytest.mark.parametrize("case", CASES)
def test_dense_forward_and_backward_agree_with_torchs_counter(case, shape_graph):
    build, x = CASES[case]
    model = build()
    with FlopCounterMode(display=False) as counter:
        model(x).sum().backward()
    count = count_program(shape_graph(model, x))
    step = Add(*(layer.flops.dense.total for layer in count.layers))
    assert step.xreplace({BATCH: Integer(len(x))}) == counter.get_total_flops()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x)
    assert count.dense * len(x) == counter.get_total_flops()


def test_the_total_is_symbolic_in_batch_and_sequence(shape_graph):
    count = count_program(shape_graph(Tokens(), torch.zeros(2, 7, dtype=torch.int64), dynamic=2))
    batch, sequence = symbols("batch sequence")  # plain, as a user writes them
    # 8 x 24 and twice 8 x 16 weights per token, and two products of 8 features per pair of tokens.
    expected = 2 * batch * sequence * (8 * 24 + 2 * 8 * 16) + 2 * batch * sequence**2 * (8 + 8)
    assert (count.symbolic - expected).expand() == 0
    assert count.dense == expected.subs({batch: 1, sequence: 7})


def test_a_batch_that_is_not_symbolic_gives_the_same_count(shape_graph):
    build, x = CASES["convolutions"]
    model = build()
    fixed, symbolic = (count_program(shape_graph(model, x, dynamic=n)) for n in (0, 1))
    assert fixed.dense == symbolic.dense
    assert fixed.symbolic == symbolic.symbolic
    assert [row.dense for row in fixed.layers] == [row.dense for row in symbolic.layers]


def test_three_columns_and_what_storage_executes(shape_graph):
    graph = shape_graph(
        nn.Sequential(nn.Linear(10, 10), nn.Linear(10, 10), nn.Linear(10, 10)), torch.zeros(2, 10)
    )
    held = {"0.weight": Stored(20, 100), "1.weight": Stored(10, 100, compact=True)}
    count = count_program(graph, held, static())
    assert [(row.dense, row.sparse, row.executed) for row in count.layers] == [
        (200, 40, 200),
        (200, 20, 20),
        (200, 200, 200),
    ]
    assert (count.dense, count.total, count.executed) == (600, 260, 420)
    assert count.of_weight("1.weight") == (200, 20, 20)
    assert count.train_ratio == pytest.approx(260 / 600)


def test_a_weight_read_twice_counts_twice(shape_graph):
    layer = nn.Linear(10, 10)
    count = count_program(
        shape_graph(nn.Sequential(layer, nn.ReLU(), layer), torch.zeros(2, 10)), {"0.weight": Stored(5, 100)}
    )
    assert count.of_weight("0.weight") == (400, 20, 400)


def test_every_site_carries_its_count(shape_graph):
    graph = shape_graph(nn.Sequential(nn.Linear(10, 10), nn.ReLU()), torch.zeros(2, 10))
    count = count_program(graph, {"0.weight": Stored(20, 100)})
    noted = [node.meta["flops"] for node in graph.graph.nodes if "flops" in node.meta]
    assert noted == [row.flops for row in count.layers]
    assert str(noted[0]) == "200*batch dense, 40*batch theoretical, 200*batch executed"


def test_without_a_plan_nothing_is_saved(shape_graph):
    count = count_program(shape_graph(nn.Linear(3, 3), torch.zeros(2, 3)))
    assert (count.total, count.executed, count.train_ratio) == (count.dense, count.dense, 1.0)


def test_a_model_without_products_counts_nothing(shape_graph):
    count = count_program(shape_graph(nn.Sequential(nn.ReLU()), torch.zeros(2, 3)))
    assert (count.dense, count.layers, count.train_ratio) == (0, (), 1.0)


def test_an_unknown_convention_lists_the_known_ones(shape_graph):
    with pytest.raises(PlanError, match="expected one of mac2, rigl, cerebras, got 'macs'"):
        count_program(shape_graph(nn.Linear(3, 3), torch.zeros(2, 3)), convention="macs")


class Nested(nn.Module):
    """Its sequence comes inside of what it is called with."""

    def __init__(self, at):
        super().__init__()
        self.at, self.first, self.inner, self.head = at, nn.Linear(8, 16), nn.Linear(16, 32), nn.Linear(32, 3)

    def forward(self, given):
        return {"y": self.head(self.inner(self.first(given[self.at])).relu())}


@pytest.mark.parametrize(("at", "given"), [("x", lambda x: ({"x": x}, {})), (0, lambda x: ([x],))])
@pytest.mark.parametrize("transform", [None, SparseWide()])
def test_a_tensor_inside_a_dict_or_list_has_its_symbols(transform, at, given):
    inputs = given(torch.randn(2, 5, 8))
    dense = 2 * 5 * (8 * 16 + 16 * 32 + 32 * 3)
    count = fxsparse.count_flops(Nested(at), inputs)
    assert (count.dense, str(count.symbolic)) == (dense, f"{dense // 5}*batch*sequence")
    plan = Plan(sparsity=0.75, transform=transform)
    sparse = fxsparse.compile(Nested(at), plan, example_inputs=inputs)
    assert sparse(inputs[0])["y"].shape == (2, 5, 3)
    assert sparse.report.totals["flops_dense"] == (
        dense if transform is None else 2 * 5 * (8 * 32 + 32 * 64 + 64 * 3)
    )


class Einsum(nn.Module):
    """An input and trained factors of the sizes that letters stand for."""

    SIZES: ClassVar = {"a": 2, "b": 3, "c": 4, "d": 5, "e": 6, "o": 1}

    def __init__(self, equation):
        super().__init__()
        self.equation, (first, *rest) = equation, equation.partition("->")[0].split(",")
        self.x = self.drawn(first)
        self.factors = nn.ParameterList(nn.Parameter(self.drawn(term)) for term in rest)

    def drawn(self, term):
        return torch.randn([self.SIZES[letter] for letter in term])

    def forward(self, x):
        return torch.einsum(self.equation, x, *self.factors)


@pytest.mark.parametrize(
    "equation",
    [
        "ab,bc->ac", "ab,bc,cd->ad", "ab,cd,bc->ad", "ab,bc,cd,de->ae", "ab,b,bc->ac", "ab,ab,ab->a", "ab,cb,db->acd",
        "abc->acb", "aab->b", "ab,ab->ab", "a,b->ab", "ab,bc->c", "ab,cd->", "ao,oc->ac", "ao,bo->ab", "abc,cd,bd->ad",
    ],
)  # fmt: skip
def test_an_einsum_costs_what_pytorch_multiplies(equation):
    model = Einsum(equation)
    with opt_einsum.flags(enabled=False), FlopCounterMode(display=False) as forward:
        y = model(model.x)
    with FlopCounterMode(display=False) as backward:
        y.sum().backward() if y.requires_grad else None
    layers = fxsparse.count_flops(model, model.x).layers
    phases = [(layer.flops.dense.forward, layer.flops.dense.grad_input) for layer in layers] or [(0, 0)]
    found = [sympify(phase).subs(BATCH, len(model.x)) for phase in phases[0]]
    assert found == [forward.get_total_flops(), backward.get_total_flops()]


def test_products_under_an_ellipsis_and_of_broadcast_sizes_are_counted():
    class Dots(nn.Module):
        def forward(self, x, w):
            return torch.einsum("...d,de->...e", x, w), torch.einsum("bld,bmd->blm", x, x[:1])

    count = fxsparse.count_flops(Dots(), (torch.randn(2, 5, 8), torch.randn(8, 6)))
    assert [layer.dense for layer in count.layers] == [2 * 5 * 8 * 6, 2 * 5 * 5 * 8]
