"""One magnitude threshold for all weights."""

from collections.abc import Sequence

import torch

from fxsparse.allocation.target import Target, Weight
from fxsparse.errors import PlanError


def global_magnitude(specs: Sequence[Weight], target: Target) -> dict[str, int]:
    """{name: nnz}: how many entries of each free weight are among the largest magnitudes of all of them.

    Every weight keeps its largest entry at least.  Equal magnitudes at the threshold go to the first names.

    Raises:
        PlanError: the weights have no values to compare (none given, or meta tensors).
    """
    total, free = target.free_total(specs), target.free(specs)
    if not free:
        return target.forced_counts(specs)
    sizes = [s.numel for s in free]
    scores = torch.cat([_magnitudes(s, target) for s in free])
    firsts = torch.tensor([0, *sizes[:-1]]).cumsum(0)
    tops = torch.stack([part.argmax() for part in scores.split(sizes)]) + firsts
    scores[tops] = torch.inf
    threshold = scores.topk(total).values[-1]
    counts = [int((part > threshold).sum()) for part in scores.split(sizes)]
    missing = total - sum(counts)
    for i, part in enumerate(scores.split(sizes)):
        ties = min(missing, int((part == threshold).sum()))
        counts[i] += ties
        missing -= ties
    return dict(zip((s.name for s in free), counts, strict=True)) | target.forced_counts(specs)


def _magnitudes(spec: Weight, target: Target) -> torch.Tensor:
    weight = target.weight(spec.name) if target.weight else None
    if weight is None or weight.is_meta:
        raise PlanError(
            f"allocation 'global_magnitude' compares values, and weight {spec.name!r} has none; "
            "load the weights first, or use 'erk' or 'uniform'."
        )
    return weight.detach().abs().flatten().to("cpu", torch.float32)
