"""Spectral quantities against numbers by hand, dense linear algebra, and what is known of random masks."""

import math
import statistics
import sys

import numpy as np
import pytest
import torch

import fxsparse
from fxsparse.analysis import bipartite, spectral
from fxsparse.errors import NumericsError, PatternError, UnsupportedError

# Random 3x3 masks of one seed: width, sparsity, d_l, d_r, sigma_1, sigma_2, gap, prediction for random matrices.
PUBLISHED = [
    (64, 0.5, 32.1, 289, 97.1, 15.9, 6.64, 6.51),
    (64, 0.75, 16.1, 145, 49.8, 13.6, 2.26, 1.98),
    (64, 0.9, 6.40, 57.6, 20.6, 9.61, 0.239, 0.247),
    (64, 0.95, 3.23, 28.0, 11.0, 7.06, -0.372, -0.218),
    (128, 0.5, 63.8, 574, 192, 22.5, 9.41, 9.29),
    (128, 0.75, 31.9, 287, 96.8, 19.3, 3.19, 2.91),
    (128, 0.9, 12.8, 115, 39.8, 13.6, 0.497, 0.545),
    (128, 0.95, 6.49, 58.3, 21.0, 9.99, -0.071, -0.016),
]
WIDENED = [
    (90, 0.5, 45.0, 405, 18.4, 8.34),
    (128, 0.75, 31.9, 287, 19.6, 2.91),
    (202, 0.9, 20.2, 182, 17.1, 0.748),
]


def random_mask(*shape, sparsity, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) >= sparsity


def of_seeds(width, sparsity, seeds=8):
    masks = [random_mask(width, width, 3, 3, sparsity=sparsity, seed=seed) for seed in range(seeds)]
    return [spectral(mask) for mask in masks]


def is_one_of(value, found, digits):
    """Whether a rounded value could be another draw of what was found: 4 deviations, and half of its last digit."""
    spread = 4 * statistics.stdev(found) * math.sqrt(1 + 1 / len(found))
    return abs(value - statistics.mean(found)) <= spread + 0.5 * 10**-digits


@pytest.mark.parametrize(("width", "sparsity", "left", "right", "first", "second", "gap", "limit"), PUBLISHED)
def test_random_masks_have_the_known_numbers(width, sparsity, left, right, first, second, gap, limit):
    found = of_seeds(width, sparsity)
    digits = [3 - len(str(int(abs(value)))) for value in (left, right, first)]
    assert is_one_of(left, [s.input_degree for s in found], digits[0])
    assert is_one_of(right, [s.output_degree for s in found], digits[1])
    assert is_one_of(first, [s.sigma_1 for s in found], digits[2])
    assert is_one_of(second, [s.sigma_2 for s in found], 1)
    assert is_one_of(gap, [s.ramanujan_gap for s in found], 2)
    assert is_one_of(limit, [s.random_gap for s in found], 2)
    assert statistics.mean(s.sigma_2 for s in found) == pytest.approx(second, rel=0.03)


@pytest.mark.parametrize(("width", "sparsity", "left", "right", "second", "gap"), WIDENED)
def test_widened_layers_at_equal_flops_have_the_known_numbers(width, sparsity, left, right, second, gap):
    found = of_seeds(width, sparsity, seeds=6)
    assert statistics.mean(s.input_degree for s in found) == pytest.approx(left, rel=0.01)
    assert statistics.mean(s.output_degree for s in found) == pytest.approx(right, rel=0.01)
    assert statistics.mean(s.sigma_2 for s in found) == pytest.approx(second, rel=0.03)
    assert is_one_of(gap, [s.ramanujan_gap for s in found], 2)


def test_random_masks_approach_the_limit():
    small, large = (spectral(random_mask(n, 2 * n, sparsity=0.9)) for n in (32, 512))
    assert abs(large.ramanujan_gap - large.random_gap) / large.sigma_2 < 0.01
    assert abs(small.ramanujan_gap - small.random_gap) / small.sigma_2 < 0.1


