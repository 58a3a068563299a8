"""What was saved goes on bit for bit, in a model on meta too; another model's file is refused."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxsparse
from fxsparse import Plan, checkpoint
from fxsparse.errors import CheckpointError, PlanError
from fxsparse.methods import rigl, set_, spartan, srigl, static
from fxsparse.pattern import NM, ConstantFanIn
from fxsparse.storage import CompactWeight
from fxsparse.transforms import TRANSFORMS, SparseParallel

X, Y = torch.randn(16, 32), torch.randint(4, (16,))


class Net(nn.Module):
    def __init__(self, width=32):
        super().__init__()
        self.conv, self.norm = nn.Conv1d(1, 2, 3, padding=1), nn.BatchNorm1d(2)
        self.first, self.second = nn.Linear(2 * width, width), nn.Linear(width, width, bias=False)
        self.head = nn.Linear(width, 4)
        self.tied = self.second
        self.register_buffer("ramp", torch.linspace(0, 1, width), persistent=False)

    def forward(self, x):
        x = self.norm(self.conv(x[:, None])).flatten(1)
        return self.head(torch.relu(self.second(torch.relu(self.first(x)) + self.ramp)))


class Branching(Net):
    """Only torch.export can follow it."""

    def forward(self, x):
        return super().forward(x + torch.tensor([0.5]) if x.shape[0] > 1 else x)


class Deciding(Net):
    """Nothing but the module walk can follow it."""

    def forward(self, x):
        return super().forward(x) if float(x.detach().sum()) != 7 else x


def on_meta(make):
    with torch.device("meta"):
        return make()


def train(sparse, optimizer, steps=5):
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(sparse(X), Y).backward()
        optimizer.step()


def trained(plan, make=Net, optimizer=torch.optim.AdamW):
    sparse = fxsparse.compile(make(), plan, example_inputs=X)
    opt = optimizer(sparse.parameters(), lr=0.01)
    sparse.attach(opt)
    train(sparse, opt)
    return sparse, opt


def assert_same(first, second):
    one, two = first.state_dict(), second.state_dict()
    assert list(one) == list(two)
    assert [name for name in one if not torch.equal(one[name], two[name])] == []


PLANS = {
    "masked": Plan(sparsity=0.8, method=rigl(every=3), storage="masked", exclude=("head",)),
    "compact": Plan(sparsity=0.8, method=rigl(every=3), storage="compact", exclude=("head",)),
    "set": Plan(sparsity=0.9, method=set_(every=2), storage="compact", seed=5),
    "srigl": Plan(
        sparsity=0.8,
        method=srigl(every=2),
        pattern=ConstantFanIn(),
        storage="compact",
        exclude=("head", "conv"),
    ),
    "n:m": Plan(pattern=NM(2, 4), method=static("magnitude"), storage="compact", exclude=("conv",)),
}


@pytest.mark.parametrize("name", PLANS)
def test_a_loaded_run_goes_on_bit_for_bit(name, tmp_path):
    sparse, optimizer = trained(PLANS[name])
    fxsparse.save(sparse, tmp_path / "file", optimizer=optimizer)
    model = on_meta(Net)
    again = torch.optim.AdamW(model.parameters())
    loaded = fxsparse.load(tmp_path / "file", model, optimizer=again)
    assert_same(sparse, loaded)
    train(sparse, optimizer)
    train(loaded, again)
    assert_same(sparse, loaded)
    assert again.param_groups[0]["lr"] == 0.01
    assert all(parameter.is_meta for parameter in model.parameters())
    assert loaded.plan == sparse.plan
    assert [row | {"reason": ""} for row in loaded.report.layers] == [
        row | {"reason": ""} for row in sparse.report.layers
    ]


def in_groups(module):
    """Matrices and vectors apart, as for weight decay."""
    named = list(module.named_parameters())
    matrices = [p for name, p in named if name.endswith(("weight", "values")) and "norm" not in name]
    held = {id(p) for p in matrices}
    return [{"params": matrices}, {"params": [p for _, p in named if id(p) not in held], "weight_decay": 0.0}]


@pytest.mark.parametrize("storage", ["masked", "compact"])
@pytest.mark.parametrize("groups", [lambda module: module.parameters(), in_groups])
@pytest.mark.parametrize("kind", TRANSFORMS.values())
def test_a_transformed_run_goes_on_bit_for_bit(kind, groups, storage, tmp_path):
    plan = Plan(transform=kind(), sparsity=0.75, method=rigl(every=3), storage=storage)
    sparse = fxsparse.compile(Net(), plan, example_inputs=X)
    optimizer = torch.optim.AdamW(groups(sparse), lr=0.01)
    sparse.attach(optimizer)
    train(sparse, optimizer)
    fxsparse.save(sparse, tmp_path / "file", optimizer=optimizer)
    model = on_meta(Net)
    again = torch.optim.AdamW(groups(model))
    loaded = fxsparse.load(tmp_path / "file", model, optimizer=again)
    for of in (sparse, loaded):
        train(of, optimizer if of is sparse else again)
    assert_same(sparse, loaded)
    assert [group["weight_decay"] for group in again.param_groups] == [
        group["weight_decay"] for group in optimizer.param_groups
    ]


def test_what_a_transformation_left_has_to_be_in_the_groups_it_was_saved_in(tmp_path):
    plan = Plan(transform=SparseParallel(), sparsity=0.75, method=rigl(every=3))
    sparse, optimizer = trained(plan)
    fxsparse.save(sparse, tmp_path / "file", optimizer=optimizer)
    for wrong in (lambda model: model.head.parameters(), lambda model: [torch.zeros(2, requires_grad=True)]):
        model = Net()
        with pytest.raises(CheckpointError, match=r"expected a AdamW with the groups \[\['conv.bias', "):
            fxsparse.load(tmp_path / "file", model, optimizer=torch.optim.AdamW(wrong(model)))


@pytest.mark.parametrize("make", [Branching, Deciding])
def test_the_front_end_that_captured_the_model_captures_it_again(make, tmp_path):
    sparse, optimizer = trained(PLANS["masked"], make)
    fxsparse.save(sparse, tmp_path / "file")
    loaded = fxsparse.load(tmp_path / "file", on_meta(make))
    assert loaded._emitted.program.tier == sparse._emitted.program.tier != "symbolic"
    other = torch.optim.AdamW(loaded.parameters(), lr=0.01)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    loaded.attach(other)
    train(sparse, optimizer)
    train(loaded, other)
    assert_same(sparse, loaded)


def test_a_model_with_values_gives_its_classes_only(tmp_path):
    sparse, _ = trained(PLANS["compact"])
    fxsparse.save(sparse.eval(), tmp_path / "file")
    model = Net()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    loaded = fxsparse.load(tmp_path / "file", model)
    assert not loaded.training
    assert torch.equal(loaded(X), sparse(X))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert isinstance(loaded.first.weight, CompactWeight)


def test_a_loaded_module_can_be_saved_and_pickled(tmp_path):
    sparse, _ = trained(PLANS["compact"])
    fxsparse.save(sparse, tmp_path / "file")
    loaded = fxsparse.load(tmp_path / "file", on_meta(Net))
    fxsparse.save(loaded, tmp_path / "again")
    assert (tmp_path / "again").stat().st_size == (tmp_path / "file").stat().st_size
    assert_same(sparse, pickle.loads(pickle.dumps(loaded)))
    assert_same(sparse, fxsparse.load(tmp_path / "again", on_meta(Net)))
    torch.testing.assert_close(loaded.to_dense().eval()(X), sparse.eval()(X))


class Wider(Net):
    def __init__(self):
        super().__init__(48)


class Renamed(Net):
    def __init__(self):
        super().__init__()
        self.third = self.first
        del self.first


class Buffered(Net):
    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(3))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (Wider, r"expected a Net whose 'first.weight' has shape \[32, 64\], got \[48, 96\] in Wider"),
        (Renamed, r"'first.weight' has shape \[32, 64\], got no parameter of that name in Renamed"),
        (
            lambda: Net().double(),
            r"'conv.weight': expected torch.float64 \[2, 1, 3\] as in the model, got torch.float32",
        ),
        (Buffered, r"'mean': expected a saved value, got none"),
        (lambda: nn.Linear(3, 3), r"expected a Net whose 'conv.weight'"),
    ],
    ids=["width", "name", "dtype", "buffer", "class"],
)
def test_another_model_is_refused(make, message, tmp_path):
    sparse, _ = trained(Plan(sparsity=0.8, method=static("random"), storage="masked"))
    fxsparse.save(sparse, tmp_path / "file")
    with pytest.raises(CheckpointError, match=message):
        fxsparse.load(tmp_path / "file", make())


def test_another_optimizer_is_refused_and_left_alone(tmp_path):
    sparse, optimizer = trained(PLANS["compact"])
    fxsparse.save(sparse, tmp_path / "none")
    fxsparse.save(sparse, tmp_path / "file", optimizer=optimizer)
    model = on_meta(Net)
    sgd = torch.optim.SGD(model.parameters(), lr=1.0)
    fewer = torch.optim.AdamW(list(model.parameters())[1:])
    with pytest.raises(CheckpointError, match=r"expected a AdamW with the groups .* got a SGD"):
        fxsparse.load(tmp_path / "file", model, optimizer=sgd)
    with pytest.raises(CheckpointError, match="with the groups of the saved one"):
        fxsparse.load(tmp_path / "file", model, optimizer=fewer)
    with pytest.raises(CheckpointError, match="the file holds no optimizer"):
        fxsparse.load(tmp_path / "none", model, optimizer=sgd)
    assert sgd.param_groups[0]["params"] == list(model.parameters())


def test_only_an_optimizer_is_saved_as_one_and_a_model_of_another_dtype_is_told_so(tmp_path):
    sparse, _ = trained(Plan(sparsity=0.5))
    with pytest.raises(PlanError, match=r"save: expected a torch\.optim\.Optimizer, got int"):
        fxsparse.save(sparse, tmp_path / "file", optimizer=3)
    fxsparse.save(sparse.bfloat16(), tmp_path / "file")
    with pytest.raises(CheckpointError, match=r"got torch\.bfloat16 \[.*model\.to\(torch\.bfloat16\)"):
        fxsparse.load(tmp_path / "file", Net())


def test_what_cannot_be_saved_or_loaded_into_is_refused(tmp_path):
    sparse, _ = trained(PLANS["masked"])
    with pytest.raises(PlanError, match=r"expected what fxsparse.compile returned, got Net"):
        fxsparse.save(Net(), tmp_path / "file")
    with pytest.raises(PlanError, match="holds parameters that are not this module's"):
        fxsparse.save(sparse, tmp_path / "file", optimizer=torch.optim.SGD(Net().parameters()))
    fxsparse.save(sparse, tmp_path / "file")
    with pytest.raises(PlanError, match="expected your own model"):
        fxsparse.load(tmp_path / "file", sparse)


def test_example_inputs_are_saved_as_shapes_and_nothing_else(tmp_path):
    sparse, _ = trained(PLANS["masked"])
    fxsparse.save(sparse, tmp_path / "file")
    loaded = fxsparse.load(tmp_path / "file", on_meta(Net))
    [example] = [loaded._emitted.recipe.example_inputs]
    assert (example.shape, example.dtype, example.is_meta) == (X.shape, X.dtype, True)
    assert loaded.report.totals["flops_dense"] == sparse.report.totals["flops_dense"]


class Scaled(nn.Module):
    """Shapes do not tell how often it halves."""

    def __init__(self, halved=1, cls=nn.ReLU):
        super().__init__()
        self.halved, self.act, self.first, self.head = halved, cls(), nn.Linear(32, 16), nn.Linear(16, 4)

    def forward(self, x):
        return self.head(self.act(self.first(x)) / 2**self.halved)


class ScaledByValues(Scaled):
    """Nothing but the module walk can follow it."""

    def forward(self, x):
        return super().forward(x) if float(x.detach().sum()) != 7 else x


@pytest.mark.parametrize(
    ("make", "others"),
    [
        (Scaled, [lambda: Scaled(cls=nn.GELU), lambda: Scaled(halved=2), lambda: Twice()]),
        (ScaledByValues, [lambda: ScaledByValues(cls=nn.GELU), lambda: Scaled()]),
    ],
)
def test_a_model_of_equal_shapes_that_computes_something_else_is_refused(make, others, tmp_path):
    sparse = fxsparse.compile(make(), Plan(sparsity=0.5), example_inputs=(X,))
    fxsparse.save(sparse, tmp_path / "run")
    for other in others:
        with pytest.raises(CheckpointError, match="whose forward computes something else"):
            fxsparse.load(tmp_path / "run", other())
    assert torch.equal(fxsparse.load(tmp_path / "run", on_meta(make)).eval()(X), sparse.eval()(X))


class Twice(Scaled):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize("storage", ["masked", "compact"])
def test_a_state_dict_that_does_not_fit_changes_nothing(storage):
    sparse = fxsparse.compile(Scaled(), Plan(sparsity=0.8, storage=storage), example_inputs=(X,))
    other = fxsparse.compile(Scaled(), Plan(sparsity=0.5, storage=storage), example_inputs=(X,))
    short, narrow = Scaled().state_dict(), Scaled().state_dict()
    del short["head.bias"]
    narrow["head.weight"] = torch.ones(3, 3)
    before = {name: tensor.clone() for name, tensor in sparse.state_dict().items()}
    for state in (other.state_dict(), short, narrow, Scaled().state_dict() | {"more": torch.ones(1)}):
        with pytest.raises(CheckpointError):
            sparse.load_state_dict(state)
        assert all(torch.equal(tensor, before[name]) for name, tensor in sparse.state_dict().items())
    sparse.load_state_dict(short, strict=False)
    assert torch.equal(sparse.state_dict()["first.bias"], short["first.bias"])


def test_optimizer_state_that_no_step_could_take_is_refused(tmp_path):
    path, model = tmp_path / "run", Scaled()
    sparse = fxsparse.compile(model, Plan(sparsity=0.5), example_inputs=(X,))
    optimizer = torch.optim.AdamW(sparse.parameters())
    sparse.attach(optimizer)
    train(sparse, optimizer, 1)
    fxsparse.save(sparse, path, optimizer=optimizer)
    tensors, header = checkpoint.read(path)
    key = next(name for name in tensors if name.endswith("exp_avg") and tensors[name].dim() == 2)
    flat = tensors | {key: tensors[key][:-1].clone()}
    short = copy.deepcopy(header)
    del short["optimizer"]["state"]["0"]["exp_avg"]
    stray = copy.deepcopy(header)
    stray["optimizer"]["state"]["99"] = stray["optimizer"]["state"]["0"]
    for values, head, match in (
        (flat, header, "shape"),
        (tensors, short, "same state"),
        (tensors, stray, "hold"),
    ):
        checkpoint.write(path, values, head)
        again = Scaled()
        other = torch.optim.AdamW(again.parameters(), lr=0.5)
        with pytest.raises(CheckpointError, match=match):
            fxsparse.load(path, again, optimizer=other)
        assert not other.state
        assert other.param_groups[0]["lr"] == 0.5


def test_dense_weights_load_strictly_where_masks_are_soft():
    sparse = fxsparse.compile(Scaled(), Plan(sparsity=0.5, method=spartan(steps=10)), example_inputs=(X,))
    masks = sparse.masks()
    sparse.load_state_dict(Scaled().state_dict(), strict=True)
    sparse.load_state_dict(sparse.dense_state_dict(), strict=True)
    assert all(torch.equal(mask, masks[name]) for name, mask in sparse.masks().items())
