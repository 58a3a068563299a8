"""``export``: a module for other runtimes, as ONNX, as an exported program, or compiled ahead of time."""

import logging
import os
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from fxsparse.destination import destination
from fxsparse.errors import CheckpointError, PlanError, TraceError, UnsupportedError
from fxsparse.inputs import split_inputs
from fxsparse.kernels import cpu
from fxsparse.module import SparseModule
from fxsparse.raised import raised

FORMATS = ("onnx", "program", "aoti")
_FAILURES = (
    RuntimeError,
    TypeError,
    ValueError,
    AssertionError,
    LookupError,
    NotImplementedError,
    ImportError,
)
"""What PyTorch's exporters raise."""


def export(
    module: nn.Module, path: str | os.PathLike[str], example_inputs: Any, *, format: str = "onnx"
) -> None:
    """Write a model for a runtime that has no fxsparse, or no Python; the module is left untouched.

    Args:
        module: a module of `fxsparse.compile`, or any other.
        path: the file, which appears whole or not at all.
        example_inputs: as for `fxsparse.compile`.  The first dimension of tensors may be another later, if it is not 1.
        format: "onnx": with dense weights, zeros filled in, since ONNX has no sparse ops that runtimes run faster.
            "program": of a module compiled for inference, ``torch.export.save``'s file; it calls fxsparse's ops, so the
            process that loads it imports ``fxsparse.kernels``.
            "aoti": the same compiled by AOTInductor, for ``torch._inductor.aoti_load_package`` or C++.  Beside it are
            two libraries: a process without fxsparse loads ``libfxsparse_ops.so`` first.

    Raises:
        PlanError: an unknown format, or a training module where one for inference is expected.
        UnsupportedError: PyTorch's exporter fails, or ops have no C++ kernels.
        CheckpointError: the path cannot be written.
    """
    if format not in FORMATS:
        raise PlanError(f"export: expected a format of {FORMATS}, got {format!r}.")
    if not isinstance(module, nn.Module):
        raise PlanError(f"export: expected an nn.Module, got {type(module).__name__}.")
    path = destination(path)
    args, kwargs = split_inputs(example_inputs)
    graph = _dense(module) if format == "onnx" else _sparse(module, format)
    with _whole(path) as folder, _named(format), torch.no_grad():
        if format == "onnx":
            _write_onnx(graph, args, kwargs, folder / path.name)
            return
        program = torch.export.export(graph, args, kwargs, dynamic_shapes=_dynamic(args, kwargs))
        if format == "program":
            torch.export.save(program, folder / path.name)
            return
        torch._inductor.aoti_compile_and_package(program, package_path=str(folder / path.name))
        _write_libraries(program, folder)


def _dense(module: nn.Module) -> nn.Module:
    """What a module computes in evaluation mode by PyTorch's own ops."""
    if not isinstance(module, SparseModule):
        return module
    if module.plan is not None:
        return module.to_dense().eval()
    program = module._emitted.program
    return program.skeleton if program.tier == "walk" else raised(module).graphs["eval"]


def _sparse(module: nn.Module, format: str) -> nn.Module:
    if not isinstance(module, SparseModule) or module.plan is not None:
        raise PlanError(
            f"export: format={format!r} takes a module compiled for inference, got {type(module).__name__}; compile it "
            "with fxsparse.compile(module, mode='infer', example_inputs=...)."
        )
    program = module._emitted.program
    return program.skeleton if program.tier == "walk" else module.forward_graph


def _write_onnx(graph: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], path: Path) -> None:
    shapes = _dynamic(args, kwargs)
    was_training = graph.training
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the exporter's own libraries
            torch.onnx.export(
                graph.eval(), args, str(path), kwargs=kwargs, dynamic_shapes=shapes, dynamo=True, verbose=False,
                external_data=False,
            )  # fmt: skip
    finally:
        graph.train(was_training)
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _dynamic(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The first dimension of every tensor that has more than one entry there may change."""

    def of(value: Any) -> Any:
        if isinstance(value, Tensor):
            return {0: Dim.AUTO} if value.dim() and len(value) > 1 else None
        if isinstance(value, dict):
            return {key: of(item) for key, item in value.items()}
        return type(value)(of(item) for item in value) if isinstance(value, list | tuple) else None

    positional = tuple(of(value) for value in args)
    return positional if not kwargs else (*positional, *(of(value) for value in kwargs.values()))


def _write_libraries(program: ExportedProgram, folder: Path) -> None:
    names = {
        str(node.target).split(".")[1] for node in program.graph.nodes if "fxsparse." in str(node.target)
    }
    if names:
        cpu.write_libraries(folder, sorted(names))


@contextmanager
def _whole(path: Path) -> Iterator[Path]:
    """A folder whose files come to lie beside `path` if the block ends well."""
    try:
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as made:
            folder = Path(made)
            yield folder
            for file in sorted(folder.iterdir(), key=lambda file: file.name == path.name):
                file.chmod(0o666 & ~_umask())
                os.replace(file, destination(path.parent / file.name))
    except OSError as error:
        raise CheckpointError(
            f"{path}: expected a file in a folder that exists and may be written, got {error}."
        ) from error


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@contextmanager
def _named(format: str) -> Iterator[None]:
    try:
        yield
    except (CheckpointError, TraceError, UnsupportedError):
        raise
    except _FAILURES as error:
        lines = str(error).strip().splitlines() or [""]
        raise UnsupportedError(
            f"export: PyTorch could not write this model as {format!r}: {type(error).__name__}: {lines[0]}"
        ) from error
