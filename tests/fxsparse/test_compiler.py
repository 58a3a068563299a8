"""The entries a user calls, and every bad argument with its named error."""

import warnings
from dataclasses import replace

import pytest
import torch
import torchvision
from torch import nn

import fxsparse
from fxsparse import Override, Plan
from fxsparse.errors import FxSparseError, PatternError, PlanError, TraceError, UnsupportedError
from fxsparse.methods import gse, rigl, static
from fxsparse.pattern import NM, Block, ConstantFanIn


@pytest.fixture(scope="module")
def resnet50():
    with torch.device("meta"):
        return torchvision.models.resnet50()


IMAGE = torch.empty(1, 3, 224, 224, device="meta")


@pytest.mark.parametrize(
    ("changes", "total"),
    [
        ({"sparsity": 0.8}, 3.395292e9),
        ({"sparsity": 0.9}, 1.988961e9),
        (
            {"sparsity": 0.8, "allocation": "uniform", "overrides": (Override("conv1", sparsity=0),)},
            1.835610e9,
        ),
        (
            {"sparsity": 0.9, "allocation": "uniform", "overrides": (Override("conv1", sparsity=0),)},
            1.041376e9,
        ),
    ],
    ids=["erk-80", "erk-90", "uniform-80", "uniform-90"],
)
def test_resnet_50_in_the_convention_of_rigl(resnet50, changes, total):
    count = fxsparse.count_flops(resnet50, IMAGE, Plan(**changes), convention="rigl")
    assert count.dense == 8_189_482_496
    assert count.total == pytest.approx(total, abs=500)
    assert sum(fxsparse.allocate(resnet50, Plan(sparsity=0)).values()) == 25_502_912


def test_symbolic_flops_are_in_batch_and_sequence():
    model = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    count = fxsparse.count_flops(model, torch.randn(2, 6, 16))
    names = {str(symbol) for symbol in count.symbolic.free_symbols}
    assert names == {"batch", "sequence"}
    assert count.symbolic.subs({"batch": 1, "sequence": 6}) == count.total == count.dense


def test_flops_are_in_the_printed_graph_and_in_node_meta():
    sparse = fxsparse.compile(nn.Linear(8, 4), Plan(sparsity=0.5), example_inputs=torch.randn(3, 8))
    [node] = [n for n in sparse.forward_graph.graph.nodes if "flops" in n.meta]
    assert str(node.meta["flops"].dense.forward) == "64*batch"
    assert "64*batch" in sparse.forward_graph.code


def test_plan_report_and_allocate_leave_the_model_alone():
    model = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    report = fxsparse.plan_report(model, Plan(sparsity=0.5, method=rigl()), torch.randn(2, 16)).to_dict()
    assert {row["name"]: row["nnz"] for row in report["layers"]} == fxsparse.allocate(
        model, Plan(sparsity=0.5)
    )
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_prune_returns_the_users_class_with_the_largest_weights_kept():
    model = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4)).eval()
    before = model[0].weight.detach().clone()
    pruned = fxsparse.prune(model, Plan(sparsity=0.75, allocation="uniform"))
    assert torch.equal(model[0].weight, before)
    kept = pruned[0].weight != 0
    assert int(kept.sum()) == 32
    assert before[kept].abs().min() >= before[~kept].abs().max()
    assert type(pruned) is nn.Sequential
    assert not pruned.training


def test_a_model_with_nothing_eligible_compiles_and_its_report_prints():
    model = nn.Sequential(nn.Embedding(10, 4), nn.LayerNorm(4))
    with pytest.warns(
        UserWarning, match="selected none of the model's 3 parameters.*2 x norm; 1 x embedding"
    ):
        sparse = fxsparse.compile(model, Plan(sparsity=0.9), example_inputs=torch.randint(10, (2, 3)))
    x = torch.randint(10, (2, 3))
    assert torch.equal(sparse(x), model(x))
    report = sparse.report.to_dict()
    assert report["layers"] == []
    assert {row["name"]: row["reason"] for row in report["untouched"]} == {
        "0.weight": "embedding",
        "1.weight": "norm",
        "1.bias": "norm",
    }
    assert "embedding" in str(sparse.report)
    assert sparse.sparsity() == {"total": 0.0}


