import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

from fxsparse.formats import striped
from fxsparse.kernel import registered, tolerance
from fxsparse.kernels import cpu, striped_linear
from fxsparse.kernels.cpu.build import INSTRUCTION_SETS
from fxsparse.testing import problem_of, sparse_weight

COMPILED = pytest.mark.skipif(cpu.availability() is not None, reason=str(cpu.availability()))


def packed(shape=(37, 300), density=0.2, dtype=torch.float32):
    weight = sparse_weight(shape, density).to(dtype)
    return weight, tuple(striped.pack(weight).values())


@COMPILED
@pytest.mark.parametrize("level", INSTRUCTION_SETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(37, 300), (1030, 129)])
def test_every_panel_width_and_chunk_is_right_on_every_instruction_set(shape, level, dtype, instruction_set):
    if instruction_set(level) != level:
        pytest.skip(f"this CPU has no {level}")
    weight, buffers = packed(shape, dtype=dtype)
    bias = torch.randn(shape[0]).to(dtype)
    for batch in (1, 3, 13, 40, 130):
        x = torch.randn(batch, shape[1]).to(dtype)
        exact = F.gelu(F.linear(x.double(), weight.double(), bias.double()))
        scale = F.linear(x.double().abs(), weight.double().abs(), bias.double().abs()).max()
        error = (striped_linear(x, *buffers, bias, "gelu").double() - exact).abs().max() / scale
        assert error < tolerance(dtype, shape[1] + 1)


@COMPILED
@pytest.mark.parametrize("batch", [1, 65, 144, 197, 300])
def test_threads_do_not_change_a_bit(batch):
    _, buffers = packed((1030, 300))
    x = torch.randn(batch, 300)
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 3, 5):
        torch.set_num_threads(threads)
        results.append(striped_linear(x, *buffers))
    torch.set_num_threads(before)
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_op_passes_opcheck():
    _, buffers = packed()
    opcheck(torch.ops.fxsparse.striped_forward.default, (torch.randn(3, 300), *buffers, torch.randn(37), 1))


def test_counted_flops_are_two_per_entry_and_token():
    weight, buffers = packed()
    with FlopCounterMode(display=False) as counter:
        striped_linear(torch.randn(3, 5, 300), *buffers)
    assert counter.get_total_flops() == 2 * 15 * int((weight != 0).sum())


def test_compiles_whole_with_the_same_numbers():
    _, buffers = packed()
    x = torch.randn(3, 300)
    compiled = torch.compile(lambda x: striped_linear(x, *buffers), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), striped_linear(x, *buffers))


def test_an_infinite_input_reaches_only_the_rows_that_read_it():
    weight, buffers = packed()
    x = torch.randn(40, 300)
    x[:, :128] = torch.inf
    y = striped_linear(x, *buffers)
    assert torch.equal(y.isfinite(), (weight[:, :128] == 0).all(1).expand(40, -1))


@COMPILED
def test_refuses_inputs_of_another_width_and_other_buffers():
    _, buffers = packed()
    with pytest.raises(RuntimeError, match=r"expected x .*300.*, got \[2, 299\]"):
        striped_linear(torch.randn(2, 299), *buffers)
    for position, name in ((1, "columns"), (2, "rows"), (3, "lengths"), (4, "starts")):
        wrong = [*buffers]
        wrong[position] = wrong[position].float()
        with pytest.raises(RuntimeError, match=f"expected {name}"):
            striped_linear(torch.randn(2, 300), *wrong)


@COMPILED
def test_refuses_training():
    kernel, weight = registered()["cpu-striped"], sparse_weight((8, 8), 0.5)
    assert kernel.refuses(problem_of(kernel, weight, 1, torch.float32, True)) == ["it has no gradient"]
