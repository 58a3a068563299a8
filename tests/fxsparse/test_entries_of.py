"""Every packed weight is told by its nonzeros, exactly."""

import pytest
import torch

from fxsparse import entries_of, kernel
from fxsparse.entries_of import Stored
from fxsparse.errors import CheckpointError
from fxsparse.packed import PackedWeight

KERNELS = {
    name: entry
    for name, entry in kernel.registered().items()
    if entry.format != "dense" and not name.startswith("cuda-") and name not in kernel.ALL_TRAINING
}


def weight(entry: kernel.Kernel) -> torch.Tensor:
    torch.manual_seed(0)
    if entry.op == "conv2d":
        dense = torch.randn(6, 1 if entry.format == "depthwise" else 4, 3, 3)
        return dense * (torch.rand_like(dense) < 0.3)
    dense = torch.randn(48, 64)
    if entry.format == "nm-lanes":
        return (dense.view(48, -1, 8) * (torch.rand(48, 8, 8).argsort(-1) < 2)).view(48, 64)
    if entry.format == "strided":  # one of every 4 inputs that are 16 apart
        return (dense.view(48, 4, 16) * (torch.rand(48, 4, 16).argsort(1) < 1)).view(48, 64)
    if entry.format == "bsr":
        return dense * (torch.rand(3, 4) < 0.4).repeat_interleave(16, 0).repeat_interleave(16, 1)
    if entry.format == "condensed":
        return dense * (torch.rand(48, 64).argsort(1) < 7)
    dense[5] = 0
    return dense * (torch.rand(48, 64) < 0.2)


@pytest.mark.parametrize("name", KERNELS)
def test_nonzeros_pack_to_the_same_buffers(name):
    entry, dense = KERNELS[name], weight(KERNELS[name])
    packed = PackedWeight(name, tuple(dense.shape), kernel.packed(entry, dense))
    found = entries_of.stored(packed)
    entries_of.check(packed.shape, found)
    again = entries_of.repacked(name, packed.shape, found, None)
    for buffer, tensor in packed.named_buffers():
        assert (again[buffer].dtype, again[buffer].tolist()) == (tensor.dtype, tensor.tolist())
    got = entries_of.values_of(packed.shape, found)
    if entry.values is None:
        assert torch.equal(got, dense)
    else:
        torch.testing.assert_close(got, dense, rtol=0, atol=0.02)


def test_a_weight_that_was_converted_is_refused():
    dense = weight(KERNELS["cpu-csr-conv"])
    packed = PackedWeight("cpu-csr-conv", tuple(dense.shape), kernel.packed(KERNELS["cpu-csr-conv"], dense))
    with pytest.raises(
        CheckpointError, match=r"\[6, 4, 3, 3\] packed for cpu-csr-conv .* not converted since"
    ):
        entries_of.stored(packed.bfloat16())


def test_parts_that_do_not_fit_are_refused():
    values, counts, columns = torch.ones(3), torch.tensor([1, 2]).int(), torch.tensor([0, 0, 1]).short()
    entries_of.check((2, 2), Stored(values, counts, columns, None))
    assert entries_of.dense((2, 2), Stored(values, counts, columns, None)).tolist() == [[1, 0], [1, 1]]
    for bad in (
        Stored(values, counts, columns.flip(0), None),
        Stored(values, counts, columns + 1, None),
        Stored(values, counts, columns.float(), None),
        Stored(values[:2], counts, columns, None),
        Stored(values, counts[:1], columns, None),
        Stored(values, counts, None, None),
        Stored(values, counts, columns, torch.ones(3)),
        Stored(values, None, None, None),
    ):
        with pytest.raises(ValueError, match=r"expected|must be"):
            entries_of.check((2, 2), bad)
