"""A sparse-training and sparse-inference compiler for PyTorch, as torch.fx passes."""

from fxsparse import analysis
from fxsparse.budget import Budget
from fxsparse.compiler import allocate, compile, count_flops, plan_report, prune
from fxsparse.errors import FxSparseError
from fxsparse.exporting import export
from fxsparse.module import SparseModule
from fxsparse.plans import Override, Plan
from fxsparse.pretrained import load_pretrained, save_pretrained
from fxsparse.report import Report
from fxsparse.saving import load, save
from fxsparse.scoring import saliency

__all__ = [
    "Budget",
    "FxSparseError",
    "Override",
    "Plan",
    "Report",
    "SparseModule",
    "allocate",
    "analysis",
    "compile",
    "count_flops",
    "export",
    "load",
    "load_pretrained",
    "plan_report",
    "prune",
    "saliency",
    "save",
    "save_pretrained",
]
