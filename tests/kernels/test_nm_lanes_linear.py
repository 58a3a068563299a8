import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

import fxsparse
from fxsparse import Plan, choosing
from fxsparse.formats import nm_lanes
from fxsparse.kernel import Problem, candidates, registered, tolerance
from fxsparse.kernels import cpu, nm_lanes_linear
from fxsparse.kernels.cpu.build import INSTRUCTION_SETS
from fxsparse.pattern import NM

COMPILED = pytest.mark.skipif(cpu.availability() is not None, reason=str(cpu.availability()))


def packed(group=(2, 4), shape=(70, 300), dtype=torch.float32):
    score = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    columns = shape[1] // group[1] * group[1]
    score[:, columns:] = 0
    score[:, :columns] *= NM(*group).project(score[:, :columns].abs(), 0)
    weight = score.to(dtype)
    return weight, tuple(nm_lanes.pack(weight).values())


@COMPILED
@pytest.mark.parametrize("level", INSTRUCTION_SETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("group", [(2, 4), (1, 4), (3, 8), (1, 16)])
def test_every_tile_is_right_on_every_instruction_set(group, dtype, level, instruction_set):
    if instruction_set(level) != level:
        pytest.skip(f"this CPU has no {level}")
    for shape in ((70, 300), (129, 16), (5, 128)):
        weight, buffers = packed(group, shape, dtype)
        bias = torch.randn(shape[0]).to(dtype)
        for batch in (1, 2, 3, 4, 7, 8, 9, 40):
            x = torch.randn(batch, shape[1]).to(dtype)
            exact = F.gelu(F.linear(x.double(), weight.double(), bias.double()))
            scale = F.linear(x.double().abs(), weight.double().abs(), bias.double().abs()).max()
            error = (nm_lanes_linear(x, *buffers, bias, "gelu").double() - exact).abs().max() / scale
            assert error < tolerance(dtype, shape[1] + 1)


@COMPILED
@pytest.mark.parametrize("batch", [1, 300])
def test_threads_do_not_change_a_bit(batch):
    _, buffers = packed(shape=(1030, 300))
    x, before, results = torch.randn(batch, 300), torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(nm_lanes_linear(x, *buffers))
    torch.set_num_threads(before)
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_op_passes_opcheck():
    _, buffers = packed()
    opcheck(torch.ops.fxsparse.nm_lanes_forward.default, (torch.randn(3, 300), *buffers, torch.randn(70), 1))


def test_counted_flops_are_two_per_slot_and_token():
    _, buffers = packed()
    with FlopCounterMode(display=False) as counter:
        nm_lanes_linear(torch.randn(3, 5, 300), *buffers)
    assert counter.get_total_flops() == 2 * 15 * buffers[0].numel()


@COMPILED
def test_broken_buffers_are_refused():
    _, (values, places, dense) = packed()
    x = torch.randn(2, 300)
    with pytest.raises(RuntimeError, match=r"expected values \[groups, runs, run, steps, 16\]"):
        nm_lanes_linear(x, values[0], places, dense)
    with pytest.raises(RuntimeError, match="expected places int32"):
        nm_lanes_linear(x, values, places.long(), dense)
    with pytest.raises(RuntimeError, match="expected chunks for 70 x 600"):
        nm_lanes_linear(torch.randn(2, 600), values, places, torch.empty(0, 70, 600, dtype=torch.uint8))
    for size in ((5, 0, 2, 4, 16), (5, 10, 2, 0, 16), (2**60 + 1, 1, 1, 0, 16)):
        with pytest.raises(RuntimeError, match="and 1 to 8 steps in a run"):
            nm_lanes_linear(x, torch.empty(size), places, dense)


@COMPILED
def test_other_patterns_are_refused_with_what_they_would_store():
    entry = registered()["cpu-nm"]

    def reasons(nnz, group, training=False):
        device = torch.device("cpu")
        return entry.refuses(
            Problem("linear", (64, 64), 1, nnz, torch.float32, device, training, group=group)
        )

    assert reasons(2048, (2, 4)) == []
    assert reasons(2048, None) == ["the zeros are not N:M"]
    assert reasons(256, (6, 16)) == ["as 6:16 it would store 6.0 slots a nonzero"]
    assert reasons(2048, (2, 4), training=True) == ["it has no gradient"]


@COMPILED
def test_an_nm_model_is_offered_it(monkeypatch):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(512, 1024), torch.nn.GELU(), torch.nn.Linear(1024, 512))
    x, seen = torch.randn(8, 512), []
    chosen = choosing.choose

    def choose(problem, *args, **kwargs):
        seen.append(problem)
        return chosen(problem, *args, **kwargs)

    monkeypatch.setattr(choosing, "choose", choose)
    pruned = fxsparse.prune(model.eval(), Plan(sparsity=0.5, pattern=NM(2, 4), allocation="uniform"), x)
    fast = fxsparse.compile(pruned, mode="infer", example_inputs=x)
    torch.testing.assert_close(fast(x), pruned(x), rtol=1e-4, atol=1e-5)
    assert (
        len(seen) >= 2
    )  # more where the sparse model as a whole measured slower than dense, and is chosen again
    assert {problem.group for problem in seen} == {(2, 4)}
    assert all("cpu-nm" in [kernel.name for kernel in candidates(problem)[0]] for problem in seen)
