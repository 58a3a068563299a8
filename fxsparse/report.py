"""Report: what was done to every parameter, pass and call site, as tables."""

from dataclasses import dataclass, field


@dataclass
class Report:
    """Rows for ``to_dict``; filled by the runner and by passes."""

    passes: list[dict[str, object]] = field(default_factory=list)
    layers: list[dict[str, object]] = field(default_factory=list)
    untouched: list[dict[str, object]] = field(default_factory=list)
    totals: dict[str, object] = field(default_factory=dict)
    environment: dict[str, object] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
