"""Calls that a captured graph would answer with something else than the model are refused by name."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import sympy
import torch
from torch import Tensor, nn
from torch.utils._sympy.functions import FloorDiv, Mod

import fxsparse
from fxsparse import Plan, inference
from fxsparse.errors import TraceError
from fxsparse.input_check import InputCheck
from fxsparse.trace import capture
from fxsparse.transformation import transform
from fxsparse.transforms import SparseParallel


class Two(nn.Module):
    """Two layers; subclasses choose between them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)


class SmallBatch(Two):
    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x)) if x.shape[0] < 8 else self.b(x) - self.a(x)


class EvenBatch(Two):
    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x)) if x.shape[0] % 2 == 0 else self.b(x) - self.a(x)


class Matrix(Two):
    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x)) if x.dim() == 2 else self.b(x) - self.a(x)


class Crop(Two):
    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x[:, -5:] if x.size(1) > 5 else x))


class Identity(Two):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.b(self.a(x)) if x is y else self.b(x) + self.a(y)


class Sum(Two):
    def forward(self, xs: list[Tensor]) -> Tensor:
        return sum((self.b(self.a(x)) for x in xs), torch.zeros(()))


class Masked(Two):
    def forward(self, x: Tensor, mask: Tensor | None = None, times: int = 1) -> Tensor:
        y = self.b(self.a(x))
        return (y if mask is None else -y) * times


def compiled(model: nn.Module, *example: Any) -> nn.Module:
    """As it trains, in evaluation mode, where its outputs are the model's."""
    return fxsparse.compile(model, Plan(sparsity=0.0), example_inputs=example).eval()


def copies(sparse: nn.Module, model: nn.Module, folder: Path) -> list[nn.Module]:
    """The module, and what comes back of it in every way."""
    fxsparse.save(sparse, folder / "file")
    loaded = fxsparse.load(folder / "file", model).train(sparse.training)
    return [sparse, copy.deepcopy(sparse), pickle.loads(pickle.dumps(sparse)), loaded]


def assert_serves(sparse: nn.Module, model: nn.Module, *inputs: Any) -> None:
    torch.testing.assert_close(sparse(*inputs), model.eval()(*inputs))


@pytest.mark.parametrize(
    ("model", "example", "served", "refused", "message"),
    [
        (SmallBatch(), (4, 8), [(1, 8), (7, 8)], (17, 8), r"expected s\d+ < 8 for 'x' \[s\d+, 8\], got s\d+=17"),
        (SmallBatch(), (9, 8), [(8, 8), (30, 8)], (7, 8), r"expected s\d+ >= 8 for 'x' \[s\d+, 8\], got s\d+=7"),
        (EvenBatch(), (4, 8), [(2, 8), (10, 8)], (5, 8), r"Mod"),
        (Matrix(), (4, 8), [(3, 8)], (2, 3, 8), r"expected a tensor \[s\d+, 8\] as 'x', got a tensor \[2, 3, 8\]"),
        (Crop(), (2, 4, 8), [(3, 5, 8)], (2, 6, 8), r"expected s\d+ <= 5 for 'x'"),
    ],
)  # fmt: skip
def test_branches_on_sizes_hold_for_later_calls(
    model: Two,
    example: tuple[int, ...],
    served: list[tuple[int, ...]],
    refused: tuple[int, ...],
    message: str,
) -> None:
    sparse = compiled(model, torch.randn(example))
    for size in served:
        assert_serves(sparse, model, torch.randn(size))
    for module in (sparse, copy.deepcopy(sparse), pickle.loads(pickle.dumps(sparse))):
        with pytest.raises(TraceError, match=message):
            module(torch.randn(refused))


def test_inference_refuses_what_training_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inference, "NEVER_SLOWER", 0.0)  # so small a model would else run by its own forward
    model = SmallBatch().eval()
    fast = fxsparse.compile(model, mode="infer", example_inputs=(torch.randn(4, 8),))
    assert_serves(fast, model, torch.randn(7, 8))
    for module in (fast, pickle.loads(pickle.dumps(fast)), fast.train()):
        with pytest.raises(TraceError, match="< 8"):
            module(torch.randn(17, 8))


def test_a_transformed_model_refuses_what_its_model_was_not_captured_for() -> None:
    class Three(SmallBatch):
        def __init__(self) -> None:
            super().__init__()
            self.c = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(super().forward(x))

    plan, x = Plan(transform=SparseParallel(), sparsity=0.5), torch.randn(4, 8)
    for model in (transform(Three(), plan, x), fxsparse.compile(Three(), plan, example_inputs=(x,))):
        for again in (model, pickle.loads(pickle.dumps(model))):
            assert again(torch.randn(5, 8)).shape == (5, 8)
            with pytest.raises(TraceError, match="< 8"):
                again(torch.randn(17, 8))


