"""Which row of a preallocated storage belongs to which sample id, with the oldest rows reused.

The index stores no data. Its owner keeps tensors of ``capacity`` rows, asks here for the rows of a
batch of ids, and reads or writes them at once; nothing loops over rows in Python.
"""

from typing import Final

import torch
from torch import Tensor

from lightning_dvc.errors import ConfigurationError

BYTES_PER_ROW: Final = 24  # three int64: the id, its slot, the time of its last use
_FREE: Final = -1  # earlier than every time of use, so that free slots are taken first


def last_occurrences(ids: Tensor) -> Tensor:
    """Find where each distinct id stands last.

    Writing only these rows makes "the last of several values for one id wins" true whatever order
    an indexed assignment works in.

    Args:
        ids: ``(n,)`` int64 ids, possibly repeated.

    Returns:
        ``(u,)`` positions in increasing order, one for each distinct id.

    Example:
        >>> last_occurrences(torch.tensor([7, 3, 7, 5]))
        tensor([1, 2, 3])
    """
    distinct, inverse = torch.unique(ids, return_inverse=True)
    last = torch.zeros_like(distinct)
    last.scatter_reduce_(0, inverse, torch.arange(len(ids)), "amax", include_self=False)
    return last.sort().values


class RowIndex:
    """A map from sample ids to a fixed number of slots, least recently used first out.

    A lookup of ``n`` ids among ``k`` is a binary search, O(n log k); an insertion also moves the
    sorted ids and looks for the oldest slots, O(capacity) plain tensor work.

    An owner saves ``ids()`` with its rows in that order, and loads by ``claim``: this restores
    which id was used before which, also into an index of another capacity.

    Args:
        capacity: Number of slots, at least 0; with 0 nothing is ever held.

    Raises:
        ConfigurationError: If the capacity is negative.

    Example:
        >>> rows = RowIndex(capacity=2)
        >>> _ = rows.claim(torch.tensor([10, 11]))
        >>> _ = rows.claim(torch.tensor([10, 12]))  # 11 was used least recently
        >>> rows.ids()
        tensor([10, 12])
        >>> rows.find(torch.tensor([11]))
        tensor([-1])
    """

    def __init__(self, capacity: int) -> None:
        if capacity < 0:
            raise ConfigurationError(f"capacity must be at least 0, but got {capacity}")
        self.capacity = capacity
        self._ids = torch.empty(0, dtype=torch.int64)  # held ids, sorted
        self._slots = torch.empty(0, dtype=torch.int64)  # the slot of each
        self._used = torch.full((capacity,), _FREE, dtype=torch.int64)  # by slot
        self._clock = 0

    def __len__(self) -> int:
        return len(self._ids)

    def ids(self) -> Tensor:
        """All ids held, ``(k,)`` int64, from the least to the most recently used."""
        return self._ids[self._used[self._slots].argsort()]

    def find(self, ids: Tensor) -> Tensor:
        """Look up slots without counting it as a use.

        Args:
            ids: ``(n,)`` int64 ids, possibly repeated.

        Returns:
            ``(n,)`` int64 slots in ``[0, capacity)``, -1 where the id is not held.
        """
        if not len(self):
            return torch.full_like(ids, -1)
        place = torch.searchsorted(self._ids, ids.contiguous()).clamp_(max=len(self) - 1)
        return torch.where(self._ids[place] == ids, self._slots[place], -1)

    def claim(self, ids: Tensor) -> Tensor:
        """Give every id a slot and count it as used, later ids as used more recently.

        Ids that are held keep their slot; the others take free slots, then those of the least
        recently used ids. A row that was reassigned still holds the old owner's data.

        Args:
            ids: ``(n,)`` int64 ids; repeated ones get one slot.

        Returns:
            ``(n,)`` slots. Of more distinct ids than there are slots only the last ``capacity``
            are kept, as if the ids had come one by one, and the others get -1.
        """
        distinct = ids[last_occurrences(ids)]
        distinct = distinct[max(0, len(distinct) - self.capacity) :]
        slots = self.find(distinct)
        new = slots < 0
        self._used[slots[~new]] = self._clock  # not to be evicted by the rest of the batch
        taken = self._used.topk(int(new.sum()), largest=False).indices
        self._drop(taken)
        self._insert(distinct[new], taken)
        slots[new] = taken
        self.touch(slots)
        return self.find(ids)

    def touch(self, slots: Tensor) -> None:
        """Count slots as used, later ones more recently.

        Args:
            slots: ``(n,)`` as returned by :meth:`find`, possibly repeated; -1 is skipped.
        """
        slots = slots[slots >= 0]
        times = torch.arange(self._clock, self._clock + len(slots))
        self._used.scatter_reduce_(0, slots, times, "amax")
        self._clock += len(slots)

    def forget(self, ids: Tensor) -> None:
        """Free the slots of ``(n,)`` ids; those that are not held are skipped."""
        slots = self.find(ids)
        slots = slots[slots >= 0]
        self._used[slots] = _FREE
        self._drop(slots)

    def _drop(self, slots: Tensor) -> None:
        keep = torch.ones(self.capacity, dtype=torch.bool)
        keep[slots] = False
        kept = keep[self._slots]
        self._ids, self._slots = self._ids[kept], self._slots[kept]

    def _insert(self, ids: Tensor, slots: Tensor) -> None:
        """Merge two sorted lists, which is cheaper than to sort all ids again."""
        ids, order = ids.sort()
        place = torch.searchsorted(self._ids, ids) + torch.arange(len(ids))
        old = torch.ones(len(self) + len(ids), dtype=torch.bool)
        old[place] = False
        merged_ids = torch.empty(len(old), dtype=torch.int64)
        merged_slots = torch.empty(len(old), dtype=torch.int64)
        merged_ids[place], merged_ids[old] = ids, self._ids
        merged_slots[place], merged_slots[old] = slots[order], self._slots
        self._ids, self._slots = merged_ids, merged_slots
