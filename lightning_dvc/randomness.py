"""Seeded random streams that need no state.

A generator made from ``(seed, purpose, number)`` yields the same draws whenever and wherever it is
made: after a resume, on every rank, and whatever else has drawn random numbers in between. Nothing
here touches the global generators of torch, numpy or random.
"""

import zlib

import numpy as np
import torch


def stream(seed: int, purpose: str, *numbers: int) -> np.random.Generator:
    """Make the numpy generator of one purpose.

    Args:
        seed: The user's seed, at least 0.
        purpose: What the draws are for; different purposes get independent streams.
        numbers: Round, arm or whatever else tells this use from the others, each at least 0.

    Returns:
        A fresh generator, the same for the same arguments.

    Example:
        >>> stream(0, "draw", 3).integers(100) == stream(0, "draw", 3).integers(100)
        np.True_
    """
    # How many numbers there are comes first: numpy takes trailing zeros for nothing.
    return np.random.default_rng([seed, zlib.crc32(purpose.encode()), len(numbers), *numbers])


def torch_stream(seed: int, purpose: str, *numbers: int) -> torch.Generator:
    """Make the torch generator (CPU) of one purpose; see :func:`stream`.

    Example:
        >>> g = torch_stream(0, "hyperplanes")
        >>> torch.randn(1, generator=g).shape
        torch.Size([1])
    """
    word = int(stream(seed, purpose, *numbers).integers(2**62))
    return torch.Generator().manual_seed(word)
