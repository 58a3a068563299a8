"""The GPU's product with blocks, without a GPU: its numbers in Triton's interpreter, its code for other machines."""

from itertools import product

import pytest
import torch

from fxsparse.formats import bsr
from fxsparse.kernel import Problem, registered
from fxsparse.kernels import bsr_linear, trainable_bsr_linear
from tests.kernels.interpreter import check_sums, interpreted

triton = pytest.importorskip("triton")
SPILLED = 88 if triton.__version__.startswith("3.6.") else 0
"""Bytes at most, of the forms below: the compiler that came with torch 2.11 spills in some."""


def mask_of(rows: int, columns: int, block: int, density: float) -> torch.Tensor:
    kept = torch.rand(rows // block, columns // block) < density
    return kept.repeat_interleave(block, 0).repeat_interleave(block, 1)


def compare(blocks: list[int], tokens: list[int], dtypes: list[torch.dtype]) -> int:
    """Runs in the interpreter: the kernel beside the exact product, over memory that is NaN until written."""
    from fxsparse.kernels.bsr import _triton
    from fxsparse.kernels.gpu import INTERPRETED
    from fxsparse.kernels.library import ACTIVATIONS, activate
    from fxsparse.testing import poisoned_memory

    assert INTERPRETED
    cases = list(product(blocks, tokens, dtypes, (0.0, 0.4, 1.0)))
    for seed, (block, count, dtype, density) in enumerate(cases):
        torch.manual_seed(seed)
        rows, columns, code = 3 * block, 2 * block, seed % len(ACTIVATIONS)
        weight = (torch.randn(rows, columns) * mask_of(rows, columns, block, density)).to(dtype)
        packed = bsr.pack_for_inference(weight)
        x = torch.randn(count, 2 * columns).to(dtype)[:, ::2]
        bias = torch.randn(rows).to(dtype) if seed % 2 else None
        residual = torch.randn(count, rows).to(dtype) if seed % 3 else None
        if seed % 4 == 0:
            del packed["order"]
        with poisoned_memory():
            y = _triton.forward(x, **packed, bias=bias, activation=code, residual=residual)
        exact = x.double() @ weight.double().T
        for added in (bias, residual):
            exact += 0 if added is None else added.double()
        check_sums(y, activate(exact, ACTIVATIONS[code]), dtype, columns)
    return len(cases)


def compare_gradients(blocks: list[int], tokens: list[int], dtypes: list[torch.dtype]) -> int:
    """Runs in the interpreter: gradients of input, blocks and bias beside the exact ones, all in the same memory."""
    from fxsparse.kernels.bsr import _triton, launch
    from fxsparse.testing import poisoned_memory

    parts = set()
    cases = list(product(blocks, tokens, dtypes, (0.0, 0.4, 1.0)))
    for seed, (block, count, dtype, density) in enumerate(cases):
        torch.manual_seed(seed)
        rows, columns = 3 * block, 2 * block
        mask = mask_of(rows, columns, block, density)
        mask[:block] = seed % 2 == 0  # a row that is longer than others, or empty
        weight = (torch.randn(rows, columns) * mask).to(dtype)
        packed = bsr.pack_for_training(weight)
        values, _ = packed.pop("values"), packed.pop("order")
        x = torch.randn(count, 2 * columns).to(dtype)[:, ::2]
        grad = torch.randn(rows, count).to(dtype).T
        with poisoned_memory():
            made = _triton.backward(grad, x, values, **packed, need_x=True, need_values=True, need_bias=True)
        exact = torch.where(mask, grad.double().T @ x.double(), 0)
        check_sums(made[0], grad.double() @ weight.double(), dtype, rows)
        index = [packed[name] for name in ("crow", "columns", "dense")]
        check_sums(bsr.to_dense(made[1], *index), exact, dtype, count)
        check_sums(made[2], grad.double().sum(0), dtype, count)
        tile = launch.of_sample(block, block, dtype.itemsize)[0].tokens
        parts.add(launch.splits_of_sample(max(1, len(values)), count, tile, 4))
    assert max(parts) > (max(tokens) > 255)
    return len(cases)


def test_the_interpreter_gives_the_product_and_its_gradients() -> None:
    types = "[torch.float32, torch.bfloat16, torch.float16]"
    made = interpreted(
        __name__,
        f"compare([16, 32], [1, 17], {types})",
        "compare([16], [1100], [torch.float32])",  # more tiles than go together
        f"compare_gradients([16, 32], [1, 40], {types})",
        "compare_gradients([16], [300], [torch.float32])",  # tokens in parts
    )
    assert made == ["36", "3", "36", "3"]


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_the_largest_forms_compile_ahead_of_time_without_spills(
    capability: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")  # about whose default Triton 3.9 warns
    from benchmarks.triton_ahead import compiled
    from fxsparse.kernels.bsr import _triton

    large = ("128x128 torch.float32, 64", "128x128 torch.bfloat16, 64", "64x64 torch.bfloat16, 128")
    large += ("64x64 torch.bfloat16, 16", "gradient 64x64 torch.float32 unrounded, 32")
    large += ("weight gradient 128x128 torch.b", "weight gradient 64x64 torch.b")
    asked = [v for v in _triton.variants() if any(name in v[0] for name in large)]
    made = [compiled(*v, capability) for v in asked]
    assert len(made) == len(asked) == 11
    assert max(row["spilled bytes"] for row in made) <= SPILLED
    assert all(("mma" in row["tensor cores"]) != ("unrounded" in row["kernel"]) for row in made)


def test_every_tile_and_block_is_a_form_that_is_compiled_ahead() -> None:
    from fxsparse.kernels.bsr import _triton

    names = {name for name, *_ in _triton.variants()}
    assert {f"bsr {b}x{b} torch.bfloat16, 16 tokens" for b in (16, 32, 64, 128)} <= names
    assert "bsr input gradient 16x16 torch.float16, 128 tokens" in names
    assert len(names) == 3 * (4 * 2 * 4 + 4 - 2) + 2 * (1 + 2 + 3 + 4) + 4


def test_launches_are_few_and_the_default_is_the_first() -> None:
    from fxsparse.kernels.bsr import launch

    assert launch.of_product(1, 64 * 64, 2)[0] == launch.Launch(16, 4, 3)
    assert launch.of_product(4096, 64 * 64, 2)[0] == launch.Launch(128, 8, 3)
    assert launch.of_product(4096, 128 * 128, 4)[0] == launch.Launch(64, 4, 2)
    assert launch.of_product(4096, 128 * 128, 4, tensor_cores=False)[0] == launch.Launch(16, 8, 2)
    for tokens, block, itemsize in product((1, 16, 100, 4096), (16, 32, 64, 128), (2, 4)):
        found = launch.of_product(tokens, block * block, itemsize)
        assert len(set(found)) == len(found) <= 5
        assert all(16 <= how.tokens <= 128 and how.warps in (4, 8) and how.stages in (2, 3) for how in found)


def test_a_few_blocks_are_summed_in_parts_that_fill_the_device() -> None:
    from fxsparse.kernels.bsr.launch import splits_of_sample

    assert splits_of_sample(blocks=410, tokens=4096, tile=64, multiprocessors=132) == 2
    assert splits_of_sample(blocks=4, tokens=4096, tile=64, multiprocessors=132) == 16
    assert splits_of_sample(blocks=4, tokens=100, tile=64, multiprocessors=132) == 1
    assert splits_of_sample(blocks=10_000, tokens=4096, tile=64, multiprocessors=132) == 1


def test_it_is_for_cuda_and_for_blocks() -> None:
    entry = registered()["cuda-bsr"]
    problem = Problem(
        "linear", (64, 64), 4, 512, torch.float16, torch.device("cuda"), training=False, is_blocked=True
    )
    assert entry.refuses(problem) == []
    on_cpu = Problem("linear", (64, 64), 4, 512, torch.float64, torch.device("cpu"), training=True)
    assert entry.refuses(on_cpu) == [
        "it runs on cuda, not cpu",
        "it has float32, bfloat16 and float16, not float64",
        "it has no gradient: cuda-bsr-train has",
        "zeros do not lie in blocks",
    ]


def test_it_packs_the_largest_blocks_that_tensor_cores_take() -> None:
    entry = registered()["cuda-bsr"]
    for block in (128, 64, 32, 16):
        weight = torch.randn(256, 256) * mask_of(256, 256, block, 0.5)
        packed = dict(entry.pack(weight.bfloat16()))
        assert packed["values"].shape[1:] == (block, block)
        order = packed.pop("order")
        assert packed["crow"].diff()[order.long()].tolist() == sorted(packed["crow"].diff().tolist())[::-1]
        assert torch.equal(bsr.to_dense(**packed), weight.bfloat16())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("block", [16, 32, 64, 128])
@pytest.mark.parametrize("tokens", [1, 33, 300])
def test_a_gpu_gives_the_product(dtype: torch.dtype, block: int, tokens: int) -> None:
    weight = (torch.randn(512, 256) * mask_of(512, 256, block, 0.4)).to("cuda", dtype)
    x, bias = (
        torch.randn(tokens, 256, device="cuda", dtype=dtype),
        torch.randn(512, device="cuda", dtype=dtype),
    )
    y = bsr_linear(x, **registered()["cuda-bsr"].pack(weight), bias=bias, activation="gelu")
    exact = torch.nn.functional.gelu(x.double() @ weight.double().T + bias.double())
    allowed = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
    assert (y.double() - exact).abs().max() < allowed * exact.abs().max()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("block", [16, 32, 64, 128])
@pytest.mark.parametrize("tokens", [1, 33, 3000])
def test_a_gpu_gives_the_gradients_and_the_same_ones_again(
    dtype: torch.dtype, block: int, tokens: int
) -> None:
    mask = mask_of(512, 256, block, 0.4).cuda()
    weight = torch.randn(512, 256, device="cuda", dtype=dtype) * mask
    packed = bsr.pack_for_training(weight)
    values = packed.pop("values").requires_grad_()
    x = torch.randn(tokens, 256, device="cuda", dtype=dtype, requires_grad=True)
    bias = torch.randn(512, device="cuda", dtype=dtype, requires_grad=True)
    upstream = torch.randn(tokens, 512, device="cuda", dtype=dtype)

    def gradients() -> tuple[torch.Tensor, ...]:
        y = trainable_bsr_linear(x, values, **packed, bias=bias)
        return torch.autograd.grad(y, (x, values, bias), upstream)

    made, again = gradients(), gradients()
    assert all(torch.equal(one, other) for one, other in zip(made, again, strict=True))
    index = [packed[name] for name in ("crow", "columns", "dense")]
    exact = upstream.double() @ weight.double(), (upstream.double().T @ x.double()) * mask
    allowed = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
    for got, right in zip((made[0], bsr.to_dense(made[1], *index)), exact, strict=True):
        assert (got.double() - right).abs().max() < allowed * right.abs().max()
    torch.testing.assert_close(made[2].double(), upstream.double().sum(0), rtol=allowed, atol=allowed * 100)
