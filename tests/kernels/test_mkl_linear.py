import gc

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses import FakeTensorMode

import fxsparse
from fxsparse.errors import UnsupportedError
from fxsparse.kernel import Problem, registered
from fxsparse.kernels import mkl_linear
from fxsparse.kernels.library import ACTIVATIONS, activate
from fxsparse.kernels.mkl import linear

ENTRY = registered()["mkl"]
NEEDS_MKL = pytest.mark.skipif(not linear.IS_AVAILABLE, reason="this PyTorch was built without MKL")


def packs(monkeypatch):
    """[rows that a weight was packed for], filled by calls."""
    made, pack = [], linear._packed
    monkeypatch.setattr(linear, "_packed", lambda weight, rows: made.append(rows) or pack(weight, rows))
    return made


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_it_is_the_dense_product_with_every_activation(activation, dtype):
    torch.manual_seed(0)
    weight, bias = torch.randn(48, 33).to(dtype), torch.randn(48).to(dtype)
    error = {"rtol": 2e-2, "atol": 1e-1} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-4}
    for size in ((7, 33), (2, 5, 33), (33,), (0, 33), (3, 0, 33)):
        x = torch.randn(size).to(dtype)
        want = activate(F.linear(x.double(), weight.double(), bias.double()), activation)
        for run in (ENTRY.run, ENTRY.reference):
            y = run(x, bias, weight, activation=activation, in_features=33)
            assert y.dtype == dtype
            torch.testing.assert_close(y.double(), want, **error)
            torch.testing.assert_close(run(x, None, weight, in_features=33), F.linear(x, weight), **error)


def test_strided_inputs_and_transposed_weights_are_read_as_they_are():
    torch.manual_seed(0)
    weight, x = torch.randn(33, 48).t(), torch.randn(33, 9).t()
    torch.testing.assert_close(mkl_linear(x, weight), F.linear(x, weight), rtol=1e-4, atol=1e-4)
    x = torch.randn(4, 6, 33).transpose(0, 1)
    torch.testing.assert_close(mkl_linear(x, weight), F.linear(x, weight), rtol=1e-4, atol=1e-4)


def test_vmap_goes_over_inputs_and_weights():
    torch.manual_seed(0)
    x, weight = torch.randn(3, 7, 33), torch.randn(3, 48, 33)
    found = torch.vmap(lambda x: mkl_linear(x, weight[0]))(x), torch.vmap(mkl_linear)(x, weight)
    torch.testing.assert_close(found[0], F.linear(x, weight[0]), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found[1], x @ weight.mT, rtol=1e-4, atol=1e-4)


@NEEDS_MKL
def test_a_weight_is_packed_once_and_anew_when_it_changes(monkeypatch):
    made = packs(monkeypatch)
    torch.manual_seed(0)
    weight = torch.randn(48, 33)
    for rows in (7, 7, 9):
        x = torch.randn(rows, 33)
        torch.testing.assert_close(mkl_linear(x, weight), F.linear(x, weight), rtol=1e-4, atol=1e-4)
    assert made == [7]
    weight.mul_(2)
    x = torch.randn(3, 3, 33)
    torch.testing.assert_close(mkl_linear(x, weight), F.linear(x, weight), rtol=1e-4, atol=1e-4)
    assert made == [7, 9]
    with torch.inference_mode():
        fixed = torch.randn(48, 33)
    torch.testing.assert_close(mkl_linear(x, fixed), F.linear(x, fixed), rtol=1e-4, atol=1e-4)
    assert made == [7, 9], "nobody counts the changes of this one"


@pytest.mark.parametrize("shape", [(48, 33), (20, 33), (60, 33)])
def test_other_memory_under_the_same_weight_is_seen(shape):
    weight, x = nn.Parameter(torch.randn(48, 33), requires_grad=False), torch.randn(7, 33)
    mkl_linear(x, weight)
    weight.data = torch.randn(shape)
    torch.testing.assert_close(mkl_linear(x, weight), F.linear(x, weight), rtol=1e-4, atol=1e-4)


