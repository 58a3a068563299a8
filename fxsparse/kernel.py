"""One way to run one op on one format: the registry, and the measured choice among candidates."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Problem:
    """One call site, as far as a kernel may care."""

    op: str
    """"linear" or "conv2d"."""
    shape: tuple[int, ...]
    """Dense shape of the weight."""
    batch: int
    """Rows of the input: the product of its leading dimensions."""
    nnz: int
    dtype: torch.dtype
    device: torch.device
    training: bool
    fan_in: int | None = None
    """Nonzeros of every active row where that is one number, else None."""


@dataclass(frozen=True)
class Kernel:
    """A kernel entry; `refuses` answers with reasons and never raises."""

    name: str
    op: str
    format: str
    pack: Callable[[Tensor], Mapping[str, Tensor]]
    run: Callable[..., Tensor]
    reference: Callable[..., Tensor]
    refuses: Callable[[Problem], list[str]]
