import pytest

from fxsparse.allocation import Target
from fxsparse.allocation.erk import _raw, erk, erk_densities
from fxsparse.allocation.proportional import proportional

# srigl_rigl 3.1: densities of ResNet-50, four digits, by (outputs, inputs, kernel).
RESNET50 = {
    0.8: {
        (64, 3, 7): 0.8572, (64, 64, 1): 1, (64, 64, 3): 0.3619, (256, 64, 1): 1, (64, 256, 1): 1,
        (128, 256, 1): 1, (128, 128, 3): 0.1769, (512, 128, 1): 0.9753, (512, 256, 1): 0.5849,
        (128, 512, 1): 0.9753, (256, 512, 1): 0.5849, (256, 256, 3): 0.0874, (1024, 256, 1): 0.4869,
        (1024, 512, 1): 0.2921,
        (256, 1024, 1): 0.4869, (512, 1024, 1): 0.2921, (512, 512, 3): 0.0435, (2048, 512, 1): 0.2433,
        (2048, 1024, 1): 0.1459, (512, 2048, 1): 0.2433, (1000, 2048, 0): 0.1482,
    },
    0.9: {
        (64, 3, 7): 0.42, (64, 64, 1): 1, (64, 64, 3): 0.1773, (256, 64, 1): 0.9588, (64, 256, 1): 0.9588,
        (128, 256, 1): 0.5747, (128, 128, 3): 0.0867, (512, 128, 1): 0.4779, (512, 256, 1): 0.2866,
        (128, 512, 1): 0.4779, (256, 512, 1): 0.2866, (256, 256, 3): 0.0428, (1024, 256, 1): 0.2386,
        (1024, 512, 1): 0.1431, (256, 1024, 1): 0.2386, (512, 1024, 1): 0.1431, (512, 512, 3): 0.0213,
        (2048, 512, 1): 0.1192, (2048, 1024, 1): 0.0715, (512, 2048, 1): 0.1192, (1000, 2048, 0): 0.0726,
    },
}  # fmt: skip


@pytest.mark.parametrize("sparsity", [0.8, 0.9])
def test_resnet50_densities(resnet50, sparsity):
    densities = erk_densities(resnet50, Target(sparsity))
    got = {
        (*s.shape[:2], s.shape[2] if len(s.shape) == 4 else 0): round(densities[s.name], 4) for s in resnet50
    }
    assert got == RESNET50[sparsity]


@pytest.mark.parametrize(("sparsity", "scale"), [(0.5, 303.951870), (0.8, 99.561667), (0.9, 48.786611)])
def test_resnet50_scales(resnet50, sparsity, scale):
    assert round(proportional(resnet50, Target(sparsity), _raw)[1], 6) == scale


@pytest.mark.parametrize(
    ("sparsity", "indices"), [(0.8, [1, 3, 4, 5, 7, 8, 10, 11]), (0.9, [1]), (0.95, []), (0.99, [])]
)
def test_resnet50_dense_sets(resnet50, sparsity, indices):
    dense = proportional(resnet50, Target(sparsity), _raw)[2]
    assert [i for i, s in enumerate(resnet50) if s.name in dense] == indices


@pytest.mark.parametrize(("sparsity", "layers"), [(0.8, 9), (0.9, 4), (0.95, 3), (0.99, 1)])
def test_cifar_resnet18_dense_sets(cifar_resnet18, sparsity, layers):
    assert sum(s.numel for s in cifar_resnet18) == 11_164_352
    assert len(proportional(cifar_resnet18, Target(sparsity), _raw)[2]) == layers


@pytest.mark.parametrize(("sparsity", "kept"), [(0.8, 5), (0.9, 10), (0.95, 20), (0.99, 100)])
def test_counts_sum_to_the_share_of_all_weights(resnet50, sparsity, kept):
    assert sum(erk(resnet50, Target(sparsity)).values()) == 25_502_912 // kept


@pytest.mark.parametrize(
    ("sparsity", "nnz"), [(0.8, 5_086_360), (0.9, 2_544_096), (0.95, 1_262_224), (0.99, 246_512)]
)
def test_resnet50_constant_fan_in_counts(resnet50, sparsity, nnz):
    counts = erk(resnet50, Target(sparsity))
    assert sum(counts[s.name] // s.shape[0] * s.shape[0] for s in resnet50) == nnz


def fan_ins(specs, sparsity):
    counts = erk(specs, Target(sparsity))
    return [counts[s.name] // s.shape[0] for s in specs]


def test_resnet50_fan_ins_at_99_and_90_percent(resnet50):
    bottleneck = [24, 9, 6]
    assert fan_ins(resnet50, 0.99) == [
        *(6, 9, 10, 6, 6, 24, 10, 6, 24, 10, 6),
        *(14, 9, 6, 7, *bottleneck * 3),
        *(14, 9, 6, 7, *bottleneck * 5),
        *(14, 9, 6, 7, *bottleneck * 2, 14),
    ]
    ninety = fan_ins(resnet50, 0.9)
    assert ninety[:6] == [61, 64, 102, 61, 61, 245]
    assert ninety[-1] == 148


def test_cifar_resnet18_fan_ins(cifar_resnet18):
    assert fan_ins(cifar_resnet18, 0.9) == [
        *(
            27,
            276,
            276,
            276,
            276,
            204,
            270,
            64,
            270,
            270,
            201,
            267,
            128,
            267,
            267,
            199,
            265,
            198,
            265,
            265,
            512,
        )
    ]


def test_weights_forced_by_the_user_are_out_of_the_budget_or_in_it(resnet50):
    forced = {"fc.weight": 0.5}
    outside = erk(resnet50, Target(0.9, forced=forced))
    inside = erk(resnet50, Target(0.9, forced=forced, keep_dense_counts=True))
    assert outside["fc.weight"] == inside["fc.weight"] == 1_024_000
    assert sum(outside.values()) == 1_024_000 + 2_345_491  # a tenth of the 23,454,912 others
    assert sum(inside.values()) == 2_550_291
