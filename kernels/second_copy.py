"""Weights in the order that a library reads them in, beside the weights themselves."""

from collections.abc import Callable
from typing import TypeVar

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

Made = TypeVar("Made")


def second_copy(
    kept: WeakTensorKeyDictionary, weight: Tensor, given: object, make: Callable[[], Made]
) -> Made:
    """What `make` gave for the weight, in `kept` for as long as the weight is there.

    Made anew when the weight changes, or `given`.
    """
    state = 0 if weight.is_inference() else weight._version, given
    known = kept.get(weight)
    if known is None or known[0] != state:
        known = kept[weight] = state, make()
    return known[1]
