"""Somebody's own datamodule, with its training set selected."""

from collections.abc import Iterable, Mapping
from numbers import Integral
from pathlib import Path
from typing import Any, Final

import numpy as np
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, Dataset
from typing_extensions import override

from lightning_dvc import trainer_bridge
from lightning_dvc.capture.guard import preserve_random_state
from lightning_dvc.datamodule import DVCDataModule, Sources, SourcesInside, checked_reference
from lightning_dvc.errors import ConfigurationError, is_number
from lightning_dvc.loaders import dataset_of, settings_of
from lightning_dvc.pools import is_map_style
from lightning_dvc.selection import Selection
from lightning_dvc.splitting import split_by

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
    """See :meth:`DVCDataModule.wrap`, which documents the arguments.

    Attributes:
        wrapped: The project's own datamodule. Its public attributes can be read here too, if this
            class has none of that name; to change one, change it there.
    """

    def __init__(
        self,
        datamodule: LightningDataModule,
        sources: SourcesInside,
        *,
        budget: int | float | None,
        selection: Selection | str | Path | None,
        reference: Dataset[Any] | None,
        seed: int,
        warmup: float,
        rounds: int,
        oversample: float,
    ) -> None:
        _check(datamodule, budget, selection)
        if isinstance(selection, str | Path):
            selection = Selection.load(selection)
        self._given_selection = selection
        if selection is not None:
            budget = max(len(selection), 1)
        assert budget is not None, "checked above"
        # LightningCLI may read a count as a float, where None is allowed too.
        if is_number(budget) and budget > 1 and float(budget).is_integer():
            budget = int(budget)
        self._start(budget, seed, warmup, rounds, oversample)
        self.wrapped = datamodule
        self._given_sources = sources
        self._given_reference = (
            None if reference is None else checked_reference(reference, "reference")
        )
        self.reference = self._given_reference
        self.prepare_data_per_node = datamodule.prepare_data_per_node
        self.allow_zero_length_dataloader_with_multiple_devices = (
            datamodule.allow_zero_length_dataloader_with_multiple_devices
        )
        trainer_bridge.share_hyperparameters(datamodule, self)
        for name in _KEPT:
            # Only what it overrides: Lightning prefers a hook of the datamodule to the model's.
            if is_overridden(name, datamodule):
                setattr(self, name, getattr(datamodule, name))

    def __getattr__(self, name: str) -> Any:
        """What the wrapped datamodule has, as for ``self.trainer.datamodule.n_classes``."""
        # Private names are Lightning's, and those of pickle and copy, before there is an attribute.
        if name.startswith("_") or "wrapped" not in vars(self):
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        return getattr(self.wrapped, name)

    @property
    def hparams(self) -> Any:
        """The hyperparameters that the wrapped datamodule saved."""
        return self.wrapped.hparams

    @property
    def hparams_initial(self) -> Any:
        """Those as they were at first, to be logged."""
        return self.wrapped.hparams_initial

    @override
    def prepare_data(self) -> None:
        """Let the wrapped datamodule prepare its data."""
        self.wrapped.trainer = self.trainer
        self.wrapped.prepare_data()

    @override
    def setup(self, stage: str) -> None:
        """Set the wrapped datamodule up; for training, build the pools and draw the warm-up."""
        self.wrapped.trainer = self.trainer
        self.wrapped.setup(stage)
        self._stage = stage
        if stage == "fit":
            self.loading, dataset = settings_of(self.wrapped.train_dataloader())
            self._open_anew(self._sources_in(dataset))
            if self._given_reference is None:
                self.reference = self._held_out(dataset)
        super().setup(stage)

    @override
    def teardown(self, stage: str) -> None:
        """Let the wrapped datamodule clean up."""
        self.wrapped.teardown(stage)

    @override
    def state_dict(self) -> dict[str, Any]:
        """The selection, and the state of the wrapped datamodule."""
        own, wrapped = super().state_dict(), self.wrapped.state_dict()
        return {**own, "wrapped": wrapped} if wrapped else own

    @override
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on with a saved selection, and let the wrapped datamodule go on with its state."""
        own = dict(state_dict)
        if "wrapped" in own:
            self.wrapped.load_state_dict(own.pop("wrapped"))
        super().load_state_dict(own)

    def _open_anew(self, sources: Sources) -> None:
        """Build the pools; in another fit, of the datasets that the wrapped one has made now."""
        before = self._pools
        if before is None:
            self._open(sources)
            if self._given_selection is not None:
                self._adopt(self._given_selection)
            return
        state = super().state_dict()
        added = {name: given for name, given in before.sources.items() if name not in sources}
        self._open({**sources, **added})
        super().load_state_dict(state)
        self._train_loader = None

    def _sources_in(self, dataset: Dataset[Any]) -> Sources:
        given: Any = self._given_sources
        if callable(given):
            given = given(dataset)
        if given is None:
            return {"train": dataset}
        if isinstance(given, Mapping) and not all(map(_are_indices, given.values())):
            return given
        return split_by(dataset, given)

    def _held_out(self, training: Dataset[Any]) -> Dataset[Any] | None:
        """The datasets behind the validation loaders, but for the training set itself."""
        validates = is_overridden("val_dataloader", self.wrapped)
        given = self.wrapped.val_dataloader() if validates else None
        if given in (None, [], (), {}):
            return None
        loaders = given if isinstance(given, CombinedLoader) else CombinedLoader(given)
        found = loaders.flattened
        datasets = [dataset_of(each) if isinstance(each, DataLoader) else each for each in found]
        held_out = [dataset for dataset in datasets if dataset is not training]
        usable = bool(held_out) and all(map(is_map_style, held_out))
        if usable and len(held_out) == 1:
            return checked_reference(held_out[0], "val")
        if usable and all(_format(dataset) == _format(training) for dataset in held_out):
            return ConcatDataset(held_out)
        rank_zero_warn(
            f"The validation data of the wrapped datamodule ({_kinds(datasets)}) is not held "
            "out, not map-style, or not all like the training samples, so candidates are "
            "compared with the selection itself. Pass clean samples, of the format of the "
            "training samples, as reference=dataset."
        )
        return None


def _check(datamodule: object, budget: object, selection: object) -> None:
    kind = type(datamodule).__name__
    if not isinstance(datamodule, LightningDataModule):
        raise ConfigurationError(
            f"expected a lightning.pytorch.LightningDataModule to wrap, but got a {kind} of "
            f"{type(datamodule).__module__}; pass an object of such a class"
        )
    if isinstance(datamodule, DVCDataModule):
        raise ConfigurationError(f"expected a datamodule that selects nothing, but got a {kind}")
    if (budget is None) == (selection is None):
        raise ConfigurationError(
            "expected either a budget, to select, or a selection, to train on it again, but got "
            f"{'neither' if budget is None else 'both'}; pass budget=... or selection=..."
        )


def _are_indices(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(isinstance(entry, Integral) for entry in value)
    return isinstance(value, range | np.ndarray | Tensor)


def _kinds(datasets: Iterable[object]) -> str:
    return ", ".join(type(dataset).__name__ for dataset in datasets)


def _format(dataset: Any) -> Any:
    """What the first sample is made of; nothing that equals it, if it cannot be read."""
    try:
        with preserve_random_state():
            return _shape(dataset[0])
    except Exception:  # whatever a user's dataset may raise
        return object()


def _shape(sample: Any) -> Any:
    """Its keys, lengths of tuples and numbers of axes: what a collate function relies on."""
    if isinstance(sample, Mapping):
        return {key: _shape(value) for key, value in sample.items()}
    if isinstance(sample, tuple):
        return tuple(_shape(value) for value in sample)
    if isinstance(sample, list):  # such as the tokens of a text, as many as it has
        return [_shape(value) for value in sample[:1]]
    if isinstance(sample, int | float | np.generic):
        return 0
    return getattr(sample, "ndim", type(sample).__name__)
