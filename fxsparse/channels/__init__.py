"""Channel dependency graph: which positions of values and parameters live and go together."""

from fxsparse.channels.constants import Constant, constant_channels
from fxsparse.channels.dependency import Axis, ChannelGraph, Contraction, Tie
from fxsparse.channels.tracing import TracedChannels, trace_channels

__all__ = [
    "Axis",
    "ChannelGraph",
    "Constant",
    "Contraction",
    "Tie",
    "TracedChannels",
    "constant_channels",
    "trace_channels",
]
