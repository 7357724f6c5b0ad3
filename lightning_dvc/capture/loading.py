"""Samples by id into batches, where a sample that cannot be read does not take its batch along."""

import copy
from collections import UserDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map
from torch.utils.data import DataLoader, Dataset

from lightning_dvc.records import BadSample

Collate = Callable[[list[Any]], Any]
Entry = tuple[int, Any, str | None]


@dataclass(frozen=True)
class LoadedBatch:
    """A batch as the user's collate function made it.

    Single samples are not sent along: of a worker's each tensor would keep a file open here.

    Attributes:
        again: Reads some of its samples again: of ids, and of the size of a batch.
        ids: ``(n,)`` ids of the samples in it.
        batch: What collate made of them; None when no sample could be read.
        bad: Samples that could not be read.
    """

    again: Callable[[Tensor, int], Iterator["LoadedBatch"]]
    ids: Tensor
    batch: Any
    bad: list[BadSample]


def copied(batch: Any) -> Any:
    """A batch that may be changed without changing the given one.

    Args:
        batch: What the user's collate function made. Its containers, tensors and arrays are copied;
            of anything else that torch knows nothing of, the object is the same.

    Example:
        >>> batch = {"x": torch.zeros(2), "y": [torch.ones(2)]}
        >>> twin = copied(batch)
        >>> twin.pop("y")[0].zero_()
        tensor([0., 0.])
        >>> batch["y"]
        [tensor([1., 1.])]
    """
    return tree_map(_copied_leaf, batch)


def _copied_leaf(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, UserDict):  # as tokenizers return
        twin = copy.copy(value)
        twin.data = copied(value.data)
        return twin
    return value.copy() if isinstance(value, np.ndarray) else value


_Key = tuple[int, int]
"""Which dataset, and which of its samples."""


class _Tolerant(Dataset[Any]):
    """Returns ``(id, sample, None)``, or ``(id, None, reason)`` for a sample that raises."""

    def __init__(self, datasets: Sequence[Dataset[Any]]) -> None:
        self._datasets = datasets

    def __getitems__(self, keys: list[_Key]) -> list[Entry]:
        """Read a batch of one dataset at once where that can; one by one where it fails."""
        read = getattr(self._datasets[keys[0][0]], "__getitems__", None)
        if callable(read):
            ids = [sample_id for _, sample_id in keys]
            try:
                return [(i, x, None) for i, x in zip(ids, read(ids), strict=True)]
            except Exception:  # whatever a user's dataset may raise; one by one it is told apart
                pass
        return [self[key] for key in keys]

    def __getitem__(self, key: _Key) -> Entry:
        number, sample_id = key
        try:
            return sample_id, self._datasets[number][sample_id], None
        except Exception as error:  # whatever a user's dataset may raise
            return sample_id, None, f"reading it raised {type(error).__name__}: {error}"


