import sys

import pytest
import torch
from torch import nn

from fxsparse.demo.digits import accuracy, load_digits, train
from fxsparse.errors import UnsupportedError


class LinearClassifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(64, 10)

    def forward(self, x):
        return self.linear(x.flatten(1))


def test_the_split_is_fixed_normalised_and_keeps_every_image_once():
    first, second = load_digits(), load_digits()
    assert torch.equal(first.test_images, second.test_images)
    assert first.train_images.shape == (1437, 1, 8, 8)
    assert len(first.train_labels) + len(first.test_labels) == 1797
    assert abs(first.train_images.mean()) < 1e-5
    assert abs(first.train_images.std() - 1) < 1e-5


def test_training_a_linear_model_learns_the_digits():
    torch.manual_seed(0)
    model, digits = LinearClassifier(), load_digits()
    train(model, digits.draw, steps=200, rate=1e-2)
    assert accuracy(model, digits) > 90  # a tenth is right by chance


def test_the_same_seed_gives_the_same_weights():
    digits, weights = load_digits(), []
    for _ in range(2):
        torch.manual_seed(0)
        model = LinearClassifier()
        train(model, digits.draw, steps=3, seed=1)
        weights.append(model.linear.weight)
    assert torch.equal(*weights)


def test_attach_gets_the_optimizer_before_the_first_step():
    model, seen = LinearClassifier(), []
    before = model.linear.weight.clone()
    train(
        model,
        load_digits().draw,
        steps=1,
        attach=lambda o: seen.append((o, torch.equal(model.linear.weight, before))),
    )
    assert [unchanged for _, unchanged in seen] == [True]
    assert not torch.equal(model.linear.weight, before)


def test_without_scikit_learn_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(UnsupportedError, match=r"pip install 'fxsparse\[demo\]'"):
        load_digits()
