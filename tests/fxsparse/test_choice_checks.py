"""Rules of other packages return wrong things: each is named, in training as in `check_method`."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

import fxsparse
from fxsparse import Plan
from fxsparse.errors import InvariantError
from fxsparse.method import Choice, Extra, Method, Probe, WeightView
from fxsparse.methods import set_, sr_ste
from fxsparse.pattern import Unstructured
from fxsparse.reparam import Filled
from fxsparse.testing import check_method


@dataclass(frozen=True)
class Rule:
    choose: Callable[[WeightView], Any]
    probe: ClassVar[Probe] = Probe.NONE

    def __call__(self, view: WeightView) -> Any:
        return self.choose(view)


@dataclass(frozen=True)
class Together(Rule):
    choose_for_all: Callable[[list[WeightView]], Any]

    def choose_all(self, views: list[WeightView], total: int) -> Any:
        del total
        return self.choose_for_all(views)


def with_seen(rule: Rule) -> Method:
    return replace(set_(every=1), rule=rule, state=(Extra("seen", Filled(0.0)),))


def train(method: Method, storage: str = "masked") -> None:
    sparse = fxsparse.compile(nn.Linear(10, 6), Plan(sparsity=2 / 3, method=method, storage=storage))
    optimizer = torch.optim.SGD(sparse.parameters(), lr=0.1, momentum=0.9)
    sparse.attach(optimizer)
    for _ in range(2):
        optimizer.zero_grad()
        sparse(torch.ones(4, 10)).square().mean().backward()
        optimizer.step()


def chosen(view: WeightView) -> torch.Tensor:
    return torch.arange(view.nnz)


WRONG: dict[str, tuple[Callable[[WeightView], Any], str]] = {
    "nothing": (
        lambda view: None,
        "expected an update rule to return positions, a mask or a Choice, got NoneType",
    ),
    "a list": (lambda view: chosen(view).tolist(), "positions, a mask or a Choice, got list"),
    "a choice of a list": (lambda view: Choice([1, 2]), "Choice.entries as a tensor .* got list"),  # type: ignore[arg-type]
    "beyond the end": (lambda view: chosen(view) + 50, "expected positions from 0 to 59, got 50 to 69"),
    "below 0": (lambda view: chosen(view) - 3, "expected positions from 0 to 59, got -3 to 16"),
    "twice": (
        lambda view: chosen(view) // 2,
        "ascending positions without repeats, got 0 after 0 at index 1",
    ),
    "unsorted": (lambda view: chosen(view).flip(0), "ascending positions without repeats, got 18 after 19"),
    "floats": (lambda view: chosen(view).float(), r"flat positions as int64 \[n\], got torch.float32 \[20\]"),
    "a flat mask": (lambda view: torch.arange(60) < 20, r"logical shape \[6, 10\], got torch.bool \[60\]"),
    "a transposed mask": (
        lambda view: (torch.arange(60) < 20).view(10, 6),
        r"logical shape \[6, 10\], got torch.bool \[10, 6\]",
    ),
    "another device": (lambda view: chosen(view).to("meta"), "the weight's device cpu, got meta"),
    "an unknown extra": (
        lambda view: Choice(chosen(view), {"nope": torch.tensor(1.0)}),
        r"expected extras among \['seen'\], got 'nope'",
    ),
    "no table": (lambda view: Choice(chosen(view), [1]), "Choice.extras as {name: tensor}, got list"),  # type: ignore[arg-type]
    "an extra of another shape": (
        lambda view: Choice(chosen(view), {"seen": torch.ones(1)}),
        r"extra 'seen' as torch.float32 \[\], as in view.extras, got torch.float32 \[1\]",
    ),
    "an extra of another dtype": (
        lambda view: Choice(chosen(view), {"seen": torch.tensor(1)}),
        r"extra 'seen' as torch.float32 \[\], as in view.extras, got torch.int64 \[\]",
    ),
    "a number": (lambda view: Choice(chosen(view), {"seen": 1.0}), "extra 'seen' .* got float"),  # type: ignore[dict-item]
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_answer_is_named(case, monkeypatch):
    choose, message = WRONG[case]
    with pytest.raises(InvariantError, match=f"weight: set at step 1: .*{message}"):
        train(with_seen(Rule(choose)))
    with pytest.raises(InvariantError, match=f"weight: set at step 1: .*{message}"):
        train(with_seen(Together(choose, lambda views: [choose(views[0])])))
    monkeypatch.setattr("fxsparse.method_checks.from_dict", lambda fields: method)
    method = with_seen(Rule(choose))
    with pytest.raises(InvariantError, match=f"w: set at step 1: .*{message}"):
        check_method(method, Unstructured(), (6, 10), 20)


@pytest.mark.parametrize("storage", ["masked", "compact"])
def test_a_wrong_answer_is_the_same_error_in_either_storage(storage):
    for case in ("beyond the end", "twice", "floats", "a flat mask"):
        choose, message = WRONG[case]
        with pytest.raises(InvariantError, match=f"weight: set at step 1: .*{message}"):
            train(replace(set_(every=1), rule=Rule(choose)), storage)


def test_a_right_answer_passes_in_every_form(monkeypatch):
    for entries in (chosen, lambda view: (torch.arange(60) < view.nnz).view(view.shape)):

        def right(view, entries=entries):
            return Choice(entries(view), {"seen": view.extras["seen"] + 1})

        train(with_seen(Rule(right)))
        method = with_seen(Together(right, lambda views, right=right: [right(view) for view in views]))
        monkeypatch.setattr("fxsparse.method_checks.from_dict", lambda fields, method=method: method)
        check_method(method, Unstructured(), (6, 10), 20, updates=3)


@pytest.mark.parametrize(("given", "got"), [(None, "NoneType"), ([], "0 of them")])
def test_choose_all_answers_for_every_weight(given, got, monkeypatch):
    message = f"set at step 1: expected choose_all to return a list of 1 choices, .* got {got}"
    method = replace(set_(every=1), rule=Together(chosen, lambda views: given))
    with pytest.raises(InvariantError, match=message):
        train(method)
    monkeypatch.setattr("fxsparse.method_checks.from_dict", lambda fields: method)
    with pytest.raises(InvariantError, match=message):
        check_method(method, Unstructured(), (6, 10), 20)


@pytest.mark.parametrize("storage", ["masked", "compact"])
@pytest.mark.parametrize("read", [lambda v: list(v.gradient_tiles()), lambda v: v.gradient_at(v.active)])
def test_gradients_that_the_probe_does_not_collect_are_named(read, storage):
    message = (
        r"weight: set at step 1 reads gradients .* Probe.NONE does not collect: expected probe = Probe.DENSE"
    )
    with pytest.raises(InvariantError, match=message):
        train(replace(set_(every=1), rule=Rule(read)), storage)


@dataclass(frozen=True)
class Whole(Rule):
    def mask(self, weight: torch.Tensor, pattern: Any, nnz: int) -> torch.Tensor:
        del pattern, nnz
        return torch.ones(weight.numel(), dtype=torch.bool)


def test_a_mask_of_the_whole_weight_has_its_shape():
    method = replace(sr_ste(), rule=Whole(chosen))
    with pytest.raises(InvariantError, match=r"weight: sr_ste at step \d: .* logical shape \[6, 10\], got"):
        train(method)
