import re

import pytest
import torch
import torch.nn.functional as F
from sympy import Integer
from torch import nn
from torch._ops import OpOverloadPacket
from torch.utils.flop_counter import flop_registry

import fxsparse
from fxsparse.errors import PlanError
from fxsparse.flops import call_sites
from fxsparse.flops.site import BATCH, SEQUENCE
from fxsparse.flops.sites import OPERATIONS, OUT_OF_SIGHT, WITHOUT_FORMULA
from fxsparse.operations import spelled


def found(graph):
    return call_sites(graph).found


def test_batch_and_sequence_are_named(shape_graph):
    model = nn.Sequential(nn.Embedding(11, 8), nn.Linear(8, 5))
    (site,) = found(shape_graph(model, torch.zeros(2, 7, dtype=torch.int64), dynamic=2))
    assert site.output == (BATCH, SEQUENCE, Integer(5))
    assert site.uses == BATCH * SEQUENCE
    assert call_sites(shape_graph(model, torch.zeros(2, 7, dtype=torch.int64), dynamic=2)).sizes == {
        SEQUENCE: 7
    }


def test_an_image_has_no_sequence(shape_graph):
    (site,) = found(shape_graph(nn.Conv2d(3, 4, 3, stride=2), torch.zeros(2, 3, 9, 9)))
    assert site.uses == 16 * BATCH
    assert (site.stride, site.groups, site.bias) == ((2, 2), 1, True)


def test_a_transposed_convolution_uses_its_weight_once_per_input_position(shape_graph):
    (site,) = found(shape_graph(nn.ConvTranspose1d(4, 6, 3, stride=2), torch.zeros(2, 4, 5)))
    assert site.uses == 5 * BATCH


def test_the_first_layer_needs_no_gradient_of_its_input(shape_graph):
    first, second = found(shape_graph(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), torch.zeros(2, 4)))
    assert (first.grad_input, second.grad_input) == (0, 1)
    assert first.grad_weight
    assert second.grad_weight


def test_a_frozen_weight_needs_no_gradient(shape_graph):
    model = nn.Linear(4, 4)
    model.weight.requires_grad_(False)
    (site,) = found(shape_graph(model, torch.zeros(2, 4)))
    assert not site.grad_weight


class Products(nn.Module):
    def forward(self, a, b):
        return (
            a @ b,
            torch.bmm(a, b),
            torch.bmm(mat2=b, input=a),
            a.matmul(b),
            a.matmul(other=b),
            torch.einsum("bij,bjk->bik", a, b),
            torch.einsum(a, [0, 1, 2], b, [0, 2, 3], [0, 1, 3]),
            torch.baddbmm(a, a, b),
            torch.baddbmm(a, batch2=b, batch1=a),
        )


def test_products_of_activations_are_counted_in_every_spelling(shape_graph):
    sites = found(shape_graph(Products(), torch.zeros(2, 4, 6), torch.zeros(2, 6, 6), dynamic=0))
    assert [site.op for site in sites] == ["matmul"] * 9
    assert [site.products for site in sites] == [2 * 4 * 6 * 6] * 9


class Attention(nn.Module):
    def forward(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v)


class Vectors(nn.Module):
    def forward(self, a, v):
        return a.mv(v), torch.mv(a, vec=v), torch.inner(a, v), torch.linalg.matmul(a, v), v.addmm(a, a)


def test_products_with_a_vector_are_counted(shape_graph):
    sites = found(shape_graph(Vectors(), torch.zeros(6, 6), torch.zeros(6), dynamic=0))
    assert [site.products for site in sites] == [6 * 6] * 4 + [6 * 6 * 6]


class Exported(nn.Module):
    """Only ``torch.export`` follows it, which calls ops by their aten names."""

    def __init__(self, product):
        super().__init__()
        self.product, self.recurrent, self.cell = product, nn.GRU(6, 6), nn.LSTMCell(6, 6)
        self.weight = nn.Parameter(torch.ones(6, 6))

    def forward(self, x):
        return self.product(self, x) if len(range(x.dim())) == 2 else x


