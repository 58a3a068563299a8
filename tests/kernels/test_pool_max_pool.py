import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from fxsparse.errors import UnsupportedError
from fxsparse.kernels import cpu, max_pool2d
from fxsparse.kernels.pool.max_pool import reference


@given(
    st.tuples(st.integers(1, 20), st.integers(1, 40)),
    st.tuples(st.integers(1, 4), st.integers(1, 4)),
    st.tuples(st.integers(1, 4), st.integers(1, 4)),
    st.tuples(st.integers(1, 3), st.integers(1, 3)),
    st.booleans(),
    st.integers(0, 99),
)
def test_it_is_torchs_pooling(size, kernel, stride, dilation, ceil_mode, seed):
    padding = (kernel[0] // 2, kernel[1] // 2)
    if any(n + 2 * p < d * (k - 1) + 1 for n, p, d, k in zip(size, padding, dilation, kernel, strict=True)):
        return
    x = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(seed))
    expected = F.max_pool2d(x, kernel, stride, padding, dilation, ceil_mode)
    assert torch.equal(max_pool2d(x, kernel, stride, padding, dilation, ceil_mode), expected)


@pytest.mark.parametrize("shape", [(5, 7), (3, 5, 7), (0, 3, 5, 7), (2, 3, 5, 7)])
def test_any_number_of_leading_dimensions(shape):
    x = torch.randn(shape)
    if x.dim() == 2:
        assert torch.equal(max_pool2d(x, 2), F.max_pool2d(x[None], 2)[0])
    else:
        assert torch.equal(max_pool2d(x, 2), F.max_pool2d(x, 2))


def test_layouts_other_dtypes_and_threads_give_the_same(monkeypatch):
    x = torch.randn(4, 32, 30, 30)
    expected = F.max_pool2d(x, 3, 2, 1)
    assert torch.equal(max_pool2d(x.contiguous(memory_format=torch.channels_last), 3, 2, 1), expected)
    assert torch.equal(max_pool2d(x.transpose(2, 3), 3, 2, 1), expected.transpose(2, 3))
    assert torch.equal(max_pool2d(x.bfloat16(), 3, 2, 1), F.max_pool2d(x.bfloat16(), 3, 2, 1))
    torch.set_num_threads(2)
    try:
        assert torch.equal(max_pool2d(x, 3, 2, 1), expected)
    finally:
        torch.set_num_threads(1)


def test_nan_and_infinity_come_through():
    x = torch.tensor([[[[1.0, math.nan, -math.inf, -math.inf]]]])
    assert max_pool2d(x, (1, 2)).flatten().tolist()[1] == -math.inf
    assert math.isnan(max_pool2d(x, (1, 2)).flatten()[0])


def test_the_reference_is_the_same():
    x = torch.randn(2, 3, 9, 11)
    window = [3, 2, 2, 3, 1, 1, 1, 2, 5, 4]
    expected = F.max_pool2d(x, (3, 2), (2, 3), (1, 1), (1, 2))
    assert torch.equal(reference(x, window), expected[..., :5, :4])
    if cpu.load():
        assert torch.equal(torch.ops.fxsparse.max_pool(x, window), reference(x, window))


def test_it_has_no_gradient_and_says_so():
    with pytest.raises(UnsupportedError, match="requires a gradient"):
        max_pool2d(torch.randn(1, 1, 4, 4, requires_grad=True), 2)


def test_it_compiles_in_one_graph():
    x = torch.randn(1, 2, 8, 8)
    compiled = torch.compile(lambda t: max_pool2d(t, 3, 2, 1) + 1, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), F.max_pool2d(x, 3, 2, 1) + 1)
