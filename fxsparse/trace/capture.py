"""Capture a model: front ends in order, each verified against the original, with the reason for every step
down.
"""

from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy

from fxsparse.errors import TraceError
from fxsparse.inputs import named_arguments
from fxsparse.pipeline import Program
from fxsparse.skeleton import adopt, bind, copy_structure
from fxsparse.trace.symbolic import hidden_weights, trace_symbolic


def capture(
    model: nn.Module, example_inputs: Any = None, *, modes: Sequence[str] = ("train", "eval")
) -> Program:
    """Trace a model once per mode, without touching its modules, buffers, gradients or mode.

    `example_inputs`: see :func:`fxsparse.inputs.split_inputs`.  Raises TraceError for lazy modules.
    """
    _check(model)
    notes: list[str] = []
    return _symbolic(model, example_inputs, modes, notes)


def _symbolic(model: nn.Module, example_inputs: Any, modes: Sequence[str], notes: list[str]) -> Program:
    arguments = None if example_inputs is None else named_arguments(model, example_inputs)
    skeleton = copy_structure(model)
    graphs, opaque = {}, {}
    for mode in modes:
        scratch = copy_structure(model).train(mode == "train")
        graph, left = trace_symbolic(scratch, arguments)
        adopt(graph, scratch, skeleton)
        graphs[mode] = bind(graph, skeleton)
        opaque.update(left)
    hidden: dict[str, str] = {}
    for gm in graphs.values():
        hidden.update(hidden_weights(gm, opaque))
    notes.extend(f"symbolic: {reason}" for reason in opaque.values())
    return Program("symbolic", skeleton, _merged(graphs), notes, hidden)


def _merged(graphs: dict[str, Any]) -> dict[str, Any]:
    """The same graph object for both modes where their code is the same."""
    first = next(iter(graphs.values()))
    return {mode: first if gm.code == first.code else gm for mode, gm in graphs.items()}


def _check(model: nn.Module) -> None:
    for name, parameter in (*model.named_parameters(), *model.named_buffers()):
        if is_lazy(parameter):
            raise TraceError(
                f"{name!r} of a lazy module has no shape yet; run the model once before compiling it"
            )
