"""Networks whose first part runs in lanes."""

import copy
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad
from torch.fx import Graph, GraphModule

import fxsparse
from fxsparse import choosing, inference, kernel
from fxsparse.lane_region import LaneRegion
from fxsparse.passes import pack_lanes


class Images(nn.Module):
    """A small residual network whose planes are 56, 28 and 14 wide; `last` is what it does with its rows."""

    def __init__(self, last=None):
        super().__init__()
        self.stem, self.act = nn.Conv2d(3, 8, 7, 2, 3), nn.ReLU()
        self.before = nn.Conv2d(8, 8, 3, padding=1)
        self.one, self.two = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 12, 1, 2)
        self.own = nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.head, self.last = nn.Linear(12, 5), last

    def forward(self, x):
        x = F.max_pool2d(self.act(self.stem(x)), 3, 2, 1)
        x = F.relu(x + self.one(F.relu(self.before(x))))
        x = F.relu6(self.own(self.two(x)))
        x = x if self.last is None else self.last(x)
        return self.head(x.mean((2, 3)))


@pytest.fixture
def faster(monkeypatch):
    """Lanes always measure faster."""
    monkeypatch.setattr(pack_lanes._Found, "times", lambda found, x: {"lanes": 1.0, "plain": 2.0})
    monkeypatch.setattr(inference, "NEVER_SLOWER", 0.0)


def pruned(last=None):
    torch.manual_seed(0)
    return thinned(Images(last).eval(), "before")


def thinned(model, *more):
    with torch.no_grad():
        for name in ("one", "two", *more):
            weight = model.get_parameter(f"{name}.weight")
            weight *= torch.rand_like(weight) < 0.2
    return model


def compiled(model, x):
    fast = fxsparse.compile(model, mode="infer", example_inputs=x)
    (row,) = [row for row in fast.report.passes if row["name"] == "pack-lanes"]
    return fast, row


def lowered(model, monkeypatch, dense="dense"):
    """Every sparse weight gets the sparse kernel, one of single channels its own, others `dense`: whatever is fast."""
    from fxsparse.passes import choose_layouts, select_kernels

    measured = choosing.choose

    def choose(*call, **options):
        choice = measured(*call, **options)
        known = next((n for n in ("cpu-csr-conv", "cpu-depthwise", dense) if n in choice.times_us), None)
        times = {name: 1.0 if name == known else 2.0 for name in choice.times_us}
        return replace(choice, times_us=times) if known else choice

    monkeypatch.setattr(choosing, "choose", choose)
    monkeypatch.setattr(select_kernels, "ADVANTAGE", 1.0)
    monkeypatch.setattr(inference, "CLEAR_GAIN", -math.inf)
    monkeypatch.setattr(choose_layouts, "_costs", lambda *site: choose_layouts._Costs(1.0, 2.0, 1.0))
    return model


def same(fast, model, x):
    with torch.no_grad():
        torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("stem", "ops"), [("dense", 7), ("onednn-conv", 6)]
)  # oneDNN's has its activation in it
def test_stages_take_the_finest_grid_that_fits(faster, monkeypatch, stem, ops):
    model, x = lowered(pruned(), monkeypatch, stem), torch.randn(16, 3, 224, 224)
    fast, row = compiled(model, x)
    (note,) = row["notes"]
    assert f"{ops} in 4 x 4 parts of 1" in note
    assert row["rewrites"] >= ops
    regions = [m for m in fast.modules() if isinstance(m, LaneRegion)]
    assert len(regions) == 1
    assert "over_residual = True" in regions[0].pieces[0].code
    assert regions[0].pieces[0].code.count("conv_lanes") >= 4
    same(fast, model, x)


