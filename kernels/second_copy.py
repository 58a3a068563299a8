"""Weights in the order that a library reads them in, beside the weights themselves."""

from collections.abc import Callable
from typing import TypeVar

from torch import Tensor, nn
from torch._C._functorch import peek_interpreter_stack
from torch.utils.weak import WeakTensorKeyDictionary

Made = TypeVar("Made")


def second_copy(
    kept: WeakTensorKeyDictionary, weight: Tensor, given: object, make: Callable[[], Made]
) -> Made:
    """What `make` gave for the weight, in `kept` for as long as the weight is there.

    Made anew when `given` changes, or the weight: its memory, its shape, or its values as far as PyTorch counts that.
    It does not for inference tensors, which have no second copy (`can_have_one`), nor for writes through ``.data`` or
    NumPy.
    """
    state = weight._version, weight.data_ptr(), weight.shape, weight.stride(), weight.dtype, given
    known = kept.get(weight)
    if known is None or known[0] != state:
        # With its memory, so that no other has that address.
        known = kept[weight] = state, make(), weight.untyped_storage()
    return known[1]


def can_have_one(weight: Tensor) -> bool:
    """Whether this is a plain tensor whose changes are counted, and no transform of torch.func is at work."""
    is_plain = type(weight) in (Tensor, nn.Parameter) and not weight.is_inference()
    return is_plain and peek_interpreter_stack() is None
