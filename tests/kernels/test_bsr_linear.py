import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxsparse
from fxsparse import Plan
from fxsparse.formats import bsr
from fxsparse.kernel import Problem, registered
from fxsparse.kernels import bsr_linear, cpu
from fxsparse.kernels.cpu.build import INSTRUCTION_SETS
from fxsparse.pattern import Block


def test_only_blocks_are_taken_and_the_reason_is_said():
    problem = Problem("linear", (64, 64), 4, 512, torch.float32, torch.device("cpu"), training=False)
    assert "zeros do not lie in blocks" in registered()["cpu-bsr"].refuses(problem)


def test_a_model_pruned_in_blocks_runs_on_them(monkeypatch):
    if (reason := cpu.availability()) is not None:
        pytest.skip(reason)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 256), nn.GELU(), nn.Linear(256, 64))
    x = torch.randn(128, 256)
    pruned = fxsparse.prune(model, Plan(sparsity=0.9, pattern=Block(16, 16), allocation="uniform"), x)
    fast = fxsparse.compile(pruned, mode="infer", example_inputs=x)
    rows = {row["name"]: row for row in fast.report.layers}
    assert rows["0.weight"]["pattern"] == "Block(rows=16, cols=16)"
    torch.testing.assert_close(fast(x), pruned(x).detach(), rtol=1e-4, atol=1e-5)


def test_wrong_widths_and_broken_pointers_are_refused():
    if (reason := cpu.availability()) is not None:
        pytest.skip(reason)
    packed = bsr.pack(torch.eye(8).repeat_interleave(4, 0).repeat_interleave(4, 1))
    with pytest.raises(RuntimeError, match="32"):
        bsr_linear(torch.randn(2, 31), **packed)
    with pytest.raises(RuntimeError, match="crow"):
        bsr_linear(torch.randn(2, 32), **packed | {"crow": packed["crow"] + 1})


@pytest.mark.parametrize("level", INSTRUCTION_SETS)
@pytest.mark.parametrize("block", [(16, 16), (32, 32), (4, 4), (1, 16), (8, 1)])
@pytest.mark.parametrize("batch", [1, 17, 64, 130])
def test_every_instruction_set_multiplies_bfloat16(level, block, batch, instruction_set):
    if instruction_set(level) != level:
        pytest.skip(f"this CPU has no {level}")
    torch.manual_seed(0)
    kept = (torch.rand(96 // block[0], 64 // block[1]) < 0.4).repeat_interleave(block[0], 0)
    weight = (torch.randn(96, 64) * kept.repeat_interleave(block[1], 1)).bfloat16()
    x, bias = torch.randn(batch, 64).bfloat16(), torch.randn(96).bfloat16()
    y = bsr_linear(x, **bsr.pack(weight), bias=bias)
    exact = x.double() @ weight.double().T + bias.double()
    assert (y.double() - exact).abs().max() <= 2**-8 * exact.abs().max()


def test_pairs_are_of_bfloat16_and_of_two():
    if (reason := cpu.availability()) is not None:
        pytest.skip(reason)
    packed = bsr.pack(torch.eye(8).repeat_interleave(4, 0).repeat_interleave(4, 1).bfloat16())
    with pytest.raises(RuntimeError, match="pairs of columns in bfloat16 alone"):
        bsr_linear(torch.randn(2, 32), **packed | {"values": packed["values"].float()})
    with pytest.raises(RuntimeError, match="width / 2"):
        bsr_linear(torch.randn(2, 32).bfloat16(), **packed | {"values": packed["values"].repeat(1, 1, 1, 2)})


def test_two_threads_give_the_same():
    weight = torch.randn(64, 48).view(16, 4, 12, 4) * (torch.rand(16, 1, 12, 1) < 0.3)
    weight, x = weight.view(64, 48), torch.randn(200, 48)
    packed = bsr.pack(weight)
    one = bsr_linear(x, **packed)
    torch.set_num_threads(2)
    try:
        assert torch.equal(bsr_linear(x, **packed), one)
    finally:
        torch.set_num_threads(1)
    torch.testing.assert_close(one, F.linear(x, weight), rtol=1e-4, atol=1e-4)
