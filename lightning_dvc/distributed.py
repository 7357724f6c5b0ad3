"""Several processes working on one round; with one process, the same code with nothing to do.

Every rank draws the same candidates, because draws depend only on the seed, scores its own shard
of them, and gathers the rows; each then decides by itself from the same numbers.
"""

from typing import TypeVar

import torch
from torch import Tensor

_T = TypeVar("_T")


class Group:
    """The processes of a run.

    Args:
        rank: This process.
        world_size: Number of processes.

    Example:
        >>> Group().shard(torch.arange(3)).tolist()
        [0, 1, 2]
        >>> Group(rank=1, world_size=2).shard(torch.arange(5), batch_size=2).tolist()
        [2, 3, 4]
    """

    def __init__(self, rank: int = 0, world_size: int = 1) -> None:
        self.rank = rank
        self.world_size = world_size

    def shard(self, ids: Tensor, batch_size: int = 1) -> Tensor:
        """This rank's contiguous part of ``(n,)`` ids.

        Parts are made of whole batches, so that a sample meets the same batch mates, and so the
        same rounding, whatever the number of processes.
        """
        batches = -(-len(ids) // batch_size)
        first, last = (batches * rank // self.world_size for rank in (self.rank, self.rank + 1))
        return ids[first * batch_size : last * batch_size]

    def gather(self, rows: Tensor, device: torch.device | None = None) -> Tensor:
        """Concatenate every rank's rows in rank order.

        Args:
            rows: ``(n_r, ...)``; ``n_r`` may differ between ranks, the rest may not.
            device: Where collectives run; the rows' own device when not given.

        Returns:
            ``(sum of n_r, ...)`` on the rows' device, the same on every rank.
        """
        if self.world_size == 1:
            return rows
        sent = rows.to(device or rows.device).contiguous()
        counts = self._counts(len(rows), sent.device)
        padded = sent.new_zeros((max(counts), *sent.shape[1:]))
        padded[: len(sent)] = sent
        received = [torch.empty_like(padded) for _ in range(self.world_size)]
        torch.distributed.all_gather(received, padded)
        parts = [part[:count] for part, count in zip(received, counts, strict=True)]
        return torch.cat(parts).to(rows.device)

    def sum(self, value: Tensor) -> Tensor:
        """Add a tensor of the same shape on every rank up."""
        if self.world_size == 1:
            return value
        total = value.clone()
        torch.distributed.all_reduce(total)
        return total

    def first(self, value: Tensor, device: torch.device | None = None) -> Tensor:
        """The first rank's tensor, on every rank.

        Args:
            value: Of the same shape and type on every rank.
            device: Where collectives run; the tensor's own device when not given.
        """
        if self.world_size == 1:
            return value
        sent = value.to(device or value.device).contiguous().clone()
        torch.distributed.broadcast(sent, src=0)
        return sent.to(value.device)

    def gather_objects(self, items: list[_T]) -> list[_T]:
        """Concatenate every rank's short list of plain objects in rank order."""
        if self.world_size == 1:
            return items
        received: list[list[_T]] = [[] for _ in range(self.world_size)]
        torch.distributed.all_gather_object(received, items)
        return [item for part in received for item in part]

    def _counts(self, own: int, device: torch.device) -> list[int]:
        counts = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(self.world_size)]
        torch.distributed.all_gather(counts, torch.tensor([own], dtype=torch.int64, device=device))
        return [int(count) for count in counts]
