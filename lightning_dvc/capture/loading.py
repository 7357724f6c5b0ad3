"""Samples by id into batches, where a sample that cannot be read does not take its batch along."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_dvc.records import BadSample

Collate = Callable[[list[Any]], Any]
_Entry = tuple[int, Any, str | None]


@dataclass(frozen=True)
class LoadedBatch:
    """A batch as the user's collate function made it.

    Attributes:
        ids: ``(n,)`` ids of the samples in it.
        samples: The ``n`` samples as the dataset returned them, to split the batch if need be.
        batch: What collate made of them; None when no sample could be read.
        bad: Samples that could not be read.
    """

    ids: Tensor
    samples: list[Any]
    batch: Any
    bad: list[BadSample]


class _Tolerant(Dataset[Any]):
    """Returns ``(id, sample, None)``, or ``(id, None, reason)`` for a sample that raises."""

    def __init__(self, dataset: Dataset[Any]) -> None:
        self._dataset = dataset

    def __getitems__(self, sample_ids: list[int]) -> list[_Entry]:
        """Read a batch at once where the dataset can; one by one where that fails."""
        read = getattr(self._dataset, "__getitems__", None)
        if callable(read):
            try:
                return [(i, x, None) for i, x in zip(sample_ids, read(sample_ids), strict=True)]
            except Exception:  # whatever a user's dataset may raise; one by one it is told apart
                pass
        return [self[sample_id] for sample_id in sample_ids]

    def __getitem__(self, sample_id: int) -> _Entry:
        try:
            return sample_id, self._dataset[sample_id], None
        except Exception as error:  # whatever a user's dataset may raise
            return sample_id, None, f"reading it raised {type(error).__name__}: {error}"


class _TolerantCollate:
    """Collates what could be read; a class, so that worker processes can be spawned."""

    def __init__(self, collate: Collate) -> None:
        self._collate = collate

    def __call__(self, entries: list[_Entry]) -> LoadedBatch:
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
        return LoadedBatch(ids, [sample for _, sample in good], batch, bad)

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


def load_batches(
    dataset: Dataset[Any],
    ids: Tensor,
    collate: Collate,
    batch_size: int,
    num_workers: int,
    **worker_settings: Any,
) -> Iterator[LoadedBatch]:
    """Read samples in the given order.

    Args:
        dataset: Map-style dataset indexed by the ids.
        ids: ``(n,)`` what to read.
        collate: The user's collate function.
        batch_size: Samples in a batch.
        num_workers: Worker processes; 0 reads in this one.
        worker_settings: Further arguments of ``DataLoader`` that concern worker processes; not used
            without them.

    Yields:
        Batches in order.
    """
    if not len(ids):  # which is no reason to start workers
        return
    loader = DataLoader(
        _Tolerant(dataset),
        sampler=ids.tolist(),
        batch_size=batch_size,
        num_workers=num_workers,
        collate_fn=_TolerantCollate(collate),
        # A loader without its own generator draws a seed from the global one.
        generator=torch.Generator(),
        **(worker_settings if num_workers else {}),
    )
    yield from loader
