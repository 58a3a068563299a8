import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fxsparse.calibration import Moments, call_of, from_matrix, to_matrix
from fxsparse.errors import NumericsError
from fxsparse.graph import sites
from fxsparse.trace import capture


def calls(model, x):
    """Every call site of a model's eval graph, with the weight's shape."""
    program = capture(model.eval(), x)
    from fxsparse.passes import planning_pipeline
    from fxsparse.pipeline import PassContext, run_passes
    from fxsparse.report import Report

    run_passes(planning_pipeline(None), PassContext(None, "train", program, Report(), x))
    found = sites(program.graphs["eval"])
    shapes = [tuple(program.skeleton.get_parameter(str(s.weight.target)).shape) for s in found]
    return [
        call_of(s, shape[::-1] if s.transposed else shape) for s, shape in zip(found, shapes, strict=True)
    ]


CONVOLUTIONS = {
    "1d": (nn.Conv1d(4, 6, 3, stride=2, padding=1), (2, 4, 9)),
    "2d": (nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2)), (3, 4, 7, 8)),
    "groups": (nn.Conv2d(4, 6, 3, groups=2, padding="same"), (2, 4, 5, 6)),
    "depthwise": (nn.Conv2d(4, 4, 2, groups=4, padding="valid"), (2, 4, 5, 5)),
    "same, even": (nn.Conv1d(4, 2, 4, padding="same", dilation=3), (2, 4, 16)),
    "3d": (nn.Conv3d(2, 4, 2, stride=2, padding=1), (2, 2, 4, 4, 4)),
    "unbatched": (nn.Conv2d(4, 6, 3), (4, 5, 6)),
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
@pytest.mark.parametrize(("layer", "shape"), CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def test_products_of_windows_give_the_energy_of_a_convolutions_output(layer, shape):
    layer, x = layer.double(), torch.randn(shape, dtype=torch.float64)
    [call] = calls(layer, x)
    moments = Moments(tuple(layer.weight.shape), products=True)
    moments.add(call, x)
    squares = Moments(tuple(layer.weight.shape), products=False)
    squares.add(call, x)
    matrix, energy = to_matrix(layer.weight.detach()), 0.0
    for first, last in call.rows:
        rows = matrix[first:last]
        energy += ((rows @ moments.sums[first, last]) * rows).sum()
        torch.testing.assert_close(moments.sums[first, last].diagonal(), squares.sums[first, last])
    y = call.output(x, layer.weight.detach())
    torch.testing.assert_close(y, layer(x) - layer.bias.view(-1, *[1] * (layer.weight.dim() - 2)))
    torch.testing.assert_close(energy, y.square().sum())
    assert torch.equal(from_matrix(matrix, layer.weight.shape), layer.weight)


def test_batches_add_up_in_at_least_float32():
    [call] = calls(nn.Linear(4, 2), torch.randn(2, 4))
    half = [torch.full((2, 3, 4), 300.0, dtype=torch.float16), torch.full((5, 4), 200.0, dtype=torch.float16)]
    for products, shape in ((True, (4, 4)), (False, (4,))):
        moments = Moments((2, 4), products)
        for x in half:
            moments.add(call, x)
        expected = torch.full(shape, (6 * 300.0**2 + 5 * 200.0**2) / 11)  # one square is above half's range
        torch.testing.assert_close(moments.mean((0, 2)), expected, check_dtype=False)
    assert moments.mean((0, 1)) is None


def test_inputs_that_are_not_finite_are_refused():
    [call] = calls(nn.Linear(4, 2), torch.randn(2, 4))
    moments = Moments((2, 4), products=False)
    moments.add(call, torch.full((1, 4), torch.inf))
    with pytest.raises(
        NumericsError, match="expected finite inputs on the calibration batches, got inf or NaN"
    ):
        moments.mean((0, 2))


class Cross(nn.Module):
    """Attention over another sequence: a packed weight is read in three parts."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x, memory):
        return self.attention(x, memory, memory, need_weights=False)[0]


def test_parts_of_a_packed_weight_have_inputs_of_their_own():
    model = Cross().eval()
    inputs = (torch.randn(2, 3, 8), torch.randn(2, 5, 8))
    found = [call for call in calls(model, inputs) if call.site.weight.target.endswith("in_proj_weight")]
    assert [call.rows for call in found] == [((0, 8),), ((8, 16),), ((16, 24),)]
    weight = model.attention.in_proj_weight.detach()
    assert torch.equal(found[1].output(inputs[1], weight), F.linear(inputs[1], weight[8:16]))


def test_a_transposed_convolution_says_why_it_has_no_inputs_by_row():
    assert calls(nn.ConvTranspose2d(4, 6, 3), torch.randn(1, 4, 5, 5)) == [
        "conv_transpose2d adds up its products over rows"
    ]
