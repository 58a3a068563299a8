from dataclasses import replace

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from fxsparse import testing
from fxsparse.formats import csr
from fxsparse.kernels import cpu, csr_linear, probe
from fxsparse.kernels.csr import reference

SHAPE = (37, 53)


def layer(density=0.2, dtype=torch.float32, shape=SHAPE):
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(shape, generator=generator) < density
    weight = (torch.randn(shape, generator=generator) * mask).to(dtype)
    index = csr.from_mask(mask)
    return weight, csr.values_of(weight, index), index


def indices(index):
    return index.crow, index.cols, index.ccol, index.rows_t, index.perm


def leaves(dtype=torch.float32):
    _, values, index = layer(dtype=dtype)
    x = torch.randn(3, 5, 53, dtype=dtype, requires_grad=True)
    bias = torch.randn(37, dtype=dtype, requires_grad=True)
    return x, values.requires_grad_(), bias, index


def test_gradients_are_right_by_finite_differences():
    x, values, bias, index = leaves(torch.float64)
    assert torch.autograd.gradcheck(lambda x, v, b: csr_linear(x, v, *indices(index), b), (x, values, bias))


def with_spare(index, values, spare):
    """The same entries with room for `spare` more, and NaN where no kernel may read."""
    roomy = csr.from_flat(csr.flat_of(index), index.shape, len(values) + spare)
    return roomy, torch.cat([values, values.new_full((spare,), torch.nan)])


