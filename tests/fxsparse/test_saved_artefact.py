"""An inference module comes back from a file: same numbers, nothing traced or measured, nothing of the file run."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxsparse
from fxsparse import Plan, checkpoint, choosing, inference, kernel, saved_artefact
from fxsparse.choosing import Choice
from fxsparse.errors import CheckpointError, PlanError
from fxsparse.inference import Speed
from fxsparse.lane_region import LaneRegion
from fxsparse.methods import static
from fxsparse.passes import pack_lanes
from fxsparse.transforms import SparseParallel

# PyTorch 2.11 warns of how it copies exported graphs itself.
pytestmark = pytest.mark.filterwarnings("ignore:.isinstance.treespec:FutureWarning")

IMAGES = torch.randn(16, 3, 16, 16, generator=torch.Generator().manual_seed(0))
X = torch.randn(3, 16, generator=torch.Generator().manual_seed(1))
TAKEN = {"linear": "cpu-csr", "conv2d": "cpu-csr-conv"}


class Images(nn.Module):
    """Convolutions that run in lanes, a norm that is folded, dead neurons, and a buffer that no state dict holds."""

    def __init__(self, wide=16, window=2):
        super().__init__()
        self.stem = nn.Conv2d(3, wide, 3, padding=1)
        self.norm = nn.BatchNorm2d(wide)
        self.pool = nn.MaxPool2d(window)
        self.conv = nn.Conv2d(wide, wide, 3, padding=1)
        self.fc1, self.fc2 = nn.Linear(1024, 32), nn.Linear(32, 10)
        self.register_buffer("shift", torch.arange(10.0), persistent=False)

    def forward(self, x):
        x = self.pool(torch.relu(self.norm(self.stem(x))))
        x = torch.relu(self.conv(x) + x)
        return self.fc2(F.gelu(self.fc1(x.flatten(1)))) + self.shift


class Tied(nn.Module):
    """Only torch.export follows it: a branch on a size, containers in and out, one weight at two places."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 4)
        self.b.weight = self.a.weight

    def forward(self, batch):
        x = batch["x"]
        if x.shape[0] > 2:
            x = x + 1
        return {"y": self.c(torch.relu(self.b(self.a(x)))), "mask": x.new_full((2,), float("-inf"))}


class Own(nn.Module):
    """Nothing follows it: its own forward runs."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(16, 16)

    def forward(self, x):
        return self.layer(x) if float(x.sum()) > 0 else -self.layer(x)


class Optional(nn.Module):
    """Arguments that are no tensors, which a graph asserts to be those of the example."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(16, 16)

    def forward(self, x, mask=None, shifted=True):
        y = self.layer(x) + 1 if shifted else self.layer(x)
        return y if mask is None else y * mask


