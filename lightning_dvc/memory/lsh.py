"""Algorithm 3: random hyperplane hashing, to find points that lie the same way.

The sign of a random projection differs between two vectors at angle ``a`` with probability
``a / pi`` (Goemans and Williamson, 1995; Charikar, "Similarity estimation techniques from rounding
algorithms", STOC 2002). So the share of differing bits of two codes estimates their angle, and
``bits`` signs together agree with probability ``(1 - a / pi)^bits``.
"""

import math
from collections.abc import Iterator
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_dvc.errors import ConfigurationError
from lightning_dvc.randomness import torch_stream

_ROWS: Final = 2048  # vectors hashed together: their signs, 8 bytes each, stay in the cache
# Gathered pairs are read several times in a row. On one CPU core (1,000 queries, 1,000 points,
# 256 dimensions) chunks that stay in its cache took half the time of those of 2**22 numbers.
_PAIR_CHUNK: Final = 2**18


class RandomHyperplanes:
    """Sign codes of vectors under random hyperplanes through the origin.

    Args:
        dimension: Width ``d`` of the vectors.
        tables: Number of independent codes for each vector, at least 1.
        bits: Hyperplanes, hence bits, in each code, 1 to 62.
        seed: The same seed makes the same hyperplanes.

    Raises:
        ConfigurationError: If a number is out of range.

    Example:
        >>> planes = RandomHyperplanes(dimension=3, tables=2, bits=8, seed=0)
        >>> x = torch.tensor([[1.0, 2.0, 3.0]])
        >>> torch.equal(planes.codes(x), planes.codes(5 * x))  # the direction alone counts
        True
    """

    def __init__(self, dimension: int, tables: int, bits: int, seed: int) -> None:
        if dimension < 1 or tables < 1 or not 1 <= bits <= 62:
            raise ConfigurationError(
                "hyperplanes need dimension >= 1, tables >= 1 and 1 <= bits <= 62 (a code is one "
                f"int64), but got dimension={dimension}, tables={tables}, bits={bits}"
            )
        self.tables = tables
        self.bits = bits
        generator = torch_stream(seed, "hyperplanes")
        self._normals = torch.randn(dimension, tables * bits, generator=generator)

    def codes(self, x: Tensor) -> Tensor:
        """Hash vectors.

        Args:
            x: ``(n, d)`` vectors on any device; a zero vector gets a code of ones only.

        Returns:
            ``(n, tables)`` int64 on that device, the signs of each table packed into one number.
        """
        return torch.cat([self._codes(block) for block in torch.split(real(x), _ROWS)])

    def _codes(self, x: Tensor) -> Tensor:
        positive = (x @ self._normals.to(x)) >= 0
        bits = positive.view(len(x), self.tables, self.bits).long()
        return (bits << torch.arange(self.bits, device=x.device)).sum(2)


