"""``compile(mode="infer")``: equal outputs, an untouched model, and a whole artefact that is never slower."""

import copy
import itertools
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxsparse
from fxsparse import Plan, SparseModule, choosing, inference, kernel
from fxsparse.choosing import Choice
from fxsparse.errors import InvariantError, PlanError, TraceError
from fxsparse.graph import fetch
from fxsparse.inference import Speed, speed_of
from fxsparse.kernel import tolerance
from fxsparse.methods import gmp, set_
from fxsparse.packed import PackedWeight
from fxsparse.pattern import ConstantFanIn


@pytest.fixture(autouse=True)
def sparse_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every weight with zeros is clearly faster on CSR, by 1 us and 1 us per thousand weights; the whole by 2x."""

    def choose(problem, x, weight, bias=None, activation="none", **options) -> Choice:
        end = "" if problem.op == "linear" else "-conv"
        times = {f"dense{end}": 11.0 + weight.numel() / 1000, f"cpu-csr{end}": 10.0}
        return Choice(kernel.registered()[f"cpu-csr{end}"], times, {}, "measured")

    monkeypatch.setattr(choosing, "choose", choose)
    monkeypatch.setattr(inference, "speed_of", lambda *call: Speed(200.0, 100.0, 2.0))
    monkeypatch.setattr(inference, "CLEAR_GAIN", 0.0)


class Net(nn.Module):
    """A convolution with a norm, linear layers of three sizes, dropout, and an activation."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.a, self.b, self.c = nn.Linear(8 * 16, 64), nn.Linear(64, 48), nn.Linear(48, 5)
        self.drop = nn.Dropout(0.5)
        self.norm.get_buffer("running_mean").normal_()

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.conv(x))).flatten(1)
        return self.c(F.gelu(self.b(self.drop(F.relu(self.a(x))))))


X = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(1))


def pruned(model: nn.Module, keep: float = 0.2) -> Any:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(torch.rand_like(parameter) < keep)
    return model


def infer(model: nn.Module, x: Any = X, **options: Any) -> SparseModule:
    return fxsparse.compile(model, mode="infer", example_inputs=x, **options)


def check_equal(fast: nn.Module, model: nn.Module, x: Tensor = X) -> None:
    with torch.no_grad():
        want, got = model(x), fast(x)
    # four layers after another, none with sums of more than 128 terms
    allowed = 4 * tolerance(x.dtype, 128)
    assert ((got - want).abs().max() / want.abs().max()).item() <= allowed


def kernels_of(fast: SparseModule) -> dict[str, str]:
    return {row["name"]: row["kernel"] for row in fast.report.layers}


def test_computes_what_the_model_computes_at_any_batch() -> None:
    model = pruned(Net()).eval()
    fast = infer(model)
    assert kernels_of(fast) == {
        "conv.weight": "cpu-csr-conv", "a.weight": "cpu-csr", "b.weight": "cpu-csr", "c.weight": "cpu-csr"
    }  # fmt: skip
    for x in (X, X[:1], torch.randn(7, 3, 6, 6)):
        check_equal(fast, model, x)


def test_the_model_is_untouched_and_shares_no_tensor() -> None:
    model = pruned(Net()).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    objects = [id(parameter) for parameter in model.parameters()]
    fast = infer(model)
    assert model.training
    assert objects == [id(parameter) for parameter in model.parameters()]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    theirs = {tensor.data_ptr() for tensor in model.state_dict().values()}
    assert not any(tensor.data_ptr() in theirs for tensor in fast.state_dict().values() if tensor.numel())
    assert not any(parameter.requires_grad for parameter in fast.parameters())


class Counting(nn.Module):
    """A linear layer that counts its calls in a buffer, in place or by assignment, and adds the count."""

    def __init__(self, assigns: bool) -> None:
        super().__init__()
        self.fc, self.assigns = nn.Linear(8, 8), assigns
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.assigns:
            self.calls = self.calls + 1
        else:
            self.calls += 1
        return self.fc(x) + self.calls


