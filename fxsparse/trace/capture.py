"""Capture a model: front ends in order, each verified against the original, with a reason for every step
down.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule
from torch.nn.parameter import is_lazy

from fxsparse.errors import TraceError
from fxsparse.exported_program import is_exported, tree_of
from fxsparse.graph_model import GraphModel
from fxsparse.input_check import InputCheck, has_twins, input_check, regrouped
from fxsparse.inputs import CPU, has_meta, named_arguments
from fxsparse.pipeline import Program
from fxsparse.skeleton import adopt, bind, copy_structure
from fxsparse.trace.export import trace_export
from fxsparse.trace.modules import eligible_below
from fxsparse.trace.recomputation import recomputation_refused
from fxsparse.trace.symbolic import hidden_weights, trace_symbolic
from fxsparse.trace.user_code import WAY_OUT, custom_functions
from fxsparse.trace.walk import walk
from fxsparse.verify import RUN_FAILURES, Observation, compare, observe

_RESERVED = {"graph", "code", "meta", "shape_env"}
"""Attributes of every GraphModule, which a child of that name could not be told from."""


def capture(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    modes: Sequence[str] = ("train", "eval"),
    strict: bool = False,
    device: torch.device = CPU,
    tier: str | None = None,
) -> Program:
    """Trace a model once per mode; its modules, buffers, gradients and mode stay as they are.

    Tried in order: symbolic tracing; with example inputs ``torch.export``; the walk over its layers, which always
    works.  With example inputs a program is taken only if it computes what the model computes, in eval mode and in
    one seeded train step; ``Program.notes`` says why each other was left.  `example_inputs`: see
    :func:`fxsparse.inputs.split_inputs`.  Tensors on meta are taken to be on `device`; then only shapes are compared.
    A GraphModel is its graphs already.
    With a `tier` that was found right before, that front end alone is taken and nothing is run.

    Raises:
        TraceError: a lazy module without shapes, inputs that the model does not take, or with `strict` a model that
            only the walk can capture.
    """
    if isinstance(model, GraphModel):
        program = model.program()
        program.graphs = {mode: program.graphs[mode] for mode in modes}
        return program
    _check(model)
    arguments = None if example_inputs is None else named_arguments(model, example_inputs)
    if tier is not None:
        return _again(model, example_inputs, arguments, modes, device, tier)
    notes: list[str] = []
    expected, remembers = _expected(model, example_inputs, modes, notes, device)
    for front_end, inputs in () if remembers else _front_ends(model, example_inputs):
        try:
            with recomputation_refused():
                program = front_end(model, inputs, arguments, modes, device)
        except TraceError as error:
            notes.append(f"{front_end.__name__[1:]}: {error}")
            continue
        difference = _difference(program, expected, example_inputs, device)
        if difference is None:
            notes += program.notes
            distinct = bool(expected) and _tells_tensors_apart(model, program, example_inputs, device)
            accepts = _accepts(model, program, example_inputs, distinct)
            return Program(
                program.tier, program.skeleton, program.graphs, notes, program.hidden, accepts=accepts
            )
        notes.append(f"{program.tier}: {difference}{_forgotten(difference, model, example_inputs)}")
    if is_exported(model):
        raise TraceError(
            f"expected example_inputs that the exported program accepts, and its graph to compute what it does: "
            f"{'; '.join(notes)}."
        )
    if strict:
        raise TraceError(
            "neither symbolic tracing nor torch.export captured the model, and strict=True refuses the walk "
            f"over its layers: {'; '.join(notes)}. {WAY_OUT}."
        )
    return _walk(model, modes, notes)


def _front_ends(model: nn.Module, example_inputs: Any) -> list[tuple[Callable[..., Program], Any]]:
    """In order, with what each is to trace: where inputs are one tensor, the export of a model that does not ask is
    one for any; an exported program's graph is taken as it is, with the sizes that it is for.
    """
    first = [] if is_exported(model) else [(_symbolic, example_inputs)]
    apart = [(_export, regrouped(example_inputs))] if has_twins(example_inputs) else []
    return [*first, *apart, (_export, example_inputs)]


def _again(
    model: nn.Module,
    example_inputs: Any,
    arguments: Any,
    modes: Sequence[str],
    device: torch.device,
    tier: str,
) -> Program:
    """What the front end named `tier` makes of the model."""
    if tier == "walk":
        return _walk(model, modes, [])
    with recomputation_refused():
        program = {"symbolic": _symbolic, "export": _export}[tier](
            model, example_inputs, arguments, modes, device
        )
    program.accepts = _accepts(model, program, example_inputs, False)
    return program


def _walk(model: nn.Module, modes: Sequence[str], notes: list[str]) -> Program:
    skeleton = copy_structure(model)
    gm = bind(walk(skeleton), skeleton)
    return Program("walk", skeleton, dict.fromkeys(modes, gm), notes)


def _symbolic(
    model: nn.Module, example_inputs: Any, arguments: Any, modes: Sequence[str], device: torch.device
) -> Program:
    skeleton = copy_structure(model)
    graphs: dict[str, GraphModule] = {}
    opaque: dict[str, str] = {}
    for mode in modes:
        scratch = copy_structure(model).train(mode == "train")
        graph, left = trace_symbolic(scratch, arguments)
        adopt(graph, scratch, skeleton)
        graphs[mode] = bind(graph, skeleton)
        opaque.update(left)
    hidden = {name: reason for gm in graphs.values() for name, reason in hidden_weights(gm, opaque).items()}
    if hidden and example_inputs is not None:
        name, reason = next(iter(hidden.items()))
        raise TraceError(
            f"{len(hidden)} of {len(eligible_below(skeleton))} weights are out of reach: {name}: {reason}"
        )
    notes = [f"symbolic: {reason}" for reason in opaque.values()]
    return Program("symbolic", skeleton, _merged(graphs), notes, hidden)


def _export(
    model: nn.Module, example_inputs: Any, arguments: Any, modes: Sequence[str], device: torch.device
) -> Program:
    if example_inputs is None:
        raise TraceError("not tried without example_inputs")
    skeleton = tree_of(copy_structure(model))
    graphs: dict[str, GraphModule] = {}
    notes: list[str] = []
    for mode in modes:
        scratch = copy_structure(model).train(mode == "train")
        exported, left = trace_export(scratch, example_inputs, device)
        adopt(exported.graph, exported, skeleton)
        graphs[mode] = bind(exported.graph, skeleton)
        notes += [f"export: {note}" for note in left]
    return Program("export", skeleton, _merged(graphs), list(dict.fromkeys(notes)))


def _merged(graphs: dict[str, GraphModule]) -> dict[str, GraphModule]:
    """The same graph object for both modes where their code is the same."""
    first = next(iter(graphs.values()))
    return {mode: first if gm.code == first.code else gm for mode, gm in graphs.items()}


def _expected(
    model: nn.Module, example_inputs: Any, modes: Sequence[str], notes: list[str], device: torch.device
) -> tuple[dict[str, Observation], bool]:
    """What the model itself shows in each mode, and whether a second call shows something else, with a note.

    TraceError where it fails in eval mode, a note where in training.
    """
    if example_inputs is None:
        return {}, False
    on_meta = has_meta(model) or has_meta(example_inputs)
    if on_meta:
        notes.append("verified shapes only, as tensors are on meta")
    where = " (tensors on meta have no values to decide by)" if has_meta(model) else ""
    seen: dict[str, Observation] = {}
    for mode in modes:
        copy = copy_structure(model)  # what a forward leaves in Python attributes stays in the copy
        try:
            seen[mode] = observe(copy, copy, example_inputs, training=mode == "train", device=device)
        except RUN_FAILURES as error:
            failure = f"the model itself fails on example_inputs in {mode} mode{where}: {type(error).__name__}: {error}"
            if mode == "eval":
                raise TraceError(failure) from error
            notes.append(f"not verified in training: {failure}")
            continue
        if not on_meta and (change := _change(model, copy, seen[mode], example_inputs, mode)):
            notes.append(change)
            return seen, True
    return seen, False


def _change(
    model: nn.Module, called: nn.Module, first: Observation, example_inputs: Any, mode: str
) -> str | None:
    """How a second call of `called`, a copy of the model, differs from its first one, in words."""
    again = observe(called, called, example_inputs, training=mode == "train")
    if (difference := compare(first, again)) is None:
        return None
    pairs = zip(model.named_modules(), called.modules(), strict=False)
    changed = [
        f"{path}.{name}".lstrip(".")
        for (path, before), after in pairs
        for name, value in vars(before).items()
        if name != "training" and isinstance(value, int | float | str) and vars(after).get(name) != value
    ]
    by = f" It writes {', '.join(changed)}." if changed else ""
    return (
        f"no graph is made, since a second call with the same inputs differs in {mode} mode: {difference}. A graph "
        f"keeps neither Python attributes nor Python's random numbers; buffers and torch's are kept.{by}"
    )


def _difference(
    program: Program, expected: dict[str, Observation], example_inputs: Any, device: torch.device
) -> str | None:
    """How the program differs from what was seen of the model, in words."""
    for mode, want in expected.items():
        try:
            # A call of the GraphModule itself would print what fails.
            call, training = program.graphs[mode].forward, mode == "train"
            got = observe(program.skeleton, call, example_inputs, training=training, device=device)
        except RUN_FAILURES as error:
            lines = str(error).strip().splitlines()
            return f"its {mode} graph raises {type(error).__name__}: {lines[0] if lines else 'no message'}"
        if difference := compare(want, got):
            return f"its {mode} graph differs from the model: {difference}"
    return None


def _forgotten(difference: str, model: nn.Module, example_inputs: Any) -> str:
    """What the user wrote that a graph forgets, where gradients differ."""
    if "differs from the model: gradient" not in difference or has_meta(model) or has_meta(example_inputs):
        return ""
    own = custom_functions(model, example_inputs)
    return f" (a graph keeps the forward but not the backward of {', '.join(own)})" if own else ""


def _accepts(
    model: nn.Module, program: Program, example_inputs: Any, distinct: bool
) -> dict[str, InputCheck]:
    if example_inputs is None:
        return {}
    checks = {
        mode: input_check(model, example_inputs, gm, program.tier == "export", distinct)
        for mode, gm in program.graphs.items()
    }
    return {mode: check for mode, check in checks.items() if check is not None}


def _tells_tensors_apart(
    model: nn.Module, program: Program, example_inputs: Any, device: torch.device
) -> bool:
    """Whether the program is wrong once other inputs are one tensor than in the example (``if key is query``)."""
    other = regrouped(example_inputs)
    if other is None or has_meta(model) or has_meta(example_inputs) or "eval" not in program.graphs:
        return False
    try:
        copy = copy_structure(model)
        want = observe(copy, copy, other, training=False, device=device)
        call = program.graphs["eval"].forward
        got = observe(program.skeleton, call, other, training=False, device=device)
    except RUN_FAILURES:
        return True
    return compare(want, got) is not None


def _check(model: nn.Module) -> None:
    taken = sorted(_RESERVED & (model._modules.keys() | model._parameters.keys() | model._buffers.keys()))
    if taken:
        raise TraceError(
            f"the model's {taken[0]!r} has the name of an attribute that every fx.GraphModule has; rename it, or "
            "compile a module that holds the model"
        )
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if is_lazy(tensor):
            raise TraceError(
                f"{name!r} of a lazy module has no shape yet; run the model once before compiling it"
            )
