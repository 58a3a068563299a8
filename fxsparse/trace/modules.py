"""What the front ends know about module types: which weights are eligible, and which calls F can say."""

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

FUNCTIONAL: dict[type[nn.Module], Callable[..., Any]] = {
    nn.Linear: F.linear,
    nn.Conv1d: F.conv1d,
    nn.Conv2d: F.conv2d,
    nn.Conv3d: F.conv3d,
    nn.ConvTranspose1d: F.conv_transpose1d,
    nn.ConvTranspose2d: F.conv_transpose2d,
    nn.ConvTranspose3d: F.conv_transpose3d,
}
_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
)
_PROJECTIONS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


def site_type(module: nn.Module) -> type[nn.Module] | None:
    """The Linear or Conv class whose forward the module runs; None for others and for overridden forwards."""
    for kind in FUNCTIONAL:
        if isinstance(module, kind) and type(module).forward is kind.forward:
            return kind
    return None


def has_hooks(module: nn.Module) -> bool:
    """Whether calling the module runs forward or backward hooks."""
    return any(getattr(module, name, None) for name in _HOOKS)


def is_transposed_linear(module: nn.Module) -> bool:
    """Whether this is transformers' Conv1D: a Linear that stores ``[in_features, out_features]``."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def refuses_functional(module: nn.Module) -> str | None:
    """Why a call of the module cannot be written as a call of its functional; None if it can."""
    if site_type(module) is None:
        return f"{type(module).__name__} is not a plain Linear or Conv"
    if has_hooks(module):
        return "the module has hooks, which only run when it is called"
    if parametrize.is_parametrized(module):
        return "the weight is parametrized, so it is computed at every call"
    if getattr(module, "padding_mode", "zeros") != "zeros":
        return f"padding_mode={module.padding_mode!r} is more than one convolution"
    if getattr(type(module), "_conv_forward", None) is not getattr(site_type(module), "_conv_forward", None):
        return f"{type(module).__name__} overrides _conv_forward"
    return None


def runs_its_op_alone(module: nn.Module) -> bool:
    """Whether calling the module is one linear or convolution on its own weight, and nobody reads that past it."""
    if is_transposed_linear(module):
        return True
    past = isinstance(
        module, nn.modules.linear.NonDynamicallyQuantizableLinear
    )  # MultiheadAttention's out_proj
    plain = site_type(module) is not None and not parametrize.is_parametrized(module)
    return plain and not past and getattr(module, "padding_mode", "zeros") == "zeros"


def functional_arguments(module: nn.Module) -> dict[str, Any]:
    """Keyword arguments, apart from input, weight and bias, that repeat a Linear or Conv by its
    functional.
    """
    if isinstance(module, nn.Linear):
        return {}
    names = ["stride", "padding", "dilation", "groups"]
    if site_type(module) in _TRANSPOSED_CONVOLUTIONS:
        names.append("output_padding")
    return {name: getattr(module, name) for name in names}


def eligible_parameters(module: nn.Module) -> dict[str, str]:
    """{own parameter name: op} for the weights that the module itself multiplies with."""
    for kind, call in FUNCTIONAL.items():
        if isinstance(module, kind):
            return {"weight": call.__name__} if "weight" in module._parameters else {}
    if is_transposed_linear(module):
        return {"weight": "linear"}
    if isinstance(module, nn.MultiheadAttention):
        return {name: "linear" for name in _PROJECTIONS if module._parameters.get(name) is not None}
    return {}


def eligible_below(root: nn.Module, prefix: str = "") -> dict[str, str]:
    """{full parameter name: op} of every eligible weight in a tree."""
    return {
        f"{path}.{name}" if path else name: op
        for path, module in root.named_modules(prefix=prefix)
        for name, op in eligible_parameters(module).items()
    }


_TRANSPOSED_CONVOLUTIONS = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
