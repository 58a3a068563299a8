"""Test accuracy on scikit-learn's digits, by method, over seeds: ``python -m benchmarks.tasks.digits``.

    python -m benchmarks.tasks.digits --models ViT --methods rigl set:drop_fraction=0.1 dense --sparsity 0.9 0.95

Data, models (and a ResNet) and training loop are the demo's: AdamW, a one-cycle rate with a peak of 1e-3 dense and 3e-3
sparse, the same for every method.  The accuracy is that after the last step on 360 held-out images: no step, seed or
rate is chosen by it here, but the two rates were, when the demo was written.
"""

import functools

import torch
from torch import Tensor, nn

from benchmarks.models import DigitsResNet
from benchmarks.tasks.comparison import Task, compare
from fxsparse.demo.digits import DENSE_RATE, SPARSE_RATE, Digits, accuracy, load_digits
from fxsparse.demo.models import MODELS


@functools.cache
def _digits() -> Digits:
    return load_digits()


def draw(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """64 training images and their labels."""
    return _digits().draw(generator)


def evaluate(model: nn.Module) -> float:
    """Percent of the test images that are labelled right."""
    return accuracy(model, _digits())


TASK = Task(
    name="digits",
    score="test accuracy (%)",
    models={**MODELS, "ResNet": DigitsResNet},
    draw=draw,
    evaluate=evaluate,
    steps=400,
    seeds=5,
    seconds=12,
    identity=dict,
    rates=(DENSE_RATE, SPARSE_RATE),
)

if __name__ == "__main__":
    compare(TASK)
