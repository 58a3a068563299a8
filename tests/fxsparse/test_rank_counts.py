"""Ranks that score their own batches are found, and those that add their scores up agree."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import fxsparse
from fxsparse import Plan
from fxsparse.errors import InvariantError
from fxsparse.methods import set_
from tests import ranks

PLAN = Plan(sparsity=0.8, method=set_(init="snip", every=1), allocation="global_score", storage="masked")


def scored(rank, summed):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))
    own = [torch.randn(4, 16, generator=torch.Generator().manual_seed(rank)) * 3**rank]
    scores = fxsparse.saliency(model, PLAN, lambda m, x: m(x).square().mean(), own)
    for score in scores.values() if summed else ():
        dist.all_reduce(score)
    return fxsparse.compile(model, PLAN, initial_scores=scores)


def two_steps(sparse, call, rank):
    optimizer = torch.optim.SGD(sparse.parameters(), lr=0.1)
    sparse.attach(optimizer)
    for step in range(2):
        call(torch.randn(4, 16, generator=torch.Generator().manual_seed(2 * step + rank))).sum().backward()
        optimizer.step()


def two(rank, world, folder):
    sparse = scored(rank, summed=True)
    sparse.verify_sync()
    two_steps(sparse, DistributedDataParallel(sparse), rank)
    sparse.verify_sync()
    apart = scored(rank, summed=False)
    with pytest.raises(InvariantError) as sync:
        apart.verify_sync()
    ddp, message = DistributedDataParallel(apart), ""
    try:
        two_steps(apart, ddp.module, rank)
    except InvariantError as error:
        message = str(error)
    sharded = scored(rank, summed=True)
    fully_shard(sharded)
    two_steps(sharded, sharded, rank)
    sharded.verify_sync()
    other = scored(rank, summed=False)
    fully_shard(other)
    with pytest.raises(InvariantError) as shards:
        two_steps(other, other, rank)
    assert "ranks hold different masks of '0.weight'" in str(shards.value)
    torch.save({"sync": str(sync.value), "step": message, "masks": sparse.masks()}, folder / f"{rank}.pt")


def test_scores_of_own_batches_are_found_and_their_sum_agrees(tmp_path):
    ranks.start(two, 2, tmp_path)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert all(torch.equal(mask, second["masks"][name]) for name, mask in first["masks"].items())
    for rank in (first, second):
        assert "Scores that each rank made of its own batches" in rank["sync"]
    assert first["step"] == ""
    assert "ranks decided for different counts: on rank 1 expected '0.weight' with" in second["step"]
    assert "dist.all_reduce them before compile(..., initial_scores=...)" in second["step"]