def test_a_complete_graph_by_hand():
    found = spectral(torch.ones(4, 5), torch.full((4, 5), -2.0))
    assert (found.shape, found.nodes, found.nnz) == ((4, 5), (4, 5), 20)
    assert (found.input_degree, found.output_degree) == (4.0, 5.0)
    assert found.sigma_1 == pytest.approx(math.sqrt(20))
    assert found.sigma_2 == pytest.approx(0, abs=1e-6)
    assert found.ramanujan_gap == pytest.approx(math.sqrt(3) + math.sqrt(4))
    assert found.sigma_gap == pytest.approx(2 * math.sqrt(math.sqrt(20) - 1))
    assert found.weighted_spectral_gap == pytest.approx(2 * math.sqrt(20))
    # All inputs have one degree, so that the only subgraph is the graph.
    assert found.classes == 1
    assert found.iterative_ramanujan_gap == pytest.approx(found.ramanujan_gap)
    assert found.iterative_weighted_gap == pytest.approx(found.weighted_spectral_gap)
    norm = math.sqrt(2 * found.ramanujan_gap**2 + 2 * found.weighted_spectral_gap**2)
    assert found.full_spectrum_distance == pytest.approx(norm)


def test_two_parts_without_an_edge_between_them_have_no_spectral_gap():
    mask = torch.block_diag(torch.ones(4, 4), torch.ones(4, 4))
    found = spectral(mask, torch.ones(8, 8))
    assert (found.sigma_1, found.sigma_2) == (pytest.approx(4), pytest.approx(4))
    assert found.ramanujan_gap == pytest.approx(2 * math.sqrt(3) - 4)
    assert found.weighted_spectral_gap == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("shape", [(20, 60), (60, 20), (16, 8, 3, 3)])
def test_sigmas_are_eigenvalues_of_the_adjacency_matrix(shape):
    mask = random_mask(*shape, sparsity=0.6)
    mask[:3] &= random_mask(3, *shape[1:], sparsity=0.4, seed=1)  # irregular
    matrix = mask.flatten(1).numpy().astype(float)
    rows, columns = matrix.shape
    adjacency = np.block([[np.zeros((rows, rows)), matrix], [matrix.T, np.zeros((columns, columns))]])
    eigenvalues = np.sort(np.abs(np.linalg.eigvalsh(adjacency)))[::-1]
    found = spectral(mask)
    assert found.sigma_1 == pytest.approx(eigenvalues[0])
    assert found.sigma_2 == pytest.approx(eigenvalues[2])
    left, right = mask.sum() / columns, mask.sum() / rows
    assert found.ramanujan_gap == pytest.approx(math.sqrt(left - 1) + math.sqrt(right - 1) - eigenvalues[2])


def test_iterative_means_are_over_inputs_of_equal_degree():
    outputs = 12
    mask = torch.zeros(outputs, 21, dtype=torch.bool)
    generator = torch.Generator().manual_seed(0)
    degrees = [8] * 10 + [6] * 9 + [5] * 2  # two inputs of degree 5 are too few for a class
    for column, degree in enumerate(degrees):
        mask[torch.randperm(outputs, generator=generator)[:degree], column] = True
    weight = torch.randn(mask.shape, generator=generator)
    parts = [(mask[:, :10], weight[:, :10]), (mask[:, 10:19], weight[:, 10:19])]
    alone = [spectral(*part) for part in parts]
    # Columns in another order: classes are found by degree, not by position.
    order = torch.randperm(21, generator=generator)
    found = spectral(mask[:, order], weight[:, order])
    assert found.classes == 2
    gaps = [one.ramanujan_gap for one in alone]
    assert found.iterative_ramanujan_gap == pytest.approx(statistics.mean(gaps))
    assert found.iterative_weighted_gap == pytest.approx(
        statistics.mean(one.weighted_spectral_gap for one in alone)
    )
    assert found.iterative_ramanujan_gap != pytest.approx(found.ramanujan_gap)