@pytest.mark.parametrize("assigns", [True, False])
@pytest.mark.parametrize("ratio", [2.0, 0.5])
def test_a_buffer_that_the_forward_writes_counts_its_own_calls_alone(
    monkeypatch: pytest.MonkeyPatch, assigns: bool, ratio: float
) -> None:
    def call_both(dense: Any, sparse: Any, x: Tensor, *pairs: int) -> Speed:
        for _ in range(3):
            dense(x)
            sparse(x)
        return Speed(100.0, 100.0 / ratio, ratio)

    monkeypatch.setattr(inference, "speed_of", call_both)
    model, x = pruned(Counting(assigns)).eval(), torch.randn(3, 8)
    fast = infer(model, x)
    assert (model.calls, fast.calls) == (0, 0)
    with torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(fast(x), model(x))
    assert (model.calls, fast.calls) == (3, 3)


def test_without_example_inputs_no_graph_forgets_that_a_buffer_is_assigned() -> None:
    model, x = Counting(assigns=True).eval(), torch.randn(3, 8)
    fast = infer(model, None)
    assert (
        "symbolic: the forward assigns the buffer 'calls', which a graph of it would forget"
        in fast.report.notes
    )
    for _ in range(2):
        fast(x)
    assert (model.calls, fast.calls) == (0, 2)


def test_a_layer_whose_weight_alone_is_read_stays_as_it_is() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x)[:, :2] + self.b.weight[0, 0] * x.mean()  # its bias is read by nobody

    model, x = Net().eval(), torch.randn(3, 8)
    fast = infer(model, x)
    check_equal(fast, model, x)
    reasons = {row["name"]: row["reason"] for row in (*fast.report.layers, *fast.report.untouched)}
    assert reasons["a.weight"] == "it has no zeros"
    assert reasons["b.weight"] == "its op is neither a linear nor a convolution (select.int)"


def test_runs_in_evaluation_mode_and_train_changes_no_number() -> None:
    fast = infer(pruned(Net()).train())
    assert not fast.training
    want = fast(X)
    assert torch.equal(fast.train()(X), want)


def test_the_artefact_is_smaller() -> None:
    model = pruned(Net(), keep=0.05)
    fast = infer(model)
    assert "a.weight" not in fast.state_dict()
    assert isinstance(fetch(fast, "a.weight"), PackedWeight)
    totals = fast.report.to_dict()["totals"]
    weights = {name: getattr(model, name).weight for name in ("conv", "a", "b", "c")}
    assert totals["bytes_dense"] == 4 * sum(weight.numel() for weight in weights.values())
    left = {row["name"]: row for row in fast.report.layers}
    assert left["a.weight"]["neurons_removed"] > 0  # rows without a nonzero are gone
    # CSR: a value of 4 bytes and a column of 2 per nonzero, and a row pointer of 4 per row and one more
    csr = sum(6 * row["nnz"] + 4 * (row["shape"][0] + 1) for row in left.values())
    assert totals["bytes_sparse"] == csr
    assert totals["numel"] == sum(row["numel"] for row in left.values()) < totals["bytes_dense"] / 4


def test_every_parameter_is_in_layers_or_untouched_with_a_reason() -> None:
    model = pruned(Net())
    report = infer(model).report.to_dict()
    rows = [*report["layers"], *report["untouched"]]
    assert sorted(row["name"] for row in rows) == sorted(name for name, _ in model.named_parameters())
    assert all(row["reason"] for row in rows)
    conv = next(row for row in report["layers"] if row["name"] == "conv.weight")
    assert (conv["dense_us"], conv["sparse_us"]) == (11.0 + 0.216, 10.0)
    first = next(row for row in report["layers"] if row["name"] == "a.weight")
    assert (first["dense_us"], first["sparse_us"]) == (11.0 + 8.192, 10.0)
    untouched = {row["name"]: row["reason"] for row in report["untouched"]}
    assert untouched["norm.weight"] == "folded into conv.weight"
    assert "dense 200.0 us, this 100.0 us: 2.00x" in report["notes"]


