"""Functions run by several gloo processes, which are forked from one that has imported torch and fxsparse already."""

import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

multiprocessing.set_forkserver_preload(
    ["fxsparse", "torch.distributed.checkpoint", "torch.distributed.fsdp", "torch.nn.parallel"]
)


def start(function: Callable[..., None], world: int, folder: Path, *args: Any, join: bool = True) -> Any:
    """Call ``function(rank, world, folder, *args)`` in `world` processes of one group; waits for them with `join`."""
    rendezvous = folder / f"rendezvous-{function.__name__}-{world}-{len(list(folder.iterdir()))}"
    return mp.start_processes(
        _on_rank, (function, world, folder, rendezvous, args), world, join=join, start_method="forkserver"
    )


def _on_rank(
    rank: int, function: Callable[..., None], world: int, folder: Path, rendezvous: Path, args: Any
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world)
    function(rank, world, folder, *args)
    dist.destroy_process_group()