@pytest.mark.parametrize("groups", [1, 4, 16])
@pytest.mark.parametrize("pattern", [None, ConstantFanIn()])
def test_grouped_and_depthwise_convolutions_are_masked(groups, pattern):
    model = nn.Conv2d(16, 32, 3, groups=groups)
    plan = Plan(sparsity=0.5, allocation="uniform", **({"pattern": pattern} if pattern else {}))
    sparse = fxsparse.compile(model, plan, example_inputs=torch.randn(2, 16, 8, 8))
    fan_in = 16 // groups * 9
    expected = 32 * int(fan_in * 0.5) if pattern else int(32 * fan_in * 0.5)
    assert int(sparse.masks()["weight"].sum()) == expected
    assert sparse(torch.randn(2, 16, 8, 8)).shape == (2, 32, 6, 6)


@pytest.mark.parametrize("storage", ["masked", "compact"])
def test_bf16_autocast_on_cpu_trains(storage):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))
    sparse = fxsparse.compile(model, Plan(sparsity=0.8, storage=storage, method=rigl(every=2, stop=50)))
    optimizer = torch.optim.AdamW(sparse.parameters(), lr=0.01)
    sparse.attach(optimizer)
    for _ in range(5):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            y = sparse(torch.randn(4, 16))
        assert y.dtype == torch.bfloat16
        y.float().square().mean().backward()
        assert all(p.grad is None or p.grad.dtype == torch.float32 for p in sparse.parameters())
        optimizer.step()


def linear(**options):
    return nn.Linear(30, 10, **options)


def compact_conv():
    model = nn.Conv3d(3, 8, 3)
    return fxsparse.compile(
        model, Plan(sparsity=0.5, storage="compact"), example_inputs=torch.randn(1, 3, 8, 8, 8), strict=True
    )


def meta_linear():
    return nn.Linear(4, 4, device="meta")


