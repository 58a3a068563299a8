"""The rows of a report that describe weights, read from the decisions that passes left."""

import warnings
from collections import Counter
from collections.abc import Iterable

import torch
from torch import nn

from fxsparse.graph_model import GraphModel
from fxsparse.kernels import cpu
from fxsparse.pipeline import PassContext
from fxsparse.report import Row, check_complete
from fxsparse.storage import CompactWeight, MaskedWeight


def summarize(ctx: PassContext) -> None:
    """Fill layers, untouched, totals, environment and notes of ``ctx.report``."""
    report, skeleton = ctx.report, ctx.program.skeleton
    report.layers = [_layer(ctx, name) for name in ctx.decisions]
    report.untouched = [{"name": name, "reason": reason} for name, reason in ctx.untouched.items()]
    report.notes = list(ctx.program.notes)
    check_complete(report, [*ctx.weights, *ctx.untouched])
    numel = sum(row["numel"] for row in report.layers)
    nnz = sum(row["nnz"] for row in report.layers)
    report.totals |= {
        "numel": numel,
        "nnz": nnz,
        "sparsity": 1 - nnz / numel if numel else None,
        "bytes_dense": sum(_bytes_dense(ctx, row["name"]) for row in report.layers),
    }
    if ctx.flops is not None:
        report.totals |= {
            "flops_dense": ctx.flops.dense,
            "flops_sparse": ctx.flops.total,
            "flops_executed": ctx.flops.executed,
            "train_flops_ratio": ctx.flops.train_ratio,
        }
    parameters = list(skeleton.parameters())
    report.environment = {
        "torch": torch.__version__,
        "device": str(parameters[0].device) if parameters else None,
        "threads": torch.get_num_threads(),
        "dtype": str(parameters[0].dtype).removeprefix("torch.") if parameters else None,
        "kernels": cpu.in_use(),
    }


def warn_of_nothing(ctx: PassContext, call: str) -> None:
    """Warn where the plan selected no weight, with the reasons."""
    if ctx.decisions:
        return
    warnings.warn(
        f"{call}: the plan selected none of the model's {len(ctx.untouched)} parameters, so it stays dense: "
        f"{why_none(ctx)}. "
        "Linear and convolution weights can be sparse; fxsparse.plan_report shows all reasons.",
        stacklevel=4,
    )


def why_none(ctx: PassContext) -> str:
    """The commonest reasons why parameters were left as they are."""
    reasons = Counter(ctx.untouched.values()).most_common(3)
    return "; ".join(f"{count} x {reason}" for reason, count in reasons)


def add_balance(model: nn.Module, ctx: PassContext) -> None:
    """Totals and first note of a transformed model: FLOPs of its layers, and of all of it, beside those it came with.

    They are two numbers, since what is outside of the transformed layers is not made up for.
    """
    if not isinstance(model, GraphModel) or ctx.flops is None:
        return
    balance = model.origin.balance
    layers = sum(ctx.flops.of_weight(name)[1] or 0 for name in model.origin.layers)
    ctx.report.totals |= {
        "sparsity_nominal": balance.nominal,
        "layers_before": balance.layers_before,
        "layers_sparse": layers,
        "layers_ratio": layers / balance.layers_before,
        "model_before": balance.model_before,
        "model_ratio": ctx.flops.total / balance.model_before,
    }
    uneven = ctx.plan is not None and ctx.plan.overrides
    note = balance.note(
        ctx.report.totals, "overrides= give weights sparsities of their own" if uneven else ""
    )
    ctx.report.notes.insert(0, note)


def stored_bytes(weights: Iterable[CompactWeight | MaskedWeight]) -> int:
    """What training stores of the weights and of where they are nonzero, gradients and optimizer state apart."""
    return sum(_bytes(weight) for weight in weights)


def _bytes_dense(ctx: PassContext, name: str) -> int:
    """Of the weight as it came, with all its neurons."""
    spec, shrunk = ctx.weights[name], ctx.shrunk.get(name)
    return (spec.numel if shrunk is None else shrunk.numel) * spec.dtype.itemsize


def _layer(ctx: PassContext, name: str) -> Row:
    spec, decision = ctx.weights[name], ctx.decisions[name]
    flops = (None, None, None) if ctx.flops is None else ctx.flops.of_weight(name)
    return {
        "name": name,
        "op": spec.op,
        "shape": spec.shape,
        "pattern": str(decision.pattern),
        "storage": decision.storage,
        "kernel": decision.kernel,
        "reason": decision.reason,
        "sparsity_target": decision.sparsity_target,
        "sparsity": 1 - decision.nnz / spec.numel,
        "nnz": decision.nnz,
        "numel": spec.numel,
        **({"neurons": decision.neurons} if decision.neurons else {}),
        **dict(zip(("flops_dense", "flops_sparse", "flops_executed"), flops, strict=True)),
    }


def _bytes(weight: CompactWeight | MaskedWeight) -> int:
    if isinstance(weight, MaskedWeight):
        return weight.parameter.nbytes + weight.mask.nbytes
    return weight.values.nbytes + sum(buffer.nbytes for buffer in weight.buffers())
