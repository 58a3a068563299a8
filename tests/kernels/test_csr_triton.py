"""The GPU's products with nonzeros, without a GPU: numbers in Triton's interpreter, code for other machines."""

import os
import subprocess
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from fxsparse.formats import condensed, csr, narrow
from fxsparse.kernel import Problem, registered, tolerance, trained_by
from fxsparse.kernels import condensed_linear, csr_linear, gradient_at
from fxsparse.kernels.csr.tilings import tilings
from fxsparse.kernels.library import ACTIVATIONS, activate
from fxsparse.testing import poisoned_memory, sparse_weight

pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NAN = float("nan")


def with_room(weight: Tensor) -> tuple[Tensor, csr.CsrIndex]:
    """Values and index of a weight in a layout with five slots to spare, which hold NaN."""
    index = csr.from_mask(weight != 0)
    roomy = csr.from_flat(csr.flat_of(index), index.shape, index.capacity + 5)
    return F.pad(csr.values_of(weight, index), (0, 5), value=NAN), roomy


def parts_of(index: csr.CsrIndex) -> tuple[Tensor, ...]:
    return index.crow, index.cols, index.ccol, index.rows_t, index.perm


def close(got: Tensor, exact: Tensor, terms: int, scale: float) -> None:
    assert got.shape == exact.shape
    if got.numel():
        error = (got.double() - exact).abs().max() / max(scale, 1)
        assert error < tolerance(got.dtype, terms), error


def inputs(shape: tuple[int, int], tokens: int, dtype: torch.dtype, seed: int) -> tuple[Tensor, ...]:
    """A strided x, a bias, a residual and what they add up to with the product, but for the product."""
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, 2 * shape[1], generator=random).to(dtype)[:, ::2]
    bias = torch.randn(shape[0], generator=random).to(dtype) if seed % 2 else None
    residual = torch.randn(tokens, shape[0], generator=random).to(dtype) if seed % 3 else None
    added = sum(
        (t.double() for t in (bias, residual) if t is not None), torch.zeros(tokens, shape[0]).double()
    )
    return x, bias, residual, added


SHAPES = ((1, 3), (37, 53), (16, 128))


def compare_forward() -> int:
    """In the interpreter: outputs beside the exact ones, over memory that is NaN until written."""
    from fxsparse.kernels.condensed import _triton as by_fan_in
    from fxsparse.kernels.csr import _triton as by_rows

    cases = list(product((1, 20), SHAPES, (0.0, 0.2, 1.0)))
    for case, (tokens, shape, density) in enumerate(cases):
        constant, seed = case % 2 == 1, case // 2
        dtype, code, tokens = DTYPES[seed % 3], case % len(ACTIVATIONS), tokens + seed % 3
        weight = sparse_weight(shape, density, constant_fan_in=constant).to(dtype)
        x, bias, residual, added = inputs(shape, tokens, dtype, seed)
        with poisoned_memory():
            if constant:
                packed = {"active_rows": None, "empty_rows": None} | dict(condensed.pack(weight))
                y = by_fan_in.forward(x, *packed_in_order(packed), shape[1], bias, code, residual)
            else:
                values, index = with_room(weight)
                cols = index.cols.to(torch.int16 if seed % 2 else torch.int32)
                y = by_rows.forward(x, values, index.crow, cols, shape[1], bias, code, residual)
        exact = activate(x.double() @ weight.double().T + added, ACTIVATIONS[code])
        assert y.dtype == dtype
        scale = (x.double().abs() @ weight.double().abs().T + added.abs()).max().item()
        close(y, exact, shape[1] + 2, scale)
    return len(cases)


def packed_in_order(packed: dict[str, Tensor | None]) -> list[Tensor | None]:
    return [packed[name] for name in ("values", "indices", "active_rows", "empty_rows")]