class Traced(Exported):
    def forward(self, x):
        return self.product(self, x)


COUNTED = {
    "linalg.matmul": (lambda _, x: torch.linalg.matmul(x, x), 6 * 6 * 6),
    "inner": (lambda _, x: torch.inner(x, x), 6 * 6 * 6),
    "mv": (lambda _, x: torch.mv(x, x[0]), 6 * 6),
    "addmv": (lambda _, x: torch.addmv(x[1], x, x[0]), 6 * 6),
    "addmv by name": (lambda _, x: x[1].addmv(vec=x[0], mat=x), 6 * 6),
    "dot": (lambda _, x: torch.dot(x[0], x[1]), 6),
    "vdot": (lambda _, x: torch.vdot(x[0], x[1]), 6),
    "matmul": (lambda _, x: x @ x, 6 * 6 * 6),
    "outer": (lambda _, x: torch.outer(x[0], x[1]) + torch.addr(x, x[0], x[1]), 0),
}
NAMED = {
    "tensordot": lambda _, x: torch.tensordot(x, x, 1),
    "multi_dot": lambda _, x: torch.linalg.multi_dot([x, x, x]),
    "vecdot": lambda _, x: torch.linalg.vecdot(x, x),
    "matrix_power": lambda _, x: torch.linalg.matrix_power(x, 3),
    "addbmm": lambda _, x: torch.addbmm(x, x[None], x[None]),
    "bilinear": lambda _, x: F.bilinear(x, x, x[None]),
    "conv_tbc": lambda _, x: torch.conv_tbc(x[None], x[None], x[0]),
    "cdist": lambda _, x: torch.cdist(x, x),
    "gru": lambda model, x: model.recurrent(x)[0],
    "lstm_cell": lambda model, x: model.cell(x)[0],
}


@pytest.mark.parametrize(("product", "multiply_adds"), COUNTED.values(), ids=COUNTED)
@pytest.mark.parametrize("model", [Traced, Exported])
def test_products_are_counted_by_any_name(model, product, multiply_adds):
    count = fxsparse.count_flops(model(product), torch.randn(6, 6))
    assert count.symbolic.subs(dict.fromkeys(count.symbolic.free_symbols, 6)) == 2 * multiply_adds
    assert count.uncounted == ()


@pytest.mark.parametrize("product", NAMED.values(), ids=NAMED)
@pytest.mark.parametrize("model", [Traced, Exported])
def test_products_without_a_formula_are_said(model, product):
    count = fxsparse.count_flops(model(product), torch.randn(6, 6))
    assert count.dense == 0
    assert len(count.uncounted) == 1
    assert re.search("no formula here|called as a whole", count.uncounted[0])


@pytest.mark.parametrize("model", [nn.GRU(6, 6), nn.LSTM(6, 6), nn.RNN(6, 6), nn.GRUCell(6, 6)])
def test_a_recurrent_model_is_not_said_to_cost_nothing(model):
    assert len(fxsparse.count_flops(model, torch.randn(6, 6)).uncounted) == 1


def test_what_pytorch_counts_is_counted_or_said():
    names = {
        spelled(op.__name__) for op in flop_registry if isinstance(op, OpOverloadPacket) and "aten" in str(op)
    }
    forward = {name for name in names if "backward" not in name}
    of_devices = {"cudnn_convolution", "convolution_overrideable", "_slow_conv2d_forward"}
    assert len(forward) > 10
    assert forward - of_devices <= OPERATIONS.keys() | WITHOUT_FORMULA


@pytest.mark.parametrize(
    "call",
    [
        torch.linalg.inv, torch.inverse, torch.linalg.pinv, torch.det, torch.linalg.svd, torch.linalg.eigvalsh,
        torch.matrix_exp, lambda x: torch.linalg.solve(x, x), lambda x: torch.linalg.householder_product(x, x[0]),
        lambda x: torch.ormqr(x, x[0], x), lambda x: torch.linalg.cholesky(x),
    ],
)  # fmt: skip
@pytest.mark.parametrize("model", [Traced, Exported])
def test_factorizations_and_solutions_are_said(model, call):
    count = fxsparse.count_flops(model(lambda model, x: call(x)), 4 * torch.eye(6) + 1)
    assert any("computes with matrices" in said for said in count.uncounted)


