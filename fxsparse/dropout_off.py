"""Dropout off, modules and functions, where a model otherwise runs as in training."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

_MODULES = (nn.modules.dropout._DropoutNd, nn.AlphaDropout, nn.FeatureAlphaDropout)
_SHARE = {
    **dict.fromkeys(
        (
            "dropout",
            "dropout1d",
            "dropout2d",
            "dropout3d",
            "alpha_dropout",
            "feature_dropout",
            "feature_alpha_dropout",
            "native_dropout",
        ),
        (1, "p"),
    ),
    "scaled_dot_product_attention": (4, "dropout_p"),
    "multi_head_attention_forward": (10, "dropout_p"),
}
"""{function of torch, in place or an op of a graph too: place and name of the argument that says how much it drops}."""


@contextmanager
def dropout_off(model: nn.Module) -> Iterator[None]:
    """Inside the block nothing is dropped: PyTorch's dropout modules, functions and attention get a share of 0.

    Changes `model` for good: its dropout modules are in eval mode, its RNNs drop nothing.  After the block torch's
    generators, of the CPU and of the CUDA devices that the parameters are on, are as before; what a model draws
    otherwise (stochastic depth) it draws as ever.
    """
    for module in model.modules():
        if isinstance(module, _MODULES):
            module.eval()
        if isinstance(module, nn.RNNBase):
            module.dropout = 0.0
    devices = {parameter.device for parameter in model.parameters() if parameter.is_cuda}
    with torch.random.fork_rng(devices), _Off():
        yield


class _Off(TorchFunctionMode):
    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        del types
        given = dict(kwargs or {})
        name = getattr(func, "__name__", "").split(".")[0].removesuffix("_")
        if name in _SHARE:
            place, keyword = _SHARE[name]
            if len(args) > place:
                args = (*args[:place], 0.0, *args[place + 1 :])
            else:
                given[keyword] = 0.0
        return func(*args, **given)