def near_duplicate_pairs(
    codes: Tensor, known: Tensor, bits: int, max_angle: float, most_pairs: int
) -> Tensor:
    """Find pairs of vectors that point almost the same way.

    Only pairs that share a bucket, the whole code of at least one table, are looked at, and their
    angle is read off all bits: ``pi * differing / (tables * bits)``, which for a true angle ``a``
    has the standard deviation ``sqrt(a (pi - a) / (tables * bits))``. A pair at that angle is
    looked at with probability ``1 - (1 - (1 - a / pi)^bits)^tables``.

    Where too many pairs share a bucket, buckets are told apart by half the bits of the next table's
    code as well, or by all of them, as far as both codes fit into 64 bits; then a pair at an angle
    is missed more often.

    Args:
        codes: ``(n, tables)`` codes of the vectors in question.
        known: ``(m, tables)`` codes of others, also with ``m = 0``.
        bits: Bits in a code of the hyperplanes.
        max_angle: Largest angle of a near-duplicate, radians in ``[0, pi]``.
        most_pairs: How many pairs are not too many.

    Returns:
        ``(p, 2)`` int64 positions in ``codes`` and in ``known``, each pair once, sorted.

    Raises:
        ConfigurationError: If the angle is out of range.

    Example:
        >>> codes, known = torch.tensor([[0b11, 0b01], [0b00, 0b00]]), torch.tensor([[0b11, 0b00]])
        >>> near_duplicate_pairs(codes, known, bits=2, max_angle=0.8, most_pairs=9)
        tensor([[0, 0]])
    """
    if not 0 <= max_angle <= math.pi:
        raise ConfigurationError(f"max_angle must be in [0, pi] radians, but got {max_angle}")
    # Compared as whole bits; the margin keeps an angle of exactly k bits from rounding to k - 1.
    limit = math.floor(max_angle / math.pi * codes.shape[1] * bits + 1e-9)
    for more_bits in (0, min((bits + 1) // 2, 64 - bits), min(bits, 64 - bits)):
        buckets = _Buckets(*(_lengthened(x, bits, more_bits) for x in (codes, known)))
        if buckets.pairs <= most_pairs:
            break
    words, known_words = _packed(codes, bits), _packed(known, bits)
    found = [torch.empty(0, 2, dtype=torch.int64, device=codes.device)]
    for table, position, other in buckets.mates(_PAIR_CHUNK // max(1, words.shape[1])):
        near = _ones(words[position] ^ known_words[other]).sum(1) <= limit
        table, position, other = table[near], position[near], other[near]
        # A pair counts in the first table in which it meets.
        meets = _lengthened(codes[position] ^ known[other], bits, more_bits) == 0
        first = meets.byte().argmax(1) == table
        found.append(torch.stack([position[first], other[first]], dim=1))
    pairs = torch.cat(found)
    by_place = pairs[:, 0] * max(len(known), 1) + pairs[:, 1]
    return pairs[by_place.argsort()]


class SortedCodes:
    """Codes of points, sorted in each table, where those that share their first bits come together.

    In a sorted table a bucket of any depth, the codes with the same leading bits, is a range. So a
    few places around a query's are the deepest buckets that hold as many points, however uneven the
    buckets are (the LSH forest of Bawa, Condie and Ganesan, WWW 2005).

    Args:
        codes: ``(m, tables)`` with ``m >= 1``.

    Example:
        >>> ids, new = SortedCodes(torch.tensor([[0, 6], [5, 7], [4, 1]])).around(
        ...     torch.tensor([[5, 6]]), most=2
        ... )
        >>> ids[new]
        tensor([0, 1, 2])
    """

    def __init__(self, codes: Tensor) -> None:
        # Stable, so that equal codes come in the same order on every device.
        self._sorted, self._order = codes.T.contiguous().sort(dim=1, stable=True)

    def around(self, codes: Tensor, most: int) -> tuple[Tensor, Tensor]:
        """Find the points next to queries in the order of each table.

        Args:
            codes: ``(n, tables)`` codes of the queries under the same hyperplanes.
            most: How many points to take from a table, half of them before the query's place.

        Returns:
            ``(n, w)`` positions of points, ascending, and ``(n, w)`` bool, True where a point comes
            for the first time; ``w = tables * min(most, m)``.
        """
        tables, m = self._sorted.shape
        most = min(most, m)
        place = torch.searchsorted(self._sorted, codes.T.contiguous())
        start = (place - most // 2).clamp(0, m - most)
        window = start[:, :, None] + torch.arange(most, device=codes.device)
        ids = self._order.gather(1, window.flatten(1)).view(tables, len(codes), most)
        ids = ids.transpose(0, 1).flatten(1).sort(dim=1).values
        new = torch.ones_like(ids, dtype=torch.bool)
        new[:, 1:] = ids[:, 1:] != ids[:, :-1]
        return ids, new


def real(x: Tensor) -> Tensor:
    """Float32 or wider: half precision is too coarse for signs and distances.

    Example:
        >>> real(torch.zeros(1, dtype=torch.float16)).dtype
        torch.float32
    """
    return x.to(torch.promote_types(x.dtype, torch.float32))


class _Buckets:
    """Which of ``(n, tables)`` codes equal which of ``(m, tables)`` others in which table."""

    def __init__(self, codes: Tensor, known: Tensor) -> None:
        ordered, self._order = known.T.contiguous().sort(dim=1)
        wanted = codes.T.contiguous()
        self._first = torch.searchsorted(ordered, wanted).flatten()
        self._counts = torch.searchsorted(ordered, wanted, right=True).flatten() - self._first
        self._ends = self._counts.cumsum(0)
        self._n = len(codes)

    @property
    def pairs(self) -> int:
        """How many pairs share a bucket, once for each table."""
        return int(self._ends[-1]) if len(self._ends) else 0

    def mates(self, chunk: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield table, position in the codes and position in the others of all these pairs."""
        for start in range(0, self.pairs, max(1, chunk)):
            stop = min(start + max(1, chunk), self.pairs)
            pair = torch.arange(start, stop, device=self._ends.device)
            bucket = torch.searchsorted(self._ends, pair, right=True)  # table * n + position
            place = self._first[bucket] + pair - (self._ends - self._counts)[bucket]
            table = bucket // self._n
            yield table, bucket % self._n, self._order[table, place]


def _lengthened(codes: Tensor, bits: int, more_bits: int) -> Tensor:
    """Codes ``(n, tables)``, each with the first bits of the one after it, in a circle."""
    if not more_bits:
        return codes
    return (codes << more_bits) | (codes.roll(-1, 1) >> (bits - more_bits))


def _packed(codes: Tensor, bits: int) -> Tensor:
    """Codes ``(n, tables)`` in as few words as hold their bits, ``(n, w)``."""
    each = 64 // bits
    padded = F.pad(codes, (0, -codes.shape[1] % each)).unflatten(1, (-1, each))
    # A sum of numbers without a bit in common is their union; the last may be the sign.
    shifted: Tensor = padded << bits * torch.arange(each, device=codes.device)
    return shifted.sum(2)


def _ones(words: Tensor) -> Tensor:
    """Number of ones in int64 words (Hacker's Delight, section 5-1)."""
    words = words - ((words >> 1) & 0x5555555555555555)
    words = (words & 0x3333333333333333) + ((words >> 2) & 0x3333333333333333)
    words = (words + (words >> 4)) & 0x0F0F0F0F0F0F0F0F
    return (words * 0x0101010101010101) >> 56
