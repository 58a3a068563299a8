"""What a graph in a file may call: functions of PyTorch on tensors, ops, and this package's own, by name.

Saving looks a function up here, and loading looks its name up here, so a file can name nothing else: nothing that
reads or writes files, takes code, or leads from a tensor to another object of Python.
"""

import functools
import math
import operator
from collections.abc import Callable, Hashable, Mapping
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._ops import HigherOrderOperator, OpOverload
from torch.fx._symbolic_trace import _assert_is_none
from torch.overrides import get_overridable_functions

from fxsparse import kernel
from fxsparse.image_ops import channels_first, channels_last
from fxsparse.trace.attention import attention_mask

_OWN = {
    function.__name__: function
    for function in (channels_first, channels_last, attention_mask, torch._assert, _assert_is_none)
}
"""Of this package; the last two are torch.fx's, of arguments that are no tensors."""
_NAMESPACES = ("aten", "prims", "torchvision")
_NAMES_A_FILE = {"filename", "file", "path"}
"""Texts that an op takes which no graph of a model needs."""
_FACTORIES = (
    *(
        "rand",
        "randn",
        "randint",
        "randperm",
        "zeros",
        "ones",
        "empty",
        "full",
        "arange",
        "linspace",
        "eye",
        "tensor",
    ),
    *("is_grad_enabled", "sym_int", "sym_float", "sym_max", "sym_min", "sym_not", "sym_ite"),
)
_ACTIVATIONS = (
    *("elu_", "celu_", "selu_", "relu_", "hardtanh_", "leaky_relu_", "rrelu_", "threshold_"),
    *("hardsigmoid", "hardswish", "logsigmoid", "sigmoid", "tanh"),
    *("upsample", "upsample_bilinear", "upsample_nearest"),
)
"""Of ``torch.nn.functional``; PyTorch does not list them as functions that may be overridden by this name."""
_OPERATORS = (
    *(
        "abs",
        "add",
        "and_",
        "contains",
        "eq",
        "floordiv",
        "ge",
        "getitem",
        "gt",
        "iadd",
        "iand",
        "ifloordiv",
        "imul",
    ),
    *(
        "index",
        "inv",
        "invert",
        "ior",
        "is_",
        "is_not",
        "isub",
        "itruediv",
        "ixor",
        "le",
        "lshift",
        "lt",
        "matmul",
    ),
    *(
        "mod",
        "mul",
        "ne",
        "neg",
        "not_",
        "or_",
        "pos",
        "pow",
        "rshift",
        "setitem",
        "sub",
        "truediv",
        "truth",
        "xor",
    ),
)
_MATH = ("ceil", "exp", "floor", "log", "log2", "prod", "sqrt", "trunc")
_BUILTINS = (bool, float, int, len, max, min, round, slice, sum)
_ATTRIBUTES = {
    *(
        "H",
        "T",
        "device",
        "dtype",
        "imag",
        "is_cpu",
        "is_cuda",
        "itemsize",
        "layout",
        "mH",
        "mT",
        "nbytes",
        "ndim",
    ),
    *("real", "requires_grad", "shape"),
}
_METHODS_LEFT_OUT = {
    *(
        "apply_",
        "data_ptr",
        "map_",
        "map2_",
        "module_load",
        "numpy",
        "pin_memory",
        "register_hook",
        "resize",
        "resize_",
    ),
    *(
        "register_post_accumulate_grad_hook",
        "resize_as",
        "resize_as_",
        "resize_as_sparse_",
        "set_",
        "share_memory_",
    ),
    *(
        "sparse_resize_",
        "sparse_resize_and_clear_",
        "storage",
        "storage_type",
        "untyped_storage",
        "reinforce",
    ),
}
_OF_SPARSE = ("addmm", "log_softmax", "mm", "sampled_addmm", "softmax", "sum")
_REGIONS = ("wrap_with_autocast", "wrap_with_set_grad_enabled")


