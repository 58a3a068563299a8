"""The spectral quantities of masks over training: a record that the training loop asks for, its table and plots."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from fxsparse.analysis.layers import QUANTITIES, mean_of, spectral_layers, spectral_table
from fxsparse.analysis.plots import draw_layers, draw_training
from fxsparse.analysis.spectral import Spectral
from fxsparse.module import SparseModule


@dataclass
class SpectralHistory:
    """What `spectral_layers` found at some steps.

        history = SpectralHistory()
        for step, batch in enumerate(batches):
            if step % 100 == 0:
                history.record(sparse)
            ...
        print(history)

    It holds numbers only, and none of the module's tensors.
    """

    records: dict[int, dict[str, Spectral]] = field(default_factory=dict)
    """{optimizer steps taken: {weight name: quantities}}, in the order of recording."""

    def record(self, sparse: SparseModule, names: Iterable[str] | None = None) -> dict[str, Spectral]:
        """Measure the masks and weights as they are now; a second record of one step replaces the first.

        Raises:
            PlanError, NumericsError, UnsupportedError: as `spectral_layers`.
        """
        found = spectral_layers(sparse, names)
        self.records[int(sparse.get_buffer("fxsparse_step"))] = found
        return found

    def rows(self) -> list[dict[str, Any]]:
        """One plain dict for each step and weight: name, step, skipped, and the gaps, None where not known."""
        return [
            {"name": name, "step": step, "skipped": of_weight.skipped}
            | {quantity: getattr(of_weight, quantity) for quantity in QUANTITIES}
            for step, spectra in self.records.items()
            for name, of_weight in spectra.items()
        ]

    def means(self) -> dict[int, dict[str, float | None]]:
        """{step: {quantity: mean over the weights that have it}}."""
        return {
            step: {quantity: mean_of(spectra.values(), quantity) for quantity in QUANTITIES}
            for step, spectra in self.records.items()
        }

    def draw(self) -> dict[str, bytes]:
        """{title: SVG}: gaps by layer, first and last record, and gaps over training; empty without records.

        `Report.to_html` takes it as `plots`.

        Raises:
            UnsupportedError: matplotlib is not installed.
        """
        if not any(self.records.values()):
            return {}
        plots = {"Ramanujan gap by layer": draw_layers(self.rows())}
        if len(self.records) > 1:
            plots["Spectral gaps over training"] = draw_training(self.rows(), self.means())
        return plots

    def __str__(self) -> str:
        """The table of the last record, and the means at every step."""
        from tabulate import tabulate

        from fxsparse.report import cell

        if not self.records:
            return "no records"
        step, last = list(self.records.items())[-1]
        means = [[cell(at), *(cell(mean) for mean in row.values())] for at, row in self.means().items()]
        over_training = tabulate(
            means, ["step", *QUANTITIES.values()], disable_numparse=True, stralign="right"
        )
        return f"At step {step}\n{spectral_table(last)}\n\nMeans over the weights\n{over_training}"
