"""Several processes working on one round; with one process, the same code with nothing to do.

Every rank draws the same candidates, because draws depend only on the seed, scores its own shard
of them, and gathers the rows; each then decides by itself from the same numbers.

Before every exchange each process tells the others how many rows it has, or that it has failed:
then none waits for it in vain.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final, TypeVar

import torch
from torch import Tensor, nn

from lightning_dvc.errors import ProcessError

_T = TypeVar("_T")
_FAILED: Final = -1


class Group:
    """The processes of a run.

    Args:
        rank: This process.
        world_size: Number of processes.
        device: Where collectives of no tensor run; the CPU when not given.

    Example:
        >>> Group().shard(torch.arange(3)).tolist()
        [0, 1, 2]
        >>> Group(rank=1, world_size=2).shard(torch.arange(5), batch_size=2).tolist()
        [2, 3, 4]
    """

    def __init__(
        self, rank: int = 0, world_size: int = 1, device: torch.device | None = None
    ) -> None:
        self.rank = rank
        self.world_size = world_size
        self.device = device or torch.device("cpu")

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

        Raises:
            ProcessError: If another process has failed; so do all methods that exchange something.
        """
        if self.world_size == 1:
            return rows
        sent = rows.to(device or rows.device).contiguous()
        counts = self._announce(len(rows), sent.device)
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
        self._announce(0, value.device)
        total = value.clone()
        torch.distributed.all_reduce(total)
        return total

    def first(self, rows: Tensor, device: torch.device | None = None) -> Tensor:
        """The first rank's rows, on every rank.

        Args:
            rows: ``(n_r, ...)``; ``n_r`` may differ between ranks, the rest may not.
            device: Where collectives run; the rows' own device when not given.
        """
        if self.world_size == 1:
            return rows
        sent = rows.to(device or rows.device)
        n = self._announce(len(rows), sent.device)[0]
        received = (
            sent.contiguous().clone() if self.rank == 0 else sent.new_empty(n, *sent.shape[1:])
        )
        torch.distributed.broadcast(received, src=0)
        return received.to(rows.device)

    def gather_objects(self, items: list[_T]) -> list[_T]:
        """Concatenate every rank's short list of plain objects in rank order."""
        if self.world_size == 1:
            return items
        self._announce(0, self.device)
        return [item for part in self._gather_object(items) for item in part]

    @torch.no_grad()
    def share_buffers(self, module: nn.Module) -> None:
        """Give a module the first process's buffers, as DDP does before each forward pass.

        After the last one of an epoch each process has running means of its own, and only those of
        the first are saved. Buffers whose shapes differ, such as tables that grow when they have
        to, stay as they are.
        """
        if self.world_size == 1:
            return
        buffers = dict(module.named_buffers())
        shapes = [{name: (buffer.shape, buffer.dtype) for name, buffer in buffers.items()}]
        first, *others = self.gather_objects(shapes)
        for name, shape in first.items():
            if all(other.get(name) == shape for other in others):
                received = buffers[name].to(self.device).contiguous().clone()
                torch.distributed.broadcast(received, src=0)
                received = received.to(buffers[name].device)
                if not torch.equal(received, buffers[name]):  # some kinds cannot be written to
                    buffers[name].copy_(received)

    @contextmanager
    def agreeing(self) -> Iterator[None]:
        """What fails on one process inside the block fails on all of them.

        Raises:
            ProcessError: Where another process has failed, naming it and what it said. The one that
                failed raises its own error.

        Example:
            >>> with Group().agreeing():
            ...     Group().sum(torch.tensor(1))
            tensor(1)
        """
        try:
            yield
        except ProcessError:  # which all know of
            raise
        except Exception as error:
            if self.world_size > 1:
                self._announce(_FAILED, self.device, f"{type(error).__name__}: {error}")
            raise
        if self.world_size > 1:
            self._announce(0, self.device)

    def _announce(self, own: int, device: torch.device, failure: str | None = None) -> list[int]:
        """Tell all a number of rows, or that this process has failed; theirs in rank order."""
        told = torch.tensor([own], dtype=torch.int64, device=device)
        received = [torch.zeros_like(told) for _ in range(self.world_size)]
        torch.distributed.all_gather(received, told)
        counts = [int(count) for count in received]
        if _FAILED in counts:
            failures = self._gather_object(failure)
            if failure is None:
                named = [f"{rank} ({text})" for rank, text in enumerate(failures) if text]
                raise ProcessError(
                    f"selection stops, because it failed on process {', '.join(named)}; see there"
                )
        return counts

    def _gather_object(self, item: _T) -> list[_T]:
        received: list[_T] = [item] * self.world_size
        torch.distributed.all_gather_object(received, item)
        return received
