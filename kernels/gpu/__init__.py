"""The Triton kernels: needs, launches (`tuning`), roofs of the GPU, and what ends a product (`epilogue_triton`)."""

from fxsparse.kernels.gpu.device import INTERPRETED, multiprocessors, precision
from fxsparse.kernels.gpu.needs import DTYPES, failures, refuses
from fxsparse.kernels.gpu.roofs import bytes_per_second, flops_per_second

__all__ = [
    "DTYPES",
    "INTERPRETED",
    "bytes_per_second",
    "failures",
    "flops_per_second",
    "multiprocessors",
    "precision",
    "refuses",
]
