"""What Spartan's soft top-k costs beside a training step: one budget over as many values as a ResNet-50 has weights.

``python -m benchmarks.soft_topk [--threads 1] [--rounds 5]``: forward and backward of the soft top-k of 25.5 million
values, alternated with forward and backward of a ResNet-50 on 32 images of 224 pixels; least and median seconds, and
their share of that step.
"""

import torch
import torch.nn.functional as F
import torchvision
from tabulate import tabulate

from benchmarks.timing import arguments, environment
from fxsparse.timing import interleaved_samples
from fxsparse.topk import soft_topk

WEIGHTS, KEPT = 25_502_912, 0.1


def main() -> None:
    """Read the options, measure and print."""
    options = arguments(__doc__ or "", rounds=5)
    model, images, labels = torchvision.models.resnet50(), torch.randn(32, 3, 224, 224), torch.arange(32)
    values = (0.05 * torch.randn(WEIGHTS)).abs().requires_grad_()
    calls = {
        "soft top-k, forward": lambda: soft_topk(values.detach(), KEPT * WEIGHTS),
        "soft top-k, forward and backward": lambda: soft_topk(values, KEPT * WEIGHTS).sum().backward(),
        "ResNet-50, forward and backward": lambda: F.cross_entropy(model(images), labels).backward(),
    }
    samples = interleaved_samples(calls, rounds=options.rounds, warm_up=1, inner=dict.fromkeys(calls, 1))
    step = samples["ResNet-50, forward and backward"]
    rows = [
        [name, f"{min(us) / 1e6:.3f}", f"{sorted(us)[len(us) // 2] / 1e6:.3f}", f"{min(us) / min(step):.1%}"]
        for name, us in samples.items()
    ]
    print(environment(torch.float32))
    print(
        tabulate(rows, ["", "least (s)", "median (s)", "of a step"], tablefmt="github", disable_numparse=True)
    )


if __name__ == "__main__":
    main()
