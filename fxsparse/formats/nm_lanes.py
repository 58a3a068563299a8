"""N:M for a CPU whose registers hold 16 inputs: the entries of 16 rows lie side by side.

One permutation of the register fetches the input of an entry for each of them.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from fxsparse.errors import PatternError
from fxsparse.formats import nm

INPUTS = 16
"""Of a chunk, and the rows of a group."""
MOST = 8
"""Places of four bits that 32 have room for."""


def pack(weight: Tensor) -> Mapping[str, Tensor]:
    """The layout of a `weight` [out, in] with at most 8 nonzeros in every aligned chunk of 16 inputs.

    A chunk has as many steps as the fullest one of any row has nonzeros; chunks whose steps are 8 together are a run.
    ``values`` [groups of rows, runs, chunks of a run, steps, 16 rows]; ``places`` int32 [groups, runs, 16 rows], where
    in its chunk each entry of the run is, the first in the lowest four bits; ``dense`` uint8 [0, out, in], which only
    says the shape.  Free slots, and rows and columns past the last, have the value 0.

    PatternError where a chunk has more nonzeros.
    """
    out_features, in_features = weight.shape
    padded = F.pad(weight, (0, -in_features % INPUTS, 0, -out_features % INPUTS))
    steps = nm.most_in_group(padded != 0, INPUTS)
    if steps > MOST:
        raise PatternError(
            f"expected at most {MOST} nonzeros in every aligned chunk of {INPUTS} inputs, got {steps} in a weight "
            f"{list(weight.shape)}. Project its mask with NM(n, m).project, n at most m / 2, or use CSR."
        )
    run = MOST // steps
    padded = F.pad(padded, (0, -padded.shape[1] % (run * INPUTS)))
    packed = nm.pack(padded, (steps, INPUTS))
    by_lane = (len(padded) // INPUTS, INPUTS, padded.shape[1] // (run * INPUTS), run, steps)
    shifts = 4 * torch.arange(run * steps).reshape(run, steps)
    places = (packed["positions"].reshape(by_lane).long() << shifts).sum((3, 4))
    return {
        "values": packed["values"].reshape(by_lane).permute(0, 2, 3, 4, 1).contiguous(),
        "places": (places - (places >> 31 << 32)).int().transpose(1, 2).contiguous(),
        "dense": torch.empty(0, out_features, in_features, dtype=torch.uint8),
    }


def to_dense(values: Tensor, places: Tensor, dense: Tensor) -> Tensor:
    """The weight [out, in] that `pack` took apart; differentiable in `values`."""
    groups, runs, run, steps, _ = values.shape
    shifts = 4 * torch.arange(run * steps, device=places.device).reshape(run, steps, 1)
    at = places[:, :, None, None].long() >> shifts & (INPUTS - 1)
    chunks = values.new_zeros(groups, runs, run, INPUTS, INPUTS).scatter(3, at, values)
    rows = chunks.permute(0, 4, 1, 2, 3).reshape(groups * INPUTS, runs * run * INPUTS)
    return rows[: dense.shape[1], : dense.shape[2]]
