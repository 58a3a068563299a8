import pytest

from fxsparse.allocation import Target
from fxsparse.allocation.er import er, er_densities


def test_kernel_sizes_play_no_part(shape):
    specs = [shape("narrow", (8, 8, 1, 1)), shape("wide", (8, 8, 3, 3))]
    densities = er_densities(specs, Target(0.75))
    assert densities["narrow"] == densities["wide"] == pytest.approx(0.25)


def test_counts_sum_to_the_target(resnet50):
    assert sum(er(resnet50, Target(0.9)).values()) == 2_550_291
