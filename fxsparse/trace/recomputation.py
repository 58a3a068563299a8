"""Activation checkpointing inside a model: a trace would run through it and forget to recompute."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.utils.checkpoint as checkpointing

from fxsparse.errors import TraceError

_IMPLEMENTATIONS = (
    "CheckpointFunction",
    "_checkpoint_without_reentrant_generator",
    "_checkpoint_without_reentrant_generator_impl",
)
"""What ``torch.utils.checkpoint.checkpoint`` calls, by torch version; the function itself is imported by value."""


class _Refusal:
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise TraceError(
            "the model recomputes activations by torch.utils.checkpoint, which a graph would drop"
        )

    apply = __call__


@contextmanager
def recomputation_refused() -> Iterator[None]:
    """Inside the block, a forward that checkpoints activations raises TraceError."""
    saved = {
        name: checkpointing.__dict__[name] for name in _IMPLEMENTATIONS if name in checkpointing.__dict__
    }
    try:
        checkpointing.__dict__.update(dict.fromkeys(saved, _Refusal()))
        yield
    finally:
        checkpointing.__dict__.update(saved)
