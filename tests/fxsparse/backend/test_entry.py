"""``torch.compile(model, backend="fxsparse")``: right numbers and gradients for any model, and rows that say why."""

import copy
import gc
import os
import subprocess
import sys
import tomllib
import weakref
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint

import fxsparse
from fxsparse import Plan, inference
from fxsparse.backend import entry
from fxsparse.backend import fxsparse as backend

ROOT = Path(__file__).resolve().parents[3]
X = torch.randn(4, 16, generator=torch.Generator().manual_seed(1))


def prune_(model, keep=0.2):
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(torch.rand_like(parameter) < keep)
    return model


def kernels(report):
    return {row["name"]: row["kernel"] for row in report.layers}


def gradients(model, y):
    model.zero_grad()
    y.square().sum().backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def test_weights_with_zeros_get_kernels_and_batches_one_more_graph(net):
    compiled = torch.compile(net, backend=backend, fullgraph=True)
    with torch.no_grad():
        for batch in (4, 5, 6, 7):
            x = torch.randn(batch, 16)
            torch.testing.assert_close(compiled(x), net(x))
    assert [kernels(report) for report in entry.reports()] == [
        {"0.weight": "cpu-csr", "2.weight": "cpu-csr"}
    ] * 2
    assert "on kernels is fastest: " in str(entry.reports()[0])


def test_dynamic_shapes_compile_once(net):
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(net, backend=counter, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for batch in (3, 5, 7):
            x = torch.randn(batch, 16)
            torch.testing.assert_close(compiled(x), net(x))
    assert counter.frame_count == 1


def test_gradients_are_those_of_the_dense_parameters(net):
    x = X.clone().requires_grad_()
    compiled = torch.compile(net, backend=backend, fullgraph=True)
    found, wanted = gradients(net, compiled(x)), gradients(net, net(x))
    torch.testing.assert_close(found, wanted)
    assert all(
        bool((grad[net.get_parameter(name) == 0] != 0).any())
        for name, grad in found.items()
        if grad.dim() > 1
    )
    torch.testing.assert_close(x.grad, 2 * torch.autograd.grad(net(x).square().sum(), x)[0])
    assert "a backward ran" in entry.reports()[0].notes[-1]
    assert entry.reports()[0].layers


def test_training_is_that_of_the_dense_model_also_where_zeros_go_away(net):
    other = copy.deepcopy(net)
    losses = []
    for model, call in ((net, torch.compile(net, backend=backend)), (other, other)):
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        losses.append([])
        for step in range(5):
            loss = call(X + step).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    torch.testing.assert_close(*losses)
    assert torch.count_nonzero(net[0].weight) > 300  # 100 at first


def write(model):
    with torch.no_grad():
        model[0].weight.mul_(3)


def load(model):
    model.load_state_dict({name: 2 * value for name, value in model.state_dict().items()})


def replace(model):
    model[0].weight = nn.Parameter(-model[0].weight.detach())


def set_data(model):
    model[0].weight.data = model[0].weight.data * 4


def step(model):
    other = torch.optim.SGD(model.parameters(), lr=0.1)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    other.step()


@pytest.mark.parametrize("change", [write, load, replace, set_data, step])
def test_a_changed_weight_is_never_stale_and_is_packed_again_once_it_stays(net, change):
    compiled = torch.compile(net, backend=backend)
    with torch.no_grad():
        before = compiled(X)
        change(net)
        with torch.no_grad():
            prune_(net) if change is step else None
        for _ in range(3):
            torch.testing.assert_close(compiled(X), net(X))
    assert not torch.equal(before, net(X))
    assert (
        "other Parameters of a compiled graph: packed" if change is replace else "packed again"
    ) in entry.reports()[-1].notes[-1]


class Branch(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x):
        h = self.a(x)
        return self.b(h) if h.sum() > 0 else -self.b(h)


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, grad):
        return 3 * ctx.saved_tensors[0] * grad  # on purpose not the derivative


class Custom(Branch):
    def forward(self, x):
        return self.b(Square.apply(self.a(x)))


class Checkpointed(Branch):
    def forward(self, x):
        return self.b(checkpoint(lambda t: self.a(t).relu(), x, use_reentrant=False))


