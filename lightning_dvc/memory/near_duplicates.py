"""Which samples nearly repeat one that is selected already, by their hash codes (algorithm 3)."""

from collections.abc import Mapping
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from lightning_dvc.distinct import distinct_rows
from lightning_dvc.memory.lsh import RandomHyperplanes, near_duplicate_pairs

# A pair at 0.05 radians meets in a bucket with probability 1 - 1e-10, one at 1 radian with 3%.
N_TABLES: Final = 16
_BITS: Final = 16
# More pairs in buckets take more than some seconds. With half as many bits again a pair at 0.05
# radians meets with probability 1 - 2e-6, and one at 0.1 with 0.9995; with twice as many, with
# 1 - 6e-5 and 0.993.
_MOST_PAIRS: Final = 2**26


class Repeats(NamedTuple):
    """Which samples nearly repeat each other.

    Of a thousand copies of one sample, there are a thousand numbers here, and no pair.

    Attributes:
        look: ``(n,)`` int64; samples with the same number look the same.
        pairs: ``(p, 2)`` numbers of looks that nearly repeat each other, each pair once.
    """

    look: Tensor
    pairs: Tensor

    def any(self) -> Tensor:
        """``(n,)`` bool, which samples nearly repeat another."""
        repeats = torch.bincount(self.look) > 1
        repeats[self.pairs.flatten()] = True
        return repeats[self.look]


class NearDuplicates:
    """Codes of the selected samples, to compare candidates with.

    Vectors are hashed as seen from a fixed centre, the mean of the first batch.

    Args:
        max_angle: Largest angle of a near-duplicate, radians in ``[0, pi]``.
        seed: Seed of the hyperplanes.

    Example:
        >>> near = NearDuplicates(max_angle=0.1, seed=0)
        >>> x = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
        >>> near.add(torch.arange(3), near.codes(x)[:3])
        >>> near.known(near.codes(x)).tolist()
        [True, True, True, False, False]
    """

    def __init__(self, max_angle: float, seed: int) -> None:
        self._max_angle = max_angle
        self._seed = seed
        self._centre: Tensor | None = None
        self._planes: RandomHyperplanes | None = None
        self._ids = torch.empty(0, dtype=torch.int64)
        self._codes = torch.empty(0, N_TABLES, dtype=torch.int64)

    def __len__(self) -> int:
        """Number of samples held."""
        return len(self._ids)

    @property
    def ids(self) -> Tensor:
        """``(n,)`` int64 ids held."""
        return self._ids

    def codes(self, vectors: Tensor) -> Tensor:
        """Hash ``(n, d)`` vectors, ``(n, 16)`` int64 on the CPU."""
        if self._centre is None:
            self._centre = vectors.mean(0)
        if self._planes is None:
            self._planes = RandomHyperplanes(vectors.shape[1], N_TABLES, _BITS, self._seed)
        return self._planes.codes(vectors - self._centre.to(vectors)).cpu()

    def holds(self, ids: Tensor) -> Tensor:
        """Tell which of ``(n,)`` ids are held, ``(n,)`` bool."""
        return torch.isin(ids, self._ids)

    def add(self, ids: Tensor, codes: Tensor) -> None:
        """Hold the codes of ``(n,)`` distinct ids; ids held already keep theirs."""
        new = ~self.holds(ids)
        self._ids = torch.cat([self._ids, ids[new]])
        self._codes = torch.cat([self._codes, codes[new]])

    def forget(self, ids: Tensor) -> None:
        """Drop ``(n,)`` ids; those that are not held are skipped."""
        keep = ~torch.isin(self._ids, ids)
        self._ids, self._codes = self._ids[keep], self._codes[keep]

    def known(self, codes: Tensor) -> Tensor:
        """Tell which of ``(n, 16)`` codes nearly repeat one that is held, ``(n,)`` bool."""
        (first, number), (held, _) = distinct_rows(codes), distinct_rows(self._codes)
        found = torch.zeros(len(first), dtype=torch.bool)
        found[self._pairs(codes[first], self._codes[held])[:, 0]] = True
        return found[number]

    def among(self, codes: Tensor) -> Repeats:
        """Tell which of ``(n, 16)`` codes nearly repeat each other."""
        first, number = distinct_rows(codes)
        pairs = self._pairs(codes[first], codes[first])
        return Repeats(number, pairs[pairs[:, 0] < pairs[:, 1]])

    def state_dict(self) -> dict[str, Any]:
        """The ids and codes held, and the centre."""
        return {"ids": self._ids, "codes": self._codes, "centre": self._centre}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state."""
        self._ids, self._codes, self._centre = state["ids"], state["codes"], state["centre"]

    def _pairs(self, codes: Tensor, known: Tensor) -> Tensor:
        return near_duplicate_pairs(codes, known, _BITS, self._max_angle, _MOST_PAIRS)
