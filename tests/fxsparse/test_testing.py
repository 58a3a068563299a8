"""The contracts are tested by breaking them."""

from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch

from fxsparse.errors import InvariantError
from fxsparse.method import Method, Probe
from fxsparse.methods import rigl, set_
from fxsparse.pattern import ConstantFanIn, Unstructured
from fxsparse.testing import check_method, check_pattern
from fxsparse.topk import top_mask


@dataclass(frozen=True)
class _Rule:
    choose: object
    probe: ClassVar[Probe] = Probe.NONE

    def __call__(self, view):
        return self.choose(view)  # type: ignore[operator]


def broken(choose) -> Method:
    return replace(set_(every=1), rule=_Rule(choose))


@pytest.fixture
def any_round_trip(monkeypatch):
    """Lets a method that nobody registered through to the later checks."""
    monkeypatch.setattr("fxsparse.method_checks.from_dict", lambda fields: _Anything())


class _Anything:
    def __eq__(self, other: object) -> bool:
        return True

    def __hash__(self) -> int:
        return 0


@pytest.mark.usefixtures("any_round_trip")
@pytest.mark.parametrize(
    ("choose", "error", "message"),
    [
        (lambda view: view.active[1:], AssertionError, "set at step 1: 19 entries, expected 20"),
        (lambda view: view.active.flip(0), InvariantError, "set at step 1: expected ascending positions"),
        (lambda view: view.active + 1000, InvariantError, "expected positions from 0 to 59"),
        (lambda view: list(view.gradient_tiles()), AssertionError, "reads the dense gradient without asking"),
        (lambda view: view.weight(), AssertionError, "reads the whole weight, yet has exact zeros"),
    ],
)
def test_a_broken_rule_is_caught(choose, error, message):
    with pytest.raises(error, match=message):
        check_method(broken(choose), Unstructured(), (6, 10), 20)


@pytest.mark.usefixtures("any_round_trip")
def test_varying_nnz_may_fall_short_of_the_budget_and_not_exceed_it():
    fewer = replace(broken(lambda view: torch.arange(view.budget - 3)), varying_nnz=True)
    check_method(fewer, Unstructured(), (6, 10), 20)
    more = replace(broken(lambda view: torch.arange(view.budget + 1)), varying_nnz=True)
    with pytest.raises(AssertionError, match="set at step 1: 21 entries, the budget is 20"):
        check_method(more, Unstructured(), (6, 10), 20)


@pytest.mark.usefixtures("any_round_trip")
def test_a_rule_that_depends_on_tiles_is_caught():
    class Tiled(_Rule):
        probe: ClassVar[Probe] = Probe.DENSE

    rule = Tiled(lambda view: torch.arange(20) + (len(list(view.gradient_tiles())) > 1))
    with pytest.raises(AssertionError, match="the choice depends on the gradient's tiles"):
        check_method(replace(rigl(), rule=rule), Unstructured(), (6, 10), 20)


def test_a_method_that_does_not_round_trip_is_caught():
    with pytest.raises(AssertionError, match=r"rigl: from_dict\(to_dict\(\)\) is another method"):
        check_method(replace(rigl(), source="elsewhere"), Unstructured(), (6, 10), 20)


@dataclass(frozen=True)
class _Wrong:
    """A pattern that projects as another one does."""

    inner: object = ConstantFanIn()
    extra: int = 0
    row_local: ClassVar[bool] = False
    streams: ClassVar[bool] = True

    def feasible(self, shape, nnz):
        return ConstantFanIn().feasible(shape, nnz)

    def project(self, score, nnz):
        return top_mask(score, self.feasible(score.shape, nnz) + self.extra)

    def project_tiles(self, tiles, shape, nnz):
        return ConstantFanIn().project_tiles(tiles, shape, nnz)

    def prune(self, score, active, shape, keep):
        return top_mask(score, keep)

    def check(self, mask):
        ConstantFanIn().check(mask)


def test_a_pattern_with_a_wrong_count_is_caught():
    with pytest.raises(AssertionError, match="project gave 21 ones, feasible says 20"):
        check_pattern(_Wrong(extra=1), (5, 8), 20)


def test_a_pattern_that_projects_outside_itself_is_caught():
    with pytest.raises(ValueError, match="ones in every row that has any"):
        check_pattern(_Wrong(), (5, 8), 20)
