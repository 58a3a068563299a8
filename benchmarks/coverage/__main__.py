"""What compiles, and whether it computes the same: torchvision, timm and transformers, in training and inference.

``python -m benchmarks.coverage`` goes on where an interrupted run was; ``--part torchvision timm transformers`` takes
some of them, ``--quick`` two dozen, ``--page docs/coverage.md`` writes what it found.  Every model gets a plan (80 %
zeros by magnitude, uniform) and is compared with itself with the same zeros: outputs in eval mode, in one seeded train
step outputs, gradients and buffers (below 100 M parameters), then the inference artefact's outputs on other inputs.
"""

import gc
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

from benchmarks.cells import Cell, environments, parser, run_cells
from benchmarks.coverage.hugging_face import hugging_face_models
from benchmarks.coverage.measure import measure
from benchmarks.coverage.models import Build, timm_models, torchvision_models

PARTS = {
    "torchvision": torchvision_models,
    "timm": timm_models,
    "transformers": hugging_face_models,
}
_QUICK = 12
"""Every so-maniest model of a part is in the quick table."""

_LEGEND = """
`python -m benchmarks.coverage --page docs/coverage.md` wrote this page. Every model gets a plan (80 % zeros by
magnitude, uniform) and is compared with itself with the same zeros: *train* is one seeded train step (outputs,
gradients, buffers; above 100 M parameters outputs alone) and the outputs in eval mode, *infer* the inference artefact's
outputs on other inputs; "equal", or the first difference. *covered_percent* is the share of the entries of all weights
that the plan reached, and *left* says how many weights stayed dense and why.
"""


def main() -> None:
    """Run what is missing, then print the table."""
    made = parser(__doc__, output="benchmarks/results/coverage.json")
    made.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS))
    made.add_argument("--page", type=Path, metavar="FILE", help="write the tables as Markdown")
    options = made.parse_args()
    torch.set_num_threads(options.threads)
    built = {part: PARTS[part]() for part in options.part}
    grid = [
        {"part": part, "model": name}
        for part, models in built.items()
        for name in list(models)[:: _QUICK if options.quick else 1]
    ]
    cells = run_cells(grid, lambda cell: _measured(built, cell), options.output, seconds=20)
    text = page(cells)
    print(text)
    if options.page:
        options.page.write_text(text)


def page(cells: list[Cell]) -> str:
    """The counts, then a line for each model, as Markdown."""
    legend = " ".join((__doc__ or "").split("\n\n")[0].split())
    return f"# Coverage\n\n{legend}\n{_LEGEND}\n{environments(cells)}\n\n{summary(cells)}\n\n{table(cells)}\n"


def table(cells: list[Cell]) -> str:
    """A line for each model."""
    columns = ("parameters_M", "front_end", "weights", "covered_percent", "left", "train", "infer")
    rows = [
        {"model": f"{cell.settings['part']}:{cell.settings['model']}"}
        | {column: _words(cell.result.get(column, "")) for column in columns}
        for cell in cells
    ]
    return tabulate(rows, headers="keys", tablefmt="github")


def summary(cells: list[Cell]) -> str:
    """A line for each part: how many compile, how many are equal, and whether any weight is lost."""
    rows = []
    for part in dict.fromkeys(cell.settings["part"] for cell in cells):
        results = [cell.result for cell in cells if cell.settings["part"] == part]
        front_ends = [result.get("front_end", "refused") for result in results]
        rows.append(
            {"part": part, "models": len(results)}
            | {name: front_ends.count(name) for name in ("symbolic", "export", "walk", "refused")}
            | {
                "train equal": sum(result["train"].startswith("equal") for result in results),
                "infer equal": sum(result["infer"] == "equal" for result in results),
                "largest error": f"{max(result.get('error', 0.0) for result in results):.1e}",
                "weights lost": sum(len(r.get("lost", [])) + len(r.get("lost_infer", [])) for r in results),
            }
        )
    return tabulate(rows, headers="keys", tablefmt="github")


def _measured(built: Mapping[str, Mapping[str, Build]], cell: Mapping[str, Any]) -> dict[str, Any]:
    torch.manual_seed(0)
    row = measure(*built[cell["part"]][cell["model"]]())
    torch.compiler.reset()
    gc.collect()
    return row


def _words(value: Any) -> Any:
    return (
        ", ".join(f"{count} {reason}" for reason, count in value.items())
        if isinstance(value, dict)
        else value
    )


if __name__ == "__main__":
    main()
