import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxsparse
from fxsparse import Plan
from fxsparse.errors import NumericsError, PlanError
from fxsparse.methods import rigl, static
from fxsparse.scores import SALIENCIES, register_saliency

BATCHES = [
    (torch.randn(6, 16, generator=torch.Generator().manual_seed(k)), torch.arange(6) % 8) for k in range(2)
]


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 24), nn.Dropout(0.5), nn.ReLU(), nn.Linear(24, 8))


def loss(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def test_snip_is_gradient_times_weight_summed_over_the_batches_without_dropout():
    model = net()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = fxsparse.saliency(model, Plan(sparsity=0.9, method=static("snip")), loss, BATCHES)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())
    assert model[0].weight.grad is None
    assert model.training
    plain = net()
    plain[1].eval()
    sum(loss(plain, batch) for batch in BATCHES).backward()
    for name in ("0.weight", "3.weight"):
        weight = plain.get_parameter(name)
        torch.testing.assert_close(found[name], (weight.grad * weight).abs().detach())


def test_one_global_ranking_gives_counts_and_masks():
    model = net()
    plan = Plan(sparsity=0.9, method=static("snip"), allocation="global_score")
    scores = fxsparse.saliency(model, plan, loss, BATCHES)
    sparse = fxsparse.compile(model, plan, initial_scores=scores)
    joined = torch.cat([scores[name].flatten() for name in ("0.weight", "3.weight")])
    cut = joined.sort(descending=True).values[56]
    for name, mask in sparse.masks().items():
        assert torch.equal(mask, scores[name] >= cut)
    counts = fxsparse.allocate(model, plan, initial_scores=scores)
    assert counts == {name: int(mask.sum()) for name, mask in sparse.masks().items()}
    flops = fxsparse.count_flops(net(), torch.randn(1, 16), plan, initial_scores=scores)
    assert flops.total == 2 * sum(counts.values())
    with pytest.raises(PlanError, match=r"pass compile\(..., initial_scores"):
        fxsparse.count_flops(net(), torch.randn(1, 16), plan)


@pytest.mark.parametrize("storage", ["masked", "compact"])
def test_any_method_starts_from_them_at_the_counts_of_its_allocation(storage):
    model = net()
    plan = Plan(sparsity=0.8, method=rigl(init="snip"), allocation="uniform", storage=storage)
    scores = fxsparse.saliency(model, plan, loss, BATCHES)
    sparse = fxsparse.compile(model, plan, initial_scores=scores)
    for name, mask in sparse.masks().items():
        assert int(mask.sum()) == round(0.2 * mask.numel())
        assert scores[name][mask].min() >= scores[name][~mask].max()


def test_own_scores_are_given_by_name():
    model = nn.Linear(4, 4, bias=False)
    score = torch.arange(16.0).view(4, 4)
    plan = Plan(sparsity=0.75, method=static("given"))
    mask = fxsparse.compile(model, plan, initial_scores={"weight": score}).masks()["weight"]
    assert torch.equal(mask, score >= 12)


@pytest.mark.parametrize(
    ("plan", "scores", "message"),
    [
        (Plan(sparsity=0.5, method=static("snip")), None, r"initial_scores=fxsparse.saliency\(model, plan"),
        (Plan(sparsity=0.5), {"weight": torch.zeros(4, 4)}, "nothing reads them"),
        (
            Plan(sparsity=0.5, method=static("given")),
            {"weight": torch.zeros(4)},
            r"expected \(4, 4\), got \(4,\)",
        ),
        (
            Plan(sparsity=0.5, method=static("given")),
            {"w": torch.zeros(4)},
            "expected the name of a parameter",
        ),
        (Plan(sparsity=0.5, method=static("given")), {}, "expected one for 'weight', got those of no weight"),
        (
            Plan(sparsity=0.5, method=static("given")),
            {"weight": torch.full((4, 4), torch.nan)},
            "finite numbers, got inf or NaN",
        ),
    ],
)
def test_scores_that_do_not_fit_are_refused(plan, scores, message):
    with pytest.raises(PlanError, match=message):
        fxsparse.compile(nn.Linear(4, 4), plan, initial_scores=scores)
    if scores:
        with pytest.raises(PlanError, match=message):
            fxsparse.allocate(nn.Linear(4, 4), plan, initial_scores=scores)
        with pytest.raises(PlanError, match=message):
            fxsparse.count_flops(nn.Linear(4, 4), torch.ones(1, 4), plan, initial_scores=scores)


