"""Whether compiled models compute what the models do: one model of every family of torchvision.

``python -m benchmarks.agreement`` goes on where an interrupted run was; ``--quick`` takes three families.  70 % zeros
by magnitude in every weight of two dimensions or more.  The error is the largest difference from the model's own
outputs, relative to the largest of these, over the example inputs, as many others, and one image.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from tabulate import tabulate
from torch import nn

import fxsparse
from benchmarks.cells import Settings, environments, parser, run_cells
from benchmarks.coverage.models import torchvision_model
from benchmarks.models.published import Published

SPARSITY = 0.7
FAMILIES = {
    "AlexNet": "alexnet", "VGG": "vgg11", "VGG, batch norm": "vgg11_bn", "ResNet": "resnet50",
    "ResNeXt": "resnext50_32x4d", "Wide ResNet": "wide_resnet50_2", "SqueezeNet": "squeezenet1_1",
    "DenseNet": "densenet121", "GoogLeNet": "googlenet", "Inception": "inception_v3",
    "ShuffleNet": "shufflenet_v2_x0_5", "MobileNetV2": "mobilenet_v2", "MobileNetV3": "mobilenet_v3_small",
    "MNASNet": "mnasnet0_5", "EfficientNet": "efficientnet_b0", "EfficientNetV2": "efficientnet_v2_s",
    "RegNetX": "regnet_x_400mf", "RegNetY": "regnet_y_400mf", "ConvNeXt": "convnext_tiny", "ViT": "vit_b_32",
    "Swin": "swin_t", "SwinV2": "swin_v2_t", "MaxViT": "maxvit_t",
}  # fmt: skip
QUICK = ("SqueezeNet", "MobileNetV3", "ShuffleNet")
OUTPUT = "benchmarks/results/agreement.json"


def main() -> None:
    """Run what is missing, then print the table."""
    options = parser(__doc__, output=OUTPUT).parse_args()
    torch.set_num_threads(options.threads)
    grid = [{"family": family} for family in (QUICK if options.quick else FAMILIES)]
    cells = run_cells(grid, measure, options.output, seconds=20)
    rows = [cell.settings | cell.result for cell in cells]
    print(f"{environments(cells)}\n\n{tabulate(rows, headers='keys', tablefmt='github')}")
    print(f"\nlargest error of {len(rows)}: {max(row['error'] for row in rows):.1e}")


def measure(settings: Settings) -> dict[str, Any]:
    """Compile one family's model and compare; {"model", "error", "kernels": how many weights each has}."""
    torch.manual_seed(0)
    name = FAMILIES[settings["family"]]
    x = torchvision_model(name)[1]
    # Batch norm takes its statistics from these, at the stride of the whole model more than one number a channel.
    model = Published(build(name), lambda batch: torch.randn(8, *x.shape[1:])).pruned(SPARSITY)
    sparse = fxsparse.compile(model, mode="infer", example_inputs=(x,))
    kernels = Counter(row["kernel"] for row in sparse.report.layers if row["kernel"])
    errors = [_error(sparse, model, images) for images in (x, torch.randn_like(x), x[:1])]
    return {"model": name, "error": max(errors), "kernels": ", ".join(f"{n} {k}" for k, n in kernels.items())}


def build(name: str) -> Callable[[], nn.Module]:
    """A model whose outputs depend on all of its layers: weights of 0 or 1e-6 would hide what comes before."""

    @torch.no_grad()
    def made() -> nn.Module:
        model = torchvision_model(name)[0]
        for key, weight in model.named_parameters():
            if key.endswith("layer_scale"):
                weight.fill_(1.0)
            elif weight.dim() > 1 and not weight.any():
                weight.normal_()
        return model

    return made


@torch.no_grad()
def _error(sparse: nn.Module, model: nn.Module, x: torch.Tensor) -> float:
    exact = model(x)
    return float((sparse(x) - exact).abs().max() / exact.abs().max())


if __name__ == "__main__":
    main()
