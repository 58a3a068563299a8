"""The words of the command line as values: a model, example inputs, a plan."""

import importlib
import inspect
import os
import re
import sys
import tomllib
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fxsparse import methods, transforms
from fxsparse.budget import KINDS, Budget
from fxsparse.errors import FxSparseError
from fxsparse.pattern import NM, Block, ConstantFanIn, Pattern, Strided, Unstructured
from fxsparse.plans import Plan, fixed_sparsity
from fxsparse.transforms import Transform
from fxsparse.verify import RUN_FAILURES

MODEL_FAILURES = (
    *RUN_FAILURES,
    ArithmeticError,
    EOFError,
    ImportError,
    MemoryError,
    NameError,
    OSError,
    SyntaxError,
)
"""What importing or calling somebody's factory may raise."""
SIZE_FAILURES = (RuntimeError, TypeError, ValueError, OverflowError, MemoryError)
"""What torch raises for sizes that no memory holds, and for dtypes that it cannot fill."""
QUANTIZED = (torch.qint8, torch.quint8, torch.qint32, torch.quint4x2, torch.quint2x4)


class UsageError(FxSparseError, ValueError):
    """Words on the command line that name nothing."""


def model(text: str) -> nn.Module:
    """The module that ``package.module:factory`` returns, or an untrained ``torchvision:<model>``.

    Modules in the current folder can be named too.

    Raises:
        UsageError: no such module or factory, or one that raises, or the factory returns something else.
    """
    module_name, colon, factory_name = text.partition(":")
    if not colon or not module_name or not factory_name:
        raise UsageError(f"model {text!r}: expected module:factory, such as torchvision:resnet50.")
    if module_name == "torchvision":
        return _torchvision(factory_name)
    if (folder := os.getcwd()) not in sys.path:
        sys.path.insert(0, folder)
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise UsageError(f"model {text!r}: {module_name!r} does not import here: {error}.") from error
    except MODEL_FAILURES as error:
        raise UsageError(f"model {text!r}: importing {module_name!r} raises {_named(error)}.") from error
    factory = getattr(module, factory_name, None)
    if not callable(factory):
        raise UsageError(f"model {text!r}: {module_name!r} has no function {factory_name!r}.")
    try:
        inspect.signature(factory).bind()
    except TypeError as error:
        raise UsageError(f"model {text!r}: it is called without arguments, and has a {error}.") from error
    try:
        built = factory()
    except MODEL_FAILURES as error:
        raise UsageError(f"model {text!r}: the factory raises {_named(error)}.") from error
    if not isinstance(built, nn.Module):
        raise UsageError(f"model {text!r}: expected an nn.Module, the factory gave {type(built).__name__}.")
    return built