def test_what_cannot_be_scored_is_refused():
    plan = Plan(sparsity=0.5, method=static("snip"))
    with pytest.raises(PlanError, match="got no loss_fn"):
        fxsparse.saliency(net(), plan)
    with pytest.raises(PlanError, match="got no batch"):
        fxsparse.saliency(net(), plan, loss)
    with pytest.raises(PlanError, match="expected a method whose init names one of"):
        fxsparse.saliency(net(), Plan(sparsity=0.5), loss, BATCHES)
    with pytest.raises(PlanError, match="'weight' is on the meta device"):
        fxsparse.saliency(nn.Linear(4, 4, device="meta"), plan, loss, BATCHES)
    with pytest.raises(NumericsError, match=r"saliency 'snip' of '0.weight'"):
        fxsparse.saliency(net(), plan, lambda model, batch: loss(model, batch) * torch.inf, BATCHES)


OUTSIDE = nn.Linear(16, 8)


@pytest.mark.parametrize(
    ("loss_fn", "message"),
    [
        (lambda _, batch: loss(OUTSIDE, batch), "reaches none of 0.weight, 3.weight. It gets a copy"),
        (lambda model, batch: model(batch[0]), r"got one of shape \(6, 8\) and torch.float32\. Compute"),
        (lambda model, batch: loss(model, batch).item(), "with a gradient, got float"),
        (lambda model, batch: None, "with a gradient, got NoneType"),
        (lambda model, batch: loss(model, batch).detach(), "torch.float32 without a gradient"),
        (lambda model, batch: model(batch[0]).argmax(), "torch.int64 without a gradient"),
        (3, r"expected loss_fn\(model, batch\) -> loss, got int"),
    ],
)
@pytest.mark.parametrize("score", ["snip", "grasp", "force"])
def test_a_loss_that_tells_nothing_is_named(loss_fn, message, score):
    with pytest.raises(PlanError, match=message):
        fxsparse.saliency(net(), Plan(sparsity=0.5, method=static(score)), loss_fn, BATCHES)


def test_bad_arguments_are_named():
    plan = Plan(sparsity=0.5, method=static("snip"))
    with pytest.raises(PlanError, match=r"expected batches as an iterable.*got NoneType"):
        fxsparse.saliency(net(), plan, loss, None)
    with pytest.raises(PlanError, match=r"selects none of the model's 4 parameters: .*exclude"):
        fxsparse.saliency(net(), Plan(sparsity=0.5, method=static("snip"), exclude=("*",)), loss, BATCHES)
    with pytest.raises(PlanError, match="saliency: this model is compiled already"):
        fxsparse.saliency(fxsparse.compile(net(), Plan(sparsity=0.5)), plan, loss, BATCHES)
    with pytest.raises(PlanError, match="expected a Plan, got str"):
        fxsparse.saliency(net(), "snip", loss, BATCHES)


def test_a_callers_no_grad_changes_nothing():
    plan = Plan(sparsity=0.5, method=static("snip"))
    model = net()
    expected = fxsparse.saliency(model, plan, loss, BATCHES)
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            found = fxsparse.saliency(model, plan, loss, BATCHES)
        assert all(torch.equal(score, expected[name]) for name, score in found.items())
        assert not any(score.is_inference() for score in found.values())


@pytest.mark.parametrize(
    ("value", "got"),
    [
        (None, "NoneType"),
        ({}, "NoneType"),
        ({"0.weight": torch.ones(3)}, r"shape \(3,\)"),
        (torch.ones(24, 16), r"shape \(24, 16\)"),
    ],
)
def test_what_a_registered_score_returns_is_checked(value, got):
    def own(scoring):
        del scoring
        return value

    register_saliency(own)
    try:
        with pytest.raises(PlanError, match=rf"saliency 'own': .* \(24, 16\) for '0.weight', got {got}\."):
            fxsparse.saliency(net(), Plan(sparsity=0.5, method=static("own")), loss, BATCHES)
    finally:
        del SALIENCIES["own"]
