"""Two gloo processes with different data keep identical masks, in both storages."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import fxsparse
from fxsparse import Plan
from fxsparse.errors import InvariantError
from fxsparse.methods import rigl, set_, srigl


def train(rank, world, directory, storage, method):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{directory}/rendezvous", rank=rank, world_size=world)
    torch.manual_seed(rank)  # other weights and other data on every rank; DDP broadcasts rank 0's
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))
    sparse = fxsparse.compile(model, Plan(sparsity=0.8, storage=storage, method=method))
    ddp = DistributedDataParallel(sparse)
    optimizer = torch.optim.AdamW(ddp.parameters(), lr=0.01)
    sparse.attach(optimizer)
    sparse.track_itop()
    for step in range(20):
        optimizer.zero_grad()
        x = torch.randn(12, 16, generator=torch.Generator().manual_seed(100 * step + rank))
        ddp(x).square().mean().backward()
        optimizer.step()
    sparse.verify_sync()
    rows = sparse.report.topology.rows()
    saved = {"state": sparse.state_dict(), "masks": sparse.masks(), "rows": rows}
    torch.save(saved, f"{directory}/rank{rank}.pt")
    if rank == 1:
        mask = next(iter(sparse.weights()))[1]
        mask.mask.logical_not_() if storage == "masked" else mask.indices[1].add_(1)
    try:
        sparse.verify_sync()
    except InvariantError as error:
        torch.save(str(error), f"{directory}/error{rank}.pt")
    dist.destroy_process_group()


def moving(build, **options):
    return build(every=2, stop=1_000, drop_fraction=0.5, decay="constant", **options)


@pytest.mark.parametrize(
    ("storage", "method"),
    [
        ("masked", moving(rigl)),
        ("compact", moving(rigl)),
        ("compact", moving(rigl, variant="torch")),
        ("masked", moving(set_)),
    ],
    ids=["masked-rigl", "compact-rigl", "compact-rigl-torch", "masked-set"],
)
def test_masks_and_weights_stay_identical_and_a_broken_rank_is_found(storage, method, tmp_path):
    mp.spawn(train, (2, str(tmp_path), storage, method), nprocs=2)
    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2))
    for part in ("state", "masks"):
        for name, value in first[part].items():
            assert torch.equal(value, second[part][name]), name
    assert first["rows"] == second["rows"]
    assert {row["name"] for row in first["rows"]} == set(first["masks"])
    for rank in range(2):
        message = torch.load(tmp_path / f"error{rank}.pt", weights_only=True)
        assert "ranks hold different masks of '0.weight'" in message


def train_on_shares(storage, rank=0, world=1):
    """Masks after 12 steps with SRigL, of which this rank saw every `world`-th row of the batches."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8)).double()
    method = moving(srigl, gamma_sal=0.95)
    sparse = fxsparse.compile(model, Plan(sparsity=0.8, storage=storage, method=method))
    wrapped = DistributedDataParallel(sparse) if world > 1 else sparse
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1)
    sparse.attach(optimizer)
    for step in range(12):
        optimizer.zero_grad()
        x = torch.randn(12, 16, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        wrapped(x[rank::world]).square().mean().backward()
        optimizer.step()
    return sparse.masks()


def save_masks(rank, world, directory, storage):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{directory}/rendezvous", rank=rank, world_size=world)
    torch.save(train_on_shares(storage, rank, world), f"{directory}/masks{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("storage", ["masked", "compact"])
def test_gradients_are_summed_over_ranks_before_their_sign_is_dropped(storage, tmp_path):
    mp.spawn(save_masks, (2, str(tmp_path), storage), nprocs=2)
    alone = train_on_shares(storage)
    for rank in range(2):
        masks = torch.load(tmp_path / f"masks{rank}.pt", weights_only=True)
        assert all(torch.equal(mask, masks[name]) for name, mask in alone.items())
