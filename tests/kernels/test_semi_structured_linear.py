from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fxsparse.errors import PatternError, UnsupportedError
from fxsparse.kernel import Problem, registered
from fxsparse.kernels import semi_structured_linear
from fxsparse.pattern import NM

ENTRY = registered()["cuda-24"]
PROBLEM = Problem(
    "linear", (64, 32), 4, 1024, torch.bfloat16, torch.device("cuda"), training=False, group=(2, 4)
)


@pytest.mark.parametrize("given", [{}, {"group": (1, 8)}, {"dtype": torch.float16}])
def test_it_takes_what_is_surely_two_in_four(given):
    assert ENTRY.refuses(replace(PROBLEM, **given)) == []


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"device": torch.device("cpu")}, "it runs on cuda, not cpu"),
        ({"dtype": torch.float32}, "cuSPARSELt has bfloat16 and float16, not float32"),
        ({"training": True}, "its input gradient would need the transposed weight, which is not 2:4"),
        ({"group": (3, 8)}, "the zeros are not known to be 2:4"),
        ({"group": None}, "the zeros are not known to be 2:4"),
        ({"shape": (64, 40)}, "cuSPARSELt takes multiples of 16, not 64 x 40"),
        ({"shape": (8, 32)}, "cuSPARSELt takes multiples of 16, not 8 x 32"),
    ],
)
def test_it_says_what_it_does_not_take(given, reason):
    assert ENTRY.refuses(replace(PROBLEM, **given)) == [reason]


def test_an_older_gpu_and_another_build_of_pytorch_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert ENTRY.refuses(PROBLEM) == ["tensor cores are sparse from compute capability 8.0 on"]
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: False)
    assert ENTRY.refuses(PROBLEM) == ["this PyTorch has no cuSPARSELt"]


def test_a_weight_with_three_nonzeros_in_four_is_not_packed():
    with pytest.raises(PatternError, match="at most 2 nonzeros in every aligned group of 4 inputs"):
        ENTRY.pack(torch.ones(64, 32))


@pytest.mark.parametrize("shape", [(7, 32), (2, 3, 32), (0, 32), (32,)])
@pytest.mark.parametrize("has_bias", [False, True])
def test_shapes_and_dtypes_go_through_pytorch_without_a_gpu(shape, has_bias):
    with FakeTensorMode():  # which calls no kernel
        packed, dense = torch.empty(64, 40).bfloat16(), torch.empty(0, 64, 32)
        bias = torch.empty(64).bfloat16() if has_bias else None
        y = semi_structured_linear(torch.empty(shape).bfloat16(), packed, dense, bias, "gelu")
        assert (y.shape, y.dtype) == ((*shape[:-1], 64), torch.bfloat16)
        with torch.autocast("cpu", torch.bfloat16):
            y = semi_structured_linear(torch.empty(shape), packed, dense, bias, "relu", torch.empty(y.shape))
        assert y.dtype == torch.bfloat16


def test_other_inputs_are_refused():
    packed, dense = torch.empty(64, 40).bfloat16(), torch.empty(0, 64, 32)
    with pytest.raises(RuntimeError, match=r"expected x \[..., 32\] in bfloat16"):
        semi_structured_linear(torch.empty(3, 32), packed, dense)
    with pytest.raises(ValueError, match="expected an activation"):
        semi_structured_linear(torch.empty(3, 32).bfloat16(), packed, dense, activation="tanh")
    with pytest.raises(UnsupportedError, match="requires a gradient"):
        semi_structured_linear(torch.empty(3, 32).bfloat16().requires_grad_(), packed, dense)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [1, 33, 256])
def test_a_gpu_gives_the_product(dtype, tokens):
    score = torch.rand(512, 256)
    weight = (torch.randn(512, 256) * NM(2, 4).project(score, 0)).to("cuda", dtype)
    x = torch.randn(tokens, 512, device="cuda", dtype=dtype)[:, ::2]
    bias, residual = (
        torch.randn(512, device="cuda", dtype=dtype),
        torch.randn(tokens, 512, device="cuda", dtype=dtype),
    )
    buffers = ENTRY.pack(weight).values()
    exact = torch.relu(x.double() @ weight.double().T + bias.double() + residual.double())
    for run in (ENTRY.run, ENTRY.reference):
        y = run(x, bias, *buffers, activation="relu", residual=residual)
        assert y.dtype == dtype
        assert (y.double() - exact).abs().max() < {torch.bfloat16: 2e-2, torch.float16: 3e-3}[
            dtype
        ] * exact.max()
