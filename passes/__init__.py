"""One graph rewrite a file."""

from fxsparse.passes.allocate_nnz import AllocateNnz

__all__ = ["AllocateNnz"]
