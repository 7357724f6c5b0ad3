"""Somebody's own datamodule, with its training set selected."""

from collections.abc import Mapping
from typing import Any, Final

import numpy as np
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset
from typing_extensions import override

from lightning_dvc.datamodule import DVCDataModule, Sources, checked_reference
from lightning_dvc.loaders import settings_of
from lightning_dvc.splitting import Groups, split_by

_KEPT: Final = (
    "val_dataloader",
    "test_dataloader",
    "predict_dataloader",
    "on_before_batch_transfer",
    "transfer_batch_to_device",
    "on_after_batch_transfer",
    "on_exception",
)


class WrappingDataModule(DVCDataModule):
    """See :meth:`DVCDataModule.wrap`, which documents the arguments."""

    def __init__(
        self,
        datamodule: LightningDataModule,
        sources: Sources | Groups | None,
        *,
        budget: int | float,
        reference: Dataset[Any] | None,
        seed: int,
        warmup: float,
        rounds: int,
        oversample: float,
    ) -> None:
        self._start(budget, seed, warmup, rounds, oversample)
        self.wrapped = datamodule
        self._given_sources = sources
        self.reference = None if reference is None else checked_reference(reference)
        self.prepare_data_per_node = datamodule.prepare_data_per_node
        self.allow_zero_length_dataloader_with_multiple_devices = (
            datamodule.allow_zero_length_dataloader_with_multiple_devices
        )
        for name in _KEPT:
            # Only what it overrides: Lightning prefers a hook of the datamodule to the model's.
            if is_overridden(name, datamodule):
                setattr(self, name, getattr(datamodule, name))

    @override
    def prepare_data(self) -> None:
        """Let the wrapped datamodule prepare its data."""
        self.wrapped.prepare_data()

    @override
    def setup(self, stage: str) -> None:
        """Set the wrapped datamodule up; for training, build the pools and draw the warm-up."""
        self.wrapped.trainer = self.trainer
        self.wrapped.setup(stage)
        if stage == "fit" and self._pools is None:
            self.loading, dataset = settings_of(self.wrapped.train_dataloader())
            self._open(self._sources_in(dataset))
            if self.reference is None:
                self.reference = self._validation_dataset()
        super().setup(stage)

    @override
    def teardown(self, stage: str) -> None:
        """Let the wrapped datamodule clean up."""
        self.wrapped.teardown(stage)

    def _sources_in(self, dataset: Dataset[Any]) -> Sources:
        given: Any = self._given_sources
        if given is None:
            return {"train": dataset}
        if isinstance(given, Mapping) and not all(map(_are_indices, given.values())):
            return given
        return split_by(dataset, given)

    def _validation_dataset(self) -> Dataset[Any] | None:
        """The dataset behind the validation loader, or None if there is no single map-style one."""
        if not is_overridden("val_dataloader", self.wrapped):
            return None
        loader = self.wrapped.val_dataloader()
        if isinstance(loader, list | tuple) and len(loader) == 1:
            loader = loader[0]
        if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
            return None
        return checked_reference(loader.dataset)


def _are_indices(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(isinstance(entry, int) for entry in value)
    return isinstance(value, range | np.ndarray | Tensor)
