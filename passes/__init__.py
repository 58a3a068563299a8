"""The passes, and the only place that states their order."""

from fxsparse.passes.allocate_nnz import AllocateNnz
from fxsparse.passes.choose_storage import ChooseStorage
from fxsparse.passes.cleanup import Cleanup
from fxsparse.passes.collect_weights import CollectWeights
from fxsparse.passes.count_flops import CountFlops
from fxsparse.passes.functionalize import Functionalize
from fxsparse.passes.infer_shapes import InferShapes
from fxsparse.passes.insert_mask_updates import InsertMaskUpdates
from fxsparse.passes.insert_reparam import InsertReparam
from fxsparse.passes.lower_kernels import LowerKernels

_select = (Functionalize(), InferShapes(), CollectWeights(), AllocateNnz())
planning_pipeline = (*_select, CountFlops())
training_pipeline = (
    *_select,
    ChooseStorage(),
    CountFlops(),
    InsertReparam(),
    LowerKernels(),
    Cleanup(),
    InsertMaskUpdates(),
)

__all__ = [
    "AllocateNnz",
    "ChooseStorage",
    "Cleanup",
    "CollectWeights",
    "CountFlops",
    "Functionalize",
    "InferShapes",
    "InsertMaskUpdates",
    "InsertReparam",
    "LowerKernels",
    "planning_pipeline",
    "training_pipeline",
]
