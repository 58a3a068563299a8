import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

from fxsparse.formats import lookup
from fxsparse.kernel import registered, tolerance
from fxsparse.kernels import cpu, lookup_linear
from fxsparse.kernels.cpu.build import INSTRUCTION_SETS
from fxsparse.testing import problem_of, sparse_weight

COMPILED = pytest.mark.skipif(cpu.availability() is not None, reason=str(cpu.availability()))


def packed(shape=(37, 300), density=0.2, dtype=torch.float32):
    weight = sparse_weight(shape, density).to(dtype)
    return weight, list(lookup.pack(weight).values())


@COMPILED
@pytest.mark.parametrize("level", INSTRUCTION_SETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_artefact_runs_on_every_instruction_set_and_at_every_batch(level, dtype, instruction_set):
    if instruction_set(level) != level:
        pytest.skip(f"this CPU has no {level}")
    weight, buffers = packed(dtype=dtype)
    bias = torch.randn(37).to(dtype)
    for batch in (1, 3, 13, 40, 130):  # lookups, and panels of every width
        x = torch.randn(batch, 300).to(dtype)
        exact = F.gelu(F.linear(x.double(), weight.double(), bias.double()))
        scale = F.linear(x.double().abs(), weight.double().abs(), bias.double().abs()).max()
        error = (
            lookup_linear(x, *buffers, bias, "gelu", in_features=300).double() - exact
        ).abs().max() / scale
        assert error < tolerance(dtype, 301)


def test_op_passes_opcheck():
    _, buffers = packed()
    opcheck(
        torch.ops.fxsparse.lookup_forward.default, (torch.randn(3, 300), *buffers, 300, torch.randn(37), 1)
    )


def test_empty_rows_give_the_activated_bias():
    weight, buffers = packed()
    y = lookup_linear(torch.randn(2, 300), *buffers, torch.full((37,), -1.0), "relu", in_features=300)
    empty = ~weight.any(1)
    assert empty.any()
    assert torch.equal(y[:, empty], torch.zeros(2, int(empty.sum())))


def test_counted_flops_are_two_per_slot_and_token():
    _, buffers = packed()
    with FlopCounterMode(display=False) as counter:
        lookup_linear(torch.randn(3, 5, 300), *buffers, in_features=300)
    assert counter.get_total_flops() == 2 * 15 * buffers[0].numel()


def test_compiles_whole_with_the_same_numbers():
    _, buffers = packed()
    x = torch.randn(3, 300)
    compiled = torch.compile(
        lambda x: lookup_linear(x, *buffers, in_features=300), backend="aot_eager", fullgraph=True
    )
    torch.testing.assert_close(compiled(x), lookup_linear(x, *buffers, in_features=300))


@pytest.mark.parametrize("batch", [1, 40])
def test_an_infinite_input_reaches_only_the_rows_that_read_it(batch):
    weight, buffers = packed()
    x = torch.randn(batch, 300)
    x[:, :128] = torch.inf  # the whole first table: empty slots must not pick it up
    y = lookup_linear(x, *buffers, in_features=300)
    assert torch.equal(y.isfinite(), (weight[:, :128] == 0).all(1).expand(batch, -1))


@COMPILED
def test_refuses_inputs_of_another_width():
    weight = torch.zeros(2, 300)
    weight[:, 299] = 1
    buffers = list(lookup.pack(weight).values())
    for width, message in (
        (299, "columns past those of x, which has 299"),
        (200, "5 windows of 64 columns, but x"),
    ):
        with pytest.raises(RuntimeError, match=message):
            lookup_linear(torch.randn(width), *buffers, in_features=width)
    with pytest.raises(RuntimeError, match="expected columns uint8"):
        lookup_linear(torch.randn(300), buffers[0], buffers[1].int(), *buffers[2:], in_features=300)


@COMPILED
def test_refuses_a_cpu_without_vbmi_and_training(instruction_set):
    kernel, weight = registered()["cpu-lookup"], sparse_weight((8, 8), 0.5)
    assert "it has no gradient" in kernel.refuses(problem_of(kernel, weight, 1, torch.float32, True))
    instruction_set("avx2")
    assert kernel.refuses(problem_of(kernel, weight, 1, torch.float32, False)) == ["it needs AVX-512 VBMI"]
