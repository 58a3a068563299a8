"""The dense convolutions as candidates: what sparse ones have to beat."""

import torch
import torch.nn.functional as F

from fxsparse.kernel import Problem, registered
from fxsparse.kernels import DENSE_CONV, MASKED_CONV


def problem(training):
    return Problem("conv2d", (8, 4, 3, 3), 20, 64, torch.float32, torch.device("cpu"), training)


def test_it_runs_in_training_only_and_costs_every_entry():
    assert registered()["dense-conv-masked"] is MASKED_CONV
    assert MASKED_CONV.refuses(problem(training=True)) == []
    assert MASKED_CONV.refuses(problem(training=False)) == ["it is for training"]
    assert MASKED_CONV.cost(problem(training=True)).flops == 3 * 2 * 20 * 288
    assert MASKED_CONV.cost(problem(training=True)).bytes == 288 * 4


def test_gradients_are_masked():
    weight, x = torch.randn(6, 4, 3), torch.randn(2, 8, 9)
    weight[torch.rand(6, 4, 3) < 0.5] = 0
    buffers = MASKED_CONV.pack(weight)
    trained = buffers["weight"].clone().requires_grad_()
    arguments = {"stride": 2, "padding": 1, "groups": 2}
    y = MASKED_CONV.run(x, None, trained, buffers["mask"], activation="relu", kernel_size=(3,), **arguments)
    torch.testing.assert_close(y, F.relu(F.conv1d(x, weight, **arguments)))
    y.sum().backward()
    assert not trained.grad[weight == 0].any()


def test_inference_has_the_plain_one():
    assert registered()["dense-conv"] is DENSE_CONV
    assert DENSE_CONV.refuses(problem(training=True)) == ["training needs the mask: dense-conv-masked has it"]
    assert DENSE_CONV.refuses(problem(training=False)) == []
    assert DENSE_CONV.cost(problem(training=False)).flops == 2 * 20 * 288
    weight, x = torch.randn(6, 4, 3), torch.randn(2, 8, 9)
    y = DENSE_CONV.run(
        x, None, *DENSE_CONV.pack(weight).values(), activation="silu", kernel_size=(3,), groups=2
    )
    torch.testing.assert_close(y, F.silu(F.conv1d(x, weight, groups=2)))
