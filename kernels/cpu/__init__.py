"""The C++ kernels: built on first use, cached, and asked for what this CPU can do."""

from fxsparse.kernels.cpu.build import availability, builds_for, instruction_set, load, refuses, version

__all__ = ["availability", "builds_for", "instruction_set", "load", "refuses", "version"]
