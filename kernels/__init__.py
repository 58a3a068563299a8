"""Kernels: one family a folder.  Importing this registers the shipped ones."""

from fxsparse.kernels.condensed.linear import condensed_linear
from fxsparse.kernels.csr.linear import csr_linear
from fxsparse.kernels.csr.sampled import gradient_at
from fxsparse.kernels.csr.topology import position_change
from fxsparse.kernels.dense.linear import DENSE, MASKED
from fxsparse.kernels.lookup.linear import lookup_linear

__all__ = [
    "DENSE",
    "MASKED",
    "condensed_linear",
    "csr_linear",
    "gradient_at",
    "lookup_linear",
    "position_change",
]
