"""Whether the ranks of a process group hold the same masks."""

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from fxsparse.errors import InvariantError
from fxsparse.storage import CompactWeight, MaskedWeight

ADVICE = (
    "Build the model from the same seed on every rank, wrap it in DistributedDataParallel or call fully_shard on it, "
    "and update masks on all ranks. Scores that each rank made of its own batches (fxsparse.saliency) differ: "
    "dist.all_reduce them before compile(..., initial_scores=...), as docs/distributed.md shows. A checkpoint brings "
    "masks together again."
)


def verify_same(
    weights: Iterable[tuple[str, CompactWeight | MaskedWeight]],
    groups: Sequence[dist.ProcessGroup | None] = (None,),
) -> None:
    """Raise InvariantError if ranks hold different masks; a no-op without a process group.

    All ranks have to call it, or those of `groups`, one for each dimension of a mesh.  One number for each of two sums
    over the active entries and a weight is compared.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return
    names, prints = [], []
    for name, weight in weights:
        names.append(name)
        prints.append(fingerprint(weight.active()).to((prints or [weight.active()])[0].device))
    if not prints:
        return
    low = torch.stack(prints)
    high = low.clone()
    for group in groups:
        dist.all_reduce(low, dist.ReduceOp.MIN, group)
        dist.all_reduce(high, dist.ReduceOp.MAX, group)
    for name, same in zip(names, (low == high).all(1).tolist(), strict=True):
        if not same:
            raise InvariantError(
                f"ranks hold different masks of {name!r}: expected the same on all {dist.get_world_size()} ranks. "
                f"{ADVICE}"
            )


def fingerprint(positions: Tensor) -> Tensor:
    """A hash of the positions that depends on their order, int64 [2]."""
    order = torch.arange(1, positions.numel() + 1, device=positions.device)
    return torch.stack([positions.sum(), (positions * order % 1_000_003 * (order % 8191)).sum()])
