"""One row of the coverage table: a model compiled for training and for inference, beside itself with the same zeros."""

import time
from collections import Counter
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

import fxsparse
from fxsparse import FxSparseError, Plan, SparseModule
from fxsparse.methods import static
from fxsparse.verify import RUN_FAILURES, Observation, compare, first_difference, largest_error, observe

PLAN = Plan(sparsity=0.8, allocation="uniform", method=static("magnitude"), storage="masked")
TRAIN_STEP_LIMIT = 100_000_000
"""Parameters of the largest model of which a train step is compared."""


def measure(model: nn.Module, inputs: Any) -> dict[str, Any]:
    """Compile `model` for training, then what it holds then for inference; "equal", or what went otherwise."""
    began = time.perf_counter()
    parameters = sum(p.numel() for p in model.parameters())
    row: dict[str, Any] = {"parameters_M": round(parameters / 1e6, 2)}
    try:
        sparse = fxsparse.compile(model, PLAN, example_inputs=inputs)
    except (FxSparseError, *RUN_FAILURES) as error:
        return row | {"train": _refused(error), "infer": "not run", "seconds": _since(began)}
    pruned = sparse.to_dense()
    row |= _weights(model, sparse)
    row["train"] = (
        _trained(pruned, sparse, inputs)
        if parameters < TRAIN_STEP_LIMIT
        else _evaluated(pruned, sparse, inputs)
    )
    return row | _inferred(pruned, inputs) | {"seconds": _since(began)}


def _weights(model: nn.Module, sparse: SparseModule) -> dict[str, Any]:
    """Which front end captured it, the weights it reached, and why it left each of the others."""
    wide = {name: p.numel() for name, p in model.named_parameters() if p.dim() > 1}
    taken = {row["name"] for row in sparse.report.layers}
    left = {row["name"]: row["reason"] for row in sparse.report.untouched}
    covered = sum(count for name, count in wide.items() if name in taken)
    return {
        "front_end": sparse._emitted.program.tier,
        "weights": len(taken),
        "covered_percent": round(100 * covered / max(1, sum(wide.values())), 2),
        "left": dict(Counter(_kind(left[name]) for name in wide if name in left)),
        "lost": _unaccounted(model, sparse),
    }


def _unaccounted(model: nn.Module, module: SparseModule) -> list[str]:
    """Parameters of the model that its report does not have exactly once."""
    rows = Counter(row["name"] for row in (*module.report.layers, *module.report.untouched))
    return [name for name, _ in model.named_parameters() if rows[name] != 1]


def _trained(pruned: nn.Module, sparse: SparseModule, inputs: Any) -> str:
    """Outputs, buffers and gradients of one seeded train step, those of pruned entries masked, and eval outputs."""
    masks = sparse.masks()
    try:
        want = observe(pruned, pruned, inputs, training=True).tensors
    except RUN_FAILURES as error:
        return (
            f"{_evaluated(pruned, sparse, inputs)} in eval; the model itself does not train: {_line(error)}"
        )
    got = observe(sparse, sparse, inputs, training=True)
    names = {key: key.removeprefix("gradient of ") for key in want if key.startswith("gradient of ")}
    want = {key: t * masks[names[key]] if names.get(key) in masks else t for key, t in want.items()}
    return first_difference(want, got.tensors) or _evaluated(pruned, sparse, inputs)


def _evaluated(pruned: nn.Module, sparse: SparseModule, inputs: Any) -> str:
    return compare(_seen(pruned, inputs), _seen(sparse, inputs)) or "equal"


def _inferred(pruned: nn.Module, inputs: Any) -> dict[str, Any]:
    """The artefact beside the pruned model, on other inputs than those that it was compiled with."""
    try:
        fast = fxsparse.compile(pruned, mode="infer", example_inputs=inputs)
    except (FxSparseError, *RUN_FAILURES) as error:
        return {"infer": _refused(error)}
    other = pytree.tree_map(_other, inputs)
    want, got = _seen(pruned, other), _seen(fast, other)
    kernels = Counter(row["format"] for row in fast.report.layers)
    return {
        "infer": compare(want, got) or "equal",
        "error": largest_error(want, got),
        "formats": dict(kernels),
        "lost_infer": _unaccounted(pruned, fast),
    }


def _seen(module: nn.Module, inputs: Any) -> Observation:
    return observe(module, module, inputs, training=False)


def _other(leaf: Any) -> Any:
    is_image = isinstance(leaf, torch.Tensor) and leaf.is_floating_point() and leaf.dim() > 2
    return leaf.flip(-1) if is_image else leaf


def _kind(reason: str) -> str:
    """A reason without what it says of one weight alone."""
    if reason.startswith("inside "):
        return "inside a module that runs as one"
    return reason.split(":")[0].split("(")[0].strip()


def _refused(error: Exception) -> str:
    return f"{type(error).__name__}: {_line(error)}"


def _line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else "no message"


def _since(began: float) -> float:
    return round(time.perf_counter() - began, 1)
