"""The GPU's products with N:M weights, without a GPU: in Triton's interpreter, and their code for other machines."""

from collections.abc import Mapping
from itertools import product

import pytest
import torch
import torch.nn.functional as F

from fxsparse.formats import nm, strided
from fxsparse.kernels import nm_linear
from fxsparse.pattern import NM, Strided
from tests.kernels.interpreter import check_sums, interpreted

pytest.importorskip("triton")
PATTERNS = [NM(1, 4), NM(2, 4), NM(3, 8), NM(2, 16), Strided(4), Strided(16)]


def weight_of(pattern: NM | Strided, rows: int, groups: int, density: float) -> torch.Tensor:
    """With that share of the entries which the pattern allows; its first row is empty below 1."""
    score = torch.rand(rows, groups * pattern.m)
    weight = torch.randn(score.shape) * pattern.project(score, 0) * (torch.rand(score.shape) < density)
    weight[0] *= density == 1
    return weight


def packed(weight: torch.Tensor, pattern: NM | Strided) -> Mapping[str, torch.Tensor]:
    if isinstance(pattern, NM):
        return nm.pack(weight, (pattern.n, pattern.m))
    return strided.pack_rows(weight, pattern.m)


def compare(patterns: list[NM | Strided], tokens: list[int], dtypes: list[torch.dtype]) -> int:
    """Runs in the interpreter: the kernel beside the exact product, over memory that is NaN until written."""
    from fxsparse.kernels.library import ACTIVATIONS, activate
    from fxsparse.kernels.nm import _triton
    from fxsparse.testing import poisoned_memory

    cases = list(product(patterns, tokens, dtypes))
    for seed, (pattern, count, dtype) in enumerate(cases):
        torch.manual_seed(seed)
        density = (0.6, 1.0, 0.0)[seed % 4 % 3]
        rows, code = (37, 150)[seed % 2], seed % len(ACTIVATIONS)
        groups_of_row = (5, 40 if count > 8 else 300)[seed % 2]  # the gather takes 512 values at a time
        weight = weight_of(pattern, rows, groups_of_row, density).to(dtype)
        features = weight.shape[1]
        x = torch.randn(count, 2 * features).to(dtype)[:, ::2]
        bias = torch.randn(rows).to(dtype) if seed % 2 else None
        residual = torch.randn(rows, count).to(dtype).T if seed % 3 else None
        with poisoned_memory():
            y = _triton.forward(x, **packed(weight, pattern), bias=bias, activation=code, residual=residual)
        exact = x.double() @ weight.double().T
        for added in (bias, residual):
            exact += 0 if added is None else added.double()
        check_sums(y, activate(exact, ACTIVATIONS[code]), dtype, features)
    return len(cases)


def test_the_interpreter_gives_the_product() -> None:
    types = "[torch.float32, torch.bfloat16, torch.float16]"
    made = interpreted(
        __name__,
        f"compare(PATTERNS[:4], [17], {types})",
        f"compare([NM(2, 4), NM(3, 8)], [1, 7], {types})",
        "compare([NM(2, 4), NM(8, 16)], [9, 150], [torch.float32])",
        "compare([Strided(4), Strided(16)], [3, 17, 40], [torch.bfloat16])",
    )
    assert made == ["12", "12", "4", "6"]


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_forms_compile_ahead_of_time_without_spills(capability: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")  # about whose default Triton 3.9 warns
    from benchmarks.triton_ahead import compiled
    from fxsparse.kernels.nm import _triton

    asked = (
        "2:4 torch.bfloat16, 128",
        "2:8 torch.float32, 64",
        "1:4 torch.bfloat16, 8",
        "strided 1:4 torch.bfloat16, 128",
    )
    made = [compiled(*v, capability) for v in _triton.variants() if v[0].startswith(asked)]
    assert len(made) == len(asked)
    assert {row["spilled bytes"] for row in made} == {0}
    assert all("mma" in row["tensor cores"] for row in made if "gathered" not in row["kernel"])


def test_launches_are_few_and_the_default_is_the_first() -> None:
    from fxsparse.kernels.nm import launch

    assert launch.of_tiles(4096, 2, 4, 2)[0] == launch.Launch(128, 128, 64, 8, 3)
    assert launch.of_gather(1, 4096, 132)[0] == launch.Launch(4, 1, 512, 4, 3)
    assert launch.of_gather(8, 14336, 132)[0] == launch.Launch(2, 8, 256, 4, 3)
    for tokens, (n, m), itemsize in product((9, 40, 5000), ((1, 4), (8, 16)), (2, 4)):
        found = launch.of_tiles(tokens, n, m, itemsize)
        assert len(found) <= 5
        assert all(min(how.rows, how.tokens) >= 16 and how.inputs % m == 0 for how in found)
    for tokens, rows in product(range(1, launch.DECODED + 1), (1, 100, 10**5)):
        found = launch.of_gather(tokens, rows, 132)
        assert len(found) <= 4
        assert all(tokens <= how.tokens <= 8 and 1 <= how.rows <= 8 for how in found)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("tokens", [1, 8, 33, 300])
def test_a_gpu_gives_the_product(dtype: torch.dtype, pattern: NM | Strided, tokens: int) -> None:
    weight = weight_of(pattern, 530, 60, 1.0).to("cuda", dtype)
    x = torch.randn(tokens, weight.shape[1], device="cuda", dtype=dtype)
    bias = torch.randn(530, device="cuda", dtype=dtype)
    y = nm_linear(x, **packed(weight, pattern), bias=bias, activation="gelu")
    exact = F.gelu(x.double() @ weight.double().T + bias.double())
    allowed = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
    assert (y.double() - exact).abs().max() < allowed * exact.abs().max()