class Untraceable(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        return self.fc(x) if float(x.detach().sum()) > 0 else x


def scripted(module: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch deprecates what makes them
        return torch.jit.script(module)


BAD = {
    "no model": (lambda: fxsparse.compile("model", Plan(sparsity=0.5)), PlanError, r"an nn.Module, got str"),
    "no plan": (lambda: fxsparse.compile(linear()), PlanError, r"training needs a plan, for example"),
    "plan a number": (lambda: fxsparse.compile(linear(), 0.9), PlanError, r"expected a Plan, got float"),
    "mode": (
        lambda: fxsparse.compile(linear(), Plan(sparsity=0.5), mode="test"),
        PlanError,
        r"'train' or 'infer', got 'test'",
    ),
    "plan for inference": (
        lambda: fxsparse.compile(linear(), Plan(sparsity=0.5), mode="infer"),
        PlanError,
        r"takes no plan; make zeros with fxsparse.prune",
    ),
    "compiled twice": (
        lambda: fxsparse.compile(fxsparse.compile(linear(), Plan(sparsity=0.5)), Plan(sparsity=0.5)),
        PlanError,
        r"compile: this model is compiled already; use model.to_dense\(\)",
    ),
    "flops of a compiled model": (
        lambda: fxsparse.count_flops(fxsparse.compile(linear(), Plan(sparsity=0.5)), torch.randn(1, 30)),
        PlanError,
        r"count_flops: this model is compiled already; use model.to_dense\(\)",
    ),
    "plan report of a compiled model": (
        lambda: fxsparse.plan_report(fxsparse.compile(linear(), Plan(sparsity=0.5)), Plan(sparsity=0.5)),
        PlanError,
        r"plan_report and allocate: this model is compiled already; use model.to_dense\(\)",
    ),
    "allocate a model compiled for inference": (
        lambda: fxsparse.allocate(fxsparse.compile(linear(), mode="infer"), Plan(sparsity=0.5)),
        PlanError,
        r"plan_report and allocate: this model is compiled already",
    ),
    "flops of a plan in a dict": (
        lambda: fxsparse.count_flops(linear(), torch.randn(1, 30), {"sparsity": 0.9}),
        PlanError,
        r"count_flops: expected a Plan, got dict; Plan.load and Plan.from_dict make one",
    ),
    "optimizer by name": (
        lambda: fxsparse.compile(linear(), Plan(sparsity=0.5, storage="compact"), optimizer="sgd"),
        PlanError,
        r"compile: expected a torch.optim.Optimizer, got str",
    ),
    "a mask by values that are not there": (
        lambda: fxsparse.compile(meta_linear(), Plan(sparsity=0.5)),
        PlanError,
        r"'weight' is on meta and would be created compact, but static draws its first mask by magnitude",
    ),
    "inference on meta": (
        lambda: fxsparse.compile(meta_linear(), mode="infer"),
        PlanError,
        r"'weight' is on the meta device and has no values to compile for inference; load them first",
    ),
    "inference of inputs on meta": (
        lambda: fxsparse.compile(linear(), mode="infer", example_inputs=torch.empty(1, 30, device="meta")),
        PlanError,
        "example_inputs on the meta device have no values to measure kernels with",
    ),
    "a device that torch does not have": (
        lambda: fxsparse.compile(meta_linear(), Plan(sparsity=0.5), device="xyz"),
        PlanError,
        r"expected a device such as 'cpu', got 'xyz': .*xyz",
    ),
    "a device for a model that has one": (
        lambda: fxsparse.compile(linear(), Plan(sparsity=0.5), device="cpu"),
        PlanError,
        r"this model has none; move the model with model.to\(device\)",
    ),
    "created nowhere": (
        lambda: fxsparse.compile(meta_linear(), Plan(sparsity=0.5), device="meta"),
        PlanError,
        r"expected a device with memory, got 'meta'",
    ),
    "an optimizer of nothing": (
        lambda: fxsparse.compile(
            model := meta_linear(), Plan(sparsity=0.5), optimizer=torch.optim.SGD(model.parameters())
        ),
        PlanError,
        r"'weight' is on meta, so no optimizer can hold what will be created",
    ),
    "exclude": (
        lambda: fxsparse.compile(linear(), Plan(sparsity=0.5, exclude=("wieght",))),
        PlanError,
        r"exclude glob 'wieght' matches no parameter; nearest names: \['weight'\]",
    ),
    "override": (
        lambda: fxsparse.compile(linear(), Plan(sparsity=0.5, overrides=(Override("fc", sparsity=0.1),))),
        PlanError,
        r"'fc'",
    ),
    "n:m": (
        lambda: fxsparse.compile(linear(), Plan(pattern=NM(2, 4))),
        PatternError,
        r"weight 'weight': in_features=30; 2:4 needs a multiple of 4",
    ),
    "block": (
        lambda: fxsparse.compile(linear(), Plan(sparsity=0.5, pattern=Block(4, 4))),
        PatternError,
        r"weight 'weight': out_features=10; Block\(4, 4\) needs a multiple of 4",
    ),
    "fan-in of 0": (
        lambda: fxsparse.compile(
            linear(), Plan(sparsity=0.99, pattern=ConstantFanIn(), allocation="uniform")
        ),
        PlanError,
        r"smallest feasible density is 0.0333",
    ),
    "example inputs that do not fit": (
        lambda: fxsparse.compile(linear(), Plan(sparsity=0.5), example_inputs=(torch.randn(2, 7),)),
        TraceError,
        r"7",
    ),
    "strict walk": (
        lambda: fxsparse.compile(
            Untraceable(), Plan(sparsity=0.5), strict=True, example_inputs=torch.ones(1, 4)
        ),
        TraceError,
        r"strict=True refuses the walk",
    ),
    "strict compact": (
        compact_conv,
        UnsupportedError,
        r"'weight': no compact storage: there is no compact conv3d kernel",
    ),
    "lazy": (
        lambda: fxsparse.compile(nn.LazyLinear(4), Plan(sparsity=0.5)),
        TraceError,
        r"lazy module has no shape yet",
    ),
    "prune with rigl": (
        lambda: fxsparse.prune(linear(), Plan(sparsity=0.5, method=rigl())),
        PlanError,
        r"got rigl",
    ),
    "convention": (
        lambda: fxsparse.count_flops(linear(), torch.randn(1, 30), convention="macs"),
        PlanError,
        r"mac2.*got 'macs'",
    ),
    "attach nothing": (
        lambda: fxsparse.compile(linear(), Plan(sparsity=0.5)).attach("adam"),
        PlanError,
        r"attach: expected a torch.optim.Optimizer, got str",
    ),
    "attach None": (
        lambda: fxsparse.compile(linear(), Plan(sparsity=0.5)).attach(None),
        PlanError,
        r"attach: expected a torch.optim.Optimizer, got NoneType",
    ),
    "an optimizer of inference": (
        lambda: fxsparse.compile(
            model := linear(), mode="infer", optimizer=torch.optim.SGD(model.parameters())
        ),
        PlanError,
        r"mode='infer' takes no optimizer, since nothing is trained; got SGD",
    ),
    "TorchScript": (
        lambda: fxsparse.compile(scripted(linear()), mode="infer"),
        TraceError,
        r"got TorchScript: the model was made by torch.jit.script.*pass the nn.Module that it was made from",
    ),
    "TorchScript below": (
        lambda: fxsparse.plan_report(nn.Sequential(linear(), scripted(nn.ReLU())), Plan(sparsity=0.5)),
        TraceError,
        r"got TorchScript: its submodule '1' was made by",
    ),
    "values of an unknown dtype": (
        lambda: fxsparse.compile(linear(), mode="infer", values="int4"),
        PlanError,
        r"expected values of \['int8', 'bfloat16'\] or None, got 'int4'",
    ),
    "values in training": (
        lambda: fxsparse.compile(linear(), Plan(sparsity=0.5), values="int8"),
        PlanError,
        "values='int8' says how inference stores weights",
    ),
    "optimizer of another model": (
        lambda: fxsparse.compile(linear(), Plan(sparsity=0.5)).attach(
            torch.optim.SGD(linear().parameters(), lr=1)
        ),
        PlanError,
        r"the optimizer does not hold 'weight'",
    ),
}


@pytest.mark.parametrize(("call", "error", "message"), BAD.values(), ids=BAD)
def test_bad_arguments_get_their_named_error(call, error, message):
    with pytest.raises(error, match=message) as caught:
        call()
    assert isinstance(caught.value, FxSparseError)
    assert isinstance(caught.value, ValueError)


def test_static_random_masks_depend_on_the_seed_only():
    def mask(seed):
        torch.manual_seed(seed + 100)
        return fxsparse.compile(linear(), Plan(sparsity=0.5, seed=seed, method=static("random"))).masks()[
            "weight"
        ]

    assert torch.equal(mask(1), mask(1))
    assert not torch.equal(mask(1), mask(2))


def test_compact_storage_executes_its_nonzeros_alone_in_plans_too():
    build = lambda: nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 8))  # noqa: E731
    x, plan = torch.zeros(4, 32), Plan(sparsity=0.9, allocation="uniform", storage="compact")
    count = fxsparse.count_flops(build(), x, plan)
    assert (count.dense, count.total, count.executed) == (2560, 256, 256)
    assert count.executed == fxsparse.compile(build(), plan, example_inputs=x).report.totals["flops_executed"]
    with torch.device("meta"):
        assert fxsparse.count_flops(build(), x, plan).executed == 256
    report = fxsparse.plan_report(build(), plan, x)
    assert {row["storage"] for row in report.layers} == {"compact"}
    assert report.totals["flops_executed"] == 256
    drifting = replace(plan, method=gse(scope="global"))
    assert fxsparse.count_flops(build(), x, drifting).executed == 2560
    assert any("WARNING" in note for note in fxsparse.plan_report(build(), drifting, x).notes)
    for storage in ("masked", "auto"):
        assert fxsparse.count_flops(build(), x, replace(plan, storage=storage)).executed == 2560
