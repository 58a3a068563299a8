import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxsparse
from fxsparse.errors import UnsupportedError
from fxsparse.kernel import Problem, registered
from fxsparse.kernels import onednn_linear
from fxsparse.kernels.library import ACTIVATIONS, activate

ENTRY = registered()["onednn"]


@pytest.fixture(autouse=True)
def _has_onednn():
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this PyTorch was built without oneDNN")


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_it_is_the_dense_product_with_every_activation(activation, dtype):
    torch.manual_seed(0)
    weight, bias = torch.randn(48, 33).to(dtype), torch.randn(48).to(dtype)
    for size in ((7, 33), (2, 5, 33), (33,), (0, 33), (3, 0, 33)):
        x = torch.randn(size).to(dtype)
        want = activate(F.linear(x.double(), weight.double(), bias.double()), activation)
        for run in (ENTRY.run, ENTRY.reference):
            y = run(x, bias, weight, activation=activation, in_features=33)
            assert y.dtype == dtype
            torch.testing.assert_close(
                y.double(), want, rtol=2e-2, atol=1e-1 if dtype == torch.bfloat16 else 1e-4
            )
            torch.testing.assert_close(
                run(x, None, weight, in_features=33), F.linear(x, weight), rtol=2e-2, atol=0.1
            )


def test_strided_inputs_and_transposed_weights_are_read_as_they_are():
    torch.manual_seed(0)
    weight, x = torch.randn(33, 48).t(), torch.randn(33, 9).t()
    torch.testing.assert_close(onednn_linear(x, weight), F.linear(x, weight), rtol=1e-4, atol=1e-4)
    x = torch.randn(4, 6, 33).transpose(0, 1)
    torch.testing.assert_close(onednn_linear(x, weight), F.linear(x, weight), rtol=1e-4, atol=1e-4)


def test_it_compiles_in_one_graph_for_any_batch():
    torch.manual_seed(0)
    weight, bias = torch.randn(48, 33), torch.randn(48)
    run = torch.compile(lambda x: onednn_linear(x, weight, bias, "gelu"), fullgraph=True, dynamic=True)
    for batch in (4, 9):
        x = torch.randn(batch, 33)
        torch.testing.assert_close(run(x), F.gelu(F.linear(x, weight, bias)), rtol=1e-4, atol=1e-4)


def test_gradients_other_dtypes_and_other_widths_are_refused():
    weight = torch.randn(8, 4)
    with pytest.raises(UnsupportedError, match="requires a gradient"):
        onednn_linear(torch.randn(2, 4, requires_grad=True), weight)
    for x in (
        torch.randn(2, 5),
        torch.randn(2, 4).double(),
        torch.ones(2, 4, dtype=torch.long),
        torch.tensor(1.0),
    ):
        with pytest.raises(RuntimeError, match=r"expected x \[..., 4\] in float32 as the weight is"):
            onednn_linear(x, weight)


def test_it_says_where_it_cannot_run():
    problem = Problem("linear", (8, 4), 2, 32, torch.float64, torch.device("meta"), training=True)
    assert ENTRY.refuses(problem) == [
        "it has no gradient",
        "it runs on cpu, not meta",
        "it has float32 and bfloat16, not float64",
    ]


def test_autocast_gives_the_autocast_dtype():
    with torch.autocast("cpu", torch.bfloat16):
        assert onednn_linear(torch.randn(2, 4), torch.randn(8, 4), torch.randn(8)).dtype == torch.bfloat16


def test_a_model_without_zeros_may_run_on_it_and_says_why_no_sparse_kernel_is_looked_at(fastest):
    fastest("onednn")
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(33, 48), nn.GELU(), nn.Linear(48, 10)).eval(), torch.randn(64, 33)
    fast = fxsparse.compile(model, mode="infer", example_inputs=x)
    assert [(row["kernel"], row["format"], row["reason"]) for row in fast.report.layers] == [
        ("onednn", "dense", "it has no zeros")
    ] * 2
    torch.testing.assert_close(fast(x), model(x).detach(), rtol=1e-4, atol=1e-5)
    assert set(fast.state_dict()) == set(model.state_dict())
