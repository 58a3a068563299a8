"""Report: what was done to every parameter, pass and call site, as tables."""

import json
from base64 import b64encode
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib import resources
from math import isnan
from typing import Any

from fxsparse.errors import InvariantError, UnsupportedError
from fxsparse.topology import TopologyHistory, draw

Row = dict[str, Any]

UNKNOWN = "—"

HEADERS = {
    "seconds": "time (s)",
    "sparsity_target": "target sparsity",
    "flops_dense": "dense (FLOP)",
    "flops_sparse": "theoretical (FLOP)",
    "flops_executed": "executed (FLOP)",
    "train_flops_ratio": "training FLOPs / dense",
    "bytes_dense": "dense (byte)",
    "bytes_sparse": "sparse (byte)",
    "dense_us": "dense (us)",
    "sparse_us": "sparse (us)",
    "limit_us": "limit (us)",
    "limit_share": "limit / time",
    "values_error": "error by values",
    "output_error": "error of output",
    "neurons_removed": "neurons removed",
    "active_neurons": "active neurons",
    "fan_in_min": "least fan-in",
    "fan_in_mean": "mean fan-in",
    "fan_in_max": "largest fan-in",
    "itop": "ITOP rate",
    "itop_since": "ITOP since step",
    "sparsity_nominal": "nominal sparsity of the transformation",
    "layers_before": "transformed layers as they came (FLOP)",
    "layers_sparse": "transformed layers, theoretical (FLOP)",
    "layers_ratio": "transformed layers / as they came",
    "model_before": "model as it came (FLOP)",
    "model_ratio": "whole model / as it came",
}
"""Column headers that carry a unit; other columns are headed by their field."""

PASSES = ("name", "rewrites", "seconds", "notes")
LAYERS = (
    *("name", "op", "shape", "pattern", "neurons", "storage", "kernel", "sparsity_target", "sparsity"),
    *("nnz", "numel", "flops_dense", "flops_sparse", "flops_executed", "dense_us", "sparse_us"),
    *("limit_us", "limit_share", "values", "values_error", "neurons_removed", "output_error", "reason"),
)
TOPOLOGY = (
    *("name", "step", "nnz", "active_neurons", "neurons", "fan_in_min", "fan_in_mean", "fan_in_max", "churn"),
    *("itop", "itop_since"),
)
OPTIONAL = (
    "dense_us",
    "sparse_us",
    "limit_us",
    "limit_share",
    "values",
    "values_error",
    "neurons",
    "neurons_removed",
    "output_error",
)
"""Columns shown only where some layer has them: in training nothing is measured and no neuron removed, few methods
ablate, and what values are stored in is of interest where it was asked for."""
TOTALS = (
    *("numel", "nnz", "sparsity", "flops_dense", "flops_sparse", "flops_executed", "train_flops_ratio"),
    *("bytes_dense", "bytes_sparse"),
)
ENVIRONMENT = ("torch", "device", "threads", "dtype", "kernels")


@dataclass
class Report:
    """Rows for ``to_dict``; filled by the runner and by passes.

    A number that is not known is absent or None, never 0; tables print it as "—".  FLOPs are for one sample,
    in three columns that are never mixed: dense, theoretical (nonzeros only) and executed (what the storage
    really computes).
    """

    passes: list[Row] = field(default_factory=list)
    layers: list[Row] = field(default_factory=list)
    untouched: list[Row] = field(default_factory=list)
    totals: Row = field(default_factory=dict)
    environment: Row = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    topology: TopologyHistory = field(default_factory=lambda: TopologyHistory({}))
    """How masks moved since; it grows while the module trains."""

    def to_dict(self) -> dict[str, Any]:
        """All rows as plain values; every documented key is there, None where it is not known."""
        return {
            "passes": [_with_keys(row, PASSES) for row in self.passes],
            "layers": [_with_keys(row, _required(LAYERS)) for row in self.layers],
            "untouched": [_with_keys(row, ("name", "reason")) for row in self.untouched],
            "totals": _with_keys(self.totals, TOTALS),
            "environment": _with_keys(self.environment, ENVIRONMENT),
            "notes": self.notes + self.topology.emptied(),
            "topology": self.topology.rows(),
        }

    def to_json(self) -> str:
        """`to_dict` as JSON, indented."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False)

    def to_markdown(self) -> str:
        """Every table under a heading, in GitHub's table syntax."""
        return self._text("## {}\n\n", "github", pipe="\\|")

    def to_html(self, plots: Mapping[str, bytes] | None = None) -> str:
        """One self-contained page; `plots` ({title: PNG or SVG bytes}) are embedded in it.

        How masks moved is plotted where matplotlib is installed.
        """
        from jinja2 import Environment

        source = resources.files("fxsparse").joinpath("report.html").read_text(encoding="utf-8")
        template = Environment(autoescape=True, trim_blocks=True).from_string(source)
        topology, remarks = self._topology_plots()
        return template.render(
            tables=self.tables(), plots=embedded(topology | dict(plots or {})), remarks=remarks
        )

    def __str__(self) -> str:
        return self._text("{}\n", "simple")

    def _repr_html_(self) -> str:
        return self.to_html()

    def tables(self) -> list[tuple[str, list[str], list[list[str]]]]:
        """(title, headers, cells as text) of every table that has a row, in reading order."""
        shown = [c for c in LAYERS if c not in OPTIONAL or any(row.get(c) is not None for row in self.layers)]
        tables = [
            ("Notes", ["note"], [[note] for note in self.notes + self.topology.emptied()]),
            _table("Passes", PASSES, self.passes),
            _table("Layers", shown, self.layers),
            _table("Untouched", ("name", "reason"), self.untouched),
            _table("Masks after the last update", _asked(self.topology), self.topology.latest()),
            _pairs("Totals", TOTALS, self.totals),
            _pairs("Environment", ENVIRONMENT, self.environment),
        ]
        return [table for table in tables if table[2]]

    def _topology_plots(self) -> tuple[dict[str, bytes], list[str]]:
        """The plots, and a remark where there should be some and are none."""
        try:
            return draw(self.topology.rows()), []
        except UnsupportedError as error:
            return {}, [str(error)]

    def _text(self, heading: str, style: str, pipe: str = "|") -> str:
        from tabulate import tabulate

        parts = []
        for title, headers, rows in self.tables():
            rows = [[value.replace("|", pipe) for value in row] for row in rows]
            table = tabulate(rows, headers, tablefmt=style, disable_numparse=True, colalign=_align(rows))
            parts.append(heading.format(title) + table)
        return "\n\n".join(parts)


