"""Exported programs: structure of inputs and outputs, free sizes, no pinned dtype, what is refused."""

from collections import namedtuple

import pytest
import torch
from torch import Tensor, nn

from fxsparse.errors import TraceError
from fxsparse.pipeline import Program
from fxsparse.trace import capture
from fxsparse.trace.export import trace_export

Result = namedtuple("Result", ["logits", "hidden"])


class Nested(nn.Module):
    """Control flow on sizes keeps symbolic tracing out; a norm and a dropout make the modes differ."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 2)
        self.unused = nn.Parameter(torch.zeros(3))
        self.register_buffer("offset", torch.ones(4), persistent=False)

    def forward(self, pair: tuple[Tensor, Tensor], *, scale: Tensor) -> Result:
        x, y = pair
        if x.shape[1] != 4:
            raise ValueError("expected 4 features")
        with torch.no_grad():
            shift = self.offset * 2
        hidden = torch.dropout(self.norm(self.lin(x + y)), 0.5, self.training) + shift
        return Result(self.head(hidden) * scale, hidden)


def inputs(batch: int) -> tuple[tuple[Tensor, Tensor], dict[str, Tensor]]:
    return (torch.randn(batch, 4), torch.randn(batch, 4)), {"scale": torch.randn(batch, 1)}


@pytest.fixture(scope="module")
def exported() -> Program:
    torch.manual_seed(0)
    program = capture(Nested(), inputs(3))
    assert program.tier == "export", program.notes
    return program


def test_inputs_outputs_and_batches_of_other_sizes(exported: Program) -> None:
    pair, options = inputs(7)
    expected = exported.skeleton.eval()(pair, **options)
    got = exported.run("eval", pair, **options)
    assert type(got).__name__ == "Result"
    torch.testing.assert_close(got.logits, expected.logits)


def test_keys_order_and_identity_survive(exported: Program) -> None:
    for gm in exported.graphs.values():
        assert list(gm.state_dict()) == list(exported.skeleton.state_dict())
        assert gm.unused is exported.skeleton.unused
        assert "offset" not in gm.state_dict()


def test_modes_are_two_graphs(exported: Program) -> None:
    pair, options = inputs(4)
    first, second = (exported.run("train", pair, **options) for _ in range(2))
    assert not torch.equal(first.logits, second.logits)
    before = exported.skeleton.norm.running_mean.clone()
    exported.run("eval", pair, **options)
    assert torch.equal(before, exported.skeleton.norm.running_mean)
    exported.run("train", pair, **options)
    assert not torch.equal(before, exported.skeleton.norm.running_mean)


def test_a_batch_of_one_is_no_constant() -> None:
    program = capture(Nested(), inputs(1), modes=("eval",))
    pair, options = inputs(5)
    assert program.run("eval", pair, **options).logits.shape == (5, 2)


def test_dtype_is_not_pinned(exported: Program) -> None:
    program = capture(Nested(), inputs(3), modes=("eval",))
    program.skeleton.double()
    (x, y), options = inputs(3)
    got = program.graphs["eval"]((x.double(), y.double()), scale=options["scale"].double())
    assert got.logits.dtype == torch.float64


def test_hooks_refuse_an_export() -> None:
    model = Nested()
    model.lin.register_forward_hook(lambda *_: None)
    with pytest.raises(TraceError, match="lin has hooks, which an export would run once and forget"):
        trace_export(model, inputs(3))


def test_a_fixed_batch_is_noted() -> None:
    class Fixed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.view(3, 4) if x.shape[0] == 3 else x

    _, notes = trace_export(Fixed(), torch.randn(3, 4))
    assert notes == ["the batch size is fixed at [3]: the model's code depends on it"]


def test_an_exported_graph_that_reads_sizes_takes_vmap() -> None:
    class Heads(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            x = x if x.shape[1] < 100 else x[:, :100]
            return x.reshape(*x.shape[:2], 2, 4).transpose(1, 2)

    program = capture(Heads(), torch.randn(2, 3, 8), modes=("eval",))
    assert program.tier == "export", program.notes
    x = torch.randn(4, 2, 5, 8)
    assert torch.equal(torch.vmap(program.graphs["eval"])(x), torch.vmap(Heads())(x))
