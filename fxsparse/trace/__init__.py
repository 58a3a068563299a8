"""Front ends: a model in, a :class:`fxsparse.pipeline.Program` out."""

from fxsparse.trace.capture import capture
from fxsparse.inputs import split_inputs
from fxsparse.skeleton import bind, copy_structure

__all__ = ["bind", "capture", "copy_structure", "split_inputs"]
