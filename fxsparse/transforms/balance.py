"""FLOPs of a model before and after its transformation, and the sparsity at which they are equal."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fxsparse.errors import PlanError
from fxsparse.transforms.iso_flop import exact_sparsity

_OFF = 0.01
"""Share of the dense FLOPs by which a cost is no longer equal, as the reference's tables round."""
_FAR = 0.05
"""Difference in sparsity that a report points out."""


@dataclass(frozen=True)
class Balance:
    """Of one forward of one sample.  The transformed layers and the whole model are never one number.

    What is outside of the transformed layers is dense before and after: attention, a wider stem or head.
    """

    name: str
    """Of the transformation."""
    nominal: float
    """The plan's sparsity, which sized the model; 1 - 1/k where that was adjusted."""
    sparsity: float
    """What the sparse weights get."""
    layers_before: int
    """Of the layers that were transformed, as they came, dense."""
    sparsifiable: int
    """Of the weights that become sparse, if they were dense."""
    low_rank: int
    """Of weights in the place of these layers that stay dense (U and V of Sparse Doped)."""
    model_before: int
    """Of the whole model as it came, dense."""
    model_after: int
    """Of the whole transformed model, if it were dense."""
    match: str = "layers"
    """What the sparsity was solved for: the FLOPs of the "layers" or of the whole "model", or "nominal" for none."""
    unsolved: str = ""
    """Why none was."""

    @property
    def layers_sparsity(self) -> float:
        """s* at which the transformed layers cost what they did; PlanError where none does."""
        return exact_sparsity(self.layers_before, self.low_rank, self.sparsifiable)

    @property
    def model_sparsity(self) -> float:
        """s* at which the whole model costs what it did; PlanError where none does."""
        return exact_sparsity(self.model_before, self.model_after - self.sparsifiable, self.sparsifiable)

    def layers_ratio(self, sparsity: float) -> float:
        """FLOPs of the transformed layers over those of the layers as they came, at a sparsity."""
        return (self.low_rank + (1 - sparsity) * self.sparsifiable) / self.layers_before

    def model_ratio(self, sparsity: float) -> float:
        """FLOPs of the whole model over those of the model as it came, at a sparsity."""
        return (self.model_after - sparsity * self.sparsifiable) / self.model_before

    def solved(self) -> float:
        """The sparsity at which what is to match does."""
        if self.match == "nominal":
            return self.nominal
        return self.layers_sparsity if self.match == "layers" else self.model_sparsity

    def note(self, totals: Mapping[str, Any], uneven: str = "") -> str:
        """A line of the report, with the sparsity and the ratios of its totals.

        `uneven`: why weights have other sparsities than the one that was solved for.
        """
        try:
            whole = f"{self.model_sparsity:.4f}"
        except PlanError:
            whole = "none"
        taken, layers, model = (totals[name] for name in ("sparsity", "layers_ratio", "model_ratio"))
        line = (
            f"{self.name}: nominal sparsity {self.nominal:.6g} in every layer gives the transformed layers "
            f"x{self.layers_ratio(self.nominal):.4f} and the whole model x{self.model_ratio(self.nominal):.4f} of "
            f"their dense FLOPs; the sparsity taken, {taken:.6f}, x{layers:.4f} and x{model:.4f} (equal for the whole "
            f"model at: {whole})"
        )
        if abs((model if self.match == "model" else layers) - 1) > _OFF:
            line += f"; not iso-FLOP: {self.unsolved or uneven or 'counts of nonzeros are rounded'}"
        if abs(taken - self.nominal) > _FAR and self.match != "nominal" and not uneven:
            line += (
                f"; that is far from the plan's {self.nominal:.6g}, since it makes up for what is dense, what keep= "
                "leaves as large as it was and rounded sizes; match='nominal' takes the plan's"
            )
        return line