def check_complete(report: Report, parameters: Iterable[str]) -> None:
    """Raise InvariantError unless every parameter, and nothing else, is in `layers` or `untouched` once."""
    seen = Counter(row["name"] for row in (*report.layers, *report.untouched))
    expected = set(parameters)
    missing, extra = sorted(expected - set(seen)), sorted(set(seen) - expected)
    twice = sorted(name for name, n in seen.items() if n > 1)
    if missing or extra or twice:
        raise InvariantError(
            "report: expected every parameter in layers or untouched exactly once; "
            f"missing {missing}, twice {twice}, not a parameter {extra}. "
            "This is a bug of the pass that collects weights."
        )


def embedded(plots: Mapping[str, bytes]) -> list[tuple[str, str]]:
    """(title, data URI) of {title: PNG or SVG bytes}."""
    return [
        (title, f"data:image/{_image_type(image)};base64,{b64encode(image).decode()}")
        for title, image in plots.items()
    ]


def cell(value: object) -> str:
    """A value as a table shows it: thousands separated, fractions to four digits, "—" for unknown."""
    if value is None or value in ("", (), []) or (isinstance(value, float) and isnan(value)):
        return UNKNOWN
    if isinstance(value, bool) or not isinstance(value, int | float | tuple | list):
        return " ".join(str(value).split())
    if isinstance(value, tuple | list):
        return (
            "; ".join(map(str, value))
            if any(isinstance(v, str) for v in value)
            else "x".join(map(str, value))
        )
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _image_type(image: bytes) -> str:
    return "svg+xml" if image.lstrip().startswith(b"<") else "png"


def _asked(topology: TopologyHistory) -> tuple[str, ...]:
    """The columns of the topology's table; those of ITOP where somebody asked for it."""
    return TOPOLOGY if topology.itop_since is not None else tuple(c for c in TOPOLOGY if "itop" not in c)


def _required(columns: Iterable[str]) -> tuple[str, ...]:
    return tuple(c for c in columns if c not in OPTIONAL)


def _with_keys(row: Row, keys: Iterable[str]) -> Row:
    return {key: _plain(value) for key, value in (dict.fromkeys(keys) | row).items()}


def _plain(value: object) -> object:
    """JSON's types: tuples become lists, values such as patterns and sympy numbers their text, NaN None."""
    if isinstance(value, float) and isnan(value):
        return None
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return str(value)


def _table(title: str, columns: Iterable[str], rows: list[Row]) -> tuple[str, list[str], list[list[str]]]:
    columns = list(columns)
    return title, [HEADERS.get(c, c) for c in columns], [[cell(row.get(c)) for c in columns] for row in rows]


def _pairs(title: str, keys: Iterable[str], row: Row) -> tuple[str, list[str], list[list[str]]]:
    shown = [*keys, *(key for key in row if key not in keys)] if row else []
    return title, ["", "value"], [[HEADERS.get(key, key), cell(row.get(key))] for key in shown]


def _align(rows: list[list[str]]) -> list[str]:
    numeric = [
        all(v == UNKNOWN or v[0].isdigit() or v[0] == "-" for v in column)
        for column in zip(*rows, strict=True)
    ]
    return ["right" if n else "left" for n in numeric]
