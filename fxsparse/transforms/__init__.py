"""Sparse-IFT's four transformations (arXiv:2303.11525): models of other shapes that cost as much when sparse."""

from fxsparse.transforms.serialise import TRANSFORMS, Transform, from_dict, to_dict
from fxsparse.transforms.sparse_doped import SparseDoped
from fxsparse.transforms.sparse_factorized import SparseFactorized
from fxsparse.transforms.sparse_parallel import SparseParallel
from fxsparse.transforms.sparse_wide import SparseWide

__all__ = [
    "TRANSFORMS",
    "SparseDoped",
    "SparseFactorized",
    "SparseParallel",
    "SparseWide",
    "Transform",
    "from_dict",
    "to_dict",
]
