"""Random numbers that depend only on what they are for: ranks, storages and resumed runs agree."""

import hashlib

import torch


def generator_for(seed: int, name: str, step: int) -> torch.Generator:
    """A CPU generator for one weight at one update; step -1 is the initial mask.

    The key is hashed because the CPU generator reads only 32 bits of its seed; Python's ``hash`` of a string
    differs between processes.
    """
    digest = hashlib.blake2b(f"{seed}/{step}/{name}".encode(), digest_size=4).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))
