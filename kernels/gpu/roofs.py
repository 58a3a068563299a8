"""How much arithmetic and reading a GPU can do at most, as PyTorch's own best kernels reach it."""

from collections.abc import Callable
from functools import partial

import torch

from fxsparse import machine
from fxsparse.kernels.gpu.device import name_of, precision, seconds

_SIDE, _SIDE_OF_A_CPU = 8192, 256
"""Of the square product: large enough for tensor cores to count alone."""
_LEAST_BYTES = 1 << 25
"""Below, launching counts more than reading."""


def flops_per_second(dtype: torch.dtype, device: torch.device) -> float:
    """Of a dense product in `dtype`; of fp32 with TF32 where PyTorch's products are set to use it."""
    side = _SIDE if device.type == "cuda" else _SIDE_OF_A_CPU

    def product() -> Callable[[], object]:
        one, other = torch.ones(2, side, side, dtype=dtype, device=device)
        return lambda: torch.matmul(one, other)

    return 2 * side**3 / _least(("product", side, str(dtype), precision()), product, device)


def bytes_per_second(size: int, device: torch.device) -> float:
    """Of reading `size` bytes, 32 MiB or more, over and over: from the L2 cache where that holds them."""
    size = max(size, _LEAST_BYTES)

    def total() -> Callable[[], object]:
        return torch.ones(size // 4, device=device).sum

    return size / _least(("sum", size), total, device)


def _least(
    what: tuple[object, ...], prepare: Callable[[], Callable[[], object]], device: torch.device
) -> float:
    return machine.least_seconds(
        ("roof", name_of(device), *what), prepare, partial(seconds, device=device, calls=5)
    )