class Shared(Branch):
    def __init__(self):
        super().__init__()
        self.b.weight = self.a.weight

    def forward(self, x):
        return {"y": self.b(self.a(x)), "n": x.shape[0]}["y"]


def hooked():
    model = Custom()
    model.a.register_forward_hook(lambda module, inputs, output: 2 * output)
    return model


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # Dynamo's own look at what a graph break leaves
@pytest.mark.filterwarnings("ignore:.*should not be instantiated")  # of torch 2.11, which does it itself
@pytest.mark.parametrize("make", [Branch, Custom, Checkpointed, Shared, hooked])
def test_models_that_are_hard_to_trace_get_kernels_and_right_gradients(make):
    model = prune_(make())
    compiled = torch.compile(model, backend=backend)
    with torch.no_grad():
        torch.testing.assert_close(compiled(X), model(X))
    torch.testing.assert_close(gradients(model, compiled(X)), gradients(model, model(X)))
    assert "cpu-csr" in {name for report in entry.reports() for name in kernels(report).values()}


def test_weights_that_masks_or_parametrizations_compute_are_folded():
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))
    prune.l1_unstructured(model[0], "weight", 0.9)
    prune_(model[2])
    parametrizations.weight_norm(model[2])
    compiled = torch.compile(model, backend=backend)
    with torch.no_grad():
        torch.testing.assert_close(compiled(X), model(X))
        assert list(kernels(entry.reports()[0]).values()) == ["cpu-csr", "cpu-csr"]
        model[0].get_buffer("weight_mask").fill_(1)
        torch.testing.assert_close(compiled(X), model(X))
        model[2].parametrizations.weight.original0.mul_(2)
        torch.testing.assert_close(compiled(X), model(X))


def test_a_sparse_module_in_training_follows_its_masks(net):
    sparse = fxsparse.compile(net, Plan(sparsity=0.8))
    compiled = torch.compile(sparse, backend=backend, fullgraph=True)
    torch.testing.assert_close(gradients(sparse, compiled(X)), gradients(sparse, sparse(X)))
    sparse.eval()
    with torch.no_grad():
        torch.testing.assert_close(compiled(X), sparse(X))
        assert set(kernels(entry.reports()[-1]).values()) == {"cpu-csr"}
        sparse.get_buffer("0.weight_mask").fill_(False)
        torch.testing.assert_close(compiled(X), sparse(X))


def test_an_artefact_of_ours_runs_as_it_is(net):
    fast = fxsparse.compile(net, mode="infer", example_inputs=(X,))
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(fast, backend=backend, fullgraph=True)(X), net(X))
    assert entry.reports()[0].notes == ["dense, by Inductor: it has no weight of two dimensions or more"]


IN_ONE_GRAPH = pytest.mark.skipif(
    torch.__version__ < "2.12",
    reason="Dynamo of torch 2.11 hands it over in pieces once others were compiled",
)


class Counts(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(16, 16)
        self.register_buffer("n", torch.zeros(()))

    def forward(self, x):
        self.n += 1
        return self.a(x) + self.n


class Hands(Branch):
    def forward(self, x):
        return self.a(x), self.a.weight.t()


class Draws(Branch):
    def forward(self, x):
        return self.a(x) + torch.rand(2).sum() * 0


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        pytest.param(lambda: prune_(Counts()), "it writes to n", marks=IN_ONE_GRAPH),
        (lambda: prune_(Hands()), "an output is a.weight or a view of it"),
        (lambda: prune_(Draws()), "it draws random numbers"),
        (Branch, "no weight has more than 0.0% zeros"),
    ],
)
def test_graphs_whose_weights_cannot_be_constants_stay_dense_and_say_why(make, reason):
    model = make()
    other = copy.deepcopy(model)
    compiled = torch.compile(model, backend=backend)
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(compiled(X), other(X))
    assert [report for report in entry.reports() if reason in report.notes[0]]


def test_nothing_outlives_the_model():
    model = prune_(Branch())
    with torch.no_grad():
        torch.compile(model, backend=backend)(X)
    weights = [weakref.ref(parameter) for parameter in model.parameters()]
    del model
    gc.collect()
    assert [weight() for weight in weights] == [None] * 4


