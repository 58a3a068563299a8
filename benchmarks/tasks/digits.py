"""Test accuracy on scikit-learn's digits, dense and by method, over seeds: ``python -m benchmarks.tasks.digits``.

The recipe (data, models, training loop) is the demo's.  A run takes about ten seconds or less on two cores.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

import torch
from tabulate import tabulate
from tqdm import tqdm

import fxsparse
from fxsparse import Plan
from fxsparse.demo.digits import DENSE_RATE, SPARSE_RATE, Digits, accuracy, load_digits, train
from fxsparse.demo.models import MODELS
from fxsparse.method import Method
from fxsparse.methods import gmp, rigl, set_, static

DENSE = "dense"


def methods(steps: int) -> dict[str, Method]:
    """Every method with its updates in the first three quarters of `steps`."""
    every = 20
    stop = 3 * steps // 4 // every * every  # a multiple, so that GMP's ramp ends on an update
    return {
        "static": static(),
        "set": set_(every=every, stop=stop),
        "rigl": rigl(every=every, stop=stop),
        "gmp": gmp(start=0, stop=stop, every=every),
    }


def one_run(model: str, method: str, digits: Digits, *, sparsity: float, steps: int, seed: int) -> float:
    """Test accuracy in percent of one training run."""
    torch.manual_seed(seed)
    network = MODELS[model]()
    if method == DENSE:
        train(network, digits, steps=steps, seed=seed, rate=DENSE_RATE)
        return accuracy(network, digits)
    plan = Plan(sparsity=sparsity, method=methods(steps)[method], storage="masked", seed=seed)
    sparse = fxsparse.compile(network, plan, example_inputs=(digits.train_images[:64],))
    train(sparse, digits, steps=steps, seed=seed, rate=SPARSE_RATE, attach=sparse.attach)
    return accuracy(sparse, digits)


def main() -> None:
    """Run the grid, print the table, and write every run with ``-o``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--sparsity", type=float, default=0.9)
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="every run as JSON")
    options = parser.parse_args()
    digits = load_digits()
    grid = [(model, method) for model in MODELS for method in (DENSE, *methods(options.steps))]
    runs = []
    for model, method in tqdm(grid, disable=None):
        settings = {"sparsity": options.sparsity, "steps": options.steps}
        scores = [one_run(model, method, digits, **settings, seed=s) for s in range(options.seeds)]
        runs.append({"model": model, "method": method, **settings, "accuracy": scores})
    if options.output:
        environment = {
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "python": sys.version.split()[0],
        }
        options.output.write_text(json.dumps({"environment": environment, "runs": runs}, indent=2) + "\n")
    cells = [
        [
            r["model"],
            r["method"],
            f"{statistics.mean(r['accuracy']):.2f}",
            f"{statistics.pstdev(r['accuracy']):.2f}",
        ]
        for r in runs
    ]
    print(tabulate(cells, ["model", "method", "mean test accuracy (%)", "deviation"], disable_numparse=True))


if __name__ == "__main__":
    main()
