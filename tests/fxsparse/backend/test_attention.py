"""Attention as one op is taken apart: the same numbers, and kernels for the weights inside."""

import pytest
import torch
from torch import nn

from fxsparse.backend import entry
from fxsparse.backend import fxsparse as backend

X = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(1))


class Attention(nn.Module):
    def __init__(self, batch_first, part=0):
        super().__init__()
        self.inner, self.part = nn.MultiheadAttention(16, 2, batch_first=batch_first), part

    def forward(self, x):
        return self.inner(x, x, x)[self.part] + 0


def layer(**options):
    return nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, **options)


@pytest.mark.parametrize(
    ("make", "grad", "kernels"),
    [
        (layer, False, 4),
        (lambda: layer(norm_first=True, activation="gelu"), False, 4),
        (layer, True, 4),
        (lambda: Attention(True), False, 2),
        (lambda: Attention(False), True, 2),
        (lambda: Attention(True, part=1), False, 0),
    ],
)
def test_weights_in_attention_get_kernels(make, grad, kernels):
    model = make().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(torch.rand_like(parameter) < 0.3) if parameter.dim() > 1 else parameter.add_(0.1)
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(torch.compile(model, backend=backend)(X), model(X))
    assert [row["kernel"] for row in entry.reports()[-1].layers] == ["cpu-csr"] * kernels
