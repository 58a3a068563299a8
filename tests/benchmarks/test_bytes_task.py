import math

import torch
from torch import nn

from benchmarks.tasks import bytes as task
from benchmarks.tasks.comparison import run, settings_of


class SameForAll(nn.Module):
    """Every byte is as likely as every other."""

    def forward(self, x):
        return torch.zeros(*x.shape, 256)


def raw(x):
    return x.byte().numpy().tobytes()


def test_no_module_is_both_learnt_from_and_scored_on():
    assert sorted(task.MODULES) == task.MODULES
    assert len(task.HELD_OUT) * 10 >= len(task.MODULES) - 10
    learnt = raw(task.train_text())
    assert not [module for module in task.HELD_OUT if raw(task.text([module])) in learnt]


def test_labels_are_the_bytes_that_follow():
    inputs, labels = task.draw(torch.Generator().manual_seed(0))
    assert inputs.shape == labels.shape == (task.BATCH, task.TOKENS)
    assert torch.equal(inputs[:, 1:], labels[:, :-1])
    assert raw(torch.cat((inputs[0], labels[0, -1:]))) in raw(task.train_text())


def test_the_score_is_in_bits():
    assert math.isclose(task.evaluate(SameForAll()), 8, rel_tol=1e-5)


def test_the_model_sees_no_later_byte():
    model = task.TASK.models["transformer"]().eval()
    x = task.draw(torch.Generator())[0][:1]
    changed = x.clone()
    changed[0, 64:] = 0
    assert torch.equal(model(x)[0, :64], model(changed)[0, :64])
    assert not torch.equal(model(x)[0, 64:], model(changed)[0, 64:])


def test_sparse_training_learns_more_than_the_frequency_of_bytes(monkeypatch):
    monkeypatch.setattr(task, "HELD_OUT", ["getopt"])  # scoring all of them takes seconds
    monkeypatch.setattr(task, "BATCH", 12)
    task.test_text.cache_clear()
    _, result = run(task.TASK, settings_of(task.TASK, "transformer", "static", 0.9, steps=40, seed=0))
    task.test_text.cache_clear()
    counts = task.train_text().bincount(minlength=256).double() / len(task.train_text())
    entropy = -(counts * counts.clamp(min=1e-12).log2()).sum().item()
    assert result["score"] < entropy