def test_a_residual_that_nothing_reads_afterwards_is_written_over():
    graph = Graph()
    x, *weight = (graph.placeholder(name) for name in ("x", "values", "start", "columns"))

    def conv(x, residual=None):
        given = {"residual": residual, "kernel_size": (3, 3), "in_channels": 4, "padding": 1, "grid": 1}
        return graph.call_function(kernel.glue("csr_conv_lanes"), (x, None, *weight), given)

    def add(x, y):
        return graph.call_function(torch.add, (x, y))

    held = conv(x)
    kept = conv(conv(held), held)
    over = conv(conv(kept), kept)
    itself = conv(over, over)
    of_an_input = conv(itself, x)
    read_later = conv(conv(of_an_input), of_an_input)
    of_an_op = conv(conv(read_later), add(read_later, x))
    read_by_an_op = conv(add(of_an_op, x), of_an_op)
    graph.output(add(read_by_an_op, add(conv(of_an_input), held)))
    packed = kernel.glue("pack_lanes")(torch.randn(4, 36) / 6, kernel_size=(3, 3), in_channels=4)
    inputs = torch.randn(2, 4, 5, 5, 16), *packed.values()
    before = GraphModule({}, copy.deepcopy(graph))(*inputs)
    pack_lanes._write_over_residuals(graph)
    assert [node for node in graph.nodes if node.kwargs.get("over_residual")] == [over]
    assert torch.equal(GraphModule({}, graph)(*inputs), before)


def test_dense_convolutions_that_hold_channels_last_go_into_lanes(faster, monkeypatch):
    from fxsparse.passes import choose_layouts

    model, x = lowered(pruned(), monkeypatch), torch.randn(16, 3, 112, 112)

    def stem_last(gm, site, x, decision):
        return choose_layouts._Costs(
            *((9e9, 1.0) if site.weight.target == "stem.weight" else (1.0, 9e9)), 1.0
        )

    monkeypatch.setattr(choose_layouts, "_costs", stem_last)
    fast, row = compiled(model, x)
    assert {r["name"]: r["kernel"] for r in fast.report.layers}["stem.weight"] == "onednn-conv"
    assert row["rewrites"] >= 6
    same(fast, model, x)


def test_other_batches_and_sizes_run_as_before(faster, monkeypatch):
    model = lowered(pruned(), monkeypatch)
    fast, _ = compiled(model, torch.randn(16, 3, 112, 112))
    for shape in ((16, 3, 112, 112), (32, 3, 112, 112), (5, 3, 112, 112), (1, 3, 112, 112), (16, 3, 100, 64)):
        same(fast, model, torch.randn(shape))


def test_copies_and_pickles_keep_it(faster, monkeypatch, tmp_path):
    model, x = lowered(pruned(), monkeypatch), torch.randn(4, 3, 112, 112)
    fast, _ = compiled(model, x)
    torch.save(fast, tmp_path / "fast.pt")
    for other in (copy.deepcopy(fast), torch.load(tmp_path / "fast.pt", weights_only=False)):
        assert any(isinstance(module, LaneRegion) for module in other.modules())
        same(other, model, x)


def ops_of(fast, x):
    """What torch.compile makes of it, whole, and the ops that it sees."""
    seen = []

    def backend(gm, _):
        seen.extend(str(node.target) for node in gm.graph.nodes if node.op == "call_function")
        return gm.forward

    with torch.no_grad():
        return torch.compile(fast, backend=backend, fullgraph=True)(x), seen


def test_for_a_compiler_it_is_one_op_where_the_input_suits(faster, monkeypatch):
    model, x = lowered(pruned(), monkeypatch), torch.randn(4, 3, 112, 112)
    fast, _ = compiled(model, x)
    for other in (fast, copy.deepcopy(fast)):
        y, seen = ops_of(other, x)
        torch.testing.assert_close(y, model(x), rtol=1e-4, atol=1e-5)
        assert [op for op in seen if "lane" in op] == ["fxsparse.lane_region.default"]
    (region,) = [module for module in fast.modules() if isinstance(module, LaneRegion)]
    (copied,) = [module for module in other.modules() if isinstance(module, LaneRegion)]
    assert region.what == copied.what
    wider, _ = compiled(model, torch.randn(4, 3, 112, 224))
    assert all(module.what != region.what for module in wider.modules() if isinstance(module, LaneRegion))
    y, seen = ops_of(fast, x[..., :100])
    torch.testing.assert_close(y, model(x[..., :100]), rtol=1e-4, atol=1e-5)
    assert not any("lane" in op for op in seen)


@pytest.mark.slow
def test_inductor_runs_it(faster, monkeypatch):
    model, x = lowered(pruned(), monkeypatch), torch.randn(4, 3, 112, 112)
    fast, _ = compiled(model, x)
    same(torch.compile(fast), model, x)


