import pytest
import torch
import torchvision
from torch.utils.flop_counter import FlopCounterMode

import fxsparse
from fxsparse import Plan
from fxsparse.allocation import Target, published
from fxsparse.allocation.explicit import Explicit
from fxsparse.errors import PlanError
from fxsparse.methods import static

POOLING = 100_352  # what the published total of the dense model counts on top of multiply-adds with weights


@pytest.fixture(scope="module")
def macs_of_entries():
    """{weight: (entries, multiply-adds of one entry)} of a 224 x 224 image, by PyTorch's own count of FLOPs."""
    with torch.device("meta"):
        model = torchvision.models.resnet50()
        with FlopCounterMode(display=False) as counter:
            model(torch.empty(1, 3, 224, 224))
    flops = {name: sum(by_op.values()) for name, by_op in counter.get_flop_counts().items()}
    sizes = {n: p.numel() for n, p in model.named_parameters() if p.dim() > 1}
    return {n: (size, flops[f"ResNet.{n.removesuffix('.weight')}"] / 2 / size) for n, size in sizes.items()}


@pytest.mark.parametrize(
    ("name", "zeros", "millions"),
    [
        ("str-81.27", 81.27, 705.3),
        ("str-90.23", 90.23, 342.6),
        ("str-95.15", 95.15, 162.2),
        ("str-96.11", 96.11, 126.9),
        ("str-98.05", 98.05, 72.8),
        ("str-98.98", 98.98, 47.3),
        ("uniform-90", 90, 409),
        ("erk-90", None, 990),
        ("snfs-90", None, 1626),
        ("vd-90", None, 793),
        ("gs-90", None, 596),
    ],
)
def test_a_table_gives_its_sparsity_and_its_flops(macs_of_entries, name, zeros, millions):
    table = published(name)
    assert table.keys() == macs_of_entries.keys()
    total = sum(size for size, _ in macs_of_entries.values())
    kept = {n: (1 - table[n]) * size for n, (size, _) in macs_of_entries.items()}
    assert sum(size * macs for size, macs in macs_of_entries.values()) + POOLING == 4_089_284_608
    spent = sum(kept[n] * macs for n, (_, macs) in macs_of_entries.items())
    place = 0.05 if millions != round(millions) else 0.5
    assert spent / 1e6 == pytest.approx(millions, abs=place)
    if zeros is not None:
        assert 100 * (1 - sum(kept.values()) / total) == pytest.approx(zeros, abs=0.01)


def test_all_sixteen_say_their_own_sparsity(macs_of_entries):
    with pytest.raises(
        PlanError, match=r"published: expected one of str-79.55, .*, gs-90, got 'str'"
    ) as raised:
        published("str")
    names = [n for n in str(raised.value).replace(",", "").split() if n.startswith("str-")]
    assert len(names) == 16
    total = sum(size for size, _ in macs_of_entries.values())
    for name in names:
        zeros = sum(z * macs_of_entries[n][0] for n, z in published(name).items()) / total
        assert 100 * zeros == pytest.approx(float(name.removeprefix("str-")), abs=0.01)


def test_a_plan_takes_it(shape):
    with torch.device("meta"):
        model = torchvision.models.resnet50()
    table = published("str-90.23")
    counts = fxsparse.allocate(model, Plan(sparsity=0.9023, method=static(), allocation=table))
    sizes = {n: tuple(p.shape) for n, p in model.named_parameters() if n in table}
    assert counts == Explicit(table)([shape(n, size) for n, size in sizes.items()], Target(0.9023))
    assert sum(counts.values()) == pytest.approx(
        0.0977 * sum(p.numel() for p in map(model.get_parameter, table)), rel=1e-3
    )