def name_of(target: Any) -> dict[str, str] | None:
    """The name of a function or op as JSON values; None where it has none."""
    if isinstance(target, OpOverload):
        row = {"op": target._schema.name, "overload": target._overloadname}
        return row if _overload(**row) is target else None
    if isinstance(target, HigherOrderOperator):
        return {"region": target.name()} if target.name() in _REGIONS else None
    for name, entry in kernel.registered().items():
        if entry.run is target:
            return {"kernel": name}
    name = getattr(target, "__name__", "")
    if name in kernel.glues() and kernel.glue(name) is target:
        return {"glue": name}
    if _OWN.get(name) is target:
        return {"own": name}
    found = _names().get(target)
    return None if found is None else {"function": found}


def function_of(row: Mapping[str, str]) -> Callable[..., Any]:
    """The function of a name; ValueError or LookupError where it is none that a graph may call."""
    if "op" in row:
        found = _overload(row["op"], row["overload"])
        if found is None:
            raise ValueError(f"a graph calls the op {row['op']!r}")
        return found
    if "region" in row:
        if row["region"] not in _REGIONS:
            raise ValueError(f"a graph calls {row['region']!r}")
        return getattr(torch.ops.higher_order, row["region"])
    if "kernel" in row:
        return kernel.registered()[row["kernel"]].run
    if "glue" in row:
        return kernel.glue(row["glue"])
    return _OWN[row["own"]] if "own" in row else _functions()[row["function"]]


def is_method(name: object) -> bool:
    """Whether a graph may call a method of this name."""
    public = isinstance(name, str) and name.isidentifier() and not name.startswith("_")
    return public and name not in _METHODS_LEFT_OUT and callable(getattr(Tensor, str(name), None))


def is_attribute(name: object) -> bool:
    """Whether a graph may read an attribute of this name."""
    return name in _ATTRIBUTES


def _overload(op: str, overload: str) -> OpOverload | None:
    """An op that a graph may call and the dispatcher has: no function that TorchScript alone knows."""
    namespace, _, name = op.partition("::")
    qualified = f"{namespace}::{name}" + (f".{overload}" if overload != "default" else "")
    if namespace not in _NAMESPACES or not torch._C._dispatch_has_kernel(qualified):
        return None
    found = getattr(getattr(getattr(torch.ops, namespace), name), overload)
    texts = {argument.name for argument in found._schema.arguments if str(argument.type) == "str"}
    return None if texts & _NAMES_A_FILE or name in _METHODS_LEFT_OUT else found


@functools.cache
def _functions() -> dict[str, Any]:
    """{name: function}."""
    found: dict[str, Any] = {f"operator.{name}": getattr(operator, name) for name in _OPERATORS}
    found |= {f"math.{name}": getattr(math, name) for name in _MATH}
    found |= {f"builtins.{function.__name__}": function for function in (*_BUILTINS, getattr)}
    overridable = get_overridable_functions()
    for module in (torch, F, torch.linalg, torch.fft, torch.special):
        listed = {function for function in overridable[module] if not isinstance(function, type)}
        for name, value in vars(module).items():
            if isinstance(value, Hashable) and value in listed:
                found[f"{module.__name__}.{name}"] = value
    found |= {f"torch.sparse.{name}": getattr(torch.sparse, name) for name in _OF_SPARSE}
    found |= {f"torch.{name}": getattr(torch, name) for name in _FACTORIES if hasattr(torch, name)}
    found |= {f"{F.__name__}.{name}": getattr(F, name) for name in _ACTIVATIONS if hasattr(F, name)}
    # Those such as max_pool2d and unique choose one of two by an argument, and are not listed.
    found |= {
        f"{module.__name__}.{name}": value
        for module in (torch, F)
        for name, value in vars(module).items()
        if isinstance(value, FunctionType) and "boolean_dispatch.<locals>" in value.__qualname__
    }
    return found


@functools.cache
def _names() -> dict[Any, str]:
    return {function: name for name, function in reversed(_functions().items())}