@pytest.mark.parametrize("model", [Traced, Exported])
def test_norms_and_diagonals_are_free(model):
    def call(model, x):
        return torch.linalg.norm(x) + torch.linalg.vector_norm(x) + torch.linalg.diagonal(x)

    assert fxsparse.count_flops(model(call), torch.eye(6)).uncounted == ()


def sparse_product(model, x):
    return torch.sparse.mm(model.weight.to_sparse(), x)


def test_a_sparse_product_is_said():
    (said,) = fxsparse.count_flops(Traced(sparse_product), torch.randn(6, 6)).uncounted
    assert said == "_sparse_mm: it computes with matrices, and has no formula here"


def test_a_model_whose_shapes_nothing_tells_is_refused_with_the_reason():
    with pytest.raises(
        PlanError, match=r"got no shapes: symbolic: .*export: torch.export failed.*_sparse_addmm"
    ):
        fxsparse.count_flops(Exported(sparse_product), torch.randn(6, 6))


def test_attention_is_two_products(shape_graph):
    q, k, v = torch.zeros(2, 3, 5, 8), torch.zeros(2, 3, 7, 8), torch.zeros(2, 3, 7, 6)
    (site,) = found(shape_graph(Attention(), q, k, v, dynamic=0))
    assert site.products == 2 * 3 * 5 * 7 * (8 + 6)


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.packed = nn.Parameter(torch.zeros(6, 4))

    def forward(self, x):
        q, _ = self.packed.split((2, 4))
        return F.linear(x, q)


def test_a_part_of_a_packed_weight_is_a_fraction_of_it(shape_graph):
    (site,) = found(shape_graph(Shared(), torch.zeros(2, 4)))
    assert (site.weight, site.weight_shape, site.fraction) == ("packed", (2, 4), Integer(1) / 3)


def test_modules_called_as_a_whole_are_reported(shape_graph):
    sites = call_sites(shape_graph(nn.Sequential(nn.LSTM(4, 4)), torch.zeros(2, 5, 4), dynamic=0))
    assert sites.found == ()
    assert sites.uncounted == ("0: a LSTM is called as a whole",)


class Branches(nn.Module):
    def __init__(self, scale):
        super().__init__()
        self.inner, self.head, self.scale = nn.Linear(4, 4), nn.Linear(4, 4), scale

    def forward(self, x):
        def small(x):
            return x * 2 if self.scale else self.inner(x)

        return self.head(torch.cond(x.sum() > 0, small, lambda x: x + 1, (x,)))


@pytest.mark.parametrize("scale", [False, True])
def test_what_branches_multiply_is_not_counted_and_said(scale):
    count = fxsparse.count_flops(Branches(scale), torch.randn(3, 4))
    assert count.dense == 2 * 4 * 4
    assert count.uncounted == (() if scale else ("cond: layers and products inside of its cond",))


class Unordered(nn.Module):
    """No front end follows it, so that its layers are all that is known."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        y = self.layer(x)
        return y @ y.t() if y.sum().item() > 0 else y @ y.t() * 2


def test_what_a_walk_does_not_see_is_said():
    count = fxsparse.count_flops(Unordered(), torch.randn(3, 4))
    assert count.dense == 2 * 4 * 4
    assert count.uncounted == (OUT_OF_SIGHT,)


def test_a_batch_that_is_not_symbolic_is_remembered(shape_graph):
    assert call_sites(shape_graph(nn.Linear(4, 4), torch.zeros(3, 4), dynamic=0)).samples == 3


@pytest.mark.parametrize("kernel", [3, (3, 2)])
def test_windows_of_pools(shape_graph, kernel):
    (site,) = found(shape_graph(nn.Sequential(nn.MaxPool2d(kernel)), torch.zeros(2, 4, 9, 9)))
    assert site.kernel == ((3, 3) if kernel == 3 else (3, 2))
