"""One graph rewrite a file."""

from fxsparse.passes.allocate_nnz import AllocateNnz
from fxsparse.passes.cleanup import Cleanup
from fxsparse.passes.collect_weights import CollectWeights
from fxsparse.passes.functionalize import Functionalize

__all__ = ["AllocateNnz", "Cleanup", "CollectWeights", "Functionalize"]