# What vmap says of ops without a rule of their own.
@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("stem", ["dense", "onednn-conv"])
def test_transforms_of_torch_func_run_the_ops_as_they_were(faster, monkeypatch, stem):
    model, x = lowered(pruned(), monkeypatch, stem), torch.randn(16, 3, 224, 224)
    fast, _ = compiled(model, x)
    same(lambda x: torch.vmap(fast)(x[None])[0], model, x)
    same(torch.func.functionalize(fast), model, x)


# What PyTorch says of itself at the first such derivative.
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_a_derivative_in_forward_mode_is_refused_instead_of_lost(faster, monkeypatch):
    model, x = lowered(pruned(), monkeypatch), torch.randn(1, 3, 224, 224)
    fast, _ = compiled(model, x)
    with (
        torch.no_grad(),
        forward_ad.dual_level(),
        pytest.raises(fxsparse.FxSparseError, match="forward-mode"),
    ):
        fast(forward_ad.make_dual(x, x))


def test_an_exported_program_has_the_ops_as_they_were(faster, monkeypatch):
    model, x = lowered(pruned(), monkeypatch), torch.randn(4, 3, 112, 112)
    fast, _ = compiled(model, x)
    with torch.no_grad():
        exported = torch.export.export(fast, (x,))
    assert not any("lane" in str(node.target) for node in exported.graph.nodes)
    same(exported.module(), model, x)


def test_an_op_that_lanes_do_not_know_ends_the_region(faster, monkeypatch):
    model = lowered(pruned(lambda y: y.softmax(1)), monkeypatch)
    x = torch.randn(16, 3, 112, 112)
    fast, row = compiled(model, x)
    assert row["rewrites"] >= 6
    assert "softmax" in fast.forward_graph.code
    same(fast, model, x)


class LearnedMap(nn.Module):
    """Adds a parameter of the size of its images, of which lanes hold no form."""

    def __init__(self, samples):
        super().__init__()
        self.one, self.two = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.map = nn.Parameter(torch.randn(samples, 8, 28, 28))

    def forward(self, x):
        return self.two(F.relu(self.one(x) + self.map))


@pytest.mark.parametrize("samples", [1, 16])
def test_a_sum_with_a_parameter_ends_the_region(faster, monkeypatch, samples):
    model, x = lowered(thinned(LearnedMap(samples).eval()), monkeypatch), torch.randn(samples, 8, 28, 28)
    fast, row = compiled(model, x)
    assert row["rewrites"] == 1
    same(fast, model, x)


class Skip(nn.Module):
    """Its second convolution is followed by an op that lanes do not know, beside which the first one is read again."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x):
        x = F.relu(self.one(x))
        return self.two(x).softmax(1) * x


def test_a_region_ends_where_one_tensor_alone_is_read_later(faster, monkeypatch):
    model, x = lowered(thinned(Skip().eval()), monkeypatch), torch.randn(4, 3, 32, 32)
    fast, row = compiled(model, x)
    assert row["rewrites"] == 1
    same(fast, model, x)


def test_a_network_without_zeros_and_lanes_that_are_no_faster_leave_it(monkeypatch):
    monkeypatch.setattr(inference, "NEVER_SLOWER", 0.0)
    x = torch.randn(4, 3, 112, 112)
    _, row = compiled(Images().eval(), x)
    assert (row["rewrites"], row["notes"]) == (0, [])
    monkeypatch.setattr(pack_lanes._Found, "times", lambda found, x: {"lanes": 1.0, "plain": 1.0})
    fast, row = compiled(lowered(pruned(), monkeypatch), x)
    assert row["rewrites"] == 0
    assert "would take 1.00 of the time" in row["notes"][0]
    assert not any(isinstance(module, LaneRegion) for module in fast.modules())


def test_both_ways_are_timed(monkeypatch):
    monkeypatch.setattr(inference, "NEVER_SLOWER", 0.0)
    seen = []
    real = pack_lanes._Found.times
    monkeypatch.setattr(pack_lanes._Found, "times", lambda found, x: seen.append(real(found, x)) or seen[-1])
    compiled(lowered(pruned(), monkeypatch), torch.randn(4, 3, 112, 112))
    assert sorted(seen[0]) == ["lanes", "plain"]
    assert min(seen[0].values()) > 0
