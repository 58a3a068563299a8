import pytest
import torch
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

from fxsparse.formats import condensed
from fxsparse.kernels import condensed_linear, cpu
from fxsparse.testing import sparse_weight


def packed(shape=(37, 53), dtype=torch.float32):
    weight = sparse_weight(shape, 0.2, constant_fan_in=True, empty_rows=False).to(dtype)
    return weight, *condensed.pack(weight).values()


@pytest.mark.parametrize("index_dtype", [torch.int16, torch.int32])
def test_both_index_widths_give_the_same_bits(index_dtype):
    weight, values, indices = packed()
    x = torch.randn(20, 53)
    y = condensed_linear(x, values, indices.to(index_dtype), in_features=53)
    assert torch.equal(y, condensed_linear(x, values, indices, in_features=53))
    torch.testing.assert_close(y, x @ weight.t())


def test_op_passes_opcheck():
    _, values, indices = packed()
    x, bias = torch.randn(3, 53), torch.randn(37)
    opcheck(torch.ops.fxsparse.condensed_forward.default, (x, values, indices, None, None, 53, bias, 1))


def test_empty_rows_give_the_activated_bias_and_the_rest_goes_to_its_rows():
    weight = sparse_weight((37, 53), 0.2, constant_fan_in=True).float()
    buffers = list(condensed.pack(weight).values())
    x, bias = torch.randn(20, 53), torch.randn(37)
    y = condensed_linear(x, *buffers[:2], bias, "relu", *buffers[2:], in_features=53)
    torch.testing.assert_close(y, torch.relu(x @ weight.t() + bias))
    empty = ~weight.any(1)
    assert torch.equal(y[:, empty], bias[empty].relu().expand(20, -1))
    active = condensed_linear(x, *buffers[:2], bias[~empty], "relu", in_features=53)  # without the scatter
    assert torch.equal(active, y[:, ~empty])
    opcheck(torch.ops.fxsparse.condensed_forward.default, (x, *buffers, 53, bias, 1))


def test_counted_flops_are_two_per_stored_entry_and_token():
    _, values, indices = packed()
    with FlopCounterMode(display=False) as counter:
        condensed_linear(torch.randn(3, 5, 53), values, indices, in_features=53)
    assert counter.get_total_flops() == 2 * 15 * values.numel()


def test_compiles_whole_with_the_same_numbers():
    _, values, indices = packed()
    x = torch.randn(3, 53)
    compiled = torch.compile(
        lambda x: condensed_linear(x, values, indices, None, "gelu", in_features=53),
        backend="aot_eager",
        fullgraph=True,
    )
    torch.testing.assert_close(
        compiled(x), condensed_linear(x, values, indices, None, "gelu", in_features=53)
    )


def test_an_infinite_input_reaches_only_the_rows_that_read_it():
    weight, values, indices = packed()
    for batch in (1, 20):  # the gathering kernel and the panels
        x = torch.randn(batch, 53)
        x[:, 0] = torch.inf
        y = condensed_linear(x, values, indices, in_features=53)
        assert torch.equal(y.isfinite(), (weight[:, 0] == 0).expand(batch, -1))


def test_refuses_inputs_of_another_width():
    if cpu.availability() is not None:
        pytest.skip("the reference checks by indexing")
    _, values, indices = packed()
    with pytest.raises(RuntimeError, match="columns past those of x, which has 20"):
        condensed_linear(torch.randn(20), values, indices, in_features=20)
    with pytest.raises(RuntimeError, match="int16 or int32"):
        condensed_linear(torch.randn(53), values, indices.long(), in_features=53)