def test_a_transformed_model_refuses_another_value() -> None:
    class Three(Masked):
        def __init__(self) -> None:
            super().__init__()
            self.c = nn.Linear(8, 8)

        def forward(self, x: Tensor, mask: Tensor | None = None, times: int = 1) -> Tensor:
            return self.c(super().forward(x, mask, times))

    x = torch.randn(4, 8)
    model = transform(Three(), Plan(transform=SparseParallel(), sparsity=0.5), x)
    assert torch.equal(model(x), model(x, None, 1))
    with pytest.raises(TraceError, match="expected times=1, as in the example inputs"):
        model(x, None, 2)
    with pytest.raises(TraceError, match="expected mask=None, as in the example inputs"):
        model(x, x)


def test_one_tensor_or_two_matters_where_the_model_asks() -> None:
    model, x, y = Identity(), torch.randn(4, 8), torch.randn(4, 8)
    same = compiled(model, x, x)
    assert_serves(same, model, y, y)
    with pytest.raises(
        TraceError, match="expected one tensor as 'x' and 'y', as in the example, got two tensors"
    ):
        same(x, y)
    with pytest.raises(TraceError, match="expected one tensor as 'x' and 'y'"):
        same(y=y, x=x)
    apart = compiled(model, x, y)
    assert_serves(apart, model, y, x)
    with pytest.raises(
        TraceError, match="expected two tensors as 'x' and 'y', as in the example, got one tensor"
    ):
        apart(x, x)


@pytest.mark.parametrize("places", [(0, 0, 0), (0, 1, 1), (0, 1, 2)])
def test_attention_captured_for_any_of_its_uses_serves_all(places: tuple[int, ...], tmp_path: Path) -> None:
    attention = nn.MultiheadAttention(16, 2, batch_first=True).eval()
    tensors = [torch.randn(2, 5, 16) for _ in range(3)]
    a, b, c = tensors
    first = compiled(attention, *(tensors[k] for k in places))
    for sparse in copies(first, attention, tmp_path):
        for inputs in ((a, b, c), (a, a, a), (a, b, b)):
            torch.testing.assert_close(sparse(*inputs)[0], attention(*inputs)[0])


class Both(Two):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.a(x) * self.b(y)


class BothMatrices(Both):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return super().forward(x, y) if x.dim() == 2 else x


@pytest.mark.parametrize("make", [Both, BothMatrices])
def test_one_tensor_given_twice_is_no_matter_where_the_model_does_not_ask(
    make: type[Both], tmp_path: Path
) -> None:
    model, x = make(), torch.randn(4, 8)
    for sparse in copies(compiled(model, x, x), model, tmp_path):
        assert_serves(sparse, model, x, torch.randn(4, 8))
        assert_serves(sparse, model, x, x)


def test_one_tensor_given_twice_comes_back_where_the_model_asks(tmp_path: Path) -> None:
    model, x, y = Identity(), torch.randn(4, 8), torch.randn(4, 8)
    for sparse in copies(compiled(model, x, x), model, tmp_path):
        assert_serves(sparse, model, y, y)
        with pytest.raises(TraceError, match="expected one tensor as 'x' and 'y'"):
            sparse(x, y)


def test_a_transformed_model_that_got_one_tensor_twice_comes_back(tmp_path: Path) -> None:
    class Inner(BothMatrices):
        def __init__(self) -> None:
            super().__init__()
            self.c, self.d = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.d(super().forward(self.c(x), self.c(y)))

    model, x, y = Inner(), torch.randn(4, 8), torch.randn(4, 8)
    plan = Plan(transform=SparseParallel(), sparsity=0.5)
    first, *others = copies(fxsparse.compile(model, plan, example_inputs=(x, x)).eval(), model, tmp_path)
    assert not torch.equal(first(x, y), first(x, x))
    for sparse in others:
        torch.testing.assert_close(sparse(x, y), first(x, y))


def test_containers_are_those_of_the_example() -> None:
    model, x = Sum(), torch.randn(4, 8)
    sparse = compiled(model, [x, x])
    assert_serves(sparse, model, [x, torch.randn(4, 8)])
    for xs in ([x, x, x], [x], (x, x)):
        with pytest.raises(TraceError, match=r"as 'xs', as in the example, got TreeSpec"):
            sparse(xs)


def test_values_that_an_export_took_for_granted_hold() -> None:
    class Times(Two):
        def forward(self, x: Tensor, times: int = 1) -> Tensor:
            return self.b(self.a(x)) * times if x.shape[0] < 8 else x

    model, x = Times(), torch.randn(4, 8)
    sparse = compiled(model, x, 3)
    assert_serves(sparse, model, x, 3)
    with pytest.raises(TraceError, match="expected 3 as 'times', as in the example, got 4"):
        sparse(x, 4)


@pytest.mark.parametrize("call", [(), (None,), (2.0,)])
def test_a_tensor_of_the_example_is_one_in_every_call(
    call: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inference, "NEVER_SLOWER", 0.0)
    model, x, mask = Masked().eval(), torch.randn(4, 8), torch.ones(4, 8)
    fast = fxsparse.compile(model, mode="infer", example_inputs=(x, mask))
    got = "no such argument" if not call else call[0]
    for sparse in (compiled(model, x, mask), compiled(model, x, {"mask": mask}), fast):
        for inputs in ((x, mask), (x, mask, 1)):
            assert_serves(sparse, model, *inputs)
        assert_serves(sparse, model.eval(), torch.randn(7, 8), torch.ones(7, 8))
        with pytest.raises(TraceError, match=f"expected a tensor as 'mask', as in the example, got {got}"):
            sparse(x, *call)


