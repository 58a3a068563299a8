"""``torch.compile`` with our backend beside Inductor, on pruned models.

    python -m benchmarks.torch_compile [--threads 1] [--rounds 101] [--models resnet18,transformer]

90 % of every weight are zeros by magnitude, the first convolution's and the classifier's too; batch 1, no gradients.
Calls take turns; a ratio is the median over the turns of Inductor's time / ours.
"""

import statistics
from collections.abc import Callable

import torch
import torchvision
from tabulate import tabulate
from torch import Tensor, nn

from benchmarks.timing import environment, parser
from fxsparse.backend import fxsparse, reports
from fxsparse.timing import interleaved_samples

SPARSITY = 0.9


def resnet18() -> tuple[nn.Module, Tensor]:
    """ResNet-18 and an image."""
    return torchvision.models.resnet18(), torch.randn(1, 3, 224, 224)


def transformer() -> tuple[nn.Module, Tensor]:
    """Six encoder layers of width 512, and 128 tokens."""
    layer = nn.TransformerEncoderLayer(512, 8, 2048, batch_first=True)
    return nn.TransformerEncoder(layer, 6, enable_nested_tensor=False), torch.randn(1, 128, 512)


MODELS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "resnet18": resnet18,
    "transformer": transformer,
}


def main() -> None:
    """Print the table."""
    made = parser(__doc__ or "", 101)
    made.add_argument("--models", default=",".join(MODELS))
    options = made.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    headers = ["model", "inductor ms", "fxsparse ms", "ratio", "taken"]
    rows = [row(name, options.rounds) for name in options.models.split(",")]
    print(f"Medians of {options.rounds} turns. {environment(torch.float32)}")
    print(tabulate(rows, headers, disable_numparse=True))


@torch.no_grad()
def row(name: str, rounds: int) -> list[str]:
    """One line of the table."""
    model, x = MODELS[name]()
    prune(model.eval())
    dense, ours = (torch.compile(Caller(model), backend=backend) for backend in ("inductor", fxsparse))
    torch.testing.assert_close(ours(x), dense(x), rtol=1e-3, atol=1e-4)
    calls = {"inductor": lambda: dense(x), "fxsparse": lambda: ours(x)}
    samples = interleaved_samples(calls, rounds=rounds, warm_up=3, inner=dict.fromkeys(calls, 1))
    ratios = [a / b for a, b in zip(samples["inductor"], samples["fxsparse"], strict=True)]
    return [
        name,
        *(f"{statistics.median(samples[call]) / 1000:.2f}" for call in calls),
        f"{statistics.median(ratios):.2f}",
        reports()[-1].notes[-1].partition(" is fastest")[0],
    ]


class Caller(nn.Module):
    """Code objects cache what was compiled, so that each backend gets a module of its own around the model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        """The model."""
        return self.model(x)


def prune(model: nn.Module) -> None:
    """Zero the smallest entries of every weight, in place."""
    for parameter in model.parameters():
        if parameter.dim() > 1:
            count = round(SPARSITY * parameter.numel())
            parameter[parameter.abs() <= parameter.abs().flatten().kthvalue(count).values] = 0


if __name__ == "__main__":
    main()
