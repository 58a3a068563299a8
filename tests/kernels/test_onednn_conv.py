import gc

import pytest
import torch
import torch.nn.functional as F

from fxsparse.errors import UnsupportedError
from fxsparse.kernel import Problem, registered
from fxsparse.kernels import onednn_conv2d
from fxsparse.kernels.library import ACTIVATIONS, activate
from fxsparse.kernels.onednn import conv

WINDOWS = (
    {"padding": 1},
    {"padding": "same", "dilation": 2},
    {"groups": 4, "stride": 2},
    {"groups": 16},
    {"stride": (2, 1), "padding": (0, 1)},
)


@pytest.fixture(autouse=True)
def _has_onednn():
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this PyTorch was built without oneDNN")


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("given", WINDOWS, ids=str)
def test_it_is_the_dense_convolution_in_the_format_of_its_input(given, memory_format):
    torch.manual_seed(0)
    weight, bias = torch.randn(32, 16 // given.get("groups", 1), 3, 3), torch.randn(32)
    x = torch.randn(2, 16, 9, 11).contiguous(memory_format=memory_format)
    want = F.conv2d(x, weight, bias, **given)
    residual = torch.randn_like(want)
    for activation in ACTIVATIONS:
        for added in (None, residual):
            y = onednn_conv2d(x, bias, weight, activation, residual=added, **given)
            exact = activate(want if added is None else want + added, activation)
            torch.testing.assert_close(y, exact, rtol=1e-4, atol=1e-4)
            assert y.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_images_of_one_pixel(memory_format):
    weight, x = torch.randn(8, 4, 1, 1), torch.randn(2, 4, 2, 2).contiguous(memory_format=memory_format)
    residual = torch.randn(2, 8, 1, 1)
    want = torch.relu(F.conv2d(x, weight, stride=2) + residual)
    torch.testing.assert_close(onednn_conv2d(x, None, weight, "relu", residual=residual, stride=2), want)


def test_vmap_goes_over_inputs_and_weights():
    torch.manual_seed(0)
    x, weight = torch.randn(3, 2, 4, 5, 5), torch.randn(3, 8, 4, 3, 3)
    found = torch.vmap(lambda x: onednn_conv2d(x, None, weight[0]))(x)
    torch.testing.assert_close(found, torch.vmap(lambda x: F.conv2d(x, weight[0]))(x))
    found = torch.vmap(lambda x, w: onednn_conv2d(x, None, w, "relu"))(x, weight)
    torch.testing.assert_close(found, torch.vmap(lambda x, w: F.conv2d(x, w).relu())(x, weight))


def test_a_weight_that_changes_is_put_in_order_again_and_forgotten_with_the_weight():
    weight, x = torch.randn(8, 4, 3, 3), torch.randn(1, 4, 5, 5)
    before = onednn_conv2d(x, None, weight)
    weight.mul_(2)
    torch.testing.assert_close(onednn_conv2d(x, None, weight), 2 * before)
    torch.testing.assert_close(onednn_conv2d(x, None, weight, padding=1), F.conv2d(x, weight, padding=1))
    gc.collect()
    kept = len(conv._ORDERED)
    del weight
    gc.collect()
    assert len(conv._ORDERED) == kept - 1


def test_what_onednn_does_not_take_goes_through_pytorch():
    weight = torch.randn(8, 4, 3, 3)
    for x in (torch.randn(4, 5, 5), torch.randn(0, 4, 5, 5)):
        torch.testing.assert_close(onednn_conv2d(x, None, weight), F.conv2d(x, weight))
    x = torch.randn(1, 4, 5, 5).double()
    torch.testing.assert_close(
        onednn_conv2d(x, None, weight.double(), "relu"), F.relu(F.conv2d(x, weight.double()))
    )
    with pytest.raises(RuntimeError):
        onednn_conv2d(x, None, weight)
    with pytest.raises(UnsupportedError, match="requires a gradient"):
        onednn_conv2d(torch.randn(1, 4, 5, 5, requires_grad=True), None, weight)
    with pytest.raises(UnsupportedError, match="requires a gradient"):
        onednn_conv2d(torch.randn(1, 4, 5, 5), torch.zeros(8, requires_grad=True), weight)
    with torch.autocast("cpu", torch.bfloat16):
        assert onednn_conv2d(torch.randn(1, 4, 5, 5), None, weight).dtype == torch.bfloat16


def test_it_compiles_in_one_graph():
    weight, x = torch.randn(8, 4, 3, 3), torch.randn(2, 4, 6, 6)
    run = torch.compile(lambda x: onednn_conv2d(x, None, weight, "silu", padding=1), fullgraph=True)
    torch.testing.assert_close(run(x), F.silu(F.conv2d(x, weight, padding=1)), rtol=1e-4, atol=1e-4)


def test_it_says_where_it_cannot_run():
    entry = registered()["onednn-conv"]
    given = {"kernel_size": (3, 4), "in_channels": 4, "padding": "same"}
    even = Problem(
        "conv2d",
        (8, 4, 3, 4),
        9,
        96,
        torch.float32,
        torch.device("cpu"),
        False,
        arguments=tuple(given.items()),
    )
    assert entry.refuses(even) == ["its padding is the same on both sides"]
    line = Problem("conv2d", (8, 4, 3), 9, 96, torch.float32, torch.device("cpu"), training=False)
    assert entry.refuses(line) == ["it has two dimensions"]