def test_autocast_from_outside_stays_dense_and_inside_does_not(net):
    compiled = torch.compile(net, backend=backend)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert compiled(X).dtype == torch.bfloat16
    assert "autocast is on" in entry.reports()[0].notes[0]
    with torch.no_grad():
        torch.testing.assert_close(compiled(X), net(X))
    assert set(kernels(entry.reports()[1]).values()) == {"cpu-csr"}


def test_a_wrong_kernel_is_a_warning_and_runs_dense(net, monkeypatch):
    monkeypatch.setattr(inference, "compare", lambda *_: "output 0 differs by 1")
    with (
        torch.no_grad(),
        pytest.warns(UserWarning, match="stays dense by a bug of ours.* output 0 differs by 1"),
    ):
        y = torch.compile(net, backend=backend)(X)
    torch.testing.assert_close(y, net(X).detach())


def test_where_dense_is_faster_dense_runs(net, monkeypatch):
    monkeypatch.setattr(
        entry, "times_us", lambda calls, arguments: {n: float("dense" not in n) for n in calls}
    )
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(net, backend=backend)(X), net(X))
    assert (
        "dense, by Inductor is fastest: dense, by Inductor 0.0 us, on kernels 1.0 us"
        in entry.reports()[0].notes[-1]
    )


def test_the_modes_of_the_backend(net):
    inferred = torch.compile(net, backend=backend, options={"mode": "infer"})(X)
    assert not inferred.requires_grad
    torch._dynamo.reset()
    trained = torch.compile(net, backend=backend, options={"mode": "train"})(X)
    torch.testing.assert_close(gradients(net, trained), gradients(net, net(X)))
    assert [bool(report.layers) for report in entry.reports()] == [True, False]
    assert "is 'train'" in entry.reports()[1].notes[0]


def test_inference_mode_and_inference_tensors(net):
    with torch.inference_mode():
        torch.testing.assert_close(torch.compile(net, backend=backend)(X), net(X))
        torch._dynamo.reset()
        born = prune_(nn.Linear(16, 8))
        torch.testing.assert_close(torch.compile(born, backend=backend)(X), born(X))
    assert [bool(report.layers) for report in entry.reports()] == [True, False]
    assert "inference tensors" in entry.reports()[1].notes[0]


INSTALLED = """
import sys, torch
from torch import nn
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8)).eval()
with torch.no_grad():
    model[0].weight.mul_(torch.rand(64, 64) < 0.1)
    assert not any(name.split(".")[0] == "fxsparse" for name in sys.modules)
    assert "fxsparse" in torch._dynamo.list_backends()
    x = torch.randn(3, 64)
    y = torch.compile(model, backend="fxsparse", mode="reduce-overhead")(x)
    torch.testing.assert_close(y, model(x))
import fxsparse.backend
(report,) = fxsparse.backend.reports()
assert {row["name"] for row in report.layers} == {"0.weight", "2.weight"}
assert "dense, by Inductor" in report.notes[-1], report.notes

from fxsparse import choosing, inference, kernel  # from here on CSR is faster by decree
from fxsparse.backend import entry
end = "on kernels, the rest by Inductor"
csr = choosing.Choice(kernel.registered()["cpu-csr"], {"dense": 11.0, "cpu-csr": 10.0}, {}, "measured")
choosing.choose = lambda *call, **options: csr
inference.speed_of = lambda *call: inference.Speed(2.0, 1.0, 2.0)
entry.times_us = lambda calls, arguments: {name: float(name != end) for name in calls}
torch._dynamo.reset()
with torch.no_grad():
    compiled = torch.compile(model, backend="fxsparse", dynamic=True)
    for batch in (3, 5):
        x = torch.randn(batch, 64)
        torch.testing.assert_close(compiled(x), model(x))
report = fxsparse.backend.reports()[-1]
assert report.notes[-1].startswith(f"{end} is fastest")
assert len(fxsparse.backend.reports()) == 2
"""


def test_an_installed_package_needs_no_import_and_hands_the_rest_to_inductor(tmp_path):
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    group = declared["torch_dynamo_backends"]
    installed = tmp_path / "fxsparse-0.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: fxsparse\nVersion: 0\n")
    lines = [f"{name} = {place}" for name, place in group.items()]
    (installed / "entry_points.txt").write_text("\n".join(["[torch_dynamo_backends]", *lines]))
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", INSTALLED]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
