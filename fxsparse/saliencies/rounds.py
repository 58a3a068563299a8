"""Pruning in rounds before training: score, keep a few less, score what is left again."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from fxsparse.errors import PlanError
from fxsparse.scores import Scoring
from fxsparse.topk import top_mask


def in_rounds(
    scoring: Scoring,
    rounds: int,
    score: Callable[[Mapping[str, Tensor]], dict[str, Tensor]],
    comes_back: bool = False,
) -> dict[str, Tensor]:
    """Scores whose ranking is that of `rounds` global cuts, the t-th to the share ``density ** (t / rounds)``.

    `score` gets the weights as they were and finds those of ``scoring.model`` under the masks so far; it is called once
    in every round.  With `comes_back` an entry may come back, and the last round's scores are the outcome.  Otherwise
    what a round drops is out: it gets a negative number, the lower the earlier it went, and what stays its score of the
    last round.  The model's weights are changed in place.

    Raises:
        PlanError: `rounds` is no integer above 0.
    """
    if not isinstance(rounds, int) or isinstance(rounds, bool) or rounds < 1:
        raise PlanError(f"saliency: expected rounds as an integer >= 1, got {rounds!r}.")
    weights = scoring.weights()
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    sizes = [weight.numel() for weight in weights.values()]
    out = kept = torch.ones(0)
    for done in range(1, rounds + 1):
        scores = score(before)
        found = torch.cat([scores[name].detach().flatten() for name in weights])
        if done == 1 or comes_back:
            kept, out = torch.ones_like(found, dtype=torch.bool), torch.zeros_like(found)
        open_ = found.masked_fill(~kept, -torch.inf)
        chosen = top_mask(open_, round(sum(sizes) * scoring.density ** (done / rounds)))
        if not comes_back:
            share = found / found.amax().clamp_min(torch.finfo(found.dtype).tiny)
            out = torch.where(kept & ~chosen, done - rounds - 1 + share / 2, out)
        kept = chosen
        out = found if comes_back else torch.where(kept, found, out)
        with torch.no_grad():
            for (name, weight), mask in zip(weights.items(), kept.split(sizes), strict=True):
                weight.copy_(before[name] * mask.view(weight.shape))
    return {name: part.view(before[name].shape) for name, part in zip(weights, out.split(sizes), strict=True)}