def compare_tilings() -> int:
    """In the interpreter: every form that a measurement may choose, split or not."""
    from fxsparse.kernels.csr import _triton
    from fxsparse.kernels.gpu.panels_triton import panels_of

    ran = 0
    for seed, tokens in enumerate((1, 19)):
        weight = sparse_weight((9, 100), 0.6)
        x, bias, residual, added = inputs((9, 100), tokens, torch.float32, 4 + 3 * seed)
        weight[:, 0] = 0
        values, index = with_room(weight.float())
        rows = _triton.Rows(values, index.cols, index.crow)
        exact = torch.relu(x.double() @ weight.T + added)
        x[:, 0] = torch.inf  # which no entry multiplies
        for tiling in rows.tilings(tokens, torch.float32):
            form = replace(tiling, **({"splits": 3}, {"bands": 2})[ran % 2])
            with poisoned_memory():
                panels = panels_of(x, form.tokens)
                y = _triton.tiled(panels, tokens, rows, form, bias, ACTIVATIONS.index("relu"), residual)
            close(y, exact, 102, 30)
            ran += 1
    return ran


def compare_narrow() -> int:
    """In the interpreter: values of fewer bytes, whose rows have scales."""
    from fxsparse.kernels.csr import _triton

    for seed, dtype in enumerate(narrow.DTYPES.values()):
        weight = sparse_weight((37, 53), 0.3).float()
        values, scales = narrow.rounded(weight, dtype)
        index = csr.from_mask(values != 0)
        stored = values[values != 0]
        x, bias, residual, added = inputs((37, 53), 3, torch.float32, 5 + 6 * seed)
        y = _triton.forward(x, stored, index.crow, index.cols, 53, bias, 0, residual, scales)
        close(y, x.double() @ (values.double() * scales.double()[:, None]).T + added, 60, 20)
    return len(narrow.DTYPES)