def _named(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _torchvision(name: str) -> nn.Module:
    try:
        from torchvision import models
    except ImportError as error:
        raise UsageError(f"model 'torchvision:{name}': torchvision does not import here: {error}.") from error
    try:
        return models.get_model(name, weights=None)
    except ValueError as error:
        raise UsageError(f"model 'torchvision:{name}': torchvision has no model of that name.") from error


def example(text: str) -> Tensor:
    """A tensor for ``1x3x224x224`` or ``1x128:int64``: normal where the dtype is floating, else zeros.

    Raises:
        UsageError: not sizes joined by x, an unknown dtype, or a tensor that cannot be made here.
    """
    sizes, _, dtype_name = text.partition(":")
    if not re.fullmatch(r"\d+(x\d+)*", sizes):
        raise UsageError(f"input {text!r}: expected sizes joined by x and a dtype, such as 1x128:int64.")
    dtype = getattr(torch, dtype_name or "float32", None)
    if not isinstance(dtype, torch.dtype):
        raise UsageError(f"input {text!r}: torch has no dtype {dtype_name!r}.")
    if dtype in QUANTIZED:
        raise UsageError(f"input {text!r}: expected a dtype that is not quantized, such as float32 or int8.")
    try:
        shape = [int(size) for size in sizes.split("x")]
        return torch.randn(shape).to(dtype) if dtype.is_floating_point else torch.zeros(shape, dtype=dtype)
    except SIZE_FAILURES as error:
        raise UsageError(
            f"input {text!r}: expected a size and dtype that a tensor can have on this machine, got "
            f"{_named(error)}. Use smaller sizes, or a dtype such as float32 or int64."
        ) from error


def examples(texts: list[str]) -> tuple[Tensor, ...] | None:
    """Example inputs of a model, None where none were named."""
    return tuple(example(text) for text in texts) or None


def pattern(text: str) -> Pattern:
    """``unstructured``, ``constant-fan-in``, ``2:4`` (N:M), ``strided-1:4`` or ``16x16`` (block).

    Raises:
        UsageError: none of these.
    """
    if text == "unstructured":
        return Unstructured()
    if text == "constant-fan-in":
        return ConstantFanIn()
    if strided := re.fullmatch(r"strided-1:(\d+)", text):
        return Strided(int(strided[1]))
    numbers = re.fullmatch(r"(\d+)([:x])(\d+)", text)
    if numbers is None:
        raise UsageError(
            f"pattern {text!r}: expected unstructured, constant-fan-in, n:m (2:4), strided-1:m (strided-1:4) or a "
            "block (16x16)."
        )
    first, kind, second = int(numbers[1]), numbers[2], int(numbers[3])
    return NM(first, second) if kind == ":" else Block(first, second)


def transform(text: str) -> Transform:
    """``sparse-wide``, or with options as a plan file has them: ``sparse-parallel(adjust=true, sigma="norm")``.

    Raises:
        UsageError: not of this form.
        PlanError: no such transformation or option, or a value out of range.
    """
    name, _, options = text.removesuffix(")").partition("(")
    try:
        fields = tomllib.loads(f"given = {{{options}}}")["given"]
    except tomllib.TOMLDecodeError as error:
        raise UsageError(
            f"transform {text!r}: expected a name, or a name with options as in a plan file, such as "
            f"'sparse-parallel(adjust=true, sigma=\"norm\")': {error}."
        ) from error
    return transforms.from_dict(fields | {"name": name})


def budget(text: str) -> Budget:
    """``flops=0.3`` and the like: a kind and its share of the dense model.

    Raises:
        UsageError: no such kind, or no number.
        PlanError: a share out of range.
    """
    kind, _, share = text.partition("=")
    if kind not in KINDS or not re.fullmatch(r"\d*\.?\d+", share):
        raise UsageError(
            f"budget {text!r}: expected one of {', '.join(KINDS)} and a share, such as flops=0.3."
        )
    wanted: dict[str, Any] = {kind: float(share)}
    return Budget(**wanted)


def check_output(path: str) -> None:
    """Before what takes long.

    Raises:
        UsageError: the folder is not there, nothing may be written to it, or a folder has that name.
    """
    folder = Path(path).parent
    written = path if Path(path).exists() else folder
    if not path or Path(path).is_dir() or not folder.is_dir() or not os.access(written, os.W_OK):
        raise UsageError(f"-o {path!r}: expected a file in a folder that exists and may be written.")


def plan_words(words: Namespace) -> list[str]:
    """The options that were given of those that say what to prune, as they are written."""
    names = ("plan", "sparsity", "budget", "method", "transform", "allocation", "pattern", "exclude")
    return [f"--{name}" for name in names if getattr(words, name) not in (None, [])]


def plan(words: Namespace) -> Plan:
    """The plan in ``--plan`` (a TOML file or a preset's name), with the other options in its place.

    Raises:
        PlanError: a plan that contradicts itself or names what does not exist.
        UsageError: an unknown pattern or budget, nothing that says how sparse, or a transformation without an example
            input.
    """
    made = _plan(words)
    if made.transform is not None and not words.input:
        raise UsageError(
            f"transform {made.transform.name!r}: expected example inputs, since FLOPs depend on shapes; name them with "
            "--input 8x3x64x64."
        )
    return made


def _plan(words: Namespace) -> Plan:
    fields: dict[str, Any] = {}
    if words.sparsity is not None:
        fields["sparsity"] = words.sparsity
        fields["budget"] = None
    if words.budget is not None:
        fields |= {"budget": budget(words.budget), "sparsity": words.sparsity}
    if words.allocation is not None:
        fields["allocation"] = words.allocation
    if words.pattern is not None:
        fields["pattern"] = pattern(words.pattern)
    if words.method is not None:
        fields["method"] = methods.from_dict({"name": words.method})
    if words.transform is not None:
        fields["transform"] = transform(words.transform)
    if words.exclude:
        fields["exclude"] = tuple(words.exclude)
    if (
        words.plan is None
        and not {"sparsity", "budget"} & set(fields)
        and fixed_sparsity(fields.get("pattern")) is None
    ):
        raise UsageError(
            "no plan: expected --sparsity 0.9, --budget flops=0.3, an n:m --pattern such as 2:4, or --plan with a TOML "
            "file or a preset such as rigl-90."
        )
    if words.plan is None:
        return Plan(**fields)
    return replace(
        Plan.load(words.plan) if words.plan.endswith(".toml") else Plan.preset(words.plan), **fields
    )