class Phase(nn.Module):
    """Complex numbers, in double precision, in the weight and in the graph; a weight that is transposed in memory."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(16, 16, dtype=torch.complex128)
        self.layer.weight = nn.Parameter(self.layer.weight.detach().t())

    def forward(self, x):
        return self.layer(x * 1j) + (2 - 3j)


def two_names():
    linear = nn.Linear(16, 16)
    return nn.Sequential(linear, nn.ReLU(), linear)


MODELS = {
    "images": (Images, IMAGES),
    "optional": (Optional, X),
    "tied": (Tied, ({"x": X}, {})),
    "own": (Own, X),
    "phase": (Phase, X.to(torch.complex128)),
    "two names": (two_names, X),
}


@pytest.fixture(autouse=True)
def sparse_is_faster(monkeypatch):
    def choose(problem, *rest, **options):
        taken = TAKEN[problem.op] + ("-int8" if problem.values == torch.int8 else "")
        if kernel.registered()[taken].refuses(problem):
            taken = "dense"
        return Choice(kernel.registered()[taken], {"dense": 10.0, taken: 5.0}, {}, "measured")

    monkeypatch.setattr(choosing, "choose", choose)
    monkeypatch.setattr(inference, "speed_of", lambda *call: Speed(200.0, 100.0, 2.0))
    monkeypatch.setattr(pack_lanes._Found, "times", lambda *call: {"lanes": 1.0, "plain": 2.0})


def compiled(make, x, **options):
    torch.manual_seed(0)
    model = make().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(torch.rand(parameter.shape) < 0.1)
    return fxsparse.compile(model, mode="infer", example_inputs=x, **options)


def outputs(module, x):
    y = module(*x[:-1], **x[-1]) if isinstance(x, tuple) else module(x)
    return list(y.values()) if isinstance(y, dict) else [y]


def on_meta(make):
    with torch.device("meta"):
        return make()


@pytest.mark.parametrize("name", MODELS)
def test_it_comes_back_bit_for_bit_and_nothing_is_traced_or_measured(name, tmp_path, monkeypatch):
    make, x = MODELS[name]
    fast = compiled(make, x)
    fxsparse.save(fast, tmp_path / "file")
    for place, what in ((choosing, "choose"), (inference, "capture"), (inference, "run_passes")):
        monkeypatch.setattr(place, what, lambda *call, **options: pytest.fail("measured or traced"))
    loaded = fxsparse.load(tmp_path / "file", on_meta(make))
    assert all(map(torch.equal, outputs(loaded, x), outputs(fast, x)))
    assert list(loaded.state_dict()) == list(fast.state_dict())
    assert [p.stride() for p in loaded.parameters()] == [p.stride() for p in fast.parameters()]
    assert loaded.report.to_dict() == fast.report.to_dict()
    assert str(loaded.report) == str(fast.report)
    regions = [sum(isinstance(m, LaneRegion) for m in module.modules()) for module in (fast, loaded)]
    assert regions == [name == "images"] * 2
    if name != "own":
        assert loaded.forward_graph.code == fast.forward_graph.code
        flops = [[str(n.meta.get("flops")) for n in m.forward_graph.graph.nodes] for m in (fast, loaded)]
        assert flops[0] == flops[1]
    for other in (copy.deepcopy(loaded), pickle.loads(pickle.dumps(loaded))):
        assert all(map(torch.equal, outputs(other, x), outputs(fast, x)))
    fxsparse.save(loaded, tmp_path / "again")
    (tensors, header), (again, same) = (checkpoint.read(tmp_path / file) for file in ("file", "again"))
    assert header == same
    assert all(torch.equal(again[key], tensor) for key, tensor in tensors.items())


@pytest.mark.parametrize("name", ["images", "tied"])
def test_kernels_are_measured_again_where_the_times_do_not_hold(name, tmp_path, monkeypatch):
    make, x = MODELS[name]
    fast = compiled(make, x)
    fxsparse.save(fast, tmp_path / "file")
    monkeypatch.setattr(saved_artefact, "environment", lambda: ["another processor"])
    seen = []
    choose = choosing.choose
    monkeypatch.setattr(
        choosing, "choose", lambda *call, **options: seen.append(1) or choose(*call, **options)
    )
    loaded = fxsparse.load(tmp_path / "file", on_meta(make))
    assert seen
    assert "measured again after loading: it was measured with" in loaded.report.notes[-1]
    assert "here is another processor" in loaded.report.notes[-1]
    for got, want in zip(outputs(loaded, x), outputs(fast, x), strict=True):
        torch.testing.assert_close(got, want)
    fxsparse.save(loaded, tmp_path / "again")
    assert torch.equal(outputs(fxsparse.load(tmp_path / "again", make()), x)[0], outputs(loaded, x)[0])


def test_narrow_values_and_what_inputs_have_to_be_come_back(tmp_path):
    fast = compiled(lambda: nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 2)), X, values="int8")
    assert {row["kernel"] for row in fast.report.layers} == {"cpu-csr-int8"}
    fxsparse.save(fast, tmp_path / "file")
    model = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 2))
    assert torch.equal(fxsparse.load(tmp_path / "file", model)(X), fast(X))
    make, x = MODELS["tied"]
    fxsparse.save(compiled(make, x), tmp_path / "file")
    loaded = fxsparse.load(tmp_path / "file", make())
    with pytest.raises(fxsparse.FxSparseError, match=r"as in the example|expected a tensor"):
        loaded({"other": X})
    assert loaded._modules["a"]._modules["weight"] is loaded._modules["b"]._modules["weight"]


def doubled(x):
    return x + x


torch.fx.wrap("doubled")


class Calls(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(16, 16)

    def forward(self, x):
        return doubled(self.layer(x))


def test_what_a_file_cannot_hold_is_refused_when_it_is_saved(tmp_path):
    with pytest.raises(CheckpointError, match=r"calls <function doubled.*Pickle the module"):
        fxsparse.save(compiled(Calls, X), tmp_path / "file")
    fast = compiled(*MODELS["own"])
    with pytest.raises(PlanError, match="compiled for inference has no optimizer"):
        fxsparse.save(fast, tmp_path / "file", optimizer=torch.optim.SGD([torch.ones(1)]))
    with pytest.raises(CheckpointError, match="not converted since"):
        fxsparse.save(compiled(*MODELS["images"]).bfloat16(), tmp_path / "file")
    assert list(tmp_path.iterdir()) == []


class Dropped(Images):
    def __init__(self):
        super().__init__()
        self.pool = nn.AvgPool2d(2)


class Extra(Images):
    def __init__(self):
        super().__init__()
        self.more = nn.Linear(2, 2)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (
            lambda: Images(8),
            r"expected a Images whose 'stem.weight' has shape \[16, 3, 3, 3\], got \[8, 3, 3, 3\]",
        ),
        (Tied, "no tensor of that name in Tied"),
        (Dropped, "expected a MaxPool2d as 'pool', got AvgPool2d"),
        (Extra, r"'more.weight' has shape none, got \[2, 2\]"),
    ],
    ids=["width", "class", "layer", "more"],
)
def test_another_model_is_refused(make, match, tmp_path):
    fxsparse.save(compiled(*MODELS["images"]), tmp_path / "file")
    with pytest.raises(CheckpointError, match=match):
        fxsparse.load(tmp_path / "file", make())
    with pytest.raises(CheckpointError, match="which no optimizer trains"):
        fxsparse.load(tmp_path / "file", Images(), optimizer=torch.optim.SGD(Images().parameters()))


def test_a_transformed_model_is_given_as_it_came(tmp_path):
    plan = Plan(sparsity=0.5, transform=SparseParallel(), method=static("random"))
    layers = [
        lambda: nn.Linear(16, 16),
        nn.ReLU,
        lambda: nn.Linear(16, 16),
        nn.ReLU,
        lambda: nn.Linear(16, 2),
    ]
    model, same = (nn.Sequential(*(make() for make in layers)) for _ in range(2))
    fast = fxsparse.compile(fxsparse.compile(model, plan, example_inputs=X), mode="infer", example_inputs=X)
    fxsparse.save(fast, tmp_path / "file")
    assert torch.equal(fxsparse.load(tmp_path / "file", same)(X), fast(X))


def test_what_the_compiled_model_was_set_to_is_kept(tmp_path):
    fast = compiled(*MODELS["images"])
    fxsparse.save(fast, tmp_path / "file")
    loaded = fxsparse.load(tmp_path / "file", Images(window=3))
    assert torch.equal(loaded(IMAGES), fast(IMAGES))
    assert loaded.fc2.in_features == fast.fc2.in_features < 32


# -- hostile files --------------------------------------------------------------------------------------------


def nodes(header):
    return header["graph"]["nodes"]


def call(header, kernel_name="cpu-csr"):
    return next(node for node in nodes(header) if node["target"] == {"kernel": kernel_name})


def target(value):
    return lambda header, tensors: call(header).update(target=value)


def method(name):
    return lambda header, tensors: next(n for n in nodes(header) if n["op"] == "call_method").update(
        target=name
    )


def attribute(header, tensors):
    x = nodes(header)[0]["name"]
    row = {"name": "leak", "op": "call_function", "target": {"function": "builtins.getattr"}}
    nodes(header).insert(1, row | {"args": {"list": [{"node": x}, "__class__"]}, "kwargs": {"dict": {}}})


def argument(value):
    return lambda header, tensors: call(header)["args"]["list"].__setitem__(2, value)


def keyword(name, value):
    return lambda header, tensors: call(header)["kwargs"]["dict"].__setitem__(name, value)


def node(field, value):
    return lambda header, tensors: nodes(header)[1].update({field: value})


def swapped(header, tensors):
    args = call(header)["args"]["list"]
    args[3], args[4] = args[4], args[3]


def tensor(name, change):
    return lambda header, tensors: tensors.update(
        {f"weight/fc1.weight.{name}": change(tensors[f"weight/fc1.weight.{name}"])}
    )


def bad_region(header, tensors):
    stage = header["regions"]["_lanes_0"]["stages"][0][2]["nodes"]
    row = next(n for n in stage if n["target"] == {"glue": "csr_conv_lanes"})
    row["kwargs"]["dict"]["in_channels"] = 1


def weight(field, value):
    return lambda header, tensors: header["weights"]["fc1.weight"].update({field: value})


HOSTILE = {
    "function": target({"function": "os.system"}),
    "builtin": target({"function": "builtins.eval"}),
    "load": target({"function": "torch.load"}),
    "file op": target({"op": "aten::from_file", "overload": "default"}),
    "jit op": target({"op": "aten::save", "overload": "default"}),
    "own op": target({"op": "fxsparse::csr_forward", "overload": "default"}),
    "region": target({"region": "while_loop"}),
    "other kernel": target({"kernel": "cpu-striped"}),
    "no function": target("F.relu"),
    "method": method("__reduce__"),
    "storage": method("untyped_storage"),
    "hook": method("register_hook"),
    "attribute": attribute,
    "name": node("name", "x;import os"),
    "code": node("target", 'a"); import os; ("'),
    "op": node("op", "call_code"),
    "keyword": keyword("activation='relu'); import os; print(", 1),
    "in_features": keyword("in_features", 1 << 20),
    "loose buffers": argument({"node": "x"}),
    "swapped buffers": swapped,
    "kind": argument({"lambda": "x"}),
    "two kinds": argument({"tuple": [], "list": []}),
    "dtype": argument({"dtype": "load"}),
    "device": argument({"device": "file:/etc/passwd"}),
    "lanes": bad_region,
    "columns": tensor("columns", lambda t: t + 30_000),
    "negative columns": tensor("columns", lambda t: t - 1_000),
    "counts": tensor("counts", lambda t: t * 1_000_000),
    "negative counts": tensor("counts", lambda t: torch.cat([t[:-1] + 1, -t[-1:]])),
    "fewer values": tensor("values", lambda t: t[:-1]),
    "text": tensor("counts", lambda t: t.float()),
    "larger weight": weight("shape", [1 << 30, 1 << 30]),
    "negative shape": weight("shape", [-1, -1]),
    "NaN shape": weight("shape", [float("nan"), 1]),
    "names": weight("names", ["fc1.weight", "stem.bias"]),
    "kernel": weight("kernel", "nobody-registered-this"),
    "no tier": lambda header, tensors: header.update(tier="walk"),
    "settings": lambda header, tensors: header["modules"]["fc1"].update(__class__="x"),
    "no module": lambda header, tensors: header["modules"].update({"no.such": {}}),
    "path": lambda header, tensors: tensors.update({"parameter/../../x": torch.ones(1)}),
    "new name": lambda header, tensors: tensors.update({"buffer/forward": torch.ones(1)}),
    "report": lambda header, tensors: header.update(report=[]),
    "samples": lambda header, tensors: header["graph"].update(calling={"samples": 0}),
}


@pytest.fixture(scope="module")
def contents():
    """Of one file, for all of them."""
    return {}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_refused(name, contents, tmp_path):
    path = tmp_path / "file"
    if not contents:
        fxsparse.save(compiled(*MODELS["images"]), path)
        contents["whole"] = path.read_bytes()
    path.write_bytes(contents["whole"])
    tensors, header = checkpoint.read(path)
    HOSTILE[name](header, tensors)
    for key in ("format", "aliases"):
        del header[key]
    checkpoint.write(path, tensors, header)
    model = Images()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(CheckpointError):
        fxsparse.load(path, model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
