import pytest
import torch
from torch import nn

import fxsparse
from fxsparse import Plan
from fxsparse import pattern as patterns
from fxsparse.errors import PatternError
from fxsparse.methods import gmp, rigl, set_, sr_ste, static
from fxsparse.testing import check_method
from fxsparse.transposable import Transposable, masks_4x4

PATTERN = Transposable()
SCORES = torch.tensor([[4, 3, 2, 1], [4.5, 3.5, 2.5, 1.5], [1, 2, 3, 4], [9, 8, 0.1, 0.2]])


def test_there_are_90_masks_of_4_x_4():
    masks = masks_4x4().view(-1, 4, 4)
    assert len(masks.unique(dim=0)) == 90
    assert bool((masks.sum(1) == 2).all())
    assert bool((masks.sum(2) == 2).all())


def test_the_best_sum_is_taken_and_of_six_the_mask_with_the_earliest_ones():
    sums = masks_4x4() @ SCORES.double().flatten()
    assert int((sums == sums.max()).sum()) == 6
    mask = PATTERN.project(SCORES, 0)
    assert float(SCORES[mask].sum()) == 35
    best = masks_4x4()[sums == sums.max()].int().tolist()
    assert mask.int().flatten().tolist() == max(best)


def test_it_keeps_less_than_rows_alone_would_and_both_directions_are_2_4():
    weight = torch.randn(128, 256, generator=torch.Generator().manual_seed(0))
    mask = PATTERN.project(weight.abs(), 0)
    patterns.NM(2, 4).check(mask)
    patterns.NM(2, 4).check(mask.t())
    rows = patterns.NM(2, 4).project(weight.abs(), 0)
    whole = float(weight.abs().sum())
    assert float(weight[mask].abs().sum()) / whole == pytest.approx(0.7024, abs=4e-3)
    assert float(weight[rows].abs().sum()) / whole == pytest.approx(0.7447, abs=4e-3)


def test_convolutions_have_blocks_at_each_kernel_position():
    score = torch.rand(4, 8, 3, 1)
    mask = PATTERN.project(score, 0)
    for at in range(3):
        assert torch.equal(mask[:, :, at, 0], PATTERN.project(score[:, :, at, 0], 0))


def test_entries_are_forced_in_and_kept_out():
    score = torch.rand(4, 4)
    score[0, 0], score[0, 1] = torch.inf, -torch.inf
    mask = PATTERN.project(score, 0)
    assert mask[0, :2].tolist() == [True, False]
    score[0, 1:] = -torch.inf
    with pytest.raises(PatternError, match="expected 8 entries for Transposable\\(\\), got only 7"):
        PATTERN.project(score, 0)


def test_what_does_not_fit_is_named():
    mask = torch.zeros(8, 8, dtype=torch.bool)
    PATTERN.check(mask)
    mask[4:7, 5] = True
    with pytest.raises(PatternError, match="got 3 in the block at row 4, channel 4, kernel position 0"):
        PATTERN.check(mask)
    with pytest.raises(
        PatternError, match=r"multiples of 4 output rows and input channels, got shape \[6, 8\]"
    ):
        PATTERN.feasible((6, 8), 3)
    assert patterns.from_dict(patterns.to_dict(PATTERN)) == PATTERN


@pytest.mark.parametrize(
    "method", [sr_ste(6e-5), set_(every=1), rigl(every=1), static(), gmp(0, 20, 1)], ids=lambda m: m.name
)
def test_methods_train_it(method):
    check_method(method, PATTERN, (8, 8, 1, 2), nnz=64, updates=20)


def test_a_model_has_it_in_training_and_by_its_2_4_kernels_in_inference():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 8))
    sparse = fxsparse.compile(model, Plan(pattern=PATTERN, method=sr_ste(6e-5)))
    optimizer = torch.optim.SGD(sparse.parameters(), lr=0.1)
    sparse.attach(optimizer)
    x = torch.randn(12, 16)
    for _ in range(3):
        optimizer.zero_grad()
        (sparse(x) - 1).square().mean().backward()
        optimizer.step()
    for mask in sparse.masks().values():
        PATTERN.check(mask)
        assert int(mask.sum()) == mask.numel() // 2
    expected = sparse.eval()(x).detach()
    torch.testing.assert_close(fxsparse.compile(sparse, mode="infer", example_inputs=x)(x), expected)
