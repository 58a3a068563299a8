"""Scores of weights before training that take the model and its loss, one a file."""

from fxsparse.saliencies.snip import snip

__all__ = ["snip"]
