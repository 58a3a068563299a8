"""What plain symbolic tracing gets silently wrong, one test each, and how refusals are named."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from fxsparse.errors import TraceError
from fxsparse.pipeline import Program
from fxsparse.trace import capture
from fxsparse.trace.symbolic import trace_symbolic


class Lambda(nn.Module):
    """A model with the given forward, a weight and a counter."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function
        self.lin = nn.Linear(4, 4)
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def symbolic(model: nn.Module, x: Any = None) -> Program:
    program = capture(model, x)
    assert program.tier == "symbolic", program.notes
    return program


def test_unused_parameters_and_buffers_stay_in_the_state_dict() -> None:
    model = torchvision.models.googlenet(init_weights=False)
    program = symbolic(model)
    for gm in program.graphs.values():
        assert list(gm.state_dict()) == list(model.state_dict())
        assert all(ours is theirs for ours, theirs in zip(gm.parameters(), model.parameters(), strict=True))
        gm.load_state_dict(model.state_dict(), strict=True)


def test_functional_dropout_follows_the_mode() -> None:
    model = Lambda(lambda self, x: F.dropout(self.lin(x), 0.5, training=self.training)).train()
    program, x = symbolic(model), torch.randn(8, 4)
    assert torch.equal(program.run("eval", x), program.run("eval", x))
    assert not torch.equal(program.run("train", x), program.run("train", x))
    assert program.graphs["train"] is not program.graphs["eval"]


def test_module_dropout_needs_one_graph_only() -> None:
    program = symbolic(nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.BatchNorm1d(4)))
    assert program.graphs["train"] is program.graphs["eval"]
    x = torch.randn(8, 4)
    assert torch.equal(program.run("eval", x), program.run("eval", x))
    assert not torch.equal(program.run("train", x), program.run("train", x))


@pytest.mark.parametrize("start", ["train", "eval"])
def test_batchnorm_of_timm_moves_its_statistics_in_train_only(start: str) -> None:
    model = timm.create_model("efficientnet_b0")
    model.train(start == "train")
    program, x = symbolic(model), torch.randn(2, 3, 64, 64)
    means = [name for name in model.state_dict() if name.endswith("running_mean")]
    before = copy.deepcopy(model.state_dict())
    program.run("eval", x)
    assert all(torch.equal(before[name], model.state_dict()[name]) for name in means)
    program.run("train", x)
    # Every one of its 49 norms, counters included.
    assert len(means) == 49
    assert not any(torch.equal(before[name], model.state_dict()[name]) for name in means)
    assert model.state_dict()["bn1.num_batches_tracked"] == 1


def test_in_place_buffer_updates_are_nodes_and_do_not_run_while_tracing() -> None:
    model = Lambda(lambda self, x: (self.count.add_(1), self.lin(x))[1])
    program = symbolic(model, torch.randn(2, 4))
    assert model.count == 0
    program.run("eval", torch.randn(2, 4))
    program.run("train", torch.randn(2, 4))
    assert model.count == 2


def test_random_numbers_without_inputs_stay_random() -> None:
    program, x = symbolic(Lambda(lambda self, x: self.lin(x) + torch.rand(4))), torch.randn(2, 4)
    assert not torch.equal(program.run("eval", x), program.run("eval", x))


def test_fresh_tensors_written_in_place_do_not_remember_the_last_call() -> None:
    def accumulate(self: Lambda, x: Tensor) -> Tensor:
        total = torch.zeros(2, 4)
        total += self.lin(x)
        return total

    program, x = symbolic(Lambda(accumulate)), torch.randn(2, 4)
    assert torch.equal(program.run("eval", x), program.run("eval", x))


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(4, 4)

    def forward(self, x: Tensor, mask: Tensor | None = None, scale: float = 2.0) -> Tensor:
        x = self.lin(x) * scale
        return x if mask is None else x * mask


def test_an_optional_argument_left_out_is_none_and_not_a_proxy() -> None:
    model, x = Masked(), torch.randn(2, 4)
    for inputs in (None, (x,)):
        program = symbolic(model, inputs)
        assert torch.equal(program.run("eval", x), model(x))
        assert torch.equal(program.run("eval", x, mask=None), model(x))
        with pytest.raises(AssertionError, match="mask has been specialized to have value None"):
            program.run("eval", x, x)


def test_an_optional_argument_that_is_given_stays_an_input() -> None:
    model, x, mask = Masked(), torch.randn(2, 4), torch.tensor([0.0, 1.0, 1.0, 0.0])
    program = symbolic(model, (x, {"mask": mask}))
    assert torch.equal(program.run("eval", x, mask=1 - mask), model(x, 1 - mask))


def test_weights_of_attention_are_visible() -> None:
    model = torchvision.models.vit_b_16(image_size=32, num_classes=3)
    code = symbolic(model).graphs["eval"].code
    assert code.count(".self_attention.in_proj_weight") == code.count(".out_proj.weight") == 12


def test_a_module_with_hooks_runs_as_one_module_so_that_they_fire() -> None:
    model, calls = nn.Sequential(nn.Sequential(nn.Linear(4, 4)), nn.ReLU()), []
    model[0].register_forward_hook(lambda *_: calls.append(1))
    program = symbolic(model)
    assert calls == []
    program.run("eval", torch.randn(2, 4))
    assert calls == [1]
    assert program.hidden == {"0.0.weight": "0 runs as one module"}


def test_hooks_of_the_root_refuse_the_trace() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    model.register_forward_hook(lambda *_: None)
    with pytest.raises(TraceError, match="Sequential has hooks, which a trace would run once and forget"):
        trace_symbolic(model)


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin(x) if x.sum() > 0 else -self.lin(x)


def test_an_untraceable_child_runs_as_one_module_with_the_reason() -> None:
    model, x = nn.Sequential(nn.Linear(4, 4), Branching()), torch.randn(3, 4)
    program = symbolic(model)
    [note] = program.notes
    assert note.startswith(
        "symbolic: 1 (Branching) runs as one module: TraceError: symbolically traced variables cannot be used as "
        "inputs to control flow ("
    )
    assert "test_symbolic.py" in note
    assert "if x.sum() > 0" in note
    assert list(program.hidden) == ["1.lin.weight"]
    assert torch.equal(program.run("eval", x), model(x))
    assert "_1_lin" not in program.graphs["eval"].code  # nothing is left of the failed trace


def test_a_factory_in_a_graph_leaves_later_traces_alone() -> None:
    model = Lambda(lambda m, x: m.lin(x) + torch.arange(x.shape[1]))
    program = capture(model.eval(), torch.randn(2, 4), modes=("eval",))
    assert program.tier == "symbolic"
    assert "arange" in program.graphs["eval"].code
    torch.fx.symbolic_trace(nn.Linear(2, 2))  # raised KeyError: 'torch.arange'