def test_weights_count_by_magnitude_and_only_at_the_mask():
    mask = random_mask(16, 40, sparsity=0.5)
    weight = torch.randn(16, 40, generator=torch.Generator().manual_seed(1))
    first, second = torch.linalg.svdvals((weight * mask).abs().double())[:2].tolist()
    dirty = torch.where(mask, weight, torch.nan)
    for given in (weight, -weight, dirty, weight.bfloat16().float()):
        gap = spectral(mask, given).weighted_spectral_gap
        assert gap == pytest.approx(first - second, rel=1e-2 if given is not dirty else 1e-6)
    assert spectral(mask).weighted_spectral_gap is None
    assert spectral(mask).full_spectrum_distance is None


def test_complex_weights_count_by_magnitude():
    mask = random_mask(16, 40, sparsity=0.5)
    weight = torch.randn(16, 40, dtype=torch.complex64, generator=torch.Generator().manual_seed(1))
    assert spectral(mask, weight) == spectral(mask, weight.to(torch.complex128).abs())
    assert spectral(mask, weight) != spectral(mask, weight.real)


def test_isolated_nodes_are_left_out():
    mask = random_mask(12, 30, sparsity=0.5)
    padded = torch.zeros(15, 41, dtype=torch.bool)
    padded[1:13, 5:35] = mask
    found, alone = spectral(padded), spectral(mask)
    assert (found.shape, found.nodes) == ((15, 41), (12, 30))
    assert found.ramanujan_gap == alone.ramanujan_gap
    assert (found.input_degree, found.output_degree) == (alone.input_degree, alone.output_degree)


def test_a_convolution_is_its_matrix_and_numbers_are_masks_too():
    mask = random_mask(16, 8, 3, 3, sparsity=0.7)
    assert spectral(mask) == spectral(mask.reshape(16, 72)) == spectral(mask.float()) == spectral(mask.int())


@pytest.mark.parametrize(
    ("mask", "reason"),
    [
        (torch.zeros(4, 5), "no entries"),
        (torch.zeros(4, 0), "no entries"),
        (torch.zeros(0, 4), "no entries"),
        (torch.ones(1, 50), "mean degree of the inputs is 1, below 3"),
        (torch.ones(50, 1), "mean degree of the outputs is 1, below 3"),
        (torch.eye(9), "mean degree of the inputs is 1, below 3"),
    ],
)
def test_graphs_that_are_too_sparse_are_skipped_with_a_reason(mask, reason):
    found = spectral(mask, torch.ones_like(mask))
    assert found.skipped == reason
    assert found.ramanujan_gap is found.weighted_spectral_gap is found.random_gap is found.sigma_gap is None
    assert found.full_spectrum_distance is None
    assert found.nnz == int(mask.sum())


def test_the_second_singular_value_of_one_row_is_zero():
    found = spectral(torch.ones(1, 50))
    assert (found.sigma_1, found.sigma_2) == (pytest.approx(math.sqrt(50)), 0.0)


def test_without_a_class_of_inputs_the_means_are_unknown():
    mask = torch.ones(40, 10, dtype=torch.bool).triu(-29)  # ten inputs of ten degrees
    found = spectral(mask, torch.ones(40, 10))
    assert found.skipped == "no 3 inputs of one degree of at least 3"
    assert found.ramanujan_gap is not None
    assert found.iterative_ramanujan_gap is found.full_spectrum_distance is None


@pytest.mark.parametrize("shape", [(40, 130), (130, 40), (30, 30), (3, 500)])
def test_a_matrix_of_rank_one_has_no_second_singular_value(shape):
    graph = bipartite.Bipartite.of(*torch.ones(shape).nonzero().unbind(1), None)
    first, second = graph.two_largest()
    assert (first, second) == (pytest.approx((shape[0] * shape[1]) ** 0.5), 0.0)


