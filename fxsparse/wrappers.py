"""Models that come wrapped, by torch.compile, data parallelism or shards: compilation has to come before."""

import sys
from typing import Any

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from fxsparse.errors import PlanError
from fxsparse.sharding import is_sharded

_AGAIN = {
    "torch.compile": ("_orig_mod", "torch.compile({})"),
    "DataParallel": ("module", "DistributedDataParallel({})"),
    "DistributedDataParallel": ("module", "DistributedDataParallel({})"),
    "FullyShardedDataParallel": ("module", "fully_shard({})"),
}
"""{wrapper: (where it holds the module, what to make of the compiled one)}."""


def refuse_wrapped(model: nn.Module) -> None:
    """Raise PlanError where `model` or a part of it is wrapped: the wrapper holds on to ops and parameters that
    compilation rewrites.
    """
    for path, module in model.named_modules():
        wrapper = _wrapper(module)
        if wrapper is not None:
            held, again = _AGAIN[wrapper]
            raise PlanError(
                f"compile: {_named(path)} is wrapped in {wrapper}: expected the module itself, as the wrapper holds on "
                f"to ops and parameters that are rewritten. Take what it wraps (.{held}) and compile it first, then "
                f"wrap: {again.format('fxsparse.compile(...)')}."
            )
    for name, parameter in model.named_parameters():
        if is_sharded(parameter):
            raise PlanError(
                f"compile: {name!r} is sharded (a DTensor): expected a model in one piece on every rank, as masks are "
                "drawn from whole weights. Compile it first, then fully_shard(sparse), and make the optimizer after. "
                "For inference, take what sparse.to_dense() returns."
            )


def _wrapper(module: nn.Module) -> str | None:
    for kind in (DistributedDataParallel, DataParallel):
        if isinstance(module, kind):
            return kind.__name__
    if _is(module, "torch._dynamo.eval_frame", "OptimizedModule"):
        return "torch.compile"
    if _is(module, "torch.distributed.fsdp", "FullyShardedDataParallel"):
        return "FullyShardedDataParallel"
    return None


def _is(module: nn.Module, package: str, name: str) -> bool:
    """Whether it is of a class of a package that is only imported where somebody uses it."""
    kind: Any = getattr(sys.modules.get(package), name, None)
    return kind is not None and isinstance(module, kind)


def _named(path: str) -> str:
    return f"its submodule {path!r}" if path else "the model"