def compare_backward() -> int:
    """In the interpreter: gradients beside the exact ones, the stored entries' 0 where there are none."""
    from fxsparse.kernels.csr import backward_triton

    cases = [*product(SHAPES, (0.0, 0.2, 1.0), [(3, 6)]), ((37, 53), 0.2, ()), ((37, 53), 0.2, (0,))]
    for seed, (shape, density, leading) in enumerate(cases):
        dtype = DTYPES[(seed + seed // 3) % 3]
        weight = sparse_weight(shape, density).to(dtype)
        values, index = with_room(weight)
        random = torch.Generator().manual_seed(seed)
        grad = torch.randn(*leading, shape[0], generator=random).to(dtype)
        x = torch.randn(*leading, 2 * shape[1], generator=random).to(dtype)[..., ::2]
        parts = parts_of(index)
        with poisoned_memory():
            made = backward_triton.backward(grad, x, values, *parts, True, True, True)
            sums = backward_triton.forward(
                grad.reshape(-1, shape[0]), x.reshape(-1, shape[1]), index.crow, index.cols
            )
        flat, upstream = x.reshape(-1, shape[1]).double(), grad.reshape(-1, shape[0]).double()
        dense = upstream.T @ flat
        exact = F.pad(dense[weight != 0], (0, 5))
        largest = (upstream.abs().T @ flat.abs()).max().item()
        expected = (upstream @ weight.double()).reshape(x.shape), exact, upstream.sum(0)
        scales = (upstream.abs() @ weight.double().abs()).sum().item(), largest, upstream.abs().sum().item()
        for got, right, scale in zip(made, expected, scales, strict=True):
            assert got.dtype == dtype
            close(got, right, 100, scale)
        assert sums.dtype == torch.float32
        close(sums, exact, 100, largest)
        none = backward_triton.backward(grad, x, values, *parts, False, False, False)
        assert [tuple(t.shape) for t in none] == [(0,)] * 3
    return len(cases)


def refusals() -> int:
    """In the interpreter: inputs and residuals that do not fit the weight."""
    from fxsparse.kernels.csr import _triton

    values, index = with_room(torch.eye(4))
    wrong = [(torch.ones(2, 5), None), (torch.ones(2, 4).half(), None)]
    wrong += [(torch.ones(2, 4), torch.ones(4)), (torch.ones(2, 4), torch.ones(2, 4).half())]
    for x, residual in wrong:
        named = (
            "expected a residual of the output's shape" if residual is not None else r"expected x \[..., 4\]"
        )
        with pytest.raises(RuntimeError, match=named):
            _triton.forward(x, values, index.crow, index.cols, 4, None, 0, residual)
    return len(wrong)


def compare() -> list[int]:
    from fxsparse.kernels import gpu

    assert gpu.INTERPRETED
    return [run() for run in (compare_forward, compare_tilings, compare_narrow, compare_backward, refusals)]


def test_the_interpreter_gives_products_and_gradients() -> None:
    code = "from tests.kernels.test_csr_triton import compare\nprint(compare())"
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "[18, 12, 2, 11, 4]"


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_forms_compile_ahead_of_time_without_spills(capability: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")  # about whose default Triton 3.9 warns
    from benchmarks.triton_ahead import compiled
    from fxsparse.kernels.csr import _triton, backward_triton

    asked = (
        "csr torch.float32, 16 tokens, 16 rows, 16 warps",
        "condensed torch.bfloat16, 1 tokens, 8 rows, 8 warps",
        "sample torch.bfloat16, 32 tokens",
        "turn torch.float32, 16 tokens",
    )
    made = [
        compiled(*v, capability) for m in (_triton, backward_triton) for v in m.variants() if v[0] in asked
    ]
    assert sorted(row["kernel"] for row in made) == sorted(asked)
    assert {row["spilled bytes"] for row in made} == {0}
    assert max(row["registers"] for row in made) <= 128, "16 warps have no more"


def test_every_dtype_and_count_of_tokens_has_its_forms() -> None:
    from fxsparse.kernels.csr import _triton, backward_triton

    names = [name for module in (_triton, backward_triton) for name, *_ in module.variants()]
    assert len(set(names)) == len(names) >= 90
    for form, dtype, tokens in product(("csr", "condensed", "sample"), DTYPES, (1, 2, 4, 8, 16)):
        assert any(name.startswith(f"{form} {dtype}, {tokens} tokens") for name in names)


def test_programs_fill_a_gpu_and_stay_few_where_tokens_are_many() -> None:
    decode = tilings(1, 14336, 410, torch.bfloat16, 132)[0]
    assert (decode.rows, decode.entries, decode.splits) == (8, 32, 1)  # a warp for a row
    assert tilings(1, 512, 1638, torch.bfloat16, 132)[0].rows == 1  # all warps for a row
    assert tilings(1, 16, 40000, torch.float32, 132)[0].splits == 16
    layer = tilings(256, 768, 307, torch.float32, 132)[0]
    assert layer.bands * (256 // layer.tokens) == 128  # of 132 multiprocessors
    for tokens, rows, mean, dtype in product((1, 3, 500), (1, 70, 9000), (0, 3.5, 5000), DTYPES):
        forms = tilings(tokens, rows, mean, dtype, 132)
        assert len(set(forms)) == len(forms) <= 6
        for form in forms:
            loaded = form.rows * form.entries * form.tokens
            assert loaded <= 32 * form.warps * max(16 // dtype.itemsize, form.tokens)
            assert 1 <= form.bands <= max(1, -(-rows // form.rows))
            assert form.splits == 1 or form.splits * form.entries <= mean


def test_entries_are_for_cuda_and_say_what_they_refuse() -> None:
    shape, cuda = (64, 64), torch.device("cuda")
    layer = Problem("linear", shape, 4, 512, torch.float16, cuda, training=False, fan_in=8)
    assert registered()["cuda-csr"].refuses(layer) == []
    assert registered()["cuda-condensed"].refuses(layer) == []
    assert registered()["cuda-csr-train"].refuses(replace(layer, training=True)) == []
    assert registered()["cuda-csr-train"].refuses(layer) == ["it is for training: cuda-csr needs less memory"]
    elsewhere = replace(layer, device=torch.device("cpu"), dtype=torch.float64, training=True, fan_in=None)
    expected = ["it runs on cuda, not cpu", "it has float32, bfloat16 and float16, not float64"]
    assert registered()["cuda-csr"].refuses(elsewhere) == [
        *expected,
        "it has no gradient: cuda-csr-train has",
    ]
    narrow_values = replace(layer, values=torch.int8)
    assert registered()["cuda-csr-int8"].refuses(narrow_values) == []
    assert registered()["cuda-csr-int8"].cost(narrow_values).bytes == 512 * (1 + 2)
    uneven = "rows have different numbers of nonzeros"
    assert registered()["cuda-condensed"].refuses(elsewhere) == [*expected, "it has no gradient", uneven]


def test_compact_storage_trains_with_the_kernel_of_its_device() -> None:
    assert trained_by("linear", torch.device("cuda")).name == "cuda-csr-train"
    assert trained_by("linear", torch.device("cpu")).name == "cpu-csr-train"
    assert trained_by("linear", torch.device("cuda")).run is trained_by("linear", torch.device("cpu")).run


NAMES = ("csr_forward", "csr_backward", "csr_sample", "condensed_forward")


def test_half_precision_goes_through_the_ops_on_cuda() -> None:
    seen = []

    class Ops(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    values, index = with_room(sparse_weight((37, 53), 0.3))
    sizes, lengths = ((3, 6, 53), values.shape, (37,)), [t.shape for t in parts_of(index)]
    with FakeTensorMode(), Ops():
        x, values, bias = (torch.empty(size, device="cuda", dtype=torch.float16) for size in sizes)
        parts = [torch.empty(length, device="cuda", dtype=torch.int32) for length in lengths]
        y = csr_linear(x, values, *parts, bias)
        gradients = torch.ops.fxsparse.csr_backward(y, x, values, *parts, True, True, True)
        gradient_at([(x, y)], torch.empty(9, device="cuda", dtype=torch.int64), (37, 53))
        packed = torch.empty(20, 7, device="cuda", dtype=torch.float16)
        condensed_linear(x, packed, packed.to(torch.int16), in_features=53)
    assert [tuple(g.shape) for g in gradients] == list(sizes)
    assert {g.device.type for g in (y, *gradients)} == {"cuda"}
    ops = [name for name in seen if name.startswith("fxsparse")]
    assert ops == [f"fxsparse.{op}.default" for op in NAMES]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("constant", [False, True])
@pytest.mark.parametrize("tokens", [1, 2, 7, 16, 33, 300])
def test_a_gpu_gives_the_product(dtype: torch.dtype, constant: bool, tokens: int) -> None:
    weight = sparse_weight((130, 700), 0.2, constant_fan_in=constant).to("cuda", dtype)
    x, bias, residual = (
        torch.randn(n, device="cuda").to(dtype) for n in ((tokens, 700), (130,), (tokens, 130))
    )
    name = "cuda-condensed" if constant else "cuda-csr"
    buffers = registered()[name].pack(weight).values()
    y = registered()[name].run(x, bias, *buffers, activation="gelu", residual=residual, in_features=700)
    exact = F.gelu(x.double() @ weight.double().T + bias.double() + residual.double())
    scale = (x.double().abs() @ weight.double().abs().T).max().item()
    close(y, exact, 702, scale)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 40, 300])
def test_a_gpu_gives_the_gradients_in_a_captured_graph_too(dtype: torch.dtype, tokens: int) -> None:
    weight = sparse_weight((130, 700), 0.2).to("cuda", dtype)
    values, index = with_room(weight)
    x, bias, upstream = (
        torch.randn(n, device="cuda").to(dtype) for n in ((tokens, 700), (130,), (tokens, 130))
    )
    leaves = [t.requires_grad_() for t in (x, values, bias)]
    parts = parts_of(index)

    def gradients() -> tuple[Tensor, ...]:
        return torch.autograd.grad(csr_linear(x, values, *parts, bias), leaves, upstream)

    dense = upstream.double().T @ x.detach().double()
    exact = upstream.double() @ weight.double(), F.pad(dense[weight != 0], (0, 5)), upstream.double().sum(0)
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        eager = gradients()
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph):
        captured = gradients()
    graph.replay()
    for got, again, right in zip(eager, captured, exact, strict=True):
        close(got, right, 700, 50 * right.abs().max().item())
        assert torch.equal(got, again)
