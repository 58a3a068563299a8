"""Whether a budget of time is met: models pruned to half the time of dense, compiled for inference and timed.

``python -m benchmarks.latency_budget [--threads 1] [--share 0.5]``: a ResNet-18 and a ViT-small (timm) on one image of
224 pixels, stem and head dense, uniform sparsity; no training.  The share is measured over interleaved pairs with the
dense model, which is compiled for inference too.
"""

import argparse
from collections.abc import Callable

import timm
import torch
import torchvision
from tabulate import tabulate
from torch import nn

import fxsparse
from benchmarks.timing import environment
from fxsparse import Budget, Plan
from fxsparse.inference import speed_of

MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[str, ...]]] = {
    "ResNet-18": (torchvision.models.resnet18, ("conv1", "fc")),
    "ViT-small": (lambda: timm.create_model("vit_small_patch16_224"), ("patch_embed", "head")),
}


def main() -> None:
    """Read the options, measure and print."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--threads", type=int, default=1)
    options.add_argument("--share", type=float, default=0.5)
    words = options.parse_args()
    torch.set_num_threads(words.threads)
    torch.manual_seed(0)
    rows = [[name, *met(*MODELS[name], words.share)] for name in MODELS]
    print(environment(torch.float32))
    headers = ["model", "asked", "sparsity", "measured share", "dense (ms)", "ours (ms)"]
    print(tabulate(rows, headers, tablefmt="github", floatfmt=".3f"))


def met(build: Callable[[], nn.Module], dense: tuple[str, ...], share: float) -> list[float]:
    """Asked share, sparsity, measured share, and milliseconds of both."""
    model, x = build().eval(), torch.randn(1, 3, 224, 224)
    plan = Plan(budget=Budget(latency=share), allocation="uniform", exclude=dense)
    pruned = fxsparse.prune(model, plan, x)
    full, fast = (fxsparse.compile(each, mode="infer", example_inputs=x) for each in (model, pruned))
    zeros = 1 - fast.report.totals["nnz"] / fast.report.totals["numel"]
    speed = speed_of(full, fast, x, 31)
    return [share, zeros, 1 / speed.ratio, speed.dense_us / 1e3, speed.sparse_us / 1e3]


if __name__ == "__main__":
    main()
