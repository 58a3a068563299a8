"""Inference of pruned models: dense against the artefact, eager and under torch.compile, and the reason of every op.

    python -m benchmarks.inference [--threads 1] [--sparsity 0.9] [--batch 1] [--models mlp vit] [--compile]

Zeros are drawn by magnitude, weight by weight, in every layer that may be sparse.  Ratios are medians over interleaved
pairs in one process, dense time / artefact time: below 1 we lose.
"""

import argparse
from collections import Counter
from collections.abc import Callable

import torch
import torchvision
from tabulate import tabulate
from torch import Tensor, nn

import fxsparse
from fxsparse import Plan, SparseModule
from fxsparse.inference import speed_of


def mlp(batch: int) -> tuple[nn.Module, Tensor]:
    """The digits MLP of the demo."""
    layers = (nn.Linear(64, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 10))
    return nn.Sequential(*layers), torch.randn(batch, 64)


def feed_forward(batch: int) -> tuple[nn.Module, Tensor]:
    """The feed-forward half of a ViT-B block."""
    return nn.Sequential(nn.Linear(768, 3072), nn.GELU(), nn.Linear(3072, 768)), torch.randn(batch, 768)


def vit(batch: int) -> tuple[nn.Module, Tensor]:
    """A ViT of width 256 on 32 x 32 images: 17 tokens."""
    model = torchvision.models.VisionTransformer(
        32, 8, num_layers=4, num_heads=8, hidden_dim=256, mlp_dim=1024
    )
    nn.init.normal_(model.get_parameter("heads.head.weight"))  # torchvision starts it at zero
    return model, torch.randn(batch, 3, 32, 32)


def resnet18(batch: int) -> tuple[nn.Module, Tensor]:
    """ResNet-18 on 128 x 128 images: nearly all of it is convolutions, which stay dense."""
    return torchvision.models.resnet18(), torch.randn(batch, 3, 128, 128)


def vit_b_16(batch: int) -> tuple[nn.Module, Tensor]:
    """ViT-B/16 on 224 x 224 images: 197 tokens."""
    model = torchvision.models.vit_b_16()
    nn.init.normal_(model.get_parameter("heads.head.weight"))
    return model, torch.randn(batch, 3, 224, 224)


MODELS: dict[str, Callable[[int], tuple[nn.Module, Tensor]]] = {
    build.__name__: build for build in (mlp, feed_forward, vit, resnet18, vit_b_16)
}


def main() -> None:
    """Print the two tables."""
    arguments = parse()
    torch.manual_seed(0)
    torch.set_num_threads(arguments.threads)
    rows, reasons = [], []
    for name in arguments.models:
        model, x = MODELS[name](arguments.batch)
        plan = Plan(sparsity=arguments.sparsity, allocation="uniform")
        pruned = fxsparse.prune(model.eval(), plan, x)
        fast = fxsparse.compile(pruned, mode="infer", example_inputs=x)
        rows.append([name, *measure(pruned, fast, x, arguments.compile)])
        reasons += [[name, *reason] for reason in why(fast)]
    where = f"torch {torch.__version__}, {arguments.threads} thread(s), batch {arguments.batch}, fp32"
    print(f"{arguments.sparsity:.0%} sparse, {where}\n")
    compiled = ["compiled dense (us)", "compiled ours (us)", "ratio"] if arguments.compile else []
    headers = ["model", "dense (us)", "ours (us)", "ratio", *compiled, "lowered", "bytes / dense"]
    print(tabulate(rows, headers, tablefmt="github", floatfmt=".2f"))
    print("\n" + tabulate(reasons, ["model", "shape", "weights", "kernel", "reason"], tablefmt="github"))


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--sparsity", type=float, default=0.9)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--models", nargs="+", default=[*MODELS][:4], choices=MODELS)
    parser.add_argument("--compile", action="store_true", help="also under torch.compile (minutes)")
    return parser.parse_args()


def measure(dense: nn.Module, fast: SparseModule, x: Tensor, compiled: bool) -> list[object]:
    """Times, ratios, lowered weights and bytes of one model."""
    pairs: list[tuple[Callable[..., object], Callable[..., object]]] = [(dense, fast)]
    if compiled:
        pairs.append((torch.compile(dense), torch.compile(fast)))
    cells: list[object] = []
    for one, other in pairs:
        speed = speed_of(one, other, x, pairs=31)
        cells += [speed.dense_us, speed.sparse_us, speed.ratio]
    lowered = sum(row["format"] != "dense" for row in fast.report.layers)
    totals = fast.report.totals
    size = totals["bytes_sparse"] / totals["bytes_dense"]
    return [*cells, f"{lowered} of {len(fast.report.layers)}", size]


def why(fast: SparseModule) -> list[list[object]]:
    """Weights of one shape and kernel in a row, with the reason of the first."""
    seen: dict[tuple[str, str], str] = {}
    counts: Counter[tuple[str, str]] = Counter()
    for row in fast.report.layers:
        key = ("x".join(map(str, row["shape"])), row["kernel"])
        counts[key] += 1
        seen.setdefault(key, row["reason"])
    return [[shape, counts[shape, kernel], kernel, reason] for (shape, kernel), reason in seen.items()]


if __name__ == "__main__":
    main()
