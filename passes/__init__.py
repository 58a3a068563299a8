"""The passes, and the only place that states their order."""

from fxsparse.passes.allocate_nnz import AllocateNnz
from fxsparse.passes.choose_layers import ChooseLayers
from fxsparse.passes.choose_layouts import ChooseLayouts
from fxsparse.passes.choose_storage import ChooseStorage
from fxsparse.passes.cleanup import Cleanup
from fxsparse.passes.collect_weights import CollectWeights
from fxsparse.passes.count_flops import CountFlops
from fxsparse.passes.create_parameters import CreateParameters
from fxsparse.passes.detect_pattern import DetectPattern
from fxsparse.passes.find_chains import FindChains
from fxsparse.passes.fold_batch_norm import FoldBatchNorm
from fxsparse.passes.fold_masks import FoldMasks
from fxsparse.passes.functionalize import Functionalize
from fxsparse.passes.fuse_epilogue import FuseEpilogue
from fxsparse.passes.infer_shapes import InferShapes
from fxsparse.passes.insert_linear_rule import InsertLinearRule
from fxsparse.passes.insert_mask_updates import InsertMaskUpdates
from fxsparse.passes.insert_reparam import InsertReparam
from fxsparse.passes.insert_soft_masks import InsertSoftMasks
from fxsparse.passes.keep_neurons import KeepNeurons
from fxsparse.passes.lower_glue import LowerGlue
from fxsparse.passes.lower_inference import LowerInference
from fxsparse.passes.lower_kernels import LowerKernels
from fxsparse.passes.pack_lanes import PackLanes
from fxsparse.passes.price_weights import PriceWeights
from fxsparse.passes.recognize_gelu import RecognizeGelu
from fxsparse.passes.remove_dead_neurons import RemoveDeadNeurons
from fxsparse.passes.remove_identities import RemoveIdentities
from fxsparse.passes.replace_layers import ReplaceLayers
from fxsparse.passes.round_values import RoundValues
from fxsparse.passes.select_entry_kernels import SelectEntryKernels
from fxsparse.passes.select_kernels import SelectKernels
from fxsparse.passes.split_samples import SplitSamples
from fxsparse.passes.widen_channels import WidenChannels
from fxsparse.pipeline import Pass
from fxsparse.plans import Plan
from fxsparse.transforms import SparseWide, Transform

_select = (Functionalize(), InferShapes(), CollectWeights(), PriceWeights(), AllocateNnz(), KeepNeurons())
training_pipeline = (
    *_select,
    FindChains(),
    ChooseStorage(),
    CreateParameters(),
    CountFlops(),
    InsertReparam(),
    InsertSoftMasks(),
    InsertLinearRule(),
    LowerKernels(),
    Cleanup(),
    InsertMaskUpdates(),
)
inference_pipeline = (
    FoldMasks(),
    Functionalize(),
    RecognizeGelu(),
    InferShapes(),
    CollectWeights(),
    RemoveIdentities(),
    FoldBatchNorm(),
    RemoveDeadNeurons(),
    DetectPattern(),
    SelectKernels(),
    SelectEntryKernels(),
    ChooseLayouts(),
    RoundValues(),
    CountFlops(),
    LowerInference(),
    LowerGlue(),
    FuseEpilogue(),
    Cleanup(),
    SplitSamples(),
    PackLanes(),
)


def transforming_pipeline(transform: Transform) -> tuple[Pass, ...]:
    """What makes the model of a transformation."""
    rewrite = WidenChannels() if isinstance(transform, SparseWide) else ReplaceLayers()
    return (*_select[:3], CountFlops(), ChooseLayers(), rewrite)


def planning_pipeline(plan: Plan | None, convention: str = "mac2") -> tuple[Pass, ...]:
    """What counts the FLOPs of a plan, or of the dense model, by a convention, and measures nothing.

    Storage is chosen only where the plan names it: "auto" is decided by measured times.
    """
    stored = () if plan is None or plan.storage == "auto" else (ChooseStorage(),)
    return (*(_select if plan else _select[:3]), *stored, CountFlops(convention))


__all__ = [
    "AllocateNnz",
    "ChooseLayers",
    "ChooseLayouts",
    "ChooseStorage",
    "Cleanup",
    "CollectWeights",
    "CountFlops",
    "CreateParameters",
    "DetectPattern",
    "FindChains",
    "FoldBatchNorm",
    "FoldMasks",
    "Functionalize",
    "FuseEpilogue",
    "InferShapes",
    "InsertLinearRule",
    "InsertMaskUpdates",
    "InsertReparam",
    "InsertSoftMasks",
    "KeepNeurons",
    "LowerGlue",
    "LowerInference",
    "LowerKernels",
    "PackLanes",
    "PriceWeights",
    "RecognizeGelu",
    "RemoveDeadNeurons",
    "RemoveIdentities",
    "ReplaceLayers",
    "RoundValues",
    "SelectEntryKernels",
    "SelectKernels",
    "SplitSamples",
    "WidenChannels",
    "inference_pipeline",
    "planning_pipeline",
    "training_pipeline",
    "transforming_pipeline",
]
