"""What launches ask of a device and of PyTorch's settings."""

import os

import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Triton's interpreter multiplies bfloat16 wrongly; there tiles are widened first."""


def multiprocessors(device: torch.device) -> int:
    """Of a GPU; 4 in the interpreter, so that small problems are split there, too."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def precision() -> str:
    """Of fp32 products: as PyTorch's own are set to be."""
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"
