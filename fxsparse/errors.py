"""Named errors.  Each message says what was expected, what came, where, and what to do."""


class FxSparseError(Exception):
    """Any error that fxsparse raises on purpose."""


class PlanError(FxSparseError, ValueError):
    """A plan that cannot be carried out: a bad field, an unmatched glob, an infeasible budget."""


class PatternError(FxSparseError, ValueError):
    """A weight or mask that does not fit its pattern, such as 2:4 on 30 input features."""


class TraceError(FxSparseError, ValueError):
    """A model that no front end could capture, or a graph that this tier does not have."""


class CheckpointError(FxSparseError, ValueError):
    """A state dict or file that does not belong to this model, or was damaged."""


class UnsupportedError(FxSparseError, ValueError):
    """No kernel, optimizer or device can do what was asked; the message lists every reason."""


class InvariantError(FxSparseError, RuntimeError):
    """A bug of fxsparse: a pass broke the graph or a mask lost its count."""


class NumericsError(FxSparseError, ValueError):
    """A NaN among numbers that have to be ranked: training has diverged."""
