"""A rank dies in the middle of training; all start again from the last checkpoint, and nothing tells the runs apart."""

import os
import signal

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import fxsparse
from fxsparse import Plan
from fxsparse.methods import gse, rigl
from tests import ranks

STEPS, EVERY, DIES_AT = 12, 3, 8
RIGL = rigl(every=2, stop=1_000, drop_fraction=0.4, decay="constant")
RUNS = {
    "masked, FSDP2": ("masked", RIGL, fully_shard),
    "compact, FSDP2": ("compact", gse(every=2, stop=1_000), fully_shard),
    "masked, DDP": ("masked", RIGL, DistributedDataParallel),
    "compact, DDP": ("compact", RIGL, DistributedDataParallel),
}


def build(storage, method, wrap):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 30), nn.ReLU(), nn.Linear(30, 10))
    sparse = fxsparse.compile(model, Plan(sparsity=0.7, storage=storage, method=method))
    call = wrap(sparse)
    optimizer = torch.optim.AdamW(call.parameters(), lr=0.01)
    sparse.attach(optimizer)
    return sparse, call, optimizer


def states(built):
    found = {}
    for name, (_, call, optimizer) in built.items():
        model, state = get_state_dict(call, optimizer)
        found[name] = {"model": model, "optimizer": state}
    return found


def train(rank, world, folder, dies_at=None):
    """Train all four from the last checkpoint, if there is one, and save every third step; the final state."""
    built = {name: build(*run) for name, run in RUNS.items()}
    done = [int(path.name) for path in folder.glob("[0-9]*") if (path / ".metadata").exists()]
    if done:
        loaded = states(built)
        dcp.load(loaded, checkpoint_id=folder / str(max(done)))
        for name, (_, call, optimizer) in built.items():
            state = loaded[name]
            set_state_dict(
                call, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
            )
    for step in range(max(done, default=0), STEPS):
        x = torch.randn(12, 16, generator=torch.Generator().manual_seed(step))[rank::world]
        for number, (_, call, optimizer) in enumerate(built.values()):
            optimizer.zero_grad()
            loss = call(x).square().mean()
            if (step, rank, number) == (dies_at, 0, 2):
                os.kill(os.getpid(), signal.SIGKILL)
            loss.backward()
            optimizer.step()
        if (step + 1) % EVERY == 0 and step + 1 < STEPS:
            dcp.save(states(built), checkpoint_id=folder / str(step + 1))
    for sparse, _, _ in built.values():
        sparse.verify_sync()
        assert int(sparse.state_dict()["fxsparse_step"]) == STEPS
    return {
        name: {"masks": sparse.masks(), "weights": sparse.dense_state_dict()}
        for name, (sparse, _, _) in built.items()
    }


def undisturbed_then_killed(rank, world, folder):
    for part in ("calm", "storm"):
        (folder / part).mkdir(exist_ok=True)
    dist.barrier()
    torch.save(train(rank, world, folder / "calm"), folder / f"calm{rank}.pt")
    train(rank, world, folder / "storm", DIES_AT)


def again(rank, world, folder):
    torch.save(train(rank, world, folder / "storm"), folder / f"storm{rank}.pt")


def test_ranks_that_resume_after_one_was_killed_end_bit_for_bit_as_those_that_nobody_killed(tmp_path):
    with pytest.raises(mp.ProcessExitedException, match="SIGKILL"):
        ranks.start(undisturbed_then_killed, 2, tmp_path)
    saved = sorted(int(path.name) for path in (tmp_path / "storm").iterdir())
    assert saved == [3, 6]  # it died at the ninth step
    ranks.start(again, 2, tmp_path)
    for rank in range(2):
        calm, storm = (
            torch.load(tmp_path / f"{part}{rank}.pt", weights_only=True) for part in ("calm", "storm")
        )
        for name in RUNS:
            for kind in ("masks", "weights"):
                for key, value in calm[name][kind].items():
                    assert torch.equal(storm[name][kind][key], value), (name, kind, key)
