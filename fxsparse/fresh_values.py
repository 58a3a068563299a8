"""First values of tensors that took the place of others of another shape: drawn as those had been drawn."""

import torch
from torch import Tensor

from fxsparse.creation import AT_CREATION
from fxsparse.rng import generator_for


@torch.no_grad()
def drawn_like(given: Tensor, shape: tuple[int, ...], scale: float, seed: int, name: str) -> Tensor:
    """A tensor of `shape` of entries drawn from those of `given`, with replacement, times `scale`.

    So zeros stay zeros, ones stay ones and a uniform or truncated draw keeps its form, whoever made it.  On meta there
    is nothing to draw from, and the result is there too.  A tensor of one number alone is not scaled.
    """
    if given.is_meta or not given.numel():
        return torch.empty(shape, dtype=given.dtype, device=given.device)
    entries = given.detach().flatten()
    if bool((entries == entries[0]).all()):
        return entries[:1].expand(torch.Size(shape).numel()).reshape(shape).clone()
    generator = generator_for(seed, name, AT_CREATION)
    at = torch.randint(len(entries), shape, generator=generator)
    return entries[at.to(entries.device)] * scale
