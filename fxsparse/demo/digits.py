"""The recipe: scikit-learn's handwritten digits, one training loop for dense and sparse models alike."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import OneCycleLR
from tqdm import tqdm

from fxsparse.errors import UnsupportedError

BATCH = 64
DENSE_RATE, SPARSE_RATE = 1e-3, 3e-3
"""Peak learning rates: the ViT trains worse sparse at the dense one's, and dense at the sparse one's."""


@dataclass(frozen=True)
class Digits:
    """1,797 images of 8 x 8 pixels, one fifth of them held out for the test."""

    train_images: Tensor
    """[1437, 1, 8, 8], zero mean, unit variance."""
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor

    def draw(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """64 training images with their labels, with replacement."""
        rows = torch.randint(len(self.train_labels), (BATCH,), generator=generator)
        return self.train_images[rows], self.train_labels[rows]


def load_digits() -> Digits:
    """The data set, which scikit-learn carries with it; the split is the same in every run.

    Raises:
        UnsupportedError: scikit-learn is not installed.
    """
    try:
        from sklearn import datasets
        from sklearn.model_selection import train_test_split
    except ModuleNotFoundError as error:
        raise UnsupportedError(
            f"the digits need scikit-learn, and {error.name!r} is not installed: pip install 'fxsparse[demo]'"
        ) from error
    images, labels = datasets.load_digits(return_X_y=True)
    parts = train_test_split(images, labels, test_size=0.2, stratify=labels, random_state=0)
    train_images, test_images = (torch.tensor(part, dtype=torch.float32) for part in parts[:2])
    mean, deviation = train_images.mean(), train_images.std()
    scaled = ((part - mean) / deviation for part in (train_images, test_images))
    train, test = (part.view(-1, 1, 8, 8) for part in scaled)
    return Digits(train, torch.tensor(parts[2]), test, torch.tensor(parts[3]))


def train(
    model: nn.Module,
    draw: Callable[[torch.Generator], tuple[Tensor, Tensor]],
    *,
    steps: int,
    seed: int = 0,
    rate: float = DENSE_RATE,
    attach: Callable[[AdamW], object] | None = None,
    groups: Callable[[float], list[dict[str, Any]]] | None = None,
    title: str = "",
) -> None:
    """Train in place with AdamW, a one-cycle rate and cross entropy, on `steps` batches that `draw` makes.

    `draw` returns inputs and int64 labels; the model answers with a row of logits for each label.
    `attach` gets the optimizer before the first step: `SparseModule.attach` for a sparse model.  `groups` makes the
    optimizer's groups from the rate, in place of one of all parameters: `SparseModule.parameter_groups` for a method
    that learns more than weights.
    """
    held = model.parameters() if groups is None else groups(rate)
    optimizer = AdamW(held, lr=rate, weight_decay=0.05)
    peaks = [group["lr"] for group in optimizer.param_groups]
    rates = OneCycleLR(optimizer, max_lr=peaks, total_steps=steps)
    if attach is not None:
        attach(optimizer)
    model.train()
    generator = torch.Generator().manual_seed(seed)
    for _ in tqdm(range(steps), desc=title, unit="step", leave=False, disable=None):
        inputs, labels = draw(generator)
        loss = F.cross_entropy(model(inputs).flatten(0, -2), labels.flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        rates.step()


@torch.no_grad()
def accuracy(model: nn.Module, digits: Digits) -> float:
    """Share of the test images that `model` labels right, in percent; leaves it in eval mode."""
    predicted = model.eval()(digits.test_images).argmax(1)
    return 100 * (predicted == digits.test_labels).float().mean().item()
