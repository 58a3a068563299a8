"""The dense gradient of a convolution's weight in tiles and at some entries, from what backwards left behind."""

import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

from fxsparse.kernels import conv_gradient_at, conv_gradient_tiles
from fxsparse.kernels.csr.conv import window
from fxsparse.testing import forbid_tensors_of

CASES = [
    ((32, 3, 3, 3), (9, 8), {"padding": 1, "stride": 2}),
    ((6, 2, 2, 4), (7, 9), {"padding": "same", "groups": 3}),
    ((20, 4, 1, 1), (5, 6), {}),
    ((8, 3, 5), (21,), {"padding": 2, "dilation": 2, "groups": 2}),
]


def backwards(shape, size, arguments, dtype):
    """(what two backwards see, one of them with a single sample; the dense gradient in fp64)."""
    op = F.conv1d if len(size) == 1 else F.conv2d
    seen, total = [], torch.zeros(shape, dtype=torch.float64)
    for lead in ((3,), ()):
        x = torch.randn(*lead, shape[1] * arguments.get("groups", 1), *size).to(dtype)
        weight = torch.zeros(shape, dtype=torch.float64, requires_grad=True)
        y = op(x.double(), weight, **arguments)
        grad = torch.randn_like(y).to(dtype)
        total += torch.autograd.grad(y, weight, grad.double())[0]
        seen.append((x, grad, arguments))
    return seen, total


@pytest.mark.filterwarnings("ignore:Using padding=.same. with even kernel")  # torch, of its own dense op
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("shape", "size", "arguments"), CASES, ids=str)
def test_tiles_and_samples_are_the_dense_gradient(shape, size, arguments, dtype):
    seen, dense = backwards(shape, size, arguments, dtype)
    tiles = list(conv_gradient_tiles(seen, shape))
    assert max(len(tile) for _, tile in tiles) == max(1, shape[0] // 16)
    assert [first for first, _ in tiles] == list(range(0, shape[0], max(1, shape[0] // 16)))
    torch.testing.assert_close(
        torch.cat([tile for _, tile in tiles]), dense.flatten(1).to(dtype), rtol=1e-4, atol=1e-4
    )
    for count in (0, 5, dense.numel()):
        at = torch.randperm(dense.numel())[:count].sort().values
        sampled = conv_gradient_at(seen, at, shape)
        torch.testing.assert_close(sampled, dense.flatten()[at].to(dtype), rtol=1e-4, atol=1e-4)


def test_makes_no_tensor_of_the_weights_size():
    seen, dense = backwards((64, 32, 3, 3), (4, 4), {}, torch.float32)  # its inputs have 1,536 entries
    with forbid_tensors_of(dense.numel() // 10):
        conv_gradient_at(seen, torch.arange(0, dense.numel(), 50), dense.shape)
        for _ in conv_gradient_tiles(seen, dense.shape):
            pass


def test_the_op_keeps_its_contract_and_counts_its_flops():
    crow, cols = torch.tensor([0, 1, 1, 3], dtype=torch.int32), torch.tensor([4, 0, 17], dtype=torch.int32)
    arguments = (torch.randn(2, 3, 5, 5), torch.randn(2, 2, 5, 5), crow, cols, window((3, 3), 2, padding=1))
    opcheck(torch.ops.fxsparse.csr_conv_sample.default, arguments)
    with FlopCounterMode(display=False) as counter:
        torch.ops.fxsparse.csr_conv_sample(*arguments)
    assert counter.get_total_flops() == 2 * 3 * 50
