"""What masks are as graphs: Ramanujan and spectral gaps, by layer and over training."""

from fxsparse.analysis.history import SpectralHistory
from fxsparse.analysis.layers import spectral_layers, spectral_table
from fxsparse.analysis.spectral import Spectral, spectral

__all__ = ["Spectral", "SpectralHistory", "spectral", "spectral_layers", "spectral_table"]