@pytest.mark.parametrize("shape", [(40, 130), (130, 40), (30, 30)])
@pytest.mark.parametrize("sparsity", [0.0, 0.7])
def test_the_sparse_solver_agrees_with_all_eigenvalues(shape, sparsity, monkeypatch):
    mask = random_mask(*shape, sparsity=sparsity)
    weight = torch.rand(shape, generator=torch.Generator().manual_seed(1))
    by_gram = bipartite.Bipartite.of(*mask.nonzero().unbind(1), weight[mask])
    expected = [by_gram.two_largest(weighted) for weighted in (False, True)]
    monkeypatch.setattr(bipartite, "DENSE_SIDE", 0)
    assert [by_gram.two_largest(weighted) for weighted in (False, True)] == [
        pytest.approx(pair, abs=1e-6) for pair in expected
    ]


def test_a_large_graph_needs_no_dense_copy(monkeypatch):
    monkeypatch.setattr(bipartite, "_by_gram", lambda *_: pytest.fail("made a dense matrix"))
    generator = torch.Generator().manual_seed(0)
    positions = torch.randint(4000 * 3000, (60_000,), generator=generator).unique()
    graph = bipartite.Bipartite.of(positions // 3000, positions % 3000, None)
    left, right = graph.degrees
    assert graph.two_largest()[1] == pytest.approx(math.sqrt(left) + math.sqrt(right), rel=0.03)


def test_a_missing_scipy_is_named_where_it_is_needed(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.sparse", None)
    monkeypatch.setattr(bipartite, "DENSE_SIDE", 8)
    assert spectral(torch.ones(8, 20)).ramanujan_gap is not None
    with pytest.raises(UnsupportedError, match=r"pip install 'fxsparse\[analysis\]'"):
        spectral(torch.ones(9, 20))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.ones(5),), PatternError, r"expected a mask \[outputs, inputs, ...\], got the shape \(5,\)"),
        ((torch.randn(4, 4),), PatternError, "expected a mask of 0 and 1"),
        ((torch.ones(4, 4), torch.ones(4, 5)), PatternError, r"shape \(4, 4\), got \(4, 5\)"),
        ((torch.ones(4, 4), torch.full((4, 4), math.inf)), NumericsError, "got inf or NaN"),
        (
            ([[1, 0]],),
            PatternError,
            r"expected the mask as a dense tensor with values, got list: torch\.as_tensor",
        ),
        ((torch.ones(4, 4).numpy(),), PatternError, "the mask as .*, got ndarray: "),
        ((torch.ones(4, 4), 3), PatternError, "the weight as .*, got int: "),
        ((torch.ones(4, 4, device="meta"),), PatternError, "the mask as .*, got one on the meta device"),
        (
            (torch.ones(4, 4), torch.ones(4, 4).to_sparse()),
            PatternError,
            r"layout torch\.sparse_coo: .*to_dense",
        ),
    ],
)
def test_bad_input_is_named(arguments, error, message):
    with pytest.raises(error, match=message):
        spectral(*arguments)


def test_the_record_is_frozen_and_the_same_from_run_to_run():
    mask = random_mask(600, 700, sparsity=0.95)  # by the sparse solver, whose start vector is fixed
    weight = torch.rand(600, 700, generator=torch.Generator().manual_seed(1), requires_grad=True)
    found = fxsparse.analysis.spectral(mask, weight)
    assert found == spectral(mask, weight)
    with pytest.raises(AttributeError):
        found.ramanujan_gap = 0.0


def test_it_runs_on_one_thread_and_leaves_the_setting(monkeypatch):
    seen = []
    by_gram = bipartite._by_gram
    monkeypatch.setattr(
        bipartite, "_by_gram", lambda *given: (seen.append(torch.get_num_threads()), by_gram(*given))[1]
    )
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        spectral(torch.ones(4, 5))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert set(seen) == {1}
