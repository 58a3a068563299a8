"""The dense product as a candidate: what the sparse kernels have to beat."""

import torch
import torch.nn.functional as F

from fxsparse.kernel import Problem, registered
from fxsparse.kernels.dense.linear import DENSE, MASKED


def problem(training):
    return Problem("linear", (8, 16), 4, 32, torch.float32, torch.device("cpu"), training)


def test_one_of_the_two_runs_in_each_mode_and_the_other_says_why_not():
    assert DENSE.refuses(problem(training=False)) == MASKED.refuses(problem(training=True)) == []
    assert DENSE.refuses(problem(training=True)) == ["training needs the mask: dense-masked has it"]
    assert MASKED.refuses(problem(training=False)) == [
        "inference folds the mask: dense needs no multiplication"
    ]
    assert {"dense", "dense-masked"} <= registered().keys()


def test_masked_pays_for_its_mask_and_gives_masked_gradients():
    weight, x = torch.randn(8, 16), torch.randn(4, 16)
    weight[torch.rand(8, 16) < 0.5] = 0
    buffers = MASKED.pack(weight)
    trained = buffers["weight"].clone().requires_grad_()
    y = MASKED.run(x, None, trained, buffers["mask"], activation="relu")
    torch.testing.assert_close(y, F.relu(F.linear(x, weight)))
    y.sum().backward()
    assert not trained.grad[weight == 0].any()
    torch.testing.assert_close(DENSE.run(x, None, *DENSE.pack(weight).values(), activation="relu"), y)


def test_costs_are_those_of_every_entry():
    assert DENSE.cost(problem(training=False)).flops == 2 * 4 * 8 * 16
    assert MASKED.cost(problem(training=True)).flops == 3 * 2 * 4 * 8 * 16
    assert DENSE.cost(problem(training=False)).bytes == 8 * 16 * 4
