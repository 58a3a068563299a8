from fxsparse.allocation.counts import to_counts


def test_missing_entries_go_to_the_largest_fractions(shape):
    specs = [shape("a", (10,)), shape("b", (10,)), shape("c", (10,))]
    densities = {"a": 0.12, "b": 0.18, "c": 0.16}  # 1.2, 1.8, 1.6 of 10
    assert to_counts(specs, densities, 4) == {"a": 1, "b": 2, "c": 1}
    assert to_counts(specs, densities, 5) == {"a": 1, "b": 2, "c": 2}


def test_excess_comes_off_the_smallest_fractions(shape):
    specs = [shape("a", (10,)), shape("b", (10,))]
    assert to_counts(specs, {"a": 0.38, "b": 0.31}, 5) == {"a": 3, "b": 2}


def test_ties_go_by_name_and_not_by_order(shape):
    specs = [shape("b", (10,)), shape("a", (10,))]
    assert to_counts(specs, {"b": 0.15, "a": 0.15}, 3) == {"a": 2, "b": 1}


def test_every_weight_keeps_an_entry_and_none_exceeds_its_size(shape):
    specs = [shape("small", (2,)), shape("large", (1000,))]
    assert to_counts(specs, {"small": 0.1, "large": 0.1}, 100) == {"small": 1, "large": 99}
    assert to_counts(specs, {"small": 1.0, "large": 0.1}, 110) == {"small": 2, "large": 108}
