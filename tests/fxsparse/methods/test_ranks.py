"""Two processes with different data hold the same masks, learned tensors and weights, whatever the method keeps."""

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import fxsparse
from fxsparse import Plan
from fxsparse.methods import acdc, feather, granet, movement, str_, top_kast

RUNS = {
    "acdc": acdc(steps=8, compress=(0.25, 0.75), decompress=(0.5,)),
    "granet": granet(every=2, ramp=4, stop=8),
    "feather": feather(steps=8),
    "top_kast": top_kast(every=2),
    "str": str_(initial=-3.0, weight_decay=0.01),
    "movement": movement(steps=8, warmup=1, cooldown=2),
}


def train(rank, world, directory):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{directory}/rendezvous", rank=rank, world_size=world)
    states = {}
    for name, method in RUNS.items():
        torch.manual_seed(rank)  # other weights and other data on every rank; DDP broadcasts rank 0's
        model = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 8))
        sparse = fxsparse.compile(model, Plan(sparsity=0.8, method=method))
        ddp = DistributedDataParallel(sparse)
        optimizer = torch.optim.SGD(sparse.parameter_groups(0.05), momentum=0.9)
        sparse.attach(optimizer)
        for step in range(8):
            optimizer.zero_grad()
            x = torch.randn(12, 16, generator=torch.Generator().manual_seed(100 * step + rank))
            (ddp(x) - 1).square().mean().backward()
            optimizer.step()
        sparse.verify_sync()
        states[name] = dict(sparse.state_dict())
    torch.save(states, f"{directory}/rank{rank}.pt")
    dist.destroy_process_group()


def test_ranks_agree_on_everything_a_method_keeps(tmp_path):
    mp.spawn(train, (2, str(tmp_path)), nprocs=2)
    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2))
    for name in RUNS:
        assert first[name].keys() == second[name].keys()
        for key, value in first[name].items():
            assert torch.equal(value, second[name][key]), (name, key)
