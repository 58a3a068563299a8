"""Which line of the user's code keeps a model from being captured, and what to write there instead."""

import inspect
import os
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fxsparse.skeleton import copy_structure
from fxsparse.verify import copied_inputs, frozen_state

WAY_OUT = (
    "Without strict=True the model runs by its own forward, with its layers sparse but no graph of it. For a graph, "
    "write branches on tensors with torch.where or torch.cond, an autograd.Function as torch.library.custom_op with "
    "register_autograd, and take hooks off (handle.remove()) or compile the submodule without them"
)
_OURS = Path(__file__).parents[1]
_NOT_THE_USERS = tuple(f"{folder}{os.sep}" for folder in (Path(torch.__file__).parent, _OURS))


def reason(error: BaseException) -> str:
    """Kind and first line of an error, and where the user's code raised it."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}{line_of(error)}"


def line_of(error: BaseException) -> str:
    """File, line and code of the innermost frame outside torch and fxsparse, in brackets; "" where there is none."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        generated = frame.filename.startswith("<")
        if not generated and not frame.filename.startswith(_NOT_THE_USERS):
            return f" ({frame.filename}:{frame.lineno}: `{frame.line}`)"
    return ""


def custom_functions(model: nn.Module, example_inputs: Any) -> list[str]:
    """Each ``torch.autograd.Function`` of the user's own in a train step, as "Name (file:line)"; nothing is changed."""
    copy = copy_structure(model)
    with frozen_state(copy, training=True), torch.enable_grad():
        args, kwargs = copied_inputs(example_inputs)
        outputs = [out for out in pytree.tree_leaves(copy(*args, **kwargs)) if isinstance(out, Tensor)]
    found = {
        cls
        for node in _autograd_nodes(outputs)
        if (cls := getattr(type(node), "_forward_cls", None)) is not None
    }
    return sorted(_place(cls) for cls in found if not cls.__module__.startswith(("torch.", "fxsparse.")))


def _autograd_nodes(outputs: list[Tensor]) -> Iterator[Any]:
    ahead: list[Any] = [out.grad_fn for out in outputs if out.grad_fn is not None]
    seen = set(ahead)
    while ahead:
        node = ahead.pop()
        yield node
        below = {inner for inner, _ in node.next_functions if inner is not None} - seen
        seen |= below
        ahead += below


def _place(cls: type) -> str:
    try:
        return f"{cls.__name__} ({inspect.getsourcefile(cls)}:{inspect.getsourcelines(cls)[1]})"
    except (OSError, TypeError):  # made in an interactive session
        return cls.__name__
