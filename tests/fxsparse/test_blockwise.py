import pytest
import torch
from torch import nn

from fxsparse.blockwise import GraphRuns, WalkRuns, runs_of
from fxsparse.demo.models import ViT
from fxsparse.errors import PlanError
from fxsparse.graph import canonical_names
from fxsparse.passes import planning_pipeline
from fxsparse.pipeline import PassContext, run_passes
from fxsparse.report import Report
from fxsparse.trace import capture


def runs(model, batches, names=None):
    program = capture(model.eval(), batches[0])
    run_passes(planning_pipeline(None), PassContext(None, "train", program, Report(), batches[0]))
    program.skeleton.eval()
    weights = set(canonical_names(model).values()) if names is None else names
    return runs_of(program, weights, batches)


class Residual(nn.Module):
    """Writes in place to what came from the block before, and reads a view of it."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.three = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, x):
        x = self.one(x)
        y = torch.relu_(x[:, :2])
        x += 1
        x = self.two(torch.cat([y, x[:, 2:]], 1))
        x += 1
        return self.three(x)


def seen_by_hooks(model, batches):
    """{weight: what it read}, of the whole model."""
    seen, handles = {}, []
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear):
            log = seen.setdefault(f"{name}.weight", [])
            handles.append(layer.register_forward_pre_hook(lambda m, a, log=log: log.append(a[0].clone())))
    with torch.no_grad():
        for batch in batches:
            model(*batch) if isinstance(batch, tuple) else model(batch)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("model", [Residual(), ViT(16, 2)], ids=lambda m: type(m).__name__)
def test_looking_changes_nothing_and_advancing_repeats_it(model):
    shape = (3, 4) if isinstance(model, Residual) else (3, 1, 8, 8)
    batches = [torch.randn(shape), torch.randn(2, *shape[1:])]
    of, expected = runs(model, batches), seen_by_hooks(model.eval(), batches)
    assert isinstance(of, GraphRuns)
    looked: dict[str, list[torch.Tensor]] = {}
    advanced: dict[str, list[torch.Tensor]] = {}
    with torch.no_grad():
        for block in range(len(of.blocks)):
            for call, log in ((of.look, looked), (of.look, {}), (of.advance, advanced)):
                call(block, lambda s, x, log=log: log.setdefault(str(s.weight.target), []).append(x.clone()))
    for log in (looked, advanced):
        assert log.keys() == expected.keys()
        for name, inputs in expected.items():
            torch.testing.assert_close(log[name], inputs, msg=name)


def test_a_transformer_is_cut_where_one_value_is_alive():
    of = runs(ViT(16, 2), [torch.randn(3, 1, 8, 8)])
    assert of.blocks == [
        ["embed.weight"],
        ["blocks.0.attention.qkv.weight", "blocks.0.attention.out.weight"],
        ["blocks.0.mlp.0.weight", "blocks.0.mlp.2.weight"],
        ["blocks.1.attention.qkv.weight", "blocks.1.attention.out.weight"],
        ["blocks.1.mlp.0.weight", "blocks.1.mlp.2.weight"],
        ["head.weight"],
    ]
    with torch.no_grad():
        of.advance(0, None)
        of.advance(1, None)
    held = [node for node in of.states[0] if node in of.dependent]
    assert len(held) == 1


class Gated(nn.Module):
    """Residual parts of three layers each, two of which read the same: fewer values are alive behind the second."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d, self.e, self.f, self.g = (nn.Linear(4, 4) for _ in range(7))

    def forward(self, x):
        x = x + self.c(self.a(x).sigmoid() * self.b(x))
        return self.g(x + self.f(self.d(x).sigmoid() * self.e(x)))


def test_no_cut_is_made_where_the_next_place_has_fewer_values():
    blocks = runs(Gated(), [torch.randn(2, 4)]).blocks
    assert ["".join(name[0] for name in block) for block in blocks] == ["abc", "def", "g"]


class Shared(nn.Module):
    """One layer is used at both ends."""

    def __init__(self):
        super().__init__()
        self.outer, self.inner, self.last = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, x):
        return self.last(self.outer(torch.relu(self.inner(torch.relu(self.outer(x))))))


def test_calls_of_one_weight_stay_in_one_block():
    assert runs(Shared(), [torch.randn(2, 4)]).blocks == [["outer.weight", "inner.weight"], ["last.weight"]]


class Branching(nn.Module):
    """No front end captures it."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)}) for _ in "12")
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        for layer in self.layers:
            x = layer["a"](x) if float(x.detach().sum()) > 0 else layer["b"](x)
        return self.head(x)


def test_without_a_graph_hooks_see_what_layers_below_a_number_read():
    model, batches = Branching(), [torch.ones(2, 4), -torch.ones(3, 4)]
    of, log = runs(model, batches), []
    assert isinstance(of, WalkRuns)
    assert of.blocks == [
        ["layers.0.a.weight", "layers.0.b.weight"],
        ["layers.1.a.weight", "layers.1.b.weight"],
        ["head.weight"],
    ]
    with torch.no_grad():
        of.look(0, lambda site, x: log.append((site.weight.target, x)))
    assert [name for name, _ in log] == ["layers.0.a.weight", "layers.0.b.weight"]
    assert [torch.equal(x, batch) for (_, x), batch in zip(log, batches, strict=True)] == [True, True]
    assert not any(module._forward_pre_hooks for module in of.program.skeleton.modules())


def test_a_batch_that_the_model_does_not_take_is_named():
    of = runs(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), [torch.randn(2, 4), torch.randn(2, 5)])
    with pytest.raises(PlanError, match=r"fails on batch 1: RuntimeError: .*on the model's device"):
        of.look(0, lambda site, x: None)
