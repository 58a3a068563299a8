"""What the entries of weights cost, and the counts that a budget pays for."""

from bisect import bisect_left
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from fxsparse.errors import PlanError

Counts = Mapping[str, int]


@dataclass(frozen=True)
class Price:
    """The cost of a weight by its nonzeros: straight lines between `points`, (nnz, cost), ascending in nnz."""

    points: tuple[tuple[int, float], ...]

    def __call__(self, nnz: int) -> float:
        if nnz <= self.points[0][0]:
            return self.points[0][1]
        place = min(bisect_left(self.points, (nnz, float("-inf"))), len(self.points) - 1)
        (low, least), (high, most) = self.points[place - 1], self.points[place]
        return most if nnz >= high else least + (most - least) * (nnz - low) / (high - low)

    @property
    def entry(self) -> float:
        """The mean cost of an entry, above 0: what weights are compared by."""
        (low, least), (high, most) = self.points[0], self.points[-1]
        return max((most - least) / max(1, high - low), 1e-30)


@dataclass(frozen=True)
class Prices:
    """Of all selected weights, with what there is to spend on them."""

    of: Mapping[str, Price]
    unit: str
    dense: float
    """Cost of the whole dense model."""
    rest: float
    """Of that, what no selected weight has to do with."""
    share: float
    """Of the whole, that may be spent."""

    @property
    def allowed(self) -> float:
        """What may be spent on the whole model."""
        return self.share * self.dense

    def cost(self, counts: Counts) -> float:
        """Of the whole model with so many nonzeros."""
        return self.rest + sum(price(counts[name]) for name, price in self.of.items())

    def per_entry(self) -> dict[str, float]:
        """{weight: cost of an entry}, 1 on average over all entries."""
        size = {name: price.points[-1][0] for name, price in self.of.items()}
        mean = sum(price.entry * size[name] for name, price in self.of.items()) / max(1, sum(size.values()))
        return {name: price.entry / mean for name, price in self.of.items()}

    def sparsest(self, counts_at: Callable[[float], Counts], most: float) -> tuple[float, Counts]:
        """(sparsity, counts): the least sparsity up to `most` whose counts the budget pays for, to 1e-6.

        `counts_at` says what an allocation gives every weight at a sparsity.

        Raises:
            PlanError: even `most` costs more; the message has the numbers.
        """
        allowed = self.allowed
        if self.cost(dense := counts_at(0.0)) <= allowed:
            return 0.0, dense
        counts = counts_at(most)
        if self.cost(counts) > allowed:
            raise PlanError(
                f"budget: {self.share:g} of the dense model are {allowed:.6g} {self.unit}, but at sparsity {most:.6g} "
                f"it still costs {self.cost(counts):.6g} {self.unit} ({self.rest:.6g} of them outside of the selected "
                "weights): expected a share that can be met. Spend more, exclude fewer weights, or use another "
                "allocation."
            )
        low, high = 0.0, most
        while high - low > 1e-6:
            middle = (low + high) / 2
            tried = counts_at(middle)
            if self.cost(tried) <= allowed:
                high, counts = middle, tried
            else:
                low = middle
        return high, counts
