"""Front ends: a model in, a :class:`fxsparse.pipeline.Program` out."""

from fxsparse.inputs import split_inputs
from fxsparse.skeleton import bind, copy_structure
from fxsparse.trace.capture import capture

__all__ = ["bind", "capture", "copy_structure", "split_inputs"]
