"""The spectral quantities of every weight of a sparse module, and their table."""

import math
from collections.abc import Iterable, Mapping
from math import prod

from torch import Tensor

from fxsparse.analysis.bipartite import Bipartite
from fxsparse.analysis.spectral import Spectral, spectral_of
from fxsparse.errors import PlanError
from fxsparse.module import SparseModule
from fxsparse.report import cell
from fxsparse.storage import CompactWeight, MaskedWeight

QUANTITIES = {
    "ramanujan_gap": "Ramanujan gap",
    "random_gap": "of a random mask",
    "iterative_ramanujan_gap": "iterative",
    "weighted_spectral_gap": "weighted gap",
    "iterative_weighted_gap": "iterative weighted",
    "full_spectrum_distance": "full spectrum",
}
"""{attribute of Spectral: column title}."""


def spectral_layers(sparse: SparseModule, names: Iterable[str] | None = None) -> dict[str, Spectral]:
    """{weight name: quantities of its mask and of its weights as they are now}; `names` limits it to some weights.

    Reads nonzeros only: no dense copy of a compact weight is made.

    Raises:
        PlanError: no compiled module, or one for inference, or a name that is no sparse weight.
        NumericsError, UnsupportedError: as `spectral`.
    """
    if not isinstance(sparse, SparseModule):
        raise PlanError(
            f"spectral_layers: expected what fxsparse.compile returned, got {type(sparse).__name__}; compile it with a "
            "plan, or give single masks to spectral(mask, weight)."
        )
    found = {}
    for name, (outputs, inputs) in sparse.coordinates(names).items():
        stored = dict(sparse.weights())[name]
        graph = Bipartite.of(outputs, inputs, _values(sparse, name, stored))
        found[name] = spectral_of(graph, (stored.shape[0], prod(stored.shape[1:])))
    return found


def spectral_table(spectra: Mapping[str, Spectral], style: str = "simple") -> str:
    """A line for each weight and one for their means over the weights that have the quantity; `style` is tabulate's."""
    from tabulate import tabulate

    rows = [_row(name, of_weight) for name, of_weight in spectra.items()]
    if len(spectra) > 1:
        means = [mean_of(spectra.values(), quantity) for quantity in QUANTITIES]
        rows.append(["mean", *[""] * 6, *map(cell, means), ""])
    headers = ["weight", "matrix", "nnz", "d_l", "d_r", "sigma_1", "sigma_2", *QUANTITIES.values(), "skipped"]
    sides = ["left", "left", *["right"] * (len(headers) - 3), "left"]
    return tabulate(rows, headers, tablefmt=style, disable_numparse=True, colalign=sides if rows else None)


def mean_of(spectra: Iterable[Spectral], quantity: str) -> float | None:
    """Mean of one quantity over the weights that have it."""
    known = [value for value in (getattr(s, quantity) for s in spectra) if value is not None]
    return math.fsum(known) / len(known) if known else None


def _row(name: str, of: Spectral) -> list[str]:
    numbers = (of.input_degree, of.output_degree, of.sigma_1, of.sigma_2)
    gaps = [getattr(of, quantity) for quantity in QUANTITIES]
    return [name, *map(cell, (of.shape, of.nnz, *numbers, *gaps)), of.skipped]


def _values(sparse: SparseModule, name: str, stored: MaskedWeight | CompactWeight) -> Tensor:
    """Effective weights at the active entries: soft masks are multiplied in."""
    positions = stored.active()
    if isinstance(stored, CompactWeight):
        return stored.values_at(positions)
    return stored.at(sparse.dense_state_dict((name,))[name], positions)
