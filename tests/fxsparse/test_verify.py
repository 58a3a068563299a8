"""The comparison finds what differs, says how much, and leaves the model as it was."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxsparse.verify import Observation, compare, first_difference, largest_error, observe


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.norm(self.lin(x)))


def test_equal_runs_are_equal_and_leave_no_trace() -> None:
    model, x = Model().train(), torch.randn(8, 4)
    state, random = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    for training in (True, False):
        runs = [observe(model, model, x, training=training) for _ in range(2)]
        assert compare(*runs) is None
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert model.training
    assert model.lin.weight.grad is None


def detached(model: Model, x: Tensor) -> Tensor:
    return model.drop(model.norm(model.lin(x).detach()))


def miscounted(model: Model, x: Tensor) -> Tensor:
    model.norm.num_batches_tracked.add_(1)
    return model(x)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda model, x: model(x) * 1.01, "output 0 differs by"),
        (lambda model, x: (model(x), 1), "the output should be"),
        (lambda model, x: model.norm(model.lin(x)), "output 0 differs by"),
        (detached, "gradient of lin.weight is missing"),
        (miscounted, "buffer norm.num_batches_tracked differs in 1 of 1 entries"),
        (lambda model, x: model(x).double(), "output 0 should be torch.float32 (8, 4), got torch.float64"),
    ],
)
def test_each_kind_of_difference_is_named(wrong: Any, message: str) -> None:
    model, x = Model(), torch.randn(8, 4)
    expected = observe(model, model, x, training=True)
    got = observe(model, lambda x: wrong(model, x), x, training=True)
    difference = compare(expected, got)
    assert difference is not None
    assert difference.startswith(message)


@pytest.mark.parametrize("inference", [True, False])
@pytest.mark.parametrize("assigned", [True, False])
def test_a_buffer_that_evaluation_writes_is_seen_and_others_are_not(assigned: bool, inference: bool) -> None:
    with torch.inference_mode(inference):
        check_writes_are_seen(assigned)


def check_writes_are_seen(assigned: bool) -> None:
    model, x = Model().eval(), torch.randn(8, 4)

    def counting(x: Tensor) -> Tensor:
        if assigned:
            model.norm.num_batches_tracked = model.norm.num_batches_tracked + 1
        else:
            model.norm.num_batches_tracked.add_(1)
        model.norm.running_mean = model.norm.running_mean.clone()  # another tensor of the same values
        return model(x)

    wanted = observe(model, counting, x, training=False)
    assert wanted.tensors.keys() == {"output 0", "buffer norm.num_batches_tracked"}
    assert compare(wanted, observe(model, model, x, training=False)) == (
        "buffer norm.num_batches_tracked is missing"
    )
    assert model.norm.num_batches_tracked == 0


def test_a_softmax_still_shows_wrong_gradients() -> None:
    # The plain sum of a softmax is constant, so its gradient would be zero whatever the model does.
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Softmax(-1)), torch.randn(8, 4)
    seen = observe(model, model, x, training=True)
    assert seen.tensors["gradient of 0.weight"].abs().max() > 1e-2


def test_not_a_number_and_integers_are_compared() -> None:
    bad = torch.tensor([1.0, float("nan")])
    assert first_difference({"a": bad}, {"a": bad.clone()}) is None
    assert first_difference({"a": bad}, {"a": torch.ones(2)}) == "a differs in which entries are finite"
    ints = torch.arange(3)
    assert first_difference({"a": ints}, {"a": ints.flip(0)}) == "a differs in 2 of 3 entries"


def test_complex_numbers_may_round() -> None:
    want = {"a": torch.complex(torch.ones(2), torch.zeros(2))}
    assert first_difference(want, {"a": want["a"] * (1 + 1e-6)}) is None
    assert (
        first_difference(want, {"a": want["a"].conj() * 1.01})
        == "a differs by 0.01 where its largest entry is 1"
    )


def test_double_precision_is_compared_in_double_precision() -> None:
    want = {"a": torch.ones(2).double()}
    assert first_difference(want, {"a": want["a"] * (1 + 2e-9)}) is None
    assert first_difference(want, {"a": want["a"] * (1 + 2e-8)}) is not None


@pytest.mark.parametrize("inside", [torch.float32, torch.bfloat16])
def test_outputs_may_round_as_what_they_are_made_of(inside: torch.dtype) -> None:
    gm = torch.fx.symbolic_trace(nn.Linear(4, 4))
    for node in gm.graph.nodes:
        node.meta["val"] = torch.zeros(1, dtype=inside if node.op == "call_function" else torch.float64)
    want = Observation("tree", {"a": torch.ones(2).double()})
    got = Observation("tree", {"a": want.tensors["a"] * (1 + torch.finfo(inside).eps)})
    assert compare(want, got, gm) is None
    assert compare(want, got) is not None
    assert compare(want, Observation("tree", {"a": torch.full((2,), 1.1).double()}), gm) is not None


def test_the_largest_error_is_relative_to_the_largest_entry_and_infinite_where_more_than_digits_differ() -> (
    None
):
    def seen(**tensors: Tensor) -> Observation:
        return Observation("tree", tensors)

    want = seen(a=torch.tensor([4.0, -8.0]), b=torch.tensor([1, 2]))
    assert largest_error(want, seen(a=torch.tensor([4.0, -7.0]), b=torch.tensor([1, 3]))) == 0.125
    assert largest_error(want, want) == 0.0
    wrong: list[Observation] = [
        seen(a=torch.tensor([4.0])),
        seen(a=torch.tensor([4.0, float("nan")]), b=torch.tensor([1, 2])),
        seen(a=torch.tensor([4.0]), b=torch.tensor([1, 2])),
        seen(a=torch.tensor([4.0, -8.0]).double(), b=torch.tensor([1, 2])),
        Observation("another", want.tensors),
    ]
    assert [largest_error(want, got) for got in wrong] == [float("inf")] * len(wrong)
