"""Nothing is dropped inside the block, however the model says it, and no generator moves."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxsparse
from fxsparse import Plan
from fxsparse.dropout_off import dropout_off
from fxsparse.methods import static


class Calls(nn.Module):
    """A linear layer before any function of its output."""

    def __init__(self, function):
        super().__init__()
        self.layer, self.function = nn.Linear(16, 16), function

    def forward(self, x):
        return self.function(self.layer(x), self.training)


FUNCTIONS = {
    "dropout": lambda x, on: F.dropout(x, 0.5, on),
    "in place": lambda x, on: F.dropout(x, training=on, inplace=True),
    "alpha": lambda x, on: F.feature_alpha_dropout(F.alpha_dropout(x, 0.5, on), 0.5, on),
    "channels": lambda x, on: F.dropout3d(F.dropout1d(x, 0.5, on)[..., None], 0.5, on)[..., 0],
    "2d": lambda x, on: F.dropout2d(x[:, None], 0.5, on),
    "torch": lambda x, on: torch.dropout(x, 0.5, on),
    "op": lambda x, on: torch.ops.aten.native_dropout.default(torch.ops.aten.dropout(x, 0.5, on), 0.5, on)[0],
    "attention": lambda x, on: F.scaled_dot_product_attention(x, x, x, None, 0.5 * on),
    "attention by keyword": lambda x, on: F.scaled_dot_product_attention(x, x, x, dropout_p=0.5 * on),
}


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_functions_drop_nothing(function):
    model, x = Calls(function), torch.randn(2, 8, 16)
    expected = copy.deepcopy(model).eval()(x)
    assert not torch.equal(model(x), expected)
    state = torch.get_rng_state()
    with dropout_off(model):
        torch.testing.assert_close(model(x), expected)
        torch.testing.assert_close(torch.fx.symbolic_trace(model)(x), expected)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(model(x), expected)


@pytest.mark.parametrize(
    "model",
    [
        nn.TransformerEncoderLayer(16, 2, 32, dropout=0.5, batch_first=True),
        nn.Sequential(nn.Dropout(0.5), nn.Linear(16, 16), nn.AlphaDropout(0.5), nn.Dropout1d(0.5)),
        nn.GRU(16, 16, 2, dropout=0.5),
    ],
    ids=["transformer", "modules", "rnn"],
)
def test_modules_drop_nothing(model):
    x = torch.randn(2, 8, 16)
    expected = copy.deepcopy(model).eval()(x)
    with dropout_off(model.train()):
        torch.testing.assert_close(model(x), expected)


def test_an_exported_graph_drops_nothing():
    x = torch.randn(2, 8, 16)
    model = Calls(FUNCTIONS["dropout"]).train()
    graph = torch.export.export(model, (x,)).module()
    with dropout_off(graph):
        torch.testing.assert_close(graph(x), copy.deepcopy(model).eval()(x))


def test_scores_do_not_depend_on_the_generator_nor_move_it():
    model = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.1, batch_first=True)
    plan = Plan(sparsity=0.5, method=static(score="snip"))
    found = []
    for seed in range(2):
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        batches = [torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))]
        found.append(fxsparse.saliency(model, plan, lambda m, x: m(x).square().mean(), batches))
        assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(score, found[1][name]) for name, score in found[0].items())


def test_what_is_random_otherwise_is_drawn_as_ever_and_the_generator_put_back():
    model, x = Calls(lambda x, on: x * torch.rand_like(x)), torch.randn(2, 16)
    with dropout_off(model):
        found = model(x)
    torch.testing.assert_close(model(x), found)
