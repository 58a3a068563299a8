from math import floor

import pytest

from fxsparse.allocation import Target
from fxsparse.allocation.er_unrolled import er_unrolled, er_unrolled_densities


def test_density_follows_the_sides_of_the_unrolled_matrix(shape):
    # Sides 8 + 8 and 8 + 72; a tenth of 64 + 576 is 64: scale 64 / 96.
    specs = [shape("a", (8, 8)), shape("b", (8, 8, 3, 3), "conv2d")]
    densities = er_unrolled_densities(specs, Target(0.9))
    assert densities == {"a": pytest.approx(16 * 64 / 96 / 64), "b": pytest.approx(80 * 64 / 96 / 576)}
    assert er_unrolled(specs, Target(0.9)) == {"a": 11, "b": 53}


def test_outputs_of_a_transposed_convolution_are_its_second_dimension(shape):
    densities = er_unrolled_densities(
        [shape("a", (2, 8, 3), "conv_transpose1d"), shape("b", (8, 2, 3), "conv1d")], Target(0.9)
    )
    assert densities["a"] == densities["b"]


def test_clipped_entries_are_not_given_to_other_weights(shape):
    # Half of 8 + 10,000 is 5,004 over sides 6 + 200: "a" would get 145.7 of its 8, so 137.7 are lost.
    specs = [shape("a", (2, 4)), shape("b", (100, 100))]
    counts = er_unrolled(specs, Target(0.5))
    assert counts["a"] == 8
    assert counts["b"] == floor(5_004 * 200 / 206)
    assert sum(counts.values()) < 5_004


def test_without_clipping_the_counts_sum_to_the_target(resnet50):
    assert max(er_unrolled_densities(resnet50, Target(0.99)).values()) < 1
    assert sum(er_unrolled(resnet50, Target(0.99)).values()) == 255_029


def test_a_target_of_every_entry_clips_none(shape):
    specs = [shape("a", (2, 4)), shape("b", (100, 100)), shape("c", (10, 10))]
    assert er_unrolled(specs, Target(0.0)) == {"a": 8, "b": 10_000, "c": 100}
    assert er_unrolled_densities(specs, Target(0.0)) == {"a": 1, "b": 1, "c": 1}
    assert er_unrolled(specs, Target(0.0, forced={"c": 0.5})) == {"a": 8, "b": 10_000, "c": 50}
    assert er_unrolled_densities(specs, Target(0.0, forced={"c": 0.5})) == {"a": 1, "b": 1}
