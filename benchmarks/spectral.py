"""Seconds that the spectral analysis of all masks of a torchvision model takes: every quantity, weights included.

python -m benchmarks.spectral                     # ResNet-50 at 50, 90 and 95 % zeros, on one thread
"""

import argparse
import time

import torch
import torchvision
from tabulate import tabulate

import fxsparse
from benchmarks.cells import environment
from fxsparse.analysis import spectral_layers, spectral_table


def main() -> None:
    """Measure, and print the times and the table of the last run."""
    options = _options()
    rows = []
    for sparsity in options.sparsity:
        torch.manual_seed(0)
        model = torchvision.models.get_model(options.model)
        sparse = fxsparse.compile(model, fxsparse.Plan(sparsity=sparsity, storage="masked"))
        began = time.perf_counter()
        found = spectral_layers(sparse)
        seconds = time.perf_counter() - began
        known = sum(one.full_spectrum_distance is not None for one in found.values())
        rows.append((options.model, f"{sparsity:.0%}", len(found), known, f"{seconds:.1f}"))
        if sparsity == options.sparsity[-1]:
            print(spectral_table(found))
    print(environment())
    print(tabulate(rows, ["model", "zeros", "weights", "with all gaps", "seconds"], tablefmt="github"))


def _options() -> argparse.Namespace:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--model", default="resnet50", help="of torchvision, untrained (default: %(default)s)")
    made.add_argument("--sparsity", type=float, nargs="+", default=[0.5, 0.9, 0.95])
    return made.parse_args()


if __name__ == "__main__":
    main()
