"""Empty figures and their SVG, the same bytes for the same numbers; matplotlib is imported here, at first use."""

import io
from typing import Any

from fxsparse.errors import UnsupportedError


def empty_figure(width: float, height: float) -> Any:
    """A matplotlib Figure of so many inches.

    Raises:
        UnsupportedError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise UnsupportedError(
            f"plots need matplotlib, and {error.name!r} is not installed: pip install 'fxsparse[viz]'"
        ) from error
    return Figure(figsize=(width, height), layout="constrained")


def svg(figure: Any) -> bytes:
    """The figure as SVG, without a date and with ids that do not change from run to run."""
    from matplotlib import rc_context

    buffer = io.BytesIO()
    with rc_context({"svg.hashsalt": "fxsparse"}):
        figure.savefig(buffer, format="svg", dpi=150, metadata={"Date": None})
    return buffer.getvalue()
