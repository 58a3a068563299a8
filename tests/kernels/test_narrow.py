import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

from fxsparse import testing
from fxsparse.choosing import stored
from fxsparse.formats import narrow
from fxsparse.kernel import candidates, registered, tolerance
from fxsparse.kernels import NARROW, cpu
from fxsparse.kernels.cpu.build import INSTRUCTION_SETS
from fxsparse.pattern import NM, Strided

COMPILED = pytest.mark.skipif(cpu.availability() is not None, reason=str(cpu.availability()))
NAMES = [kernel.name for kernel in NARROW]
EACH = pytest.mark.parametrize("name", NAMES)


def problem(name, **change):
    return testing.problem_of(
        registered()[name], grouped(name, (37, 300)), 1, change.pop("dtype", torch.float32), False
    )


def grouped(name, shape):
    """A weight with one entry in four inputs, and with empty rows, as the kernel needs them."""
    weight = testing.sparse_weight(shape, 1.0)
    pattern = Strided(4) if "strided" in name else NM(1, 4)
    weight = weight * pattern.project(weight.abs(), 0)
    weight[::12] = 0
    return weight


def call(name, dtype=torch.float32, batch=3, shape=(37, 300)):
    """A call of the kernel: x, bias, residual, and the buffers of a weight with empty rows."""
    generator = torch.Generator().manual_seed(0)
    weight = grouped(name, shape).to(dtype)
    x, bias = torch.randn(batch, shape[1], generator=generator), torch.randn(shape[0], generator=generator)
    residual = torch.randn(batch, shape[0], generator=generator)
    buffers = tuple(registered()[name].pack(weight).values())
    return weight, buffers, *(t.to(dtype) for t in (x, bias, residual))


def test_there_is_one_of_each_format_and_dtype():
    formats = ("csr", "lookup", "striped", "nm", "strided")
    assert [f"cpu-{layout}-{dtype}" for dtype in ("int8", "bfloat16") for layout in formats] == NAMES


@COMPILED
@pytest.mark.parametrize("level", INSTRUCTION_SETS)
@EACH
def test_kernels_multiply_by_what_they_store_on_every_instruction_set(name, level, instruction_set):
    if instruction_set(level) != level:
        pytest.skip(f"this CPU has no {level}")
    for dtype in (torch.float32, torch.bfloat16):
        for batch in (1, 2, 3, 13, 40, 130):
            weight, buffers, x, bias, residual = call(name, dtype, batch)
            exact = stored(registered()[name], weight).double()
            inputs = x.double(), exact, bias.double()
            scale = F.linear(*(t.abs() for t in inputs)).max()
            for run in (registered()[name].run, registered()[name].reference):
                y = run(x, bias, *buffers, activation="gelu", residual=residual, in_features=300)
                assert y.dtype == dtype
                wrong = y.double() - F.gelu(F.linear(*inputs) + residual.double())
                assert wrong.abs().max() / scale < tolerance(dtype, 302)


@COMPILED
@EACH
def test_the_contract_of_kernels(name):
    if registered()[name].refuses(problem(name)):
        pytest.skip("this CPU has no VBMI")
    testing.check_kernel(registered()[name])


@EACH
def test_values_take_the_bytes_of_their_dtype(name):
    kernel = registered()[name]
    _, buffers, *_ = call(name)
    assert buffers[0].dtype == kernel.values
    assert buffers[-1].dtype == torch.float32
    whole = registered()[name.removesuffix("-int8").removesuffix("-bfloat16")]
    asked = problem(name)
    saved = whole.cost(asked).bytes - kernel.cost(asked).bytes
    assert saved == asked.nnz * (4 - kernel.values.itemsize)
    assert whole.cost(asked).flops == kernel.cost(asked).flops


OPS = {
    "csr": "csr_forward",
    "lookup": "lookup_forward",
    "striped": "striped_forward",
    "nm-lanes": "nm_lanes_forward",
    "strided": "strided_forward",
}


@EACH
def test_ops_pass_opcheck(name):
    _, buffers, x, bias, residual = call(name)
    layout = registered()[name].format
    width = () if layout in ("striped", "nm-lanes", "strided") else (300,)
    arguments = (x, *buffers[:-1], *width, bias, 1, residual, buffers[-1])
    opcheck(getattr(torch.ops.fxsparse, OPS[layout]).default, arguments)


@EACH
def test_counted_flops_are_those_of_the_format(name):
    _, buffers, x, bias, _ = call(name)
    with FlopCounterMode(display=False) as counter:
        registered()[name].run(x, bias, *buffers, in_features=300)
    assert counter.get_total_flops() == 2 * 3 * buffers[0].numel()


@EACH
def test_compiles_whole_with_the_same_numbers(name):
    torch._dynamo.reset()  # as all kernels are called from one line here
    _, buffers, x, bias, _ = call(name)
    run = registered()[name].run
    compiled = torch.compile(
        lambda x: run(x, bias, *buffers, in_features=300), backend="aot_eager", fullgraph=True
    )
    torch.testing.assert_close(compiled(x), run(x, bias, *buffers, in_features=300))


@EACH
def test_inputs_are_of_the_dtype_of_the_weight_and_not_of_its_values(name):
    _, buffers, x, bias, _ = call(name)
    for run in (registered()[name].run, registered()[name].reference):
        with pytest.raises(RuntimeError, match=r"expected x \[..., 300\] in float32 as the weight is"):
            run(x.bfloat16(), bias, *buffers, in_features=300)


@EACH
def test_autocast_leaves_the_values_as_they_are_stored(name):
    weight, buffers, x, bias, _ = call(name)
    with torch.autocast("cpu", torch.bfloat16):
        y = registered()[name].run(x, bias, *buffers, in_features=300)
    exact = F.linear(x.double(), stored(registered()[name], weight).double(), bias.double())
    assert y.dtype == torch.bfloat16
    assert (y.double() - exact).abs().max() / exact.abs().max() < 0.02


@COMPILED
@EACH
def test_scales_of_another_number_are_refused(name):
    _, buffers, x, bias, _ = call(name)
    with pytest.raises(RuntimeError, match=r"expected scales \["):
        registered()[name].run(x, bias, *buffers[:-1], buffers[-1][1:], in_features=300)


def test_only_what_was_asked_for_is_a_candidate():
    weight = testing.sparse_weight((37, 300), 0.2)
    plain = testing.problem_of(registered()["cpu-csr"], weight, 1, torch.float32, False)
    _, refusals = candidates(plain)
    assert refusals["cpu-csr-int8"] == ["it stores values in int8, which was not asked for"]
    assert refusals["cpu-csr-bfloat16"] == ["it stores values in bfloat16, which was not asked for"]
    _, refusals = candidates(problem("cpu-csr-int8"))
    assert "cpu-csr-bfloat16" in refusals
    same = problem("cpu-csr-bfloat16", dtype=torch.bfloat16)
    assert "the weight is in bfloat16 as it is" in registered()["cpu-csr-bfloat16"].refuses(same)


def test_scales_of_lookups_are_in_the_order_of_their_rows():
    weight, buffers, *_ = call("cpu-lookup-int8")
    active = buffers[4].long()
    assert torch.equal(buffers[-1], narrow.rounded(weight, torch.int8)[1][active])
