"""Every Linear, convolution and matrix product with a parameter becomes F.linear or F.conv on get_attr
nodes."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

import fxsparse
from fxsparse.graph import sites
from fxsparse.passes import Functionalize
from fxsparse.pipeline import PassContext, run_passes
from fxsparse.report import Report
from fxsparse.trace import capture


def functionalized(model: nn.Module, x: torch.Tensor) -> PassContext:
    ctx = PassContext(None, "train", capture(model, x), Report(), x)
    run_passes([Functionalize()], ctx)
    return ctx


def code(ctx: PassContext) -> str:
    return ctx.program.graphs["eval"].code


def test_shows_the_graph_before_and_after() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    before = capture(model).graphs["eval"].code
    assert '_0 = getattr(self, "0")(input_1)' in before
    ctx = functionalized(model, torch.randn(5, 4))
    assert "torch._C._nn.linear(input_1, _0_weight, _0_bias)" in code(ctx)
    assert 'getattr(self, "1")' in code(ctx)  # norms stay modules
    assert ctx.report.passes[0]["rewrites"] == 1


@pytest.mark.parametrize(
    ("module", "shape", "call"),
    [
        (nn.Conv1d(4, 6, 3, stride=2, padding=1, dilation=2, groups=2), (2, 4, 16), F.conv1d),
        (nn.Conv2d(4, 6, 3, padding="same", bias=False), (2, 4, 8, 8), F.conv2d),
        (nn.Conv3d(2, 3, 2), (2, 2, 4, 4, 4), F.conv3d),
        (nn.ConvTranspose2d(4, 6, 3, stride=2, output_padding=1, groups=2), (2, 4, 5, 5), F.conv_transpose2d),
    ],
)
def test_convolutions_keep_their_options(module: nn.Module, shape: tuple[int, ...], call: object) -> None:
    ctx = functionalized(nn.Sequential(module), torch.randn(shape))  # the runner compares the outputs
    assert [site.node.target for site in sites(ctx.program.graphs["eval"])] == [call]


def hooked() -> nn.Module:
    layer = nn.Linear(4, 4)
    layer.register_forward_hook(lambda *call: call[-1] + 1)
    return layer


@pytest.mark.parametrize(
    ("layer", "shape", "reason"),
    [
        (hooked(), (2, 4), "has hooks, which only run when it is called"),
        (parametrizations.orthogonal(nn.Linear(4, 4)), (2, 4), "the weight is parametrized"),
        (nn.Conv1d(4, 4, 3, padding=1, padding_mode="reflect"), (2, 4, 8), "padding_mode='reflect'"),
    ],
)
def test_refuses_what_the_functional_cannot_say(
    layer: nn.Module, shape: tuple[int, ...], reason: str
) -> None:
    model = nn.Sequential(layer, nn.ReLU())
    ctx = PassContext(None, "train", capture(model), Report())
    run_passes([Functionalize()], ctx)
    row = ctx.report.passes[0]
    assert row["rewrites"] == 0
    assert reason in row["notes"][0]
    x = torch.randn(shape)
    torch.testing.assert_close(ctx.program.run("eval", x), model.eval()(x), rtol=0, atol=0)


class Product(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.weight = nn.Parameter(torch.randn(4, 3))
        self.bias = nn.Parameter(torch.randn(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        match self.kind:
            case "addmm":
                return torch.addmm(self.bias, x, self.weight)
            case "matmul":
                return x @ self.weight
            case "addmm by name":
                return torch.addmm(mat2=self.weight, mat1=x, input=self.bias)
            case "matmul by name":
                return torch.matmul(other=self.weight, input=x)
            case "linear by name":
                weight = torch.transpose(input=self.weight, dim0=0, dim1=1)
                return F.linear(weight=weight, input=x, bias=self.bias)
            case _:
                return F.linear(x, self.weight.t(), self.bias)


SPELLINGS = ["addmm", "matmul", "linear", "addmm by name", "matmul by name", "linear by name"]


@pytest.mark.parametrize("kind", SPELLINGS)
def test_products_become_linear_with_a_transposed_weight(kind: str) -> None:
    ctx = functionalized(Product(kind), torch.randn(2, 4))
    (site,) = sites(ctx.program.graphs["eval"])
    assert (site.op, site.weight.target, site.transposed) == ("linear", "weight", True)
    assert site.node.args[0].op == "placeholder"


class Spelled(nn.Module):
    def __init__(self, product: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.product = product
        self.weight = nn.Parameter(torch.randn(4, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.product(x, self.weight)


STRAIGHT = {
    "T": lambda x, w: x @ w.T,
    "mT": lambda x, w: torch.linalg.matmul(x, w.mT),
    "transpose": lambda x, w: x.mm(w.transpose(0, 1)),
    "transpose of the last": lambda x, w: torch.matmul(x, torch.transpose(w, -1, -2)),
    "swapaxes": lambda x, w: torch.mm(x, w.swapaxes(0, 1)),
    "permute": lambda x, w: x @ w.permute(1, 0),
    "permute by name": lambda x, w: x @ torch.permute(w, dims=(1, 0)),
    "three times": lambda x, w: x @ w.T.t().mT,
}
CROSSED = {
    "as it is": lambda x, w: x @ w,
    "twice": lambda x, w: x @ w.T.permute(1, 0),
}
OTHER = {
    "permute that moves nothing": lambda x, w: x @ w.permute(0, 1),
    "permute from the last that moves nothing": lambda x, w: x @ w.permute(0, -1),
    "transpose of a dimension with itself": lambda x, w: x @ w.transpose(1, -1),
    "swapaxes of a dimension with itself": lambda x, w: x @ torch.swapaxes(w, 0, -2),
    "transpose by name of a dimension with itself": lambda x, w: x @ torch.transpose(w, dim0=1, dim1=1),
    "einsum": lambda x, w: torch.einsum("bi,oi->bo", x, w),
}


@pytest.mark.parametrize(
    ("product", "transposed"),
    [
        *((product, False) for product in STRAIGHT.values()),
        *((product, True) for product in CROSSED.values()),
    ],
    ids=[*STRAIGHT, *(f"{name}, crossed" for name in CROSSED)],
)
def test_a_weight_is_read_straight_however_a_product_is_spelled(
    product: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], transposed: bool
) -> None:
    gm = functionalized(Spelled(product), torch.randn(2, 4)).program.graphs["eval"]
    (site,) = sites(gm)
    assert (site.op, site.weight.target, site.transposed) == ("linear", "weight", transposed)
    assert len(site.weight.users) == 1


@pytest.mark.parametrize("product", OTHER.values(), ids=OTHER)
def test_what_is_no_linear_layer_stays(
    product: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> None:
    assert sites(functionalized(Spelled(product), torch.randn(2, 4)).program.graphs["eval"]) == []


def test_a_convolution_on_a_transposed_weight_is_no_site() -> None:
    model = Spelled(lambda x, w: F.conv2d(x, w.transpose(0, 1)))
    model.weight = nn.Parameter(torch.randn(4, 4, 3, 3))
    x = torch.randn(2, 4, 8, 8)
    assert sites(functionalized(model, x).program.graphs["eval"]) == []
    fast = fxsparse.compile(model, mode="infer", example_inputs=x)
    torch.testing.assert_close(fast(x), model(x))
    assert [row["name"] for row in fast.report.untouched] == ["weight"]


def test_a_product_that_scales_its_bias_stays_as_it_is() -> None:
    model = Product("addmm")
    model.forward = lambda x: torch.addmm(model.bias, x, model.weight, beta=2)  # type: ignore[method-assign]
    assert sites(functionalized(model, torch.randn(2, 4)).program.graphs["eval"]) == []


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 3, 3, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.conv2d(stride=2, weight=self.weight, input=x)


def test_arguments_by_name_come_into_the_order_that_passes_read() -> None:
    (site,) = sites(functionalized(Named(), torch.randn(2, 3, 8, 8)).program.graphs["eval"])
    x, weight, bias = site.node.args
    assert (x.op, weight, bias, site.node.kwargs) == ("placeholder", site.weight, None, {"stride": 2})


def test_a_tied_weight_has_one_node_for_both_users() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    gm = functionalized(model, torch.randn(2, 4)).program.graphs["eval"]
    assert [site.weight.target for site in sites(gm)] == ["0.weight", "0.weight"]
    assert len({site.weight for site in sites(gm)}) == 1


def test_a_second_run_changes_nothing() -> None:
    ctx = functionalized(nn.Sequential(nn.Linear(4, 3)), torch.randn(2, 4))
    run_passes([Functionalize()], ctx)
    assert [row["rewrites"] for row in ctx.report.passes] == [1, 0]
