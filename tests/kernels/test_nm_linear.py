from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

from fxsparse import testing
from fxsparse.errors import PatternError, UnsupportedError
from fxsparse.formats import nm, strided
from fxsparse.kernel import Problem, registered
from fxsparse.kernels import nm_linear
from fxsparse.pattern import NM, Strided

ENTRY = registered()["cuda-nm"]


def weight_of(n: int, m: int) -> torch.Tensor:
    score = torch.rand(24, 48, generator=torch.Generator().manual_seed(0))
    return (score + 1) * NM(n, m).project(score, 0)


def test_what_runs_without_a_gpu_fulfils_the_contract():
    def refuses(problem):
        return ENTRY.refuses(replace(problem, device=torch.device("cuda")))

    assert testing.check_kernel(replace(ENTRY, refuses=refuses)) >= 20


def test_strided_groups_fulfil_the_contract_too():
    entry = registered()["cuda-strided"]

    def refuses(problem):
        return entry.refuses(replace(problem, device=torch.device("cuda")))

    assert testing.check_kernel(replace(entry, refuses=refuses)) >= 8
    problem = Problem(
        "linear", (64, 60), 4, 384, torch.float16, torch.device("cuda"), training=False, strides=10
    )
    assert entry.refuses(problem) == ["the zeros are not strided 1:M, M a power of 2 up to 16"]
    assert entry.refuses(replace(problem, strides=4, nnz=960)) == []
    with pytest.raises(
        PatternError, match=r"M a power of 2, got a weight \[8, 60\] with 48 nonzeros and M 10"
    ):
        strided.pack_rows(torch.rand(8, 60) * Strided(10).project(torch.rand(8, 60), 0))


def test_the_op_passes_opcheck_and_counts_stored_values():
    packed = nm.pack(weight_of(2, 8))
    x = torch.randn(2, 5, 48)
    opcheck(torch.ops.fxsparse.nm_forward.default, (x, *packed.values(), torch.randn(24), 2))
    with FlopCounterMode(display=False) as counter:
        y = nm_linear(x, **packed)
    assert counter.get_total_flops() == 2 * 10 * 24 * 12
    torch.testing.assert_close(y, F.linear(x, weight_of(2, 8)))


def test_an_input_that_wants_a_gradient_or_of_another_width_is_refused():
    packed = nm.pack(weight_of(2, 4))
    with pytest.raises(UnsupportedError, match="requires a gradient"):
        nm_linear(torch.randn(2, 48, requires_grad=True), **packed)
    with pytest.raises(RuntimeError, match=r"expected x \[..., 48\] in float32"):
        nm_linear(torch.randn(2, 47), **packed)


def test_it_is_for_groups_that_are_filled_and_for_inference_on_a_gpu():
    problem = Problem(
        "linear", (64, 64), 4, 2048, torch.float16, torch.device("cuda"), training=False, group=(2, 4)
    )
    assert ENTRY.refuses(problem) == []
    assert ENTRY.refuses(replace(problem, nnz=512)) == ["as 2:4 it would store 4.0 slots a nonzero"]
    assert ENTRY.refuses(replace(problem, group=None, training=True, device=torch.device("cpu"))) == [
        "it runs on cuda, not cpu",
        "it has no gradient",
        "the zeros are not N:M",
    ]
