"""GELU spelled out becomes one call, and a kernel takes it in."""

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers.activations import ACT2FN

import fxsparse
from fxsparse import choosing, inference, kernel
from fxsparse.choosing import Choice
from fxsparse.inference import Speed
from fxsparse.passes import Functionalize, RecognizeGelu
from fxsparse.pipeline import PassContext, run_passes
from fxsparse.report import Report
from fxsparse.trace import capture


class Block(nn.Module):
    """Linear layers with an activation between, the first as GPT-2 has it: a product of rows behind a view."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(8, 16) / 3), nn.Parameter(torch.randn(16))
        self.act, self.out = activation, nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        rows = torch.addmm(self.bias, x.view(-1, 8), self.weight).view(2, 3, 16)
        return self.out(self.act(rows))


def recognized(model: nn.Module, x: Tensor) -> tuple[int, list[object]]:
    ctx = PassContext(None, "infer", capture(model, x, modes=("eval",)), Report(), x)
    run_passes([Functionalize(), RecognizeGelu()], ctx)
    return ctx.report.passes[1]["rewrites"], [node.target for node in ctx.program.graphs["eval"].graph.nodes]


@pytest.mark.parametrize("name", ["gelu_new", "gelu_fast"])
def test_finds_the_spellings_of_transformers(name: str) -> None:
    model, x = Block(ACT2FN[name]).eval(), torch.randn(2, 3, 8)
    rewrites, targets = recognized(model, x)
    assert rewrites == 1
    at = targets.index(F.gelu)
    assert targets[at - 1] is F.linear, "the activation was not moved before the view"
    assert torch.tanh not in targets


@pytest.mark.parametrize("spelling", [lambda x: 0.5 * x * (1 + torch.tanh(x)), lambda x: torch.tanh(x**3)])
def test_leaves_what_only_looks_like_it(spelling: object) -> None:
    class Other(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return spelling(x)  # type: ignore[operator]

    rewrites, targets = recognized(Other(), torch.randn(4))
    assert rewrites == 0
    assert F.gelu not in targets


def test_leaves_a_gelu_whose_inner_value_is_read() -> None:
    class Leaks(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            half = 0.5 * x
            inner = torch.tanh(0.7978845608028654 * (x + 0.044715 * torch.pow(x, 3.0)))
            return half * (1.0 + inner), inner

    assert recognized(Leaks(), torch.randn(4))[0] == 0


def test_keeps_a_view_that_others_read() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.act = nn.Linear(8, 6), ACT2FN["gelu_new"]

        def forward(self, x: Tensor) -> Tensor:
            rows = self.fc(x).view(-1, 3)
            return self.act(rows) + rows

    model, x = Twice().eval(), torch.randn(2, 8)
    assert recognized(model, x)[0] == 1
    compiled = fxsparse.compile(model, mode="infer", example_inputs=(x,))
    torch.testing.assert_close(compiled(x), model(x))


def test_gpt2s_product_and_gelu_are_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    def choose(*call, **options) -> Choice:
        return Choice(kernel.registered()["cpu-csr"], {"dense": 20.0, "cpu-csr": 10.0}, {}, "measured")

    monkeypatch.setattr(choosing, "choose", choose)
    monkeypatch.setattr(inference, "speed_of", lambda *call: Speed(200.0, 100.0, 2.0))
    config = transformers.GPT2Config(
        n_layer=1, n_embd=32, n_head=2, vocab_size=50, use_cache=False, bos_token_id=1, eos_token_id=1
    )
    torch.manual_seed(0)
    model, ids = transformers.GPT2LMHeadModel(config).eval(), torch.randint(0, 50, (2, 8))
    weight = model.transformer.h[0].mlp.c_fc.weight
    with torch.no_grad():
        weight.mul_(torch.rand_like(weight) > 0.9)
    compiled = fxsparse.compile(model, mode="infer", example_inputs=(ids,))
    activations = [node.kwargs.get("activation") for node in compiled.forward_graph.graph.nodes]
    assert "gelu_tanh" in activations
    torch.testing.assert_close(compiled(ids).logits, model(ids).logits, atol=1e-5, rtol=1e-4)
