import torch

from fxsparse.formats import csr
from fxsparse.kernels import csr_linear
from fxsparse.kernels.csr import probe


def _layer(shape=(37, 53), density=0.2, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(shape, generator=generator) < density
    weight = (torch.randn(shape, generator=generator) * mask).to(dtype)
    index = csr.from_mask(mask)
    return weight, csr.values_of(weight, index), index


def test_gradients_equal_those_of_the_masked_dense_layer():
    weight, values, index = _layer(dtype=torch.float64)
    x = torch.randn(2, 5, 53, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(37, dtype=torch.float64, requires_grad=True)
    values.requires_grad_()
    y = csr_linear(x, values, index.crow, index.cols, index.ccol, index.rows_t, index.perm, bias)
    upstream = torch.randn_like(y)
    grads = torch.autograd.grad(y, (x, values, bias), upstream)
    weight.requires_grad_()
    expected_y = torch.nn.functional.linear(x, weight, bias)
    expected = torch.autograd.grad(expected_y, (x, weight, bias), upstream)
    torch.testing.assert_close(y, expected_y)
    torch.testing.assert_close(grads[0], expected[0])
    torch.testing.assert_close(grads[1], csr.values_of(expected[1], index))
    torch.testing.assert_close(grads[2], expected[2])


def test_an_armed_backward_leaves_the_dense_gradient_in_tiles():
    weight, values, index = _layer()
    values.requires_grad_()
    probe.clear(7)
    expected = torch.zeros_like(weight)
    for _ in range(2):
        x = torch.randn(4, 53)
        y = csr_linear(x, values, index.crow, index.cols, index.ccol, index.rows_t, index.perm, None, 7)
        upstream = torch.randn_like(y)
        y.backward(upstream)
        expected += upstream.t() @ x
    tiles = list(probe.gradient_tiles(7, (37, 53)))
    assert max(len(tile) for _, tile in tiles) == 37 // 16
    torch.testing.assert_close(torch.cat([tile for _, tile in tiles]), expected)
    probe.clear(7)
    assert 7 not in probe.PROBES
