"""Models as people write them: each works, and where no graph can be captured the line and the way out are named."""

import inspect

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import fxsparse
from fxsparse import Plan
from fxsparse.errors import TraceError
from fxsparse.methods import static

PLAN = Plan(sparsity=0.5, method=static("magnitude"), storage="masked")


class Branch(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(16, 32), nn.Linear(32, 8)

    def forward(self, x):
        hidden = self.first(x)
        if hidden.sum() > 0:
            hidden = hidden.relu()
        return self.last(hidden)


class Tripled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, grad):
        return 3 * grad * ctx.saved_tensors[0]


class CustomBackward(Branch):
    def forward(self, x):
        return self.last(Tripled.apply(self.first(x)))


class Tanh(nn.Module):
    def forward(self, weight):
        return weight.tanh()


def nested():
    return nn.Sequential(nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8)), nn.Linear(8, 8))


def hooked(where):
    model = nested()
    module = model if where == "root" else model.get_submodule(where.split()[0])
    if "backward" in where:
        module.register_full_backward_hook(lambda module, inputs, outputs: (2 * inputs[0],))
    elif "before" in where:
        module.register_forward_pre_hook(lambda module, inputs: (inputs[0] + 1,))
    else:
        module.register_forward_hook(lambda module, inputs, output: 2 * output)
    return model


def parametrized(how):
    model = nested()
    if how == "tanh":
        parametrize.register_parametrization(model[0][0], "weight", Tanh())
    else:
        parametrizations.weight_norm(model[0][0])
    return model


MODELS = {
    "a branch on a tensor": Branch,
    "an autograd.Function": CustomBackward,
    **{
        f"hook: {where}": lambda where=where: hooked(where)
        for where in ("0.0", "0", "0 before", "root", "1 backward")
    },
    **{how: lambda how=how: parametrized(how) for how in ("tanh", "weight norm")},
}


def step(module, x):
    """Output, and gradients by name, of one train step."""
    module.train().zero_grad()
    out = module(x)
    out.square().sum().backward()
    return out.detach(), {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


@pytest.mark.filterwarnings(
    "ignore:Full backward hook is firing:UserWarning"
)  # the inputs of a leaf need no gradient
@pytest.mark.parametrize("name", MODELS)
def test_it_trains_and_infers_as_the_model_with_the_same_zeros(name):
    torch.manual_seed(0)
    model, x = MODELS[name](), torch.randn(4, 16, requires_grad=True)
    sparse = fxsparse.compile(model, PLAN, example_inputs=(x.detach(),))
    pruned, masks = sparse.to_dense(), sparse.masks()
    (got, grads), (want, expected) = step(sparse, x), step(pruned, x)
    torch.testing.assert_close(got, want)
    assert grads.keys() == expected.keys()
    for key, grad in expected.items():
        torch.testing.assert_close(grads[key], grad * masks[key] if key in masks else grad)
    rows = [row["name"] for row in (*sparse.report.layers, *sparse.report.untouched)]
    assert sorted(rows) == sorted(parameter for parameter, _ in model.named_parameters())
    fast = fxsparse.compile(sparse, mode="infer", example_inputs=(x.detach(),))
    for batch in (x.detach(), -x.detach()):
        torch.testing.assert_close(fast(batch), pruned.eval()(batch))


@pytest.mark.parametrize("name", [name for name in MODELS if name not in ("tanh", "weight norm")])
def test_strict_names_what_is_in_the_way_and_the_way_out(name, capfd):
    with pytest.raises(TraceError) as raised:
        fxsparse.compile(MODELS[name](), PLAN, example_inputs=(torch.randn(4, 16),), strict=True)
    message = str(raised.value)
    assert "Without strict=True" in message
    if name == "a branch on a tensor":
        lines, first = inspect.getsourcelines(Branch.forward)
        line = first + next(k for k, text in enumerate(lines) if "if hidden" in text)
        assert message.count(f"test_user_models.py:{line}: `if hidden.sum() > 0:`") == 2
        assert "torch.where or torch.cond" in message
    elif name == "an autograd.Function":
        assert f"Tripled ({inspect.getsourcefile(Tripled)}:{inspect.getsourcelines(Tripled)[1]})" in message
        assert "register_autograd" in message
    else:
        assert "hooks" in message
        assert "handle.remove()" in message
    assert capfd.readouterr().err == ""


def test_a_parametrized_weight_says_how_to_make_it_a_parameter():
    sparse = fxsparse.compile(parametrized("tanh"), PLAN, example_inputs=(torch.randn(4, 16),))
    [reason] = [row["reason"] for row in sparse.report.untouched if row["name"].endswith("weight.original")]
    assert reason.startswith("0.0 computes it by a parametrization at every call; ")
    assert "remove_parametrizations" in reason
