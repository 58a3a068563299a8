"""How masks moved during training: a record for every update, and plots of it."""

from fxsparse.topology.ever_active import EverActive
from fxsparse.topology.history import TopologyHistory
from fxsparse.topology.plots import draw

__all__ = ["EverActive", "TopologyHistory", "draw"]
