"""What launches ask of a device and of PyTorch's settings."""

import os
import time
from collections.abc import Callable

import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Triton's interpreter multiplies bfloat16 wrongly; there tiles are widened first."""


def multiprocessors(device: torch.device) -> int:
    """Of a GPU; 4 in the interpreter, so that small problems are split there, too."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def precision() -> str:
    """Of fp32 products: as PyTorch's own are set to be."""
    return torch.backends.cuda.matmul.fp32_precision.replace("none", "ieee")


def name_of(device: torch.device) -> str:
    """What a GPU is called; "cpu" of the interpreter."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def seconds(call: Callable[[], object], device: torch.device, calls: int) -> float:
    """Of one of several calls in a row, after one that does not count; on a GPU by its own clock."""
    call()
    if device.type != "cuda":
        began = time.perf_counter()
        for _ in range(calls):
            call()
        return (time.perf_counter() - began) / calls
    with torch.cuda.device(device):  # whose stream the events are in
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        for _ in range(calls):
            call()
        last.record()
        last.synchronize()
        return first.elapsed_time(last) / 1e3 / calls
