"""What `benchmarks.all_methods` found, as tables."""

import statistics
from collections.abc import Mapping, Sequence

from tabulate import tabulate

from benchmarks.cells import Cell
from benchmarks.gse_training import held_bytes
from benchmarks.tasks.comparison import DENSE, Task
from benchmarks.tasks.every_method import PATTERNS, ROWS


def table(cells: Sequence[Cell], tasks: Mapping[str, Task], levels: Sequence[float]) -> str:
    """One table a model, in GitHub's markdown: means over seeds and their deviation."""
    models = dict.fromkeys((c.settings["task"], c.settings["model"]) for c in cells)
    return "\n".join(_table_of(tasks[task], model, cells, levels) for task, model in models)


def _table_of(task: Task, model: str, cells: Sequence[Cell], levels: Sequence[float]) -> str:
    of_model = [c for c in cells if c.settings["model"] == model]
    rows = [_line([c for c in of_model if c.settings["method"] == row], levels) for row in (DENSE, *ROWS)]
    headers = ["method", "seeds"]
    for level in levels:
        headers += [f"{task.score}, {level:.0%}", f"FLOPs, {level:.0%}"]
    headers += ["step (ms)", "update step (ms)", "memory (MB)"]
    made = tabulate([row for row in rows if row], headers, tablefmt="github", disable_numparse=True)
    return f"\n{task.name}, {model}, {of_model[0].settings['steps']} steps\n\n{made}"


def _line(cells: Sequence[Cell], levels: Sequence[float]) -> list[str]:
    if not cells:
        return []
    row, shown = cells[0].settings["method"], list[str]()
    for level in levels:
        at = [c for c in cells if c.settings["sparsity"] == level or (level == levels[0] and _is_fixed(c))]
        shown += [_score(at), _ratio(at)] if at else ["", ""]
    times = [_median([c.result[key] for c in cells]) for key in ("processor_ms", "update_ms")]
    return [row, str(len({c.settings["seed"] for c in cells})), *shown, *times, f"{_megabytes(cells):.2f}"]


def _is_fixed(cell: Cell) -> bool:
    return cell.settings["method"] in (DENSE, *PATTERNS)


def _score(cells: Sequence[Cell]) -> str:
    """With the deviation, and the zeros where they are not the column's."""
    values = [c.result["score"] for c in cells]
    text = f"{statistics.mean(values):.2f}"
    text += f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    plain = cells[0].result["exact"] and not _is_fixed(cells[0])
    return text if plain else f"{text} ({statistics.mean(c.result['zeros'] for c in cells):.1%} zeros)"


def _ratio(cells: Sequence[Cell]) -> str:
    return f"{statistics.mean(c.result['train_ratio'] for c in cells):.3f}"


def _median(values: Sequence[float | None]) -> str:
    found = [value for value in values if value is not None]
    return f"{statistics.median(found):.1f}" if found else ""


def _megabytes(cells: Sequence[Cell]) -> float:
    return statistics.median(held_bytes(c) for c in cells) / 1e6
