"""The function that ``torch.compile(model, backend="fxsparse")`` calls with every graph, and what it did to each."""

import warnings
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch.fx import GraphModule

from fxsparse.backend.by_weights import ByWeights
from fxsparse.backend.held import HeldGraph, hold
from fxsparse.backend.lowering import Call, by_inductor, is_changed, lower, times_us
from fxsparse.backend.options import Options, read_options
from fxsparse.backend.planned import MaskedGraph, mask_weights
from fxsparse.backend.running import Packed, SwitchingGraph, WeightSet, watch
from fxsparse.backend.trial import Trial, try_graph
from fxsparse.errors import InvariantError, TraceError, UnsupportedError
from fxsparse.plans import Plan
from fxsparse.report import Report

_REPORTS: deque[Report] = deque(maxlen=256)


def reports() -> list[Report]:
    """What the backend did in this process, a report for each graph, the last one last (of 256)."""
    return list(_REPORTS)


def fxsparse(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Call:
    """Compile a graph of Dynamo's: weights with zeros on the kernels that measured fastest, the rest by Inductor.

    Args:
        gm: may be edited.
        example_inputs: what the call that is compiled gives: inputs, parameters and buffers.
        mode: an Inductor mode.
        options: see `fxsparse.backend.options.read_options`.

    A graph whose form on kernels computes something else (a bug) stays dense, with a warning.

    Raises:
        PlanError: unknown options.
    """
    wanted = read_options(mode, options)
    if wanted.mode != "infer":
        return _compiled(gm, example_inputs, wanted)
    with torch.no_grad():
        call = _compiled(gm, example_inputs, wanted)
    return torch.no_grad()(call)


def _compiled(gm: GraphModule, example_inputs: Sequence[Any], wanted: Options) -> Call:
    report = Report()
    graph = (
        _switching(gm, example_inputs, wanted, report)
        if wanted.plan is None
        else _planned(gm, example_inputs, wanted.plan, wanted, report)
    )
    _REPORTS.append(report)
    return graph


def _planned(
    gm: GraphModule, example_inputs: Sequence[Any], plan: Plan, wanted: Options, report: Report
) -> Call:
    """The same under the masks of the plan."""
    count = len(example_inputs)
    gm, masks = mask_weights(gm, example_inputs, plan, report)
    given = (*example_inputs, *masks.first)
    masks.start(example_inputs)
    graph = _switching(gm, given, wanted, report, also=range(count, len(given)))
    return MaskedGraph(graph, masks) if masks.positions else graph


def _switching(
    gm: GraphModule,
    given: Sequence[Any],
    wanted: Options,
    report: Report,
    also: Collection[int] = (),
) -> Call:
    """`gm` for what it is `given`; inputs at the positions `also` are masks."""
    held = hold(gm, given, also)  # before Inductor, which edits gm
    dense = by_inductor(gm, given, wanted.inductor)
    trial = Trial("options['mode'] is 'train'") if wanted.mode == "train" else try_graph(held)
    if trial.refusal is not None:
        report.notes.append(f"dense, by Inductor: {trial.refusal}")
        if not trial.of_values:
            return dense
        packed = None
    else:
        symbolic = [given[position] for position in held.inputs]
        packed = _pack(held, trial, dense, report, lambda gm: by_inductor(gm, symbolic, wanted.inductor))
    sets: ByWeights[WeightSet] = ByWeights(held.parameters())
    graph = SwitchingGraph(dense, sets, [*held.names], partial(_pack_again, held.emptied(), dense), report)
    graph.start(given, packed)
    return graph


def _pack_again(held: HeldGraph, dense: Call, args: Sequence[Any], report: Report) -> Packed | None:
    """The same for the weights of a later call; Inductor has no part in it, since nothing is being compiled then."""
    if all(known is not report for known in _REPORTS):
        _REPORTS.append(report)
    held = held.refreshed(args)
    trial = try_graph(held)
    if trial.refusal is None:
        return _pack(held, trial, dense, report, None)
    report.notes.append(f"dense, by Inductor: {trial.refusal}")
    return None


def _pack(
    held: HeldGraph,
    trial: Trial,
    dense: Call,
    report: Report,
    compiler: Callable[[GraphModule], Call] | None,
) -> Packed | None:
    """The fastest form of a graph, measured; None where that is the dense one.  Fills the report."""
    try:
        artefact = lower(held)
    except (InvariantError, TraceError, UnsupportedError) as error:
        report.notes.append(f"dense, by Inductor: {error}")
        if isinstance(error, InvariantError):
            warnings.warn(f"backend 'fxsparse': a graph stays dense by a bug of ours: {error}", stacklevel=2)
        return None
    _copy_rows(artefact.report, report)
    if not is_changed(artefact):
        report.notes.append("dense, by Inductor: no kernel for zeros is faster")
        return None
    calls: dict[str, Call] = {"dense, by Inductor": dense, "on kernels": artefact.forward_graph}
    if compiler is not None:
        with torch.no_grad():
            calls["on kernels, the rest by Inductor"] = compiler(artefact.forward_graph)
    arguments = dict.fromkeys(calls, held.examples) | {"dense, by Inductor": held.arguments()}
    times = times_us(calls, arguments)
    fastest = min(times, key=times.__getitem__)
    report.notes.append(
        f"{fastest} is fastest: " + ", ".join(f"{name} {us:.1f} us" for name, us in times.items())
    )
    if calls[fastest] is dense:
        return None
    tensors = held.tensors()
    watched = tuple(watch(position, tensors[name]) for position, name in held.names.items())
    return Packed(calls[fastest], held.inputs, watched, trial.differentiable)


def _copy_rows(source: Report, to: Report) -> None:
    to.passes, to.layers, to.untouched = source.passes, source.layers, source.untouched
    to.totals, to.environment, to.notes = source.totals, source.environment, to.notes + source.notes
