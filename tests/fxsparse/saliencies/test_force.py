import copy
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxsparse
from fxsparse import Plan
from fxsparse.methods import static
from fxsparse.saliencies import force, iter_snip, snip
from fxsparse.scores import Scoring
from fxsparse.topk import top_mask

BATCHES = [
    (torch.randn(7, 5, generator=torch.Generator().manual_seed(k)).double(), torch.arange(7) % 3)
    for k in range(2)
]
NAMES = ("0.weight", "2.weight")


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3, bias=False)).double()


def loss(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def scoring(density=0.25):
    return Scoring(net(), NAMES, loss, BATCHES, density)


def joined(scores):
    return torch.cat([scores[name].flatten() for name in NAMES])


def by_hand(rounds, comes_back, density=0.25):
    """The mask of each round, written out."""
    model, masks = net(), [torch.ones(48, dtype=torch.bool)]
    before = {name: model.get_parameter(name).detach().clone() for name in NAMES}
    for done in range(1, rounds + 1):
        model.zero_grad()
        sum(loss(model, batch) for batch in BATCHES).backward()
        score = joined({n: (model.get_parameter(n).grad * before[n]).abs() for n in NAMES})
        if not comes_back:
            score = score.masked_fill(~masks[-1], -torch.inf)
        masks.append(top_mask(score, round(48 * density ** (done / rounds))))
        with torch.no_grad():
            for name, mask in zip(NAMES, masks[-1].split([30, 18]), strict=True):
                model.get_parameter(name).copy_(before[name] * mask.view(before[name].shape))
    return masks


@pytest.mark.parametrize(("saliency", "comes_back"), [(force, True), (iter_snip, False)])
def test_the_ranking_is_that_of_the_rounds(saliency, comes_back):
    masks = by_hand(5, comes_back)
    assert torch.equal(top_mask(joined(saliency(scoring(), 5)), 12), masks[-1])
    returned = any(bool((b & ~a).any()) for a, b in pairwise(masks))
    assert returned == comes_back


def test_one_round_is_snip():
    expected = joined(snip(scoring()))
    torch.testing.assert_close(joined(force(scoring(), 1)), expected)
    kept = top_mask(expected, 12)
    assert torch.equal(top_mask(joined(iter_snip(scoring(), 1)), 12), kept)


def test_signed_snip_is_conserved_in_a_net_of_relus_without_biases():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(5, 8, bias=False),
        nn.ReLU(),
        nn.Linear(8, 6, bias=False),
        nn.ReLU(),
        nn.Linear(6, 3, bias=False),
    ).double()
    names = ("0.weight", "2.weight", "4.weight")
    own = Scoring(copy.deepcopy(model), names, loss, BATCHES, 1.0)
    signed = {name: g * model.get_parameter(name).detach() for name, g in own.gradients().items()}
    first, second, third = signed.values()
    torch.testing.assert_close(first.sum(), third.sum())
    torch.testing.assert_close(first.sum(1), second.sum(0))
    torch.testing.assert_close(second.sum(1), third.sum(0))


@pytest.mark.parametrize("name", ["force", "iter_snip"])
def test_masks_start_from_them(name):
    model = net().float()
    plan = Plan(sparsity=0.75, method=static(name), allocation="global_score")
    scores = fxsparse.saliency(model, plan, loss, [(x.float(), y) for x, y in BATCHES])
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), net().float().parameters(), strict=True))
    masks = fxsparse.compile(model, plan, initial_scores=scores).masks()
    assert torch.equal(joined(masks), top_mask(joined(scores), 12))
