"""Whether ranks decided for the same masks, asked in the course of training."""

from collections.abc import Iterable, Mapping

import torch.distributed as dist

from fxsparse import sharding
from fxsparse.errors import InvariantError
from fxsparse.method import Method
from fxsparse.ranks import ADVICE, verify_same
from fxsparse.storage import CompactWeight, MaskedWeight
from fxsparse.update_mask import Target


def verify_counts(
    weights: Iterable[tuple[str, CompactWeight | MaskedWeight]],
    targets: Mapping[str, Target],
    method: Method,
    step: int,
) -> None:
    """Raise InvariantError where a mask, which DistributedDataParallel sent from rank 0, has not the count that was
    decided on this rank.  Nothing is communicated; without a process group, a no-op.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return
    for name, weight in weights:
        if not isinstance(weight, MaskedWeight) or not weight.parameter.requires_grad:
            continue
        got = int(weight.mask.count_nonzero())
        if not targets[name].allows(got, step, method):
            raise InvariantError(
                f"ranks decided for different counts: on rank {dist.get_rank()} expected {name!r} with "
                f"{targets[name].nnz_at(step, method)} active entries after {step} steps, got a mask with {got}. "
                f"{ADVICE}"
            )


def verify_shards(weights: Mapping[str, CompactWeight | MaskedWeight]) -> None:
    """Raise InvariantError where weights lie in shards and the ranks that hold them hold different masks.

    All of these ranks have to call it, as they do before an update, which gathers the shards.
    """
    for weight in weights.values():
        trained = weight.values if isinstance(weight, CompactWeight) else weight.parameter
        if sharding.is_sharded(trained):
            return verify_same(weights.items(), trained.device_mesh.get_all_groups())  # type: ignore[operator]
