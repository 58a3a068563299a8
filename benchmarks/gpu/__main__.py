"""The GPU kernels beside cuBLAS, cuSPARSE, cuSPARSELt, torch's Triton kernels and torch's own expressions.

    python -m benchmarks.gpu [--quick] [--part NAME ...] [-o FILE]

Parts: SRigL's layer, decoding, products with blocks, 2:4, mask updates, the chooser; what each measures is at the head
of its module.  All rivals of a cell are in one run and take turns; each is compared with fp64 first.  Times are
medians: as CUDA graphs (the kernels alone) and as calls from Python.  Every part has a process of its own and every
cell is kept as it is finished, so that a run that is cut short goes on where it was; a cell that failed says so, and
runs again when its line is taken out of the file.  ``--device cpu --tiny`` runs all of it on small shapes, to see that
it runs.
"""

import argparse
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from benchmarks.cells import Cell, environments, parser, run_cells
from benchmarks.gpu import blocks, chooser, decode, layer, semi, updates
from benchmarks.gpu.clock import FAILURES, reason
from benchmarks.gpu.rivals import triton_errors
from benchmarks.gpu.tables import tables
from fxsparse.errors import FxSparseError
from fxsparse.machine import processor


@dataclass(frozen=True)
class Part:
    """One table."""

    grid: Callable[[bool, bool], list[dict[str, Any]]]
    """Settings of its cells; (quick, tiny)."""
    measure: Callable[[Mapping[str, Any], torch.device], dict[str, Any]]
    seconds: float
    """Of a cell, about."""


PARTS = {
    name: Part(module.grid, module.measure, module.SECONDS)
    for name, module in (
        ("layer", layer),
        ("decode", decode),
        ("blocks", blocks),
        ("semi", semi),
        ("updates", updates),
        ("chooser", chooser),
    )
}


def main(words: Sequence[str] | None = None) -> int:
    """Run what is missing and print the tables; 1 where a part or a cell failed."""
    options = _options(words)
    if len(options.part) > 1:
        return _each_in_its_process(options, sys.argv[1:] if words is None else words)
    name = options.part[0]
    cells = run(name, options)
    print(f"\n{name}\n{environments(cells)}\n\n{tables(name, cells)}", flush=True)
    return int(any("failed" in cell.result for cell in cells))


def run(name: str, options: argparse.Namespace) -> list[Cell]:
    """The finished cells of a part."""
    torch.set_num_threads(options.threads)
    part, device = PARTS[name], torch.device(options.device)
    on = torch.cuda.get_device_name() if device.type == "cuda" else processor()
    return run_cells(
        _grid(name, options, on), partial(_measured, part, device), options.output, seconds=part.seconds
    )


def _measured(part: Part, device: torch.device, settings: Mapping[str, Any]) -> dict[str, Any]:
    try:
        return part.measure(settings, device)
    except (*FAILURES, *triton_errors(), FxSparseError) as error:
        if device.type == "cuda":
            torch.cuda.synchronize()  # a broken device ends this process, and the cell is not kept
        return {"failed": reason(error)}


def _grid(name: str, options: argparse.Namespace, on: str) -> list[dict[str, Any]]:
    return [{"part": name, "device": on, **cell} for cell in PARTS[name].grid(options.quick, options.tiny)]


def _each_in_its_process(options: argparse.Namespace, words: Sequence[str]) -> int:
    """One part after the other, so that a device error in one does not take the others with it."""
    minutes = {name: len(_grid(name, options, "")) * PARTS[name].seconds / 60 for name in options.part}
    listed = ", ".join(f"{name} {m:.1f}" for name, m in minutes.items())
    print(f"about {sum(minutes.values()):.0f} min where nothing is done yet ({listed})", flush=True)
    # The last --part counts.
    commands = [[sys.executable, "-m", "benchmarks.gpu", *words, "--part", name] for name in options.part]
    codes = [subprocess.run(command, check=False).returncode for command in commands]
    return int(any(codes))


def _options(words: Sequence[str] | None) -> argparse.Namespace:
    made = parser(__doc__, output="benchmarks/results/gpu.json")
    made.add_argument("--part", nargs="+", default=list(PARTS), choices=list(PARTS))
    made.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    made.add_argument(
        "--tiny", action="store_true", help="small shapes, whose times say nothing; kept with -o only"
    )
    options = made.parse_args(words)
    if options.tiny and options.output == made.get_default("output"):
        options.output = None
    if options.device == "cuda" and not torch.cuda.is_available():
        made.error(
            "expected a CUDA device, and there is none: --device cpu --tiny shows that everything runs"
        )
    return options


if __name__ == "__main__":
    sys.exit(main())