def test_what_the_example_leaves_to_a_default_may_be_left_out_or_given() -> None:
    model, x = Masked(), torch.randn(4, 8)
    sparse = compiled(model, x, None)
    for inputs in ((x,), (x, None), (x, None, 1)):
        assert_serves(sparse, model, *inputs)
    with pytest.raises(TraceError, match="expected mask=None"):
        sparse(x, torch.ones(4, 8))


class Sides(Two):
    def forward(self, x: Tensor, plus: Tensor | None = None, times: Tensor | None = None) -> Tensor:
        y = self.a(x) if plus is None else self.a(x) + plus
        return y if times is None else y * times


class SidesOfMatrix(Sides):
    """Only ``torch.export`` follows it, whose graphs have arguments in the example's order."""

    def forward(self, x: Tensor, plus: Tensor | None = None, times: Tensor | None = None) -> Tensor:
        return super().forward(x, plus, times) if x.dim() == 2 else self.b(x)


@pytest.mark.parametrize("make", [Sides, SidesOfMatrix])
@pytest.mark.parametrize("names", [("times",), ("times", "plus"), ("plus", "times")])
def test_an_argument_by_position_is_the_models_and_not_the_examples(
    make: type[Sides], names: tuple[str, ...], tmp_path: Path
) -> None:
    model, x = make(), torch.randn(4, 8)
    given = {name: torch.rand(4, 8) for name in names}
    both = given.get("plus"), given["times"]
    for sparse in copies(compiled(model, x, given), model, tmp_path):
        torch.testing.assert_close(sparse(x, **given), model(x, **given))
        if make is Sides or names == ("plus", "times"):
            torch.testing.assert_close(sparse(x, *both), model(x, *both))
            continue
        with pytest.raises(TraceError, match=r"expected 'times'.* by name, .* got 3 arguments by position"):
            sparse(x, *both)
        with pytest.raises(TraceError, match=r"expected 'times'.* by name, .* got 2 arguments by position"):
            sparse(x, given["times"])


class Scaled(Two):
    """Bytes and truths are not taken as other numbers are."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        if x.dtype == torch.uint8:
            x = x.float() / 255
        y = self.b(self.a(x))
        return y.masked_fill(mask, 0) if mask.dtype == torch.bool else y + mask


def test_an_export_is_for_the_dtypes_of_its_example(tmp_path: Path) -> None:
    model = Scaled()
    numbers, truths = torch.rand(4, 8), torch.rand(4, 8) > 0.5
    given = [(numbers, numbers), (numbers, truths), ((255 * numbers).to(torch.uint8), truths)]
    for example in given:
        for sparse in copies(compiled(model, *example), model, tmp_path):
            assert_serves(sparse, model, *example)
            for call in given:
                if call is not example:
                    with pytest.raises(
                        TraceError, match=r"expected a tensor of torch\.\w+ as '\w+', .* got one of"
                    ):
                        sparse(*call)
    half = compiled(model, *given[0]).bfloat16()
    assert half(numbers.bfloat16(), numbers.bfloat16()).dtype == torch.bfloat16


def test_an_export_asks_for_every_tensor_of_its_example() -> None:
    class Rest(Two):
        def forward(self, x: Tensor, *rest: Tensor) -> Tensor:
            return self.a(x) if rest else self.b(x)

    model, x = Rest(), torch.randn(4, 8)
    sparse = compiled(model, x, x.clone())
    assert_serves(sparse, model, x, x.clone())
    with pytest.raises(TraceError, match=r"expected a tensor \[s\d+, 8\] as '\*1', got no such argument"):
        sparse(x)


def test_a_symbolic_graph_of_plain_tensors_asks_for_nothing() -> None:
    program = capture(nn.Sequential(nn.Linear(8, 8), nn.ReLU()), torch.randn(2, 8))
    assert (program.tier, program.accepts) == ("symbolic", {})


def test_under_torch_compile_sizes_are_checked_too() -> None:
    sparse = compiled(SmallBatch(), torch.randn(4, 8))
    fast = torch.compile(sparse, fullgraph=True, backend="eager", dynamic=True)
    torch.testing.assert_close(fast(torch.randn(5, 8) * 0), sparse(torch.zeros(5, 8)))
    with pytest.raises(Exception, match=r"expected s\d+ < 8|Unsupported|raised exception TraceError"):
        fast(torch.randn(9, 8))


def test_a_remainder_by_a_product_is_that_of_the_product() -> None:
    size = sympy.Symbol("size", positive=True, integer=True)
    check = InputCheck(("x",), (None,), ((size,),), sympy.Ne(Mod(2, 2 * FloorDiv(size, 8)), 0))
    check((torch.zeros(32),), {})  # 2 % (2 * 4), where (2 % 2) * 4 is 0
    with pytest.raises(TraceError, match="size=8"):
        check((torch.zeros(8),), {})
