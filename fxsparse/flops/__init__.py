"""FLOPs of a model: dense, theoretical and executed, symbolic in batch and sequence."""

from fxsparse.flops.conventions import CONVENTIONS
from fxsparse.flops.count import FlopCount, LayerCount, count_program, summarise
from fxsparse.flops.site import CallSite
from fxsparse.flops.site_flops import Phases, SiteFlops, Stored
from fxsparse.flops.sites import Sites, call_sites
from fxsparse.flops.training import train_flops

__all__ = [
    "CONVENTIONS",
    "CallSite",
    "FlopCount",
    "LayerCount",
    "Phases",
    "SiteFlops",
    "Sites",
    "Stored",
    "call_sites",
    "count_program",
    "summarise",
    "train_flops",
]
