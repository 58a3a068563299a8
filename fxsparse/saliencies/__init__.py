"""Scores of weights before training that take the model and its loss, one a file."""

from fxsparse.saliencies.force import force, iter_snip
from fxsparse.saliencies.grasp import grasp
from fxsparse.saliencies.snip import snip
from fxsparse.saliencies.synflow import synflow

__all__ = ["force", "grasp", "iter_snip", "snip", "synflow"]
