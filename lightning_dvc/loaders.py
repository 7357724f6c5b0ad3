"""How batches are made: the settings of a loader, given or taken from somebody's own loader."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    Sampler,
    WeightedRandomSampler,
    default_collate,
)

from lightning_dvc.errors import ConfigurationError


@dataclass(frozen=True)
class LoaderSettings:
    """Settings of a :class:`torch.utils.data.DataLoader`, under the same names.

    Raises:
        ConfigurationError: If the batch size is below 1 or the number of workers below 0.

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
        if self.batch_size < 1 or self.num_workers < 0:
            raise ConfigurationError(
                "a loader needs batch_size >= 1 and num_workers >= 0, but got "
                f"batch_size={self.batch_size} and num_workers={self.num_workers}; change them"
            )

    def loader(
        self,
        dataset: Dataset[Any],
        sampler: Sampler[int] | None = None,
        generator: torch.Generator | None = None,
    ) -> DataLoader[Any]:
        """Make a loader; without a sampler it goes through the dataset in order."""
        return DataLoader(dataset, sampler=sampler, generator=generator, **vars(self))


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
            f"returned a {kind}; wrap a datamodule with a single training loader"
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
    if isinstance(loader.sampler, WeightedRandomSampler):
        rank_zero_warn(
            "The wrapped training loader draws with a WeightedRandomSampler. Selection replaces "
            "the sampler, so its weights no longer count."
        )
    names = LoaderSettings.__dataclass_fields__
    settings = {name: getattr(loader, name) for name in names}
    if not loader.num_workers:
        settings["prefetch_factor"] = None
    return LoaderSettings(**settings), loader.dataset