class TolerantCollate:
    """Collates what could be read; a class, so that worker processes can be spawned.

    Args:
        collate: The user's collate function.
    """

    def __init__(self, collate: Collate) -> None:
        self._collate = collate

    def __call__(self, entries: list[Entry]) -> tuple[Tensor, Any, list[BadSample]]:
        """Ids, a batch and the bad ones, of ``(id, sample, why there is none)``."""
        bad = [BadSample(i, reason) for i, _, reason in entries if reason is not None]
        good = [(i, sample) for i, sample, reason in entries if reason is None]
        try:
            batch = self._batch(good)
        except Exception:  # some sample may not fit into any batch
            good, unfit = self._fitting(good, mates=[])
            bad += unfit
            try:
                batch = self._batch(good)
            except Exception:  # or not into one with the others
                good, unfit = self._largest_fitting(good)
                bad += unfit
                batch = self._batch(good)
        ids = torch.tensor([i for i, _ in good], dtype=torch.int64)
        return ids, batch, bad

    def _batch(self, good: list[tuple[int, Any]]) -> Any:
        return self._collate([sample for _, sample in good]) if good else None

    def _fitting(
        self, good: list[tuple[int, Any]], mates: list[Any]
    ) -> tuple[list[tuple[int, Any]], list[BadSample]]:
        """Tell apart which samples make a batch with the given mates, and which do not."""
        kept, unfit = [], []
        for sample_id, sample in good:
            try:
                self._collate([*mates, sample])
                kept.append((sample_id, sample))
            except Exception as error:  # whatever a user's collate may raise
                reason = f"collating it raised {type(error).__name__}: {error}"
                unfit.append(BadSample(sample_id, reason))
        return kept, unfit

    def _largest_fitting(
        self, good: list[tuple[int, Any]]
    ) -> tuple[list[tuple[int, Any]], list[BadSample]]:
        """The samples that go along with the one that most go along with."""
        best = self._fitting(good, mates=[good[0][1]])
        for number, (_, first) in enumerate(good[1:], start=1):
            if len(best[0]) >= len(good) - number:
                break  # the rest are too few to go along with more
            found = self._fitting(good, mates=[first])
            best = max(best, found, key=lambda pair: len(pair[0]))
        return best


class _Batches:
    """Which batches a loader reads next."""

    keys: list[_Key]
    batch_size: int

    def __iter__(self) -> Iterator[list[_Key]]:
        for start in range(0, len(self.keys), self.batch_size):
            yield self.keys[start : start + self.batch_size]


class Reader:
    """Reads samples by id, in the given order.

    Args:
        collate: The user's collate function.
        num_workers: Worker processes; 0 reads in this one.
        worker_settings: Further arguments of ``DataLoader`` that concern worker processes; not used
            without them.
    """

    def __init__(self, collate: Collate, num_workers: int = 0, **worker_settings: Any) -> None:
        self._collate = TolerantCollate(collate)
        self._num_workers = num_workers
        self._settings = {**worker_settings, "persistent_workers": True} if num_workers else {}
        self._often: tuple[Dataset[Any], ...] = ()
        self._idle: list[tuple[DataLoader[Any], _Batches]] = []

    @contextmanager
    def often(self, *datasets: Dataset[Any] | None) -> Iterator[None]:
        """Let the same worker processes serve all passes over these datasets inside the block.

        To start some takes a tenth of a second, and seconds where they are not forked.
        """
        self._often = tuple(dataset for dataset in datasets if dataset is not None)
        try:
            yield
        finally:
            self._often, self._idle = (), []

    def batches(self, dataset: Dataset[Any], ids: Tensor, batch_size: int) -> Iterator[LoadedBatch]:
        """Go through samples of a dataset once.

        Args:
            dataset: Map-style dataset indexed by the ids.
            ids: ``(n,)`` what to read.
            batch_size: Samples in a batch.

        Yields:
            Batches in order.
        """
        if not len(ids):  # which is no reason to start workers
            return
        is_often = any(dataset is other for other in self._often)
        datasets = self._often if is_often else (dataset,)
        # Taken, so that a pass within this one has workers of its own.
        loader, batches = self._idle.pop() if is_often and self._idle else self._loader(datasets)
        number = next(n for n, other in enumerate(datasets) if other is dataset)
        batches.keys = [(number, sample_id) for sample_id in ids.tolist()]
        batches.batch_size = batch_size
        for loaded in loader:
            yield LoadedBatch(partial(self.batches, dataset), *loaded)
        if datasets is self._often:
            self._idle.append((loader, batches))

    def _loader(self, datasets: Sequence[Dataset[Any]]) -> tuple[DataLoader[Any], _Batches]:
        batches = _Batches()
        loader = DataLoader(
            _Tolerant(datasets),
            batch_sampler=batches,
            num_workers=self._num_workers,
            collate_fn=self._collate,
            # A loader without its own generator draws a seed from the global one.
            generator=torch.Generator().manual_seed(torch.initial_seed()),
            **self._settings,
        )
        return loader, batches
