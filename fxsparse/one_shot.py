"""Zeros in a trained model in one shot: by a score of its weights, or by what they read on calibration batches."""

import itertools
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from fxsparse.blockwise import Runs, runs_of
from fxsparse.calibration import Call, Moments, Rows, call_of, from_matrix, to_matrix
from fxsparse.errors import FxSparseError, PlanError
from fxsparse.graph import Site, fetch, sites
from fxsparse.initial import initial_mask, target_of
from fxsparse.method import OneShot
from fxsparse.pattern import Block, ConstantFanIn, Pattern
from fxsparse.pipeline import PassContext
from fxsparse.plans import Plan
from fxsparse.report import Report
from fxsparse.scores import Given
from fxsparse.undisturbed import undisturbed

_NAMED = 5
"""Weights that a warning names."""


@torch.no_grad()
def prune_program(ctx: PassContext, batches: Sequence[Any] | None, measured: bool) -> dict[str, float]:
    """Prune the weights of ``ctx.decisions`` in place, by the method of the plan.

    With `batches` the program is run on them block by block; then `measured` weights have in what is returned the
    relative error of their op's output on these batches, |x (w - pruned)'| / |x w'|, where x comes from pruned blocks.

    Raises:
        PlanError: a batch that the model does not take.
        NumericsError: weights or inputs that are not finite, named; or inputs that are not enough for SparseGPT.
    """
    assert ctx.plan is not None
    ctx.notes, method = [], ctx.plan.method.one_shot
    names = [name for name, decision in ctx.decisions.items() if decision.nnz < ctx.weights[name].numel]
    if batches is None or (method is None and not measured):
        for name in names:
            _prune_by_score(ctx, name)
        return {}
    ctx.program.skeleton.eval()
    with undisturbed(ctx.program.skeleton):
        run = _Pruning(ctx, names, runs_of(ctx.program, names, batches), measured)
        for block in tqdm(range(len(run.runs.blocks)), desc="prune", unit="block", leave=False, disable=None):
            run.prune(block)
    run.tell(len(batches))
    return run.errors()


def check_pruning(model: nn.Module, plan: Plan, calibration: object, report: object) -> None:
    """Raise PlanError for arguments of `fxsparse.prune` that do not fit together."""
    name = plan.method.name
    if plan.method.rule is not None:
        raise PlanError(
            f"prune: expected a method that makes one mask, such as static('magnitude'), wanda() or sparsegpt(), got "
            f"{name}; train with fxsparse.compile(model, plan), then take sparse.to_dense()."
        )
    if isinstance(plan.method.init, Given):
        raise PlanError(
            f"prune: expected a score of the weight alone, such as static('magnitude'), got {plan.method.init.name!r}, "
            "which is handed in: fxsparse.compile(model, plan, initial_scores=...).to_dense() cuts by it."
        )
    if plan.method.one_shot is not None and calibration is None:
        raise PlanError(
            f"prune: {name} looks at what layers read: expected calibration=, an iterable of batches of the model's "
            "inputs such as [x], got none."
        )
    if report is not None and (not isinstance(report, Report) or report.passes):
        raise PlanError("prune: expected report as an empty fxsparse.Report() to fill.")
    if meta := [name for name, parameter in model.named_parameters() if parameter.is_meta]:
        raise PlanError(
            f"prune: {meta[0]!r} is on the meta device and has no values to prune; load them first."
        )


