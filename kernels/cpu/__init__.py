"""The C++ kernels: built on first use, cached, and asked for what this CPU can do."""

from fxsparse.kernels.cpu.build import (
    availability,
    builds_for,
    has,
    in_use,
    instruction_set,
    load,
    refuses,
    release_memory,
    version,
)
from fxsparse.kernels.cpu.roofs import bytes_per_second, flops_per_second
from fxsparse.kernels.cpu.standalone import write_libraries

__all__ = [
    "availability",
    "builds_for",
    "bytes_per_second",
    "flops_per_second",
    "has",
    "in_use",
    "instruction_set",
    "load",
    "refuses",
    "release_memory",
    "version",
    "write_libraries",
]
