"""Averages in compact storage that did not follow their masks are refused however they are read."""

import copy
import pickle

import pytest
import torch
from torch.optim.swa_utils import AveragedModel

import fxsparse
from fxsparse import Plan
from fxsparse.errors import CheckpointError
from fxsparse.methods import rigl


@pytest.fixture
def averages():
    """(one that did not follow the masks, one that did)."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(16, 24), torch.nn.ReLU(), torch.nn.Linear(24, 4))
    x = torch.randn(4, 16)
    plan = Plan(sparsity=0.8, storage="compact", method=rigl(every=2, stop=20))
    sparse = fxsparse.compile(model, plan, example_inputs=(x,))
    optimizer = torch.optim.AdamW(sparse.parameters(), lr=0.01)
    sparse.attach(optimizer)
    left, followed = AveragedModel(sparse), AveragedModel(sparse)
    sparse.attach_average(followed)
    for _ in range(6):
        sparse(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        left.update_parameters(sparse)
        followed.update_parameters(sparse)
    return left, followed


def readings(average, path):
    sparse = average.module
    return {
        "save": lambda: fxsparse.save(sparse, path),
        "state_dict": sparse.state_dict,
        "state_dict of the average": average.state_dict,
        "deepcopy": lambda: copy.deepcopy(sparse),
        "pickle": lambda: pickle.dumps(sparse),
        "to_dense": sparse.to_dense,
    }


def test_an_average_that_did_not_follow_its_masks_cannot_be_read(averages, tmp_path):
    left, followed = averages
    for read in readings(left, tmp_path / "left").values():
        with pytest.raises(CheckpointError, match=r"averaged values by slot.*attach_average"):
            read()
    assert not list(tmp_path.iterdir())
    for read in readings(followed, tmp_path / "followed").values():
        read()
