"""Gloo processes under DistributedDataParallel train as one process does on the whole batch."""

import itertools
from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import fxsparse
from benchmarks.models import ByteTransformer
from benchmarks.tasks.bytes import train_text
from fxsparse import Plan
from fxsparse.errors import InvariantError
from fxsparse.methods import gse, rigl, spartan, srigl
from tests import ranks

TOKENS, BATCH, STEPS = 16, 8, 12
MOVING = {"every": 3, "stop": 1_000, "drop_fraction": 0.4, "decay": "constant"}
METHODS = {
    "rigl": rigl(**MOVING),
    "srigl": srigl(**MOVING, gamma_sal=0.95),
    "gse": gse(every=3, stop=1_000),
    "spartan": spartan(steps=12),
}
CASES = [(name, s) for name in METHODS for s in ("masked", "compact") if (name, s) != ("spartan", "compact")]


def gpt(method, storage):
    """A language model over bytes in fp64, so that the order of a sum decides nothing."""
    torch.manual_seed(0)
    model = ByteTransformer(width=16, depth=2, heads=2, tokens=TOKENS).double()
    return fxsparse.compile(model, Plan(sparsity=0.8, storage=storage, method=method, exclude=("head",)))


def windows(step):
    starts = torch.randint(10_000, (BATCH, 1), generator=torch.Generator().manual_seed(step))
    found = train_text()[starts + torch.arange(TOKENS + 1)]
    return found[:, :-1], found[:, 1:]


def train(sparse, rank=0, world=1, wrap=DistributedDataParallel, micro_batches=1):
    """Losses on the whole batch and masks after every step; this rank sees every `world`-th window."""
    call = wrap(sparse) if world > 1 else sparse
    optimizer = torch.optim.AdamW(call.parameters(), lr=0.01)
    sparse.attach(optimizer)
    losses, masks = [], []
    for step in range(STEPS):
        optimizer.zero_grad()
        x, y = (part[rank::world].chunk(micro_batches) for part in windows(step))
        total = torch.zeros((), dtype=torch.float64)
        for k, (inputs, labels) in enumerate(zip(x, y, strict=True)):
            last = k == micro_batches - 1 or world == 1
            with nullcontext() if last else call.no_sync():
                loss = F.cross_entropy(call(inputs).flatten(0, 1), labels.flatten()) / micro_batches
                loss.backward()
            total += loss.detach()
        optimizer.step()
        if world > 1:
            dist.all_reduce(total)
        losses.append(total / world)
        masks.append(sparse.masks())
    return {"losses": torch.stack(losses), "masks": masks, "weights": sparse.dense_state_dict()}


def refused_sync(sparse, rank, storage):
    """What verify_sync says after rank 1 broke a mask."""
    sparse.verify_sync()
    if rank == 1:
        weight = next(iter(sparse.weights()))[1]
        weight.mask.logical_not_() if storage == "masked" else weight.indices[1].add_(1)
    with pytest.raises(InvariantError) as caught:
        sparse.verify_sync()
    return str(caught.value)


def many(rank, world, folder):
    """All that two processes have to show, in one start of them."""
    shown = {}
    for name, storage in CASES:
        sparse = gpt(METHODS[name], storage)
        shown[name, storage] = train(sparse, rank, world)
        shown[name, storage]["error"] = refused_sync(sparse, rank, storage)
    for storage in ("masked", "compact"):
        shown["micro-batches", storage] = train(gpt(METHODS["rigl"], storage), rank, world, micro_batches=2)
        for order, wrap in ORDERS.items():
            torch._dynamo.reset()
            shown[order, storage] = other_data_on_every_rank(rank, storage, wrap)
    torch.save(shown, folder / f"rank{rank}.pt")


ORDERS = {
    "DDP": DistributedDataParallel,
    "compile -> DDP": lambda sparse: DistributedDataParallel(torch.compile(sparse, backend="eager")),
    "DDP -> compile": lambda sparse: torch.compile(DistributedDataParallel(sparse), backend="eager"),
}


def other_data_on_every_rank(rank, storage, wrap):
    """And other weights, of which DDP broadcasts rank 0's, buffers too."""
    torch.manual_seed(rank)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))
    method = rigl(every=2, stop=1_000, drop_fraction=0.5, decay="constant")
    sparse = fxsparse.compile(model, Plan(sparsity=0.8, storage=storage, method=method))
    ddp = wrap(sparse)
    optimizer = torch.optim.AdamW(ddp.parameters(), lr=0.01)
    sparse.attach(optimizer)
    sparse.track_itop()
    for step in range(8):
        optimizer.zero_grad()
        x = torch.randn(12, 16, generator=torch.Generator().manual_seed(100 * step + rank))
        ddp(x).square().mean().backward()
        optimizer.step()
    return {"state": sparse.state_dict(), "rows": sparse.report.topology.rows()}


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    """What each of two processes found."""
    folder = tmp_path_factory.mktemp("ddp")
    ranks.start(many, 2, folder)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(2)]


def same_run(found, expected):
    torch.testing.assert_close(found["losses"], expected["losses"], rtol=1e-10, atol=0)
    for step, masks in enumerate(expected["masks"]):
        for name, mask in masks.items():
            assert torch.equal(mask, found["masks"][step][name]), (step, name)
    for name, weight in expected["weights"].items():
        torch.testing.assert_close(found["weights"][name], weight, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(("name", "storage"), CASES)
def test_two_processes_train_as_one_on_the_whole_batch_and_a_broken_mask_is_found(name, storage, shown):
    alone = train(gpt(METHODS[name], storage))
    moved = [any(not torch.equal(a[n], b[n]) for n in a) for a, b in itertools.pairwise(alone["masks"])]
    assert sum(moved) >= 3
    for rank in shown:
        same_run(rank[name, storage], alone)
        assert (
            "ranks hold different masks of 'blocks.0.attention.to_qkv.weight'" in rank[name, storage]["error"]
        )


@pytest.mark.parametrize("storage", ["masked", "compact"])
def test_micro_batches_without_sync_change_nothing(storage, shown):
    for rank in shown:
        same_run(rank["micro-batches", storage], shown[0]["rigl", storage])


@pytest.mark.parametrize("storage", ["masked", "compact"])
@pytest.mark.parametrize("order", ORDERS)
def test_ranks_that_began_apart_stay_together_in_every_order_of_wrappers(order, storage, shown):
    first, second = (rank[order, storage] for rank in shown)
    for name, value in first["state"].items():
        assert torch.equal(value, second["state"][name]), name
        torch.testing.assert_close(value, shown[0]["DDP", storage]["state"][name])
    assert first["rows"] == second["rows"] == shown[0]["DDP", storage]["rows"]
