"""FLOPs of a model before and after its transformation, and the sparsity at which they are equal."""

from dataclasses import dataclass

from fxsparse.errors import PlanError
from fxsparse.transforms.iso_flop import exact_sparsity


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

    def solved(self, match: str) -> float:
        """The sparsity for what is to match: "layers", "model", or "nominal"."""
        if match == "nominal":
            return self.nominal
        return self.layers_sparsity if match == "layers" else self.model_sparsity

    def note(self) -> str:
        """A line of the report."""
        try:
            whole = f"{self.model_sparsity:.4f}"
        except PlanError:
            whole = "none"
        return (
            f"{self.name}: nominal sparsity {self.nominal:.6g} gives the transformed layers "
            f"x{self.layers_ratio(self.nominal):.4f} and the whole model x{self.model_ratio(self.nominal):.4f} of "
            f"their dense FLOPs; the sparsity taken, {self.sparsity:.6f}, x{self.layers_ratio(self.sparsity):.4f} and "
            f"x{self.model_ratio(self.sparsity):.4f} (equal for the whole model at: {whole})"
        )
