"""The rows of a report that describe weights, read from the decisions that passes left."""

import torch

from fxsparse.initial import target_of
from fxsparse.pipeline import PassContext
from fxsparse.report import Row, check_complete
from fxsparse.storage import CompactWeight, MaskedWeight, read_weights


def summarize(ctx: PassContext) -> None:
    """Fill layers, untouched, totals, environment and notes of ``ctx.report``."""
    report, skeleton = ctx.report, ctx.program.skeleton
    transposed = {name: target_of(ctx, name).transposed for name in ctx.decisions}
    weights = dict(read_weights(skeleton, transposed))
    report.layers = [_layer(ctx, name, weight) for name, weight in weights.items()]
    report.untouched = [{"name": name, "reason": reason} for name, reason in ctx.untouched.items()]
    report.notes = list(ctx.program.notes)
    check_complete(report, [*ctx.weights, *ctx.untouched])
    numel = sum(row["numel"] for row in report.layers)
    nnz = sum(row["nnz"] for row in report.layers)
    report.totals |= {
        "numel": numel,
        "nnz": nnz,
        "sparsity": 1 - nnz / numel if numel else None,
        "bytes_dense": sum(row["numel"] * ctx.weights[row["name"]].dtype.itemsize for row in report.layers),
        "bytes_sparse": sum(_bytes(weight) for weight in weights.values()),
    }
    parameters = list(skeleton.parameters())
    report.environment = {
        "torch": torch.__version__,
        "device": str(parameters[0].device) if parameters else None,
        "threads": torch.get_num_threads(),
        "dtype": str(parameters[0].dtype).removeprefix("torch.") if parameters else None,
    }


def _layer(ctx: PassContext, name: str, weight: CompactWeight | MaskedWeight) -> Row:
    spec, decision = ctx.weights[name], ctx.decisions[name]
    nnz = weight.active().numel()
    return {
        "name": name,
        "op": spec.op,
        "shape": spec.shape,
        "pattern": str(decision.pattern),
        "storage": decision.storage,
        "kernel": decision.kernel,
        "reason": decision.reason,
        "sparsity_target": decision.sparsity_target,
        "sparsity": 1 - nnz / spec.numel,
        "nnz": nnz,
        "numel": spec.numel,
    }


def _bytes(weight: CompactWeight | MaskedWeight) -> int:
    """What training stores of the weight and where it is nonzero, gradients and optimizer state apart."""
    if isinstance(weight, MaskedWeight):
        return weight.parameter.nbytes + weight.mask.nbytes
    return weight.values.nbytes + sum(buffer.nbytes for buffer in weight.buffers())
