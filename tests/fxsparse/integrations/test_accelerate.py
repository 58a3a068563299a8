"""Accelerate needs no callback: `attach` takes the optimizer that it wraps, and its saved states go on bit for bit."""

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fxsparse
from fxsparse import Plan
from fxsparse.demo.digits import load_digits
from fxsparse.methods import rigl

DIGITS = load_digits()


def build(storage):
    torch.manual_seed(0)
    layers = nn.Flatten(), nn.Linear(64, 48), nn.ReLU(), nn.Dropout(0.1), nn.Linear(48, 10)
    plan = Plan(sparsity=0.8, method=rigl(every=4, stop=100), storage=storage)
    return fxsparse.compile(nn.Sequential(*layers), plan, example_inputs=(DIGITS.train_images[:4],))


def train(storage, precision, epochs, saved=None, resume=None):
    """(the module, its masks before) after epochs of 12 batches, of which two make a step; saves after the first."""
    AcceleratorState._reset_state(
        reset_partial_state=True
    )  # it is one for the process, and keeps its precision
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2, mixed_precision=precision)
    sparse = build(storage)
    before = sparse.masks()
    data = TensorDataset(DIGITS.train_images[:192], DIGITS.train_labels[:192])
    model, optimizer, loader = accelerator.prepare(
        sparse, torch.optim.AdamW(sparse.parameters(), lr=3e-3), DataLoader(data, batch_size=16)
    )
    sparse.attach(optimizer)
    moved = 0
    if resume is not None:
        accelerator.load_state(resume)
    for epoch in range(epochs):
        for images, labels in loader:
            with accelerator.accumulate(model):
                accelerator.backward(F.cross_entropy(model(images), labels))
                optimizer.step()
                optimizer.zero_grad()
                moved += accelerator.sync_gradients and sparse.update_masks(optimizer)
        if saved is not None and epoch == 0:
            accelerator.save_state(saved)
    return sparse, before, moved


@pytest.mark.parametrize(
    ("storage", "precision"), [("masked", "no"), ("compact", "bf16")], ids=["masked", "compact-bf16"]
)
def test_steps_count_once_masks_move_and_a_resumed_run_is_bit_equal(storage, precision, tmp_path):
    sparse, before, moved = train(storage, precision, epochs=2, saved=tmp_path)
    assert int(sparse.get_buffer("fxsparse_step")) == 12  # 24 batches, each explicit call beside the hooks
    assert moved == 3  # in place of steps 0, 4 and 8
    for name, mask in sparse.masks().items():
        assert mask.sum() == before[name].sum()
        assert not torch.equal(mask, before[name])

    resumed, _, _ = train(storage, precision, epochs=1, resume=tmp_path)
    expected = sparse.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in resumed.state_dict().items())

    dense = sparse.to_dense()
    for name, mask in sparse.masks().items():
        assert not dense.get_parameter(name)[~mask].any()


def test_the_example_of_the_documentation_runs(examples, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    AcceleratorState._reset_state(reset_partial_state=True)
    names = {"__name__": "example"}
    (block,) = examples["Accelerate"]
    exec(block, names)
    assert int(names["sparse"].get_buffer("fxsparse_step")) == 12  # 23 batches
    assert names["dense"](DIGITS.test_images).argmax(1).eq(DIGITS.test_labels).float().mean() > 0.3