class _Pruning:
    """One run of `prune_program` over the blocks."""

    def __init__(self, ctx: PassContext, names: Sequence[str], runs: Runs, measured: bool) -> None:
        assert ctx.plan is not None
        self.ctx, self.runs, self.measured, self.method = ctx, runs, measured, ctx.plan.method.one_shot
        self.calls, self.refused = _calls(ctx, names)
        self.moments: dict[str, Moments] = {}
        self.lost: dict[str, tuple[Tensor, Tensor]] = {}
        """{weight of this block: what it was, what was taken from it}, in the logical layout."""
        self.squares: dict[str, list[float]] = {}
        """{weight: sums of squares of what its outputs lost, and of what they were}."""
        self.fallbacks: dict[str, str] = {}
        reached = set(itertools.chain(*runs.blocks))
        for name in [name for name in names if name not in reached]:
            self.refused[name] = "its op does not run in eval mode"
            self._prune_weight(name)

    def prune(self, block: int) -> None:
        """Look at the block's inputs, prune its weights, and run it pruned."""
        names = self.runs.blocks[block]
        if self.method is not None:
            kind = self.method.products
            self.moments = {n: Moments(_shape(self.ctx, n), kind) for n in names if n not in self.refused}
            self.runs.look(block, self._collect)
        for name in names:
            before = _logical(self.ctx, name).clone() if self.measured else None
            self._prune_weight(name)
            if before is not None:
                self.lost[name] = before, before - _logical(self.ctx, name)
        self.moments = {}
        self.runs.advance(block, self._measure if self.measured else None)
        self.lost = {}

    def tell(self, batches: int) -> None:
        """Notes for the report, and a warning of what was pruned otherwise than asked for."""
        if self.method is None or self.ctx.plan is None:
            return
        blocks = len(self.runs.blocks)
        self.ctx.notes.append(f"calibration batches: {batches}; blocks pruned one after the other: {blocks}")
        if self.fallbacks:
            listed = [f"{name} ({why})" for name, why in itertools.islice(self.fallbacks.items(), _NAMED)]
            more = ", ..." * (len(self.fallbacks) > _NAMED)
            warnings.warn(
                f"prune: pruned by magnitude, wholly or in part, in place of {self.ctx.plan.method.name}: "
                f"{', '.join(listed)}{more}. Give calibration batches that reach all layers, or exclude these weights.",
                stacklevel=5,  # the caller of fxsparse.prune
            )

    def errors(self) -> dict[str, float]:
        """{weight: relative error of its outputs}; NaN where they were 0."""
        return {
            name: (lost / whole) ** 0.5 if whole else float("nan")
            for name, (lost, whole) in self.squares.items()
        }

    def _collect(self, site: Site, x: Tensor) -> None:
        moments = self.moments.get(str(site.weight.target))
        if moments is not None:
            moments.add(self.calls[str(site.weight.target)][site], x)

    def _measure(self, site: Site, x: Tensor) -> None:
        name = str(site.weight.target)
        if name not in self.refused and name in self.lost:
            sums = self.squares.setdefault(name, [0.0, 0.0])
            for k, matrix in enumerate(reversed(self.lost[name])):
                sums[k] += float(self.calls[name][site].output(x, matrix).double().square().sum())

    def _prune_weight(self, name: str) -> None:
        if self.method is None:
            _prune_by_score(self.ctx, name)
        elif name in self.refused:
            self._fall_back(name, self.refused[name])
            _prune_by_score(self.ctx, name)
        else:
            self._prune_pieces(name, self.method)

    def _prune_pieces(self, name: str, method: OneShot) -> None:
        """Each piece of the weight that has inputs of its own, with its share of the nonzeros."""
        target, shape = target_of(self.ctx, name), _shape(self.ctx, name)
        matrix = to_matrix(_logical(self.ctx, name))
        wide = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
        pruned, notes, blind = torch.empty_like(matrix), [], 0
        pieces = _pieces(shape[0], _rows(self.calls[name]))
        for first, last in pieces:
            nnz = _share(target.nnz, target.pattern, shape[0], (first, last))
            try:
                seen = self.moments[name].mean((first, last))
                if seen is None:
                    mask = target.pattern.project(wide[first:last].abs(), nnz)
                    made, note, blind = torch.where(mask, wide[first:last], 0), "", blind + 1
                else:
                    made, note = method(wide[first:last], seen, target.pattern, nnz)
            except FxSparseError as error:
                raise type(error)(f"weight {name!r}: {error}") from error
            pruned[first:last] = made.to(matrix)
            notes.append(note)
        said = sorted(set(filter(None, notes)))
        if blind:
            part = "" if blind == len(pieces) else f"{blind} of its {len(pieces)} parts "
            self._fall_back(name, f"{part}saw no input on the calibration batches")
        self.ctx.decisions[name].reason = "; ".join(filter(None, [self.ctx.decisions[name].reason, *said]))
        _write(self.ctx, name, from_matrix(pruned, shape))

    def _fall_back(self, name: str, why: str) -> None:
        self.fallbacks[name] = why
        self.ctx.decisions[name].reason = f"by magnitude: {why}"


def _calls(ctx: PassContext, names: Sequence[str]) -> tuple[dict[str, dict[Site, Call]], dict[str, str]]:
    """({weight: {call site: how it reads the weight}}, {weight whose inputs cannot be told: why})."""
    found: dict[str, dict[Site, Call]] = {name: {} for name in names}
    refused: dict[str, str] = {}
    for site in sites(ctx.program.graphs["eval"]):
        name = str(site.weight.target)
        if name in found:
            call = call_of(site, _shape(ctx, name))
            if isinstance(call, str):
                refused[name] = call
            else:
                found[name][site] = call
    for name, calls in found.items():
        if any(after[0] < before[1] for before, after in itertools.pairwise(sorted(_rows(calls)))):
            refused[name] = "ops read parts of it that overlap"
    return found, refused


def _rows(calls: Mapping[Site, Call]) -> set[Rows]:
    """The pieces that the calls of a weight read."""
    return {rows for call in calls.values() for rows in call.rows}


def _pieces(rows: int, read: Iterable[Rows]) -> list[Rows]:
    """All rows of a weight in order: the pieces that are read, and what lies between them."""
    found, end = [], 0
    for first, last in sorted(read):
        found += [(end, first)] * (first > end) + [(first, last)]
        end = last
    return found + [(end, rows)] * (rows > end)


def _share(nnz: int, pattern: Pattern, rows: int, piece: Rows) -> int:
    """The nonzeros of a piece of the rows; those of all pieces add up to `nnz`."""
    first, last = piece
    if isinstance(pattern, ConstantFanIn):
        return nnz // rows * (last - first)
    unit = pattern.rows * pattern.cols if isinstance(pattern, Block) else 1
    return (nnz // unit * last // rows - nnz // unit * first // rows) * unit


def _prune_by_score(ctx: PassContext, name: str) -> None:
    weight = fetch(ctx.program.skeleton, name)
    weight.copy_(torch.where(initial_mask(ctx, name), weight, 0))


def _shape(ctx: PassContext, name: str) -> tuple[int, ...]:
    return target_of(ctx, name).shape


def _logical(ctx: PassContext, name: str) -> Tensor:
    """The weight, detached, with output rows first."""
    weight = fetch(ctx.program.skeleton, name).detach()
    return weight.t() if ctx.weights[name].transposed else weight


def _write(ctx: PassContext, name: str, value: Tensor) -> None:
    fetch(ctx.program.skeleton, name).copy_(value.t() if ctx.weights[name].transposed else value)
