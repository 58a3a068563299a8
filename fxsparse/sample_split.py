"""Code of a graph that runs a batch some samples at a time."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx.graph import CodeGen


class SampleSplit(CodeGen):
    """Generates ``forward`` under a decorator that calls it for `samples` samples at a time and joins the results.

    For graphs of one tensor in and one out, whose ops compute every sample by itself.  Part of the graph: copies and
    pickles have it, too.  While torch.compile traces, batches stay whole.
    """

    def __init__(self, samples: int) -> None:
        super().__init__()
        self.samples = samples

    def gen_fn_def(self, *args: Any, **kwargs: Any) -> str:
        """The signature of ``forward``, decorated."""
        return f"@samples_at_once({self.samples})\n{super().gen_fn_def(*args, **kwargs)}"

    def additional_globals(self) -> list[tuple[str, Any]]:
        """The decorator."""
        return [("samples_at_once", samples_at_once)]


def samples_at_once(samples: int) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Make a method of one tensor [batch, channels, height, width] see `samples` of it at a time.

    Other calls, by keyword or of one image alone, reach it as they are.
    """

    def decorate(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
        @functools.wraps(forward)
        def split(self: Any, *args: Any, **kwargs: Any) -> Tensor:
            if torch.compiler.is_compiling() or kwargs or len(args) != 1 or not _is_longer(args[0], samples):
                return forward(self, *args, **kwargs)
            return torch.cat([forward(self, part) for part in args[0].split(samples)])

        return split

    return decorate


def _is_longer(x: object, samples: int) -> bool:
    # A graph is traced with a proxy.
    return isinstance(x, Tensor) and x.dim() == 4 and len(x) > samples
