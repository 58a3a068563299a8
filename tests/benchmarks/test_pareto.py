from benchmarks.cells import Cell
from benchmarks.pareto import front, points, worst_shown


def test_the_front_leaves_out_what_another_beats():
    found = [("a", 0.1, 80.0), ("b", 0.2, 79.0), ("c", 0.2, 90.0), ("d", 1.0, 90.0), ("e", 1.0, 91.0)]
    assert [label for label, *_ in front(found, lower=False)] == ["a", "c", "e"]
    assert [label for label, *_ in front(found, lower=True)] == ["a", "b"]


def test_the_axis_ends_where_most_scores_do():
    scores = [98.0, 97.5, 97.0, 96.5, 96.0, 95.5, 95.0, 9.0]
    assert 9 < worst_shown(scores, lower=False) < 95
    assert worst_shown([-score for score in scores], lower=True) == -worst_shown(scores, lower=False)
    assert (worst_shown([1.0, 2.0], lower=True), worst_shown([1.0, 2.0], lower=False)) == (2, 1)


def test_points_are_means_and_say_zeros_that_differ():
    def cell(method, sparsity, score, exact=True):
        settings = {"method": method, "sparsity": sparsity}
        return Cell(settings, {"score": score, "train_ratio": 0.5, "zeros": 0.5, "exact": exact}, 1.0, {})

    cells = [cell("set", 0.9, 80), cell("set", 0.9, 82), cell("s_ste", 0.5, 90), cell("str", 0.9, 70, False)]
    assert points(cells) == [
        ("set", 0.5, 81),
        ("s_ste (50% zeros)", 0.5, 90),
        ("str (50% zeros)", 0.5, 70),
    ]