def test_a_module_that_went_through_another_dtype_is_packed_anew():
    layer, x = nn.Linear(33, 48).requires_grad_(False), torch.randn(7, 33)
    mkl_linear(x, layer.weight, layer.bias)
    layer.bfloat16().float()
    torch.testing.assert_close(mkl_linear(x, layer.weight, layer.bias), layer(x), rtol=1e-5, atol=1e-5)


@NEEDS_MKL
def test_the_second_copy_goes_with_the_weight():
    weight = torch.randn(48, 33)
    before = len(linear._PACKED)
    mkl_linear(torch.randn(7, 33), weight)
    assert len(linear._PACKED) == before + 1
    del weight
    gc.collect()
    assert len(linear._PACKED) == before


def test_fake_tensors_get_the_shape():
    with FakeTensorMode() as mode:
        x, weight = (mode.from_tensor(torch.randn(size)) for size in ((7, 33), (48, 33)))
        assert mkl_linear(x, weight).shape == (7, 48)


def test_wrong_biases_and_activations_are_refused():
    x, weight = torch.randn(7, 33), torch.randn(48, 33)
    for bias in (torch.ones(10), torch.ones(300), torch.ones(1)):
        with pytest.raises(RuntimeError, match=r"expected bias \[48\]"):
            mkl_linear(x, weight, bias)
    with pytest.raises(ValueError, match="expected an activation"):
        mkl_linear(x, weight, None, "silu2")


def test_torch_compile_sees_the_plain_op(monkeypatch):
    made = packs(monkeypatch)
    weight, bias = torch.randn(48, 33), torch.randn(48)
    run = torch.compile(lambda x: mkl_linear(x, weight, bias, "gelu"), fullgraph=True, dynamic=True)
    for batch in (4, 9):
        x = torch.randn(batch, 33)
        torch.testing.assert_close(run(x), F.gelu(F.linear(x, weight, bias)), rtol=1e-4, atol=1e-4)
    assert made == []


def test_gradients_other_dtypes_and_other_widths_are_refused():
    weight = torch.randn(8, 4)
    with pytest.raises(UnsupportedError, match="requires a gradient"):
        mkl_linear(torch.randn(2, 4, requires_grad=True), weight)
    for x in (torch.randn(2, 5), torch.randn(2, 4).double(), torch.ones(2, 4, dtype=torch.long)):
        with pytest.raises(RuntimeError, match=r"expected x \[..., 4\] in float32 as the weight is"):
            mkl_linear(x, weight)


def test_it_says_where_it_cannot_run(monkeypatch):
    monkeypatch.setattr(linear, "IS_AVAILABLE", False)
    problem = Problem("linear", (8, 4), 2, 32, torch.float64, torch.device("meta"), training=True)
    assert ENTRY.refuses(problem) == [
        "it has no gradient",
        "it runs on cpu, not meta",
        "it has float32, not float64",
        "this PyTorch was built without MKL",
    ]
    x, weight = torch.randn(2, 4), torch.randn(8, 4)
    assert torch.equal(mkl_linear(x, weight), F.linear(x, weight))


def test_autocast_gives_the_autocast_dtype():
    with torch.autocast("cpu", torch.bfloat16):
        assert mkl_linear(torch.randn(2, 4), torch.randn(8, 4), torch.randn(8)).dtype == torch.bfloat16


@NEEDS_MKL
def test_a_model_without_zeros_may_run_on_it_and_is_saved_without_the_second_copy(
    fastest, monkeypatch, tmp_path
):
    made = packs(monkeypatch)
    fastest("mkl")
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(33, 48), nn.GELU(), nn.Linear(48, 10)).eval(), torch.randn(64, 33)
    fast = fxsparse.compile(model, mode="infer", example_inputs=x)
    assert [row["kernel"] for row in fast.report.layers] == ["mkl", "mkl"]
    assert set(made) == {64}
    torch.testing.assert_close(fast(x), model(x).detach(), rtol=1e-4, atol=1e-5)
    assert set(fast.state_dict()) == set(model.state_dict())
    file = tmp_path / "fast.safetensors"
    fxsparse.save(fast, file)
    assert file.stat().st_size < 1.5 * 4 * sum(p.numel() for p in model.parameters()) + 20_000
    torch.testing.assert_close(fxsparse.load(file, model)(x), fast(x))
