"""The Triton kernels: what they need, and what they do to a sum at its end (`epilogue_triton`)."""

from fxsparse.kernels.gpu.device import INTERPRETED, multiprocessors, precision
from fxsparse.kernels.gpu.needs import DTYPES, refuses

__all__ = ["DTYPES", "INTERPRETED", "multiprocessors", "precision", "refuses"]
