"""``torch.compile(model, backend="fxsparse")``: sparse kernels for the weights of any graph that have zeros."""

from fxsparse.backend.entry import fxsparse, reports

__all__ = ["fxsparse", "reports"]
