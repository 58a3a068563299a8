"""Which channels of weights in training go first: those of least mean magnitude, of all weights together."""

from collections.abc import Sequence
from math import ceil, prod

from torch import Tensor

from fxsparse.method import WeightView
from fxsparse.rules import magnitudes


def remove_channels(
    views: Sequence[WeightView], gone: Sequence[Tensor], share: float, floor: float, total: int
) -> None:
    """Mark in `gone`, flags of the rows of each view, further rows until `share` of all channels are marked.

    A channel is a row, zeros included in its mean ``|w|``; rows that are one channel (added to each other, as
    ``WeightView.channels`` has it) go together, by their mean.  No weight keeps fewer than ``ceil(floor rows)``, and
    what is left has places for `total` entries.
    """
    channels, dead = _channels(views), [flags.tolist() for flags in gone]
    wanted, count = share * sum(map(len, channels)), sum(map(sum, dead))
    alive = [flags.count(False) for flags in dead]
    least = [max(1, ceil(floor * len(flags))) for flags in dead]
    columns = [prod(view.shape[1:]) for view in views]
    room = sum(a * c for a, c in zip(alive, columns, strict=True)) - total
    sizes = [magnitudes(v, elsewhere=0.0).double().view(v.shape[0], -1).sum(1).tolist() for v in views]

    def mean(rows: Sequence[tuple[int, int]]) -> float:
        return sum(sizes[k][r] for k, r in rows) / sum(columns[k] for k, _ in rows)

    for rows in sorted(channels, key=mean):
        here = [k for k, _ in rows]
        cost = sum(columns[k] for k in here)
        fits = all(alive[k] - here.count(k) >= least[k] for k in here)
        if dead[rows[0][0]][rows[0][1]] or not fits or cost > room or count + len(rows) > wanted:
            continue
        for k, row in rows:
            gone[k][row], alive[k] = True, alive[k] - 1
        room, count = room - cost, count + len(rows)


def _channels(views: Sequence[WeightView]) -> list[list[tuple[int, int]]]:
    """(view, row) of what may go: rows that are one channel together, others alone."""
    groups: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for k, view in enumerate(views):
        for row in range(view.shape[0]) if view.ablates else ():
            label = (-1, view.channels[row]) if view.channels else (k, row)
            groups.setdefault(label, []).append((k, row))
    return list(groups.values())