@pytest.mark.parametrize("tokens", [1, 2, 5, 70])
@pytest.mark.parametrize("density", [0.0, 0.2, 1.0])
@pytest.mark.parametrize("shape", [SHAPE, (53, 37), (300, 6), (6, 300)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_unused_slots_change_nothing_and_get_gradient_zero(dtype, shape, density, tokens):
    _, values, index = layer(density, dtype, shape)
    x, upstream = (torch.randn(tokens, n).to(dtype) for n in reversed(shape))
    x[0, 0] = torch.inf  # of which 0 times is NaN
    results = []
    for spare in (0, 9):
        roomy, filled = with_spare(index, values, spare)
        leaves = x.clone().requires_grad_(), filled.requires_grad_()
        with testing.poisoned_memory():
            y = csr_linear(leaves[0], leaves[1], *indices(roomy))
            results.append((y, *torch.autograd.grad(y, leaves, upstream), roomy))
    (y, grad_x, grad, _), (y_roomy, grad_x_roomy, grad_roomy, roomy) = results
    # The reference, which takes fp64, sums in an order that depends on the number of slots.
    allowed = 1e-12 if dtype == torch.float64 else 0
    for got, expected in ((y_roomy, y), (grad_x_roomy, grad_x), (grad_roomy[: len(values)], grad)):
        torch.testing.assert_close(got, expected, rtol=allowed, atol=allowed, equal_nan=True)
    assert grad_roomy[len(values) :].tolist() == [0.0] * 9
    inference = csr_linear(x, filled.detach(), roomy.crow, roomy.cols.to(torch.int16), in_features=shape[1])
    assert torch.equal(inference.nan_to_num(), y.nan_to_num())


def test_the_references_leave_unused_slots_alone():
    _, values, index = layer()
    roomy, filled = with_spare(index, values, 9)
    x, upstream = torch.randn(5, 53), torch.randn(5, 37)
    expected = reference.linear_backward(upstream, x, values, *indices(index), True, True, True)
    got = reference.linear_backward(upstream, x, filled, *indices(roomy), True, True, True)
    assert torch.equal(got[0], expected[0])
    assert got[1].tolist() == [*expected[1].tolist(), *[0.0] * 9]
    filled.requires_grad_()
    reference.linear(x, filled, roomy.crow, roomy.cols, 53, None, 0).backward(upstream)
    assert filled.grad[len(values) :].tolist() == [0.0] * 9
    torch.testing.assert_close(filled.grad[: len(values)], expected[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ops_pass_opcheck(dtype):
    *floats, index = leaves(dtype)
    x, values, bias = (leaf.detach() for leaf in floats)
    opcheck(torch.ops.fxsparse.csr_forward.default, (x, values, index.crow, index.cols, 53, bias, 2))
    upstream = torch.randn(3, 5, 37).to(dtype)
    for needs in ((True, True, True), (False, True, False), (True, False, False)):
        opcheck(torch.ops.fxsparse.csr_backward.default, (upstream, x, values, *indices(index), *needs))


@pytest.mark.parametrize("needs", [(True, False, False), (False, True, False), (False, False, True)])
def test_only_the_gradients_that_are_asked_for_are_computed(needs):
    x, values, bias, index = leaves()
    for leaf, needed in zip((x, values, bias), needs, strict=True):
        leaf.requires_grad_(needed)
    y = csr_linear(x, values, *indices(index), bias)
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    assert [leaf.grad is not None for leaf in (x, values, bias)] == list(needs)
    assert counter.get_total_flops() == 2 * 15 * values.numel() * (needs[0] + needs[1])


def test_counted_flops_are_two_per_stored_entry_and_token():
    x, values, bias, index = leaves()
    with FlopCounterMode(display=False) as counter:
        csr_linear(x, values, *indices(index), bias)
    assert counter.get_total_flops() == 2 * 15 * values.numel()


def test_threads_do_not_change_a_bit():
    x, values, bias, index = leaves()
    x = torch.randn(300, 53, requires_grad=True)
    results = []
    before = torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        y = csr_linear(x, values, *indices(index), bias)
        results.append((y, *torch.autograd.grad(y, (x, values, bias), torch.ones_like(y))))
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("threads", [1, 3])
def test_results_too_large_for_the_caches_equal_those_of_a_few_tokens(threads):
    index = csr.from_mask(torch.rand(512, 48) < 0.2)
    values, x = torch.randn(index.perm.numel()), torch.randn(1024, 48)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    y = csr_linear(x, values, index.crow, index.cols, in_features=48)
    torch.set_num_threads(before)
    assert y.nbytes == 2 << 20
    parts = [csr_linear(part, values, index.crow, index.cols, in_features=48) for part in x.split(64)]
    assert torch.equal(y, torch.cat(parts))


class LargestTensor(TorchDispatchMode):
    """Remembers the largest tensor that any op made."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


@pytest.mark.parametrize("shape", [(20, 20_000), (20_000, 20)])
def test_layers_so_wide_that_panels_outgrow_the_cache_equal_the_reference(shape):
    _, values, index = layer(0.01, shape=shape)
    x, grad = torch.randn(70, shape[1]), torch.randn(70, shape[0])
    y = csr_linear(x, values, index.crow, index.cols, in_features=shape[1])
    expected = reference.linear(x, values, index.crow, index.cols, shape[1], None, 0)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    rest = (*indices(index), True, True, True)
    found = torch.ops.fxsparse.csr_backward(grad, x, values, *rest)
    for got, wanted in zip(found, reference.linear_backward(grad, x, values, *rest), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "reference"])
def test_no_tensor_of_the_dense_weights_size_is_made(compiled, monkeypatch):
    _, values, index = layer(0.02, shape=(300, 400))
    x = torch.randn(8, 400, requires_grad=True)
    values.requires_grad_()
    largest = LargestTensor()
    if compiled:
        with largest:
            csr_linear(x, values, *indices(index)).sum().backward()
    else:  # the reference runs inside an op, where no mode sees it: call it as it is
        monkeypatch.setattr(reference, "_GATHERED", 300 * 400 // 4)
        arguments = (values.detach(), *indices(index))
        with largest:
            y = reference.linear(x.detach(), *arguments[:3], 400, None, 0)
            reference.linear_backward(y, x.detach(), *arguments, True, True, True)
    assert 0 < largest.numel <= 300 * 400 // 4


def test_training_state_stays_below_three_percent_of_dense_at_99_percent_sparsity():
    _, values, index = layer(0.01, shape=(768, 3072))
    floats = 4 * values.nbytes  # weights, gradients, two Adam states
    ints = sum(t.nbytes for t in (index.indices, index.crow, index.ccol, index.rows_t, index.perm))
    assert floats + ints <= 0.03 * 4 * 4 * 768 * 3072


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("probe_key", [-1, 11])
def test_compiles_whole_with_the_same_numbers(backend, probe_key):
    x, values, bias, index = leaves()

    def loss(x, values, bias):
        return csr_linear(x, values, *indices(index), bias, probe_key).square().sum()

    expected = torch.autograd.grad(loss(x, values, bias), (x, values, bias))
    stashed = list(probe.PROBES.pop(probe_key, []))
    compiled = torch.compile(loss, backend=backend, fullgraph=True)
    got = torch.autograd.grad(compiled(x, values, bias), (x, values, bias))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)
    again = probe.PROBES.pop(probe_key, [])
    assert len(stashed) == len(again) == (probe_key >= 0)
    for a, b in zip(stashed, again, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_moving_the_topology_needs_no_new_frame_at_any_nnz(dtype):
    _, values, index = layer(dtype=dtype)
    frames = CompileCounter()
    compiled = torch.compile(lambda x: csr_linear(x, values, *indices(index)), backend=frames, fullgraph=True)
    x = torch.randn(4, 53, dtype=dtype)
    generator = torch.Generator().manual_seed(5)
    for nnz in (len(values), len(values) // 2, 0, len(values) - 1):
        flat = torch.randperm(37 * 53, generator=generator)[:nnz].sort().values
        csr.move_(index, flat)
        torch.testing.assert_close(compiled(x), x @ csr.to_dense(values, index).t())
    assert frames.frame_count == 1


def test_a_backward_after_the_topology_moved_fails():
    _, values, index = layer()
    y = csr_linear(torch.randn(4, 53), values.requires_grad_(), *indices(index))
    csr.move_(index, torch.arange(len(values)))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_autocast_computes_in_bfloat16_and_returns_fp32_gradients():
    x, values, bias, index = leaves()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = csr_linear(x, values, *indices(index), bias)
    assert y.dtype == torch.bfloat16
    gradients = torch.autograd.grad(y.float().sum(), (x, values, bias))
    assert {gradient.dtype for gradient in gradients} == {torch.float32}


def test_an_armed_backward_leaves_the_dense_gradient_in_tiles():
    weight, values, index = layer()
    values.requires_grad_()
    expected = torch.zeros_like(weight)
    for _ in range(2):
        x = torch.randn(4, 53)
        y = csr_linear(x, values, *indices(index), None, 7)
        upstream = torch.randn_like(y)
        y.backward(upstream)
        expected += upstream.t() @ x
    tiles = list(probe.gradient_tiles(probe.PROBES[7], SHAPE))
    assert max(len(tile) for _, tile in tiles) == 37 // 16
    torch.testing.assert_close(torch.cat([tile for _, tile in tiles]), expected)
    probe.clear(7)
    assert 7 not in probe.PROBES


def test_activation_checkpointing_stashes_once_per_backward():
    x, values, bias, index = leaves()

    def run(x):
        return csr_linear(x, values, *indices(index), bias, 13)

    for _ in range(2):
        checkpoint(run, x, use_reentrant=False).sum().backward()
    assert len(probe.PROBES.pop(13)) == 2


def test_refuses_broken_indices():
    _, values, index = layer()
    if cpu.availability() is not None:
        pytest.skip("the reference checks by indexing")
    for tokens in (1, 4):
        with pytest.raises(RuntimeError, match="columns past those of x, which has 20"):
            csr_linear(torch.randn(tokens, 20), values, index.crow, index.cols, in_features=20)
    with pytest.raises(RuntimeError, match="crow to end with at most"):
        csr_linear(torch.randn(4, 53), values[:-1], index.crow, index.cols[:-1], in_features=53)
    y = csr_linear(
        torch.randn(4, 53, requires_grad=True), values, *indices(replace(index, ccol=index.ccol * 0))
    )
    with pytest.raises(RuntimeError, match="ccol to end with"):
        y.sum().backward()
    with pytest.raises(RuntimeError, match="cols int32"):
        csr_linear(torch.randn(4, 53), values, index.crow, index.cols.long(), in_features=53)
    with pytest.raises(ValueError, match="expected in_features, got None"):
        csr_linear(torch.randn(4, 53), values, index.crow, index.cols)
    with pytest.raises(ValueError, match="fuses no activation"):
        csr_linear(torch.randn(4, 53), values, *indices(index), activation="relu")
    with pytest.raises(ValueError, match="expected an activation of"):
        csr_linear(torch.randn(4, 53), values, index.crow, index.cols, activation="tanh", in_features=53)
