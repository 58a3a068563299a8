import pytest

from fxsparse.allocation import Target
from fxsparse.allocation.uniform import uniform, uniform_densities


def test_dense_conv1_without_compensation_leaves_the_real_sparsity_below_the_target(resnet50):
    # RigL's uniform: real sparsity 0.7997 at nominal 0.8 (srigl_rigl 1.12).
    counts = uniform(resnet50, Target(0.8, forced={"conv1.weight": 0.0}))
    assert counts["conv1.weight"] == 9408
    assert round(1 - sum(counts.values()) / 25_502_912, 4) == 0.7997


def test_dense_conv1_with_compensation_keeps_the_global_target(resnet50):
    target = Target(0.8, forced={"conv1.weight": 0.0}, keep_dense_counts=True)
    assert sum(uniform(resnet50, target).values()) == 25_502_912 // 5
    # s' = 1 - (N * density - N_dense) / N_sparse
    density = uniform_densities(resnet50, target)["fc.weight"]
    assert density == pytest.approx((25_502_912 / 5 - 9408) / (25_502_912 - 9408), rel=1e-6)


@pytest.mark.parametrize(("sparsity", "nnz"), [(0.8, 17_209_512), (0.9, 8_567_008)])
def test_vit_b_16_constant_fan_in_counts(vit_b_16, sparsity, nnz):
    assert (len(vit_b_16), sum(s.numel for s in vit_b_16)) == (50, 86_292_480)
    counts = uniform(vit_b_16, Target(sparsity))
    assert sum(counts.values()) == int(86_292_480 * round(1 - sparsity, 1))
    fan_ins = {s.numel // s.shape[0]: counts[s.name] // s.shape[0] for s in vit_b_16}
    assert sum(counts[s.name] // s.shape[0] * s.shape[0] for s in vit_b_16) == nnz
    if sparsity == 0.8:
        assert fan_ins == {768: 153, 3072: 614}
