"""Runs a grid cell by cell and keeps every finished cell in a JSON file, so that a killed run goes on where it was.

A cell is a dict of plain settings in, a dict of plain numbers out.  The file has one line a cell, with its settings,
result, seconds and environment; a cell whose settings are in it already is not run again.
"""

import argparse
import functools
import json
import os
import platform
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from shutil import which
from typing import Any

import torch
from tqdm import tqdm

from fxsparse.machine import processor

Settings = Mapping[str, Any]


@dataclass(frozen=True)
class Cell:
    """One finished cell."""

    settings: dict[str, Any]
    result: dict[str, Any]
    seconds: float
    environment: dict[str, Any]


def run_cells(
    grid: Sequence[Settings],
    measure: Callable[[Settings], dict[str, Any]],
    output: Path | None = None,
    seconds: float | Callable[[Settings], float] | None = None,
) -> list[Cell]:
    """Measure the cells of `grid` that `output` lacks, and return all of `grid`, in its order.

    Prints what is to come first: by `seconds` of every cell where that is a function; else at the median of the cells
    that are done, else at `seconds` for one, else after the first cell.  `output` is replaced whole after each cell;
    cells in it that `grid` does not have stay.

    Raises:
        ValueError: `output` is not a file of cells, or settings are not plain JSON values.
    """
    wanted = [_plain(settings) for settings in grid]
    done = read_cells(output) if output is not None and output.exists() else []
    found = {_key(cell.settings): cell for cell in done}
    ahead = [settings for settings in wanted if _key(settings) not in found]
    known = [found[_key(settings)].seconds for settings in wanted if _key(settings) in found]
    if callable(seconds):
        cost = statistics.mean(map(seconds, ahead)) if ahead else None
    else:
        cost = statistics.median(known) if known else seconds
    print(_announce(len(ahead), len(wanted), cost))
    for settings in tqdm(ahead, unit="cell", disable=None):
        began = time.perf_counter()
        result = _plain(measure(settings))
        cell = Cell(settings, result, round(time.perf_counter() - began, 2), environment())
        found[_key(settings)] = cell
        if output is not None:
            _write(output, list(found.values()))
        if cost is None:
            cost = cell.seconds
            print(_announce(len(ahead) - 1, len(wanted), cost))
    return [found[_key(settings)] for settings in wanted]


def read_cells(path: Path) -> list[Cell]:
    """The cells that `run_cells` wrote to `path`."""
    try:
        return [Cell(**row) for row in json.loads(path.read_text())["cells"]]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: expected a JSON file of cells that this runner wrote; move it away or choose another -o."
        ) from error


def environment() -> dict[str, Any]:
    """Versions, processor and threads of this process, and the GPU where there is one."""
    return {
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        **_gpu(),
    }


def environments(cells: Sequence[Cell]) -> str:
    """A line for each environment that the cells were measured in."""
    return "\n".join(dict.fromkeys(", ".join(map(_pair, cell.environment.items())) for cell in cells))


def parser(
    description: str | None, output: str | None = None, figure: str | None = None
) -> argparse.ArgumentParser:
    """A command line with the options of every grid: ``--quick``, ``--threads`` and ``-o``.

    Where there is something to draw, which `figure` says, ``--figure``, and ``--finished`` that runs nothing for it.
    """
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--quick", action="store_true", help="a small part of the grid, in minutes")
    made.add_argument("--threads", type=int, default=1)
    made.add_argument(
        "-o",
        "--output",
        type=Path,
        default=output and Path(output),
        metavar="FILE",
        help="JSON of finished cells; those in it are not run again (default: %(default)s)",
    )
    if figure is not None:
        made.add_argument("--finished", action="store_true", help="show the cells of the file, and run none")
        made.add_argument("--figure", type=Path, metavar="FILE", help=f"draw {figure}")
    return made


@functools.cache
def _gpu() -> dict[str, Any]:
    """Name, driver, CUDA and Triton of the GPU that torch would use; nothing without one."""
    if not torch.cuda.is_available():
        return {}
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    done = (
        subprocess.run(command, capture_output=True, text=True, check=False) if which("nvidia-smi") else None
    )
    driver = done.stdout.split()[0] if done and done.returncode == 0 and done.stdout.split() else "unknown"
    versions = {"driver": driver, "cuda": torch.version.cuda, "triton": metadata.version("triton")}
    return {"gpu": torch.cuda.get_device_name(), **versions}


def _announce(ahead: int, total: int, seconds: float | None) -> str:
    line = f"{ahead} of {total} cells to run"
    if not ahead or seconds is None:
        return line
    return f"{line}, about {ahead * seconds / 60:.1f} min at {seconds:.3g} s a cell"


def _plain(values: Settings) -> dict[str, Any]:
    """As it comes back from the file, so that settings compare equal: tuples are lists."""
    try:
        return json.loads(json.dumps(dict(values), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ValueError(f"expected plain JSON values in a cell, got {dict(values)!r}: {error}") from error


def _key(settings: Settings) -> str:
    return json.dumps(settings, sort_keys=True)


def _write(path: Path, cells: Sequence[Cell]) -> None:
    """The file appears whole or not at all."""
    lines = ",\n".join(json.dumps(asdict(cell)) for cell in cells)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        whole = Path(folder, path.name)
        whole.write_text(f'{{"cells": [\n{lines}\n]}}\n')
        os.replace(whole, path)


def _pair(item: tuple[str, Any]) -> str:
    return f"{item[0]} {item[1]}"
