"""One magnitude threshold for all weights."""

from collections.abc import Callable, Mapping, Sequence

import torch

from fxsparse.allocation.target import Target, Weight
from fxsparse.errors import PlanError


def global_magnitude(specs: Sequence[Weight], target: Target) -> dict[str, int]:
    """{name: nnz}: how many entries of each free weight are among the largest magnitudes of all of them.

    Every weight keeps its largest entry at least.  Equal magnitudes at the threshold go to the first names.

    Raises:
        PlanError: the weights have no values to compare (none given, or meta tensors).
    """
    return among_largest(specs, target, lambda spec: _magnitudes(spec, target))


def global_score(specs: Sequence[Weight], target: Target) -> dict[str, int]:
    """{name: nnz}: the same by the caller's scores (SNIP, GraSP, SynFlow), of all weights together.

    Raises:
        PlanError: a weight has no score.
    """
    return among_largest(specs, target, lambda spec: _scores(spec, target))


def among_largest(
    specs: Sequence[Weight], target: Target, score: Callable[[Weight], torch.Tensor]
) -> dict[str, int]:
    """{name: nnz}: how many of each free weight's flat scores are among the largest of all of them."""
    total, free = target.free_total(specs), target.free(specs)
    if not free:
        return target.forced_counts(specs)
    sizes = [s.numel for s in free]
    scores = torch.cat([score(s) for s in free])
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


def by_magnitude_per_cost(
    specs: Sequence[Weight], target: Target, costs: Mapping[str, float]
) -> Callable[[float], dict[str, int]]:
    """Sparsity -> {name: nnz}: how many entries of each free weight are among the largest magnitudes per cost.

    They are kept while their costs together stay below ``1 - sparsity`` of those of all entries of free weights.
    Every weight keeps its largest entry at least.

    Raises:
        PlanError: the weights have no values to compare.
    """
    free, forced = target.free(specs), target.forced_counts(specs)
    sizes = torch.tensor([s.numel for s in free])
    each = torch.tensor([costs[s.name] for s in free], dtype=torch.float64)
    scores = [_magnitudes(s, target) / costs[s.name] for s in free]
    for part in scores:
        part[part.argmax()] = torch.inf
    order = torch.cat(scores).argsort(descending=True, stable=True)
    owners = torch.repeat_interleave(torch.arange(len(free)), sizes)[order]
    spent = each[owners].cumsum(0)

    def counts_at(sparsity: float) -> dict[str, int]:
        allowed = (1 - sparsity) * float((each * sizes).sum())
        kept = max(len(free), int(torch.searchsorted(spent, allowed * (1 + 1e-12), right=True)))
        counts = torch.bincount(owners[:kept], minlength=len(free)).tolist()
        return dict(zip((s.name for s in free), counts, strict=True)) | forced

    return counts_at


def _magnitudes(spec: Weight, target: Target) -> torch.Tensor:
    weight = target.weight(spec.name) if target.weight else None
    if weight is None or weight.is_meta:
        raise PlanError(
            f"allocation 'global_magnitude' compares values, and weight {spec.name!r} has none; "
            "load the weights first, or use 'erk' or 'uniform'."
        )
    return weight.detach().abs().flatten().to("cpu", torch.float32)


def _scores(spec: Weight, target: Target) -> torch.Tensor:
    if target.score is None:
        raise PlanError("allocation 'global_score' ranks scores: pass compile(..., initial_scores=...).")
    return target.score(spec.name).detach().flatten().to("cpu", torch.float32)
