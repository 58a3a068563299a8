"""A record of every mask update: how many entries and neurons are active, and how many were exchanged."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fxsparse.errors import CheckpointError
from fxsparse.selection import MaskChange, to_positions
from fxsparse.topology.ever_active import EverActive

MAX_ROWS = 1024
"""Rows kept of one weight.  Above it neighbours merge, so that a method with an update at every step stays small."""


class _Row(NamedTuple):
    step: int
    updates: int
    """How many updates the row sums up; 0 for the masks before the first one."""
    nnz: int
    active_neurons: int
    fan_in_min: int
    fan_in_max: int
    pruned: int
    grown: int
    visited: int
    """Entries that were ever active; -1 where nobody looked."""

    def then(self, later: "_Row") -> "_Row":
        """Both as one row."""
        return later._replace(
            updates=self.updates + later.updates,
            pruned=self.pruned + later.pruned,
            grown=self.grown + later.grown,
        )


@dataclass
class _Track:
    """What is known of one weight."""

    rows: list[_Row] = field(default_factory=list)
    stride: int = 1
    """Updates that one row sums up."""
    ever: EverActive | None = None

    def add(self, row: _Row) -> None:
        if self.rows and 0 < self.rows[-1].updates < self.stride:
            self.rows[-1] = self.rows[-1].then(row)
            return
        self.rows.append(row)
        if len(self.rows) > MAX_ROWS:
            first, *rest = self.rows
            pairs = [rest[i : i + 2] for i in range(0, len(rest), 2)]
            self.rows = [first, *(pair[0].then(pair[1]) if len(pair) == 2 else pair[0] for pair in pairs)]
            self.stride *= 2


class _Unread(NamedTuple):
    """An update whose counts may still be on their way from the device."""

    name: str
    step: int
    before: Tensor | None
    after: Tensor
    pruned: int | Tensor
    grown: int | Tensor
    started: int
    visited: int


@dataclass(eq=False)
class TopologyHistory:
    """Rows for the report, made of what the updates of every weight tell; counts only, no masks.

    Attributes:
        shapes: {weight name: logical shape, [out, in, ...]}.
        since: the optimizer step from which on updates were seen.
        itop_since: that from which on visited entries were counted; None where nobody asked (`track_itop`).
    """

    shapes: Mapping[str, tuple[int, ...]]
    since: int = 0
    itop_since: int | None = None
    _tracks: dict[str, _Track] = field(default_factory=dict)
    _unread: list[_Unread] = field(default_factory=list)

    def track_itop(self, step: int) -> None:
        """Count, from this step on, the entries that were ever active; a second call does nothing.

        Their share is the ITOP rate (In-Time Over-Parameterization: Liu et al. 2021, arXiv:2102.02887).  Costs at most
        one bit per entry of the weights.
        """
        if self.itop_since is None:
            self.itop_since = step

    def restart(self, step: int) -> None:
        """Forget all, as after loading the masks of another run."""
        self.since, self._tracks, self._unread = step, {}, []
        if self.itop_since is not None:
            self.itop_since = step

    def record(self, name: str, step: int, before: Tensor, change: MaskChange) -> None:
        """One update of one weight: flat positions before it, int64 and ascending, and what it changes."""
        self._note(
            name,
            step,
            before=_counted(before, self.shapes[name]) if self._is_new(name) else None,
            after=_counted(change.new, self.shapes[name]),
            pruned=len(change.pruned),
            grown=len(change.grown),
            visit=(before, change.grown),
        )

    def record_masks(self, name: str, step: int, before: Tensor, after: Tensor) -> None:
        """The same from bool masks of the logical shape."""
        old, new, kept = (_fan_in(mask) for mask in (before, after, before & after))
        self._note(
            name,
            step,
            before=_summary(old) if self._is_new(name) else None,
            after=_summary(new),
            pruned=(old - kept).sum(),
            grown=(new - kept).sum(),
            visit=(before, after & ~before),
        )

    def rows(self) -> list[dict[str, Any]]:
        """One plain dict per weight and update, by weight; the first of each is its mask before the first update.

        ``churn`` is grown / nnz of one update, ``itop`` visited / numel; None where it is not known.  A row sums up
        ``updates`` updates, more than one only where there were very many.
        """
        self._settle()
        return [
            self._as_dict(name, row)
            for name in self.shapes
            if name in self._tracks
            for row in self._tracks[name].rows
        ]

    def latest(self) -> list[dict[str, Any]]:
        """The last row of every weight."""
        return list({row["name"]: row for row in self.rows()}.values())

    def emptied(self) -> list[str]:
        """A sentence for every weight whose mask kept no entry at an update."""
        found = {row["name"]: row["step"] for row in reversed(self.rows()) if row["nnz"] == 0}
        now = {row["name"]: row["nnz"] for row in self.latest()}
        return [
            f"{name}: its mask kept no entry at step {step}, and keeps {now[name]:,} now. Nothing passes through an "
            "empty weight, and gradients grow without bound where a norm divides by what is left of its outputs: keep "
            "it dense by Override(sparsity=0), or give each weight its own count (scope='layer' of Spartan)."
            for name, step in found.items()
        ]

    def state_dict(self) -> dict[str, Any]:
        """Everything as numbers and, under "tensors", tensors: to save beside the module's own state dict."""
        self._settle()
        weights = {
            name: {
                "shape": list(self.shapes[name]),
                "stride": track.stride,
                "visited": None if track.ever is None else track.ever.count,
            }
            for name, track in self._tracks.items()
        }
        tensors = {}
        for name, track in self._tracks.items():
            tensors[f"{name}/rows"] = torch.tensor(track.rows, dtype=torch.int64)
            if track.ever is not None:
                tensors[f"{name}/ever"] = track.ever.held.cpu()
        return {"since": self.since, "itop_since": self.itop_since, "weights": weights, "tensors": tensors}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue a saved history; call it after loading the module's own state dict, which restarts it.

        Raises:
            CheckpointError: weights that are not this model's.
        """
        for name, saved in state["weights"].items():
            if tuple(saved["shape"]) != self.shapes.get(name):
                raise CheckpointError(
                    f"topology history: expected a sparse weight {name!r} of shape {saved['shape']}, got "
                    f"{self.shapes.get(name, 'none of that name')}. Load the history of the same model."
                )
        self.since, self.itop_since, self._unread = state["since"], state["itop_since"], []
        self._tracks = {name: _track(name, state) for name in state["weights"]}

    def _is_new(self, name: str) -> bool:
        return name not in self._tracks

    def _note(
        self,
        name: str,
        step: int,
        *,
        before: Tensor | None,
        after: Tensor,
        pruned: int | Tensor,
        grown: int | Tensor,
        visit: tuple[Tensor, Tensor],
    ) -> None:
        # Counts of the update before have long arrived, so that reading them waits for nothing.
        if self._unread and self._unread[0].step != step:
            self._settle()
        track = self._tracks.setdefault(name, _Track())
        started, visited = self._visit(track, prod(self.shapes[name]), *visit)
        self._unread.append(_Unread(name, step, before, after, pruned, grown, started, visited))

    def _visit(self, track: _Track, numel: int, before: Tensor, grown: Tensor) -> tuple[int, int]:
        """Entries ever active before and after this update; -1 where nobody asked."""
        if self.itop_since is None:
            return -1, -1
        if track.ever is None:
            track.ever = EverActive.of(_positions(before), numel)
        started = track.ever.count
        track.ever.add(_positions(grown))
        return started, track.ever.count

    def _settle(self) -> None:
        unread, self._unread = self._unread, []
        for update in unread:
            track = self._tracks[update.name]
            if update.before is not None:
                track.add(_row(self.since, 0, update.before, 0, 0, update.started))
            track.add(
                _row(update.step, 1, update.after, int(update.pruned), int(update.grown), update.visited)
            )

    def _as_dict(self, name: str, row: _Row) -> dict[str, Any]:
        numel, visited = prod(self.shapes[name]), row.visited >= 0
        return {
            "name": name,
            "step": row.step,
            "updates": row.updates,
            "nnz": row.nnz,
            "numel": numel,
            "active_neurons": row.active_neurons,
            "neurons": self.shapes[name][0],
            "fan_in_min": row.fan_in_min,
            "fan_in_mean": row.nnz / row.active_neurons if row.active_neurons else None,
            "fan_in_max": row.fan_in_max,
            "pruned": row.pruned,
            "grown": row.grown,
            "churn": row.grown / row.updates / row.nnz if row.updates and row.nnz else None,
            "itop": row.visited / numel if visited else None,
            "itop_since": self.itop_since if visited else None,
        }


def _row(step: int, updates: int, summary: Tensor, pruned: int, grown: int, visited: int) -> _Row:
    nnz, active, least, largest = summary.tolist()
    return _Row(step, updates, nnz, active, least, largest, pruned, grown, visited)


def _counted(positions: Tensor, shape: tuple[int, ...]) -> Tensor:
    columns = prod(shape[1:])
    edges = torch.arange(0, (shape[0] + 1) * columns, columns, device=positions.device)
    return _summary(torch.searchsorted(positions, edges).diff())


def _fan_in(mask: Tensor) -> Tensor:
    # int32: twice as fast as the default, which counts for SR-STE with its update at every step.
    return mask.flatten(1).sum(1, dtype=torch.int32)


def _summary(fan_in: Tensor) -> Tensor:
    """nnz, active neurons, and the least and largest fan-in of an active neuron: on the device, int64 [4]."""
    active = fan_in > 0
    largest = fan_in.max()
    return torch.stack([fan_in.sum(), active.sum(), torch.where(active, fan_in, largest).min(), largest])


def _positions(entries: Tensor) -> Tensor:
    return to_positions(entries) if entries.dtype == torch.bool else entries


def _track(name: str, state: Mapping[str, Any]) -> _Track:
    saved, tensors = state["weights"][name], state["tensors"]
    ever = None
    if saved["visited"] is not None:
        ever = EverActive(prod(saved["shape"]), tensors[f"{name}/ever"], saved["visited"])
    return _Track([_Row(*row) for row in tensors[f"{name}/rows"].tolist()], saved["stride"], ever)
