"""Random numbers that depend only on what they are for: ranks, storages and resumed runs agree."""

import hashlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor


def generator_for(seed: int, name: str, step: int) -> torch.Generator:
    """A CPU generator for one weight at one update; step -1 is the initial mask.

    The key is hashed because the CPU generator reads only 32 bits of its seed; Python's ``hash`` of a string
    differs between processes.
    """
    digest = hashlib.blake2b(f"{seed}/{step}/{name}".encode(), digest_size=4).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))


def integers(below: int, count: int, generator: torch.Generator, device: torch.device) -> Tensor:
    """`count` int64 from 0 to `below` - 1 on `device`, by a generator of the CPU.

    On the CPU they are the generator's own numbers.  Elsewhere a single one of those keys a hash that runs on the
    device, so that none is copied there; what comes out is the same on every device but the CPU.
    """
    if device.type == "cpu":
        return torch.randint(below, (count,), generator=generator)
    return hashed(int(torch.randint(2**62, (), generator=generator)), count, device) % below


def uniform_at(step: Tensor, key: int, shape: Sequence[int]) -> Tensor:
    """fp32 in [0, 1) of this shape, on the device of `step`, an int64 scalar: a function of its value and `key` alone.

    Plain tensor ops, for a graph that a step may run twice (activation checkpointing) and a resumed run again.
    """
    state = step * _signed(0xD1342543DE82EF95) + key
    numbers = hashed(state, math.prod(shape), step.device)
    return ((numbers >> 39).float() / 2**24).reshape(tuple(shape))


def hashed(key: int | Tensor, count: int, device: torch.device) -> Tensor:
    """Numbers 1 to `count` of SplitMix64 (Steele et al. 2014) from the state `key`, without the lowest bit: int64 from
    0 to 2**63 - 1.
    """
    z = torch.arange(1, count + 1, device=device) * _signed(0x9E3779B97F4A7C15) + key
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        z = (z ^ _shifted(z, shift)) * _signed(factor)
    return _shifted(z ^ _shifted(z, 31), 1)


def _shifted(z: Tensor, bits: int) -> Tensor:
    """As unsigned numbers are."""
    return (z >> bits) & (2 ** (64 - bits) - 1)


def _signed(number: int) -> int:
    return number - 2**64