@pytest.mark.parametrize("storage", ["masked", "compact"])
def test_a_training_module_is_taken_without_tracing_again(
    storage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Net()
    plan = Plan(sparsity=0.8, storage=storage, method=set_(every=1, stop=9), exclude=("c",))
    sparse = fxsparse.compile(model, plan, example_inputs=X)
    optimizer = torch.optim.SGD(sparse.parameters(), 0.1)
    sparse.attach(optimizer)
    for _ in range(3):
        optimizer.zero_grad()
        sparse(X).square().mean().backward()
        optimizer.step()
    state = {name: tensor.clone() for name, tensor in sparse.state_dict().items()}
    monkeypatch.setattr(inference, "capture", lambda *call, **options: pytest.fail("traced again"))
    fast = infer(sparse)
    assert kernels_of(fast)["conv.weight"] == "cpu-csr-conv"
    assert kernels_of(fast)["a.weight"] == kernels_of(fast)["b.weight"] == "cpu-csr"
    assert all(torch.equal(tensor, state[name]) for name, tensor in sparse.state_dict().items())
    check_equal(fast, sparse.eval())
    assert not any(name.endswith("_mask") or name.startswith("fxsparse_") for name in fast.state_dict())
    # entries that the last update grew are still zero, so inference has no use for them
    nnz = int((sparse.dense_state_dict(["a.weight"])["a.weight"] != 0).sum())
    assert fast.sparsity()["a.weight"] == 1 - nnz / (64 * 128)
    assert fast.sparsity()["a.weight"] > sparse.sparsity()["a.weight"]


def test_constant_fan_in_is_named_and_may_be_condensed(monkeypatch: pytest.MonkeyPatch) -> None:
    sparse = fxsparse.compile(
        Net(), Plan(sparsity=0.8, pattern=ConstantFanIn(), exclude=("conv",)), example_inputs=X
    )

    def choose(problem, x, weight, bias=None, activation="none", **options) -> Choice:
        name = "cpu-csr" if problem.fan_in is None else "cpu-condensed"
        return Choice(kernel.registered()[name], {"dense": 10.0, name: 5.0}, {}, "measured")

    monkeypatch.setattr(choosing, "choose", choose)
    fast = infer(sparse)
    row = next(row for row in fast.report.layers if row["name"] == "a.weight")
    k = int(sparse.masks(["a.weight"])["a.weight"][0].sum())
    assert (row["pattern"], row["format"]) == (str(ConstantFanIn(k)), "condensed")
    check_equal(fast, sparse.eval())


@pytest.mark.parametrize(("values", "bound"), [("int8", 2e-2), ("bfloat16", 8e-3)])
def test_values_in_fewer_bytes_are_rows_of_the_report_with_what_they_cost(
    values: str, bound: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    def choose(problem, x, weight, bias=None, activation="none", **options) -> Choice:
        names = (
            {"dense": 10.0, "cpu-csr": 5.0}
            if problem.op == "linear"
            else {"dense-conv": 9.0, "cpu-csr-conv": 4.0}
        )
        if problem.values is not None and problem.shape[0] != 5:  # the last layer's is no faster
            names[f"cpu-csr-{values}"] = 2.0
        best = min(names, key=names.__getitem__)
        return Choice(kernel.registered()[best], names, {}, "measured")

    monkeypatch.setattr(choosing, "choose", choose)
    model = pruned(Net(), 0.5).eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    fast = fxsparse.compile(model, mode="infer", example_inputs=X, values=values)
    rows = {row["name"]: row for row in fast.report.to_dict()["layers"]}
    stored = {name: row["values"] for name, row in rows.items()}
    assert stored == {"conv.weight": "float32", "a.weight": values, "b.weight": values, "c.weight": "float32"}
    assert all((row["values_error"] is not None) == (row["values"] == values) for row in rows.values())
    assert 0 < rows["a.weight"]["values_error"] < bound
    assert f"values stay float32: no conv2d kernel stores {values}" in rows["conv.weight"]["reason"]
    with torch.no_grad():
        want, got = model(X), fast(X)
    error = ((got - want).abs().max() / want.abs().max()).item()
    assert fast.report.totals["values_error"] == pytest.approx(error, rel=1e-3)
    assert 1e-5 < error < bound
    assert any(f"values are {values} in 2 of 4 weights" in note for note in fast.report.notes)
    assert "error by values" in str(fast.report)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    again = copy.deepcopy(fast)
    assert torch.equal(again(X), got)


def test_rounding_that_loses_more_than_digits_is_a_bug(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inference, "largest_error", lambda *pair: float("inf"))
    monkeypatch.setattr(inference, "compare", lambda *pair: "an output is gone")

    def choose(problem, x, weight, bias=None, activation="none", **options) -> Choice:
        names = {"dense": 10.0} | ({"cpu-csr-int8": 2.0} if problem.values else {})
        return Choice(kernel.registered()["dense"], names, {}, "measured")

    monkeypatch.setattr(choosing, "choose", choose)
    with pytest.raises(InvariantError, match="an output is gone"):
        fxsparse.compile(pruned(Net()).eval(), mode="infer", example_inputs=X, values="int8")


def test_a_model_without_zeros_stays_dense_and_says_so() -> None:
    model = Net().eval()
    fast = infer(model)
    assert {row["format"] for row in fast.report.layers} == {"dense"}
    assert {row["reason"] for row in fast.report.layers} == {"it has no zeros"}
    assert {row["pattern"] for row in fast.report.layers} == {"no zeros"}
    check_equal(fast, model)


def test_without_example_inputs_nothing_is_measured() -> None:
    model = pruned(Net()).eval()
    fast = infer(model, None)
    reasons = {row["name"]: row["reason"] for row in fast.report.layers}
    assert reasons["a.weight"] == "not measured: there are no example inputs"
    rewrites = {row["name"]: row["rewrites"] for row in fast.report.passes}
    assert rewrites["fold-batch-norm"] == 1
    check_equal(fast, model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    model = pruned(Net()).eval().to(dtype)
    fast = infer(model, X.to(dtype))
    assert fast(X.to(dtype)).dtype == dtype
    assert kernels_of(fast)["a.weight"] == "cpu-csr"
    check_equal(fast, model, X.to(dtype))


class Finer(nn.Module):
    """Returns more digits than it computes."""

    def __init__(self, finish: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.net, self.finish = Net(), finish

    def forward(self, x: Tensor) -> Tensor:
        return self.finish(self.net(x))


@pytest.mark.parametrize(
    "finish",
    [
        lambda y: y.double(),
        lambda y: torch.softmax(y, -1, dtype=torch.float64),
        torch.fft.rfft,
        lambda y: (y.bfloat16() @ y.bfloat16().t()).float(),
    ],
)
def test_outputs_may_be_of_another_dtype_than_the_weights(finish: Callable[[Tensor], Tensor]) -> None:
    model = pruned(Finer(finish)).eval()
    fast = infer(model)
    with torch.no_grad():
        want, got = model(X), fast(X)
    assert got.dtype == want.dtype
    torch.testing.assert_close(got.to(torch.complex64), want.to(torch.complex64), rtol=1e-2, atol=1e-2)


def test_compiles_into_one_graph() -> None:
    fast = infer(pruned(Net()))
    whole = torch.compile(fast, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(whole(X), fast(X))


class Branching(nn.Module):
    """Neither traces nor exports: the data decide which layers run."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x) if x.sum().item() > 0 else x)


def test_a_model_without_a_graph_runs_as_it_is_with_a_reason() -> None:
    model, x = pruned(Branching()).eval(), torch.randn(2, 16)
    fast = infer(model, x)
    reason = "the model's own forward runs, since no graph of it could be captured"
    assert {(row["kernel"], row["reason"]) for row in fast.report.layers} == {("dense", reason)}
    assert fast.report.notes[-1] == reason
    assert not any("us, this" in note for note in fast.report.notes)
    for inputs in (x, x.abs(), -x.abs()):
        assert torch.equal(fast(inputs), model(inputs))
    with pytest.raises(TraceError, match="strict=True refuses the walk"):
        infer(model, x, strict=True)


def test_the_masks_of_a_training_module_without_a_graph_are_folded() -> None:
    x = torch.randn(2, 16)
    sparse = fxsparse.compile(Branching(), Plan(sparsity=0.5), example_inputs=x)
    fast = infer(sparse, x)
    assert fast.sparsity()["total"] == sparse.sparsity()["total"]
    assert torch.allclose(fast(x), sparse.eval()(x), atol=1e-6)


def test_keyword_inputs() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 8)

        def forward(self, x: Tensor, *, scale: Tensor) -> Tensor:
            return self.fc(x) * scale

    model, inputs = pruned(Two()).eval(), (torch.randn(3, 8), {"scale": torch.randn(8)})
    fast = infer(model, inputs)
    assert kernels_of(fast) == {"fc.weight": "cpu-csr"}
    assert torch.allclose(fast(inputs[0], **inputs[1]), model(inputs[0], **inputs[1]), atol=1e-6)


def speeds(monkeypatch: pytest.MonkeyPatch, rule: Callable[[int], float]) -> None:
    """The whole artefact's speed as a function of how many weights are packed."""

    def measure(dense: Any, sparse: nn.Module, *call: Any) -> Speed:
        ratio = rule(packed(sparse))
        return Speed(100.0, 100.0 / ratio, ratio)

    monkeypatch.setattr(inference, "speed_of", measure)


def packed(model: nn.Module) -> int:
    return sum(isinstance(module, PackedWeight) for module in model.modules())


def artefact(model: nn.Module) -> bool:
    return isinstance(model, SparseModule)


def test_gives_up_the_least_profitable_kernels_until_it_is_not_slower(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    speeds(monkeypatch, {4: 0.5, 2: 0.6, 1: 1.2}.__getitem__)
    model = pruned(Net()).eval()
    fast = infer(model)
    # gains grow with the size: a has 8,192, b 3,072, c 240 and the convolution 216 of them
    assert kernels_of(fast) == {
        "conv.weight": "dense", "a.weight": "cpu-csr", "b.weight": "dense", "c.weight": "dense"
    }  # fmt: skip
    reasons = {row["name"]: row["reason"] for row in fast.report.layers}
    assert reasons["c.weight"] == "cpu-csr given up: with it the whole model ran at 0.50x of dense"
    check_equal(fast, model)


SPARSE = {f"{name}.weight": f"cpu-csr{'-conv' * (name == 'conv')}" for name in ("conv", "a", "b", "c")}


@pytest.mark.parametrize(
    ("beside", "against_dense", "clear", "stays_sparse"),
    [(1.05, 1.9, 0.5, False), (1.06, 1.9, 0.5, True), (1.05, 0.9, 0.5, True), (1.05, 1.9, 0.1, True)],
)
def test_kernels_that_gain_nothing_in_the_whole_model_are_dense(
    monkeypatch: pytest.MonkeyPatch, beside: float, against_dense: float, clear: float, stays_sparse: bool
) -> None:
    def measure(one: nn.Module, other: nn.Module, *call: Any) -> Speed:
        ratio = {(False, 4): 2.0, (True, 4): beside, (False, 0): against_dense}[artefact(one), packed(other)]
        return Speed(100.0, 100.0 / ratio, ratio)

    # The four gain 15.7 us of 50.
    monkeypatch.setattr(inference, "speed_of", measure)
    monkeypatch.setattr(inference, "CLEAR_GAIN", clear)
    model = pruned(Net()).eval()
    fast = infer(model)
    assert kernels_of(fast) == (SPARSE if stays_sparse else dict.fromkeys(SPARSE, "dense"))
    reasons = {row["reason"] for row in fast.report.layers}
    assert (reasons == {inference.WITHOUT}) is not stays_sparse
    told = "no sparse kernel is taken, though 4 were faster by themselves: with them the whole model runs at 1.05x"
    assert any(note.startswith(told) for note in fast.report.notes) is not stays_sparse
    assert f"{2.0 if stays_sparse else 1.9:.2f}x" in fast.report.notes[-1]
    check_equal(fast, model)


def test_what_was_given_up_stays_dense_beside_the_graph_without_sparse_kernels(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def measure(one: nn.Module, other: nn.Module, *call: Any) -> Speed:
        ratio = {(False, 4): 0.5, (False, 2): 1.2, (True, 2): 1.0, (False, 0): 1.1}[
            artefact(one), packed(other)
        ]
        return Speed(100.0, 100.0 / ratio, ratio)

    monkeypatch.setattr(inference, "speed_of", measure)
    monkeypatch.setattr(inference, "CLEAR_GAIN", 0.5)
    fast = infer(pruned(Net()).eval())
    reasons = {row["name"]: row["reason"] for row in fast.report.layers}
    assert reasons["a.weight"] == reasons["b.weight"] == inference.WITHOUT
    assert "given up: with it the whole model ran at 0.50x" in reasons["c.weight"]
    assert set(kernels_of(fast).values()) == {"dense"}


def test_without_the_graph_no_neuron_is_removed_and_the_report_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    speeds(monkeypatch, lambda packed: 0.5)
    model = pruned(Net(), keep=0.05).eval()  # rows without a nonzero
    fast = infer(model)
    rows = {row["name"]: row for row in fast.report.to_dict()["layers"]}
    assert {name: tuple(row["shape"]) for name, row in rows.items()} == {
        name: tuple(fetch(model, name).shape) for name in rows
    }
    assert not any("neurons_removed" in row for row in rows.values())
    assert "no neuron is removed from the model's own forward" in fast.report.notes
    with torch.no_grad():
        assert torch.equal(fast(X), model(X))


def test_gives_up_the_graph_where_even_the_dense_one_is_slower(monkeypatch: pytest.MonkeyPatch) -> None:
    speeds(monkeypatch, lambda packed: 0.5)
    model = pruned(Net()).eval()
    fast = infer(model)
    assert set(kernels_of(fast).values()) == {"dense"}
    assert "the model's own forward runs, without a graph, which was slower" in fast.report.notes
    assert not any("us, this" in note for note in fast.report.notes)
    with torch.no_grad():
        assert torch.equal(fast(X), model(X))
    with pytest.raises(TraceError, match="the model's own forward runs"):
        _ = fast.forward_graph


def test_one_disturbance_costs_no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter([Speed(100.0, 200.0, 0.5), Speed(100.0, 50.0, 2.0)])
    monkeypatch.setattr(inference, "speed_of", lambda *call: next(answers))
    assert kernels_of(infer(pruned(Net())))["a.weight"] == "cpu-csr"


def test_speed_is_the_median_of_interleaved_pairs() -> None:
    order = []

    def slow(x: Tensor) -> None:
        order.append("dense")
        time.sleep(0.002)

    def quick(x: Tensor) -> None:
        order.append("sparse")
        time.sleep(0.001)

    speed = speed_of(slow, quick, X)
    assert 1.2 < speed.ratio < 2.5
    assert speed.dense_us > 2000
    assert order[-30:] == ["dense", "sparse"] * 15


@pytest.mark.parametrize(("ratio", "turns"), [(2.0, 8), (0.5, 8), (None, 15)])
def test_long_pairs_end_once_the_verdict_is_certain(
    monkeypatch: pytest.MonkeyPatch, ratio: float | None, turns: int
) -> None:
    monkeypatch.setattr(inference, "LONG_SECONDS", 0.0)
    pairs = itertools.count()

    def seconds(call: Callable[[], float], *_: object) -> float:
        return call()

    def dense() -> float:
        at = next(pairs) - 3  # after the call that says how many make a turn and two turns of warm-up
        return 1.0 if ratio is None and at % 2 else (ratio or 0.5)

    monkeypatch.setattr(inference, "_seconds", seconds)
    speed = speed_of(dense, lambda: 1.0, X)
    assert next(pairs) == turns + 3
    assert speed.ratio == (ratio or 0.5)


def test_a_wrong_kernel_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inference, "compare", lambda *_: "output 0 differs by 1")
    with pytest.raises(
        InvariantError, match="the inference module differs from the model: output 0 differs by 1"
    ):
        infer(pruned(Net()))


def test_refuses_what_cannot_be_compiled_for_inference() -> None:
    fast = infer(pruned(Net()))
    with pytest.raises(PlanError, match="compiled for inference already; compile the model it was made from"):
        infer(fast)
    with pytest.raises(PlanError, match=r"'conv.weight' is on the meta device and has no values"):
        infer(Net().to("meta"), None)
    with pytest.raises(PlanError, match="mode='infer' takes no plan"):
        infer(Net(), plan=Plan(sparsity=0.5))
    for call in (
        fast.masks,
        fast.coordinates,
        fast.to_dense,
        fast.dense_state_dict,
        lambda: fast.update_graph,
    ):
        with pytest.raises(PlanError, match="this module was compiled for inference"):
            call()


@pytest.mark.parametrize(
    "name",
    [
        "resnet18",
        "squeezenet1_1",
        "shufflenet_v2_x0_5",
        "mobilenet_v3_small",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("regnet_y_400mf", "densenet121", "efficientnet_b0", "googlenet", "convnext_tiny")
        ),
    ],
)
def test_convolutions_of_vision_models_run_sparse(name: str) -> None:
    torch.manual_seed(0)
    options = {"init_weights": False} if name == "googlenet" else {}
    model = pruned(pytest.importorskip("torchvision").models.get_model(name, **options), keep=0.3).eval()
    x = torch.randn(2, 3, 64, 64)
    fast = infer(model, x)  # which compares the two, too
    sparse = [row for row in fast.report.layers if len(row["shape"]) == 4]
    assert {row["kernel"] for row in sparse} == {"cpu-csr-conv"}
    with torch.no_grad():
        for images in (x[:1], torch.randn(3, 3, 96, 80)):
            torch.testing.assert_close(fast(images), model(images), rtol=1e-3, atol=1e-5)


def test_a_training_that_ended_before_its_ramp_is_in_the_report() -> None:
    plan = Plan(sparsity=0.9, method=gmp(every=1, start=0, stop=10), allocation="uniform")
    sparse = fxsparse.compile(nn.Linear(40, 10), plan)
    optimizer = torch.optim.SGD(sparse.parameters(), lr=0.1)
    sparse.attach(optimizer)
    notes = {}
    for step in range(12):
        if step in (0, 5, 11):
            fast = fxsparse.compile(sparse.eval(), mode="infer", example_inputs=torch.randn(2, 40))
            notes[step] = "; ".join(fast.report.notes)
            sparse.train()
        optimizer.zero_grad()
        sparse(torch.randn(4, 40)).square().mean().backward()
        optimizer.step()
    assert "attach(optimizer) counts them" in notes[0]
    assert "in the plan: training ended at step 5" in notes[5]
    assert all(words not in notes[11] for words in ("counts them", "in the plan"))
