"""How batches are made: the settings of a loader, given or taken from somebody's own loader."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    default_collate,
    get_worker_info,
)

from lightning_dvc.errors import ConfigurationError, is_whole
from lightning_dvc.sampler import SelectionSampler

_PLAIN_SAMPLERS: Final = (
    SequentialSampler,
    RandomSampler,
    SubsetRandomSampler,
    DistributedSampler,
    Sequence,
)
"""What a training loader may draw with, and selection replace, without anything being lost."""


class TrainingLoader(DataLoader[Any]):
    """Goes over what is selected, and on from where a killed run was saved.

    Its state tells Lightning that it can, and is empty: the sampler asks the trainer where that is.
    """

    def __iter__(self) -> Any:
        """Go over an epoch; workers that are started for it get seeds by its number."""
        if isinstance(self.sampler, SelectionSampler) and self.generator is not None:
            self.generator.manual_seed(self.sampler.seed_of_pass())
        return super().__iter__()

    def state_dict(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to load."""


@dataclass(frozen=True)
class LoaderSettings:
    """Settings of a :class:`torch.utils.data.DataLoader`, under the same names.

    Raises:
        ConfigurationError: If the batch size is no whole number of at least 1, or the number of
            workers none of at least 0.

    Example:
        >>> LoaderSettings(batch_size=2).loader([1, 2, 3]).batch_size
        2
    """

    batch_size: int = 32
    num_workers: int = 0
    collate_fn: Callable[[list[Any]], Any] = default_collate
    pin_memory: bool = False
    drop_last: bool = False
    timeout: float = 0
    worker_init_fn: Callable[[int], None] | None = None
    multiprocessing_context: Any = None
    prefetch_factor: int | None = None
    persistent_workers: bool = False

    def __post_init__(self) -> None:
        if not (is_whole(self.batch_size, least=1) and is_whole(self.num_workers, least=0)):
            raise ConfigurationError(
                "a loader needs whole numbers batch_size >= 1 and num_workers >= 0, but got "
                f"batch_size={self.batch_size!r} and num_workers={self.num_workers!r}; change them"
            )
        for name in ("batch_size", "num_workers"):  # torch refuses those of numpy
            object.__setattr__(self, name, int(getattr(self, name)))

    def of_workers(self, batch_size: int) -> dict[str, Any]:
        """What other loaders need to have workers that are set up like those of this one.

        Args:
            batch_size: Samples in a batch of those, for which a worker may take that much longer.
                How many batches it reads ahead is left to torch, as these take that much more
                memory.
        """
        longer = max(batch_size / self.batch_size, 1.0)
        return {
            "timeout": self.timeout * longer,
            "worker_init_fn": self.worker_init_fn,
            "multiprocessing_context": self.multiprocessing_context,
        }

    def loader(self, dataset: Dataset[Any]) -> DataLoader[Any]:
        """Make a loader that goes through a dataset in order."""
        return DataLoader(dataset, **vars(self))

    def training_loader(self, dataset: Dataset[Any], sampler: SelectionSampler) -> TrainingLoader:
        """Make a loader that goes over what is selected."""
        # A generator of its own, so that iterating draws nothing from the global one.
        return TrainingLoader(dataset, sampler=sampler, generator=torch.Generator(), **vars(self))


class WorkerInit:
    """Somebody's ``worker_init_fn``, called as in their own loader.

    ``torch.utils.data.get_worker_info().dataset`` is where such a function finds what it is to open
    a file for, so that is made their dataset again, rather than the view over all sources. In a
    worker that was spawned it is the copy that the view reads from, as both are sent together.

    Args:
        function: Theirs.
        dataset: That of their loader.
    """

    def __init__(self, function: Callable[[int], None], dataset: Dataset[Any]) -> None:
        self.function, self.dataset = function, dataset

    def __call__(self, worker: int) -> None:
        """Set up a worker."""
        # Its own way of setting is closed, in each version of torch by other means.
        object.__setattr__(get_worker_info(), "dataset", self.dataset)
        self.function(worker)


def settings_of(loader: Any) -> tuple[LoaderSettings, Dataset[Any]]:
    """Take the settings and the dataset out of the training loader of an existing project.

    Args:
        loader: What its ``train_dataloader()`` returned.

    Returns:
        The settings, and its map-style dataset.

    Raises:
        ConfigurationError: If it is no plain loader of a map-style dataset with a batch size.
    """
    kind = type(loader).__name__
    if not isinstance(loader, DataLoader):
        raise ConfigurationError(
            f"expected train_dataloader() of the wrapped datamodule to return a DataLoader, but it "
            f"returned a {kind}; return one loader over a torch.utils.data.ConcatDataset, or give "
            "the datasets to DVCDataModule(sources={'name': dataset, ...})"
        )
    if isinstance(loader.dataset, IterableDataset):
        raise ConfigurationError(
            f"expected a map-style training dataset, but {type(loader.dataset).__name__} is "
            "iterable-only; samples are drawn by index, so load it into a list or an indexed file"
        )
    if loader.batch_size is None or type(loader.batch_sampler) is not BatchSampler:
        raise ConfigurationError(
            "the wrapped training loader makes its batches with a batch_sampler of its own "
            f"({type(loader.batch_sampler).__name__}), which selection would replace; give the "
            "loader a batch_size instead"
        )
    if not isinstance(loader.sampler, _PLAIN_SAMPLERS):
        rank_zero_warn(
            f"The wrapped training loader draws with a {type(loader.sampler).__name__}. Selection "
            "replaces the sampler, so what it prefers or leaves out no longer counts."
        )
    if type(loader).__iter__ is not DataLoader.__iter__:
        rank_zero_warn(
            f"The wrapped training loader is a {kind}, which goes over its batches in a way of its "
            "own. Selection makes a DataLoader of its settings, so what it does to batches no "
            "longer counts; do that in the collate function, or in a transfer hook."
        )
    names = LoaderSettings.__dataclass_fields__
    settings = {name: getattr(loader, name) for name in names}
    if not loader.num_workers:
        settings["prefetch_factor"] = None
    if loader.worker_init_fn is not None:
        settings["worker_init_fn"] = WorkerInit(loader.worker_init_fn, loader.dataset)
    return LoaderSettings(**settings), dataset_of(loader)


def dataset_of(loader: DataLoader[Any]) -> Dataset[Any]:
    """Take the dataset out of a loader.

    Returns:
        The part of it that the loader goes through, where its sampler is a list of indices or a
        :class:`~torch.utils.data.SubsetRandomSampler`; otherwise the whole.

    Example:
        >>> len(dataset_of(DataLoader(range(9), sampler=SubsetRandomSampler([3, 1]))))
        2
    """
    sampler: Any = loader.sampler
    indices = sampler.indices if isinstance(sampler, SubsetRandomSampler) else sampler
    if not isinstance(sampler, SubsetRandomSampler | Sequence):
        return loader.dataset
    return Subset(loader.dataset, list(dict.fromkeys(int(index) for index in indices)))
