"""Pools turned into loaders: the owner of the pools, of the selection and of the sampler."""

import math
from collections.abc import Callable, Iterable, Mapping, Sized
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from lightning.pytorch import LightningDataModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader, default_collate
from typing_extensions import override

from lightning_dvc import trainer_bridge
from lightning_dvc.errors import ConfigurationError, StateError, check_settings, is_number, is_whole
from lightning_dvc.loaders import LoaderSettings
from lightning_dvc.policy.budget import resolve_budget, warm_up_counts
from lightning_dvc.policy.plan import Plan, planned_steps
from lightning_dvc.pools import (
    SELECTED,
    SET_ASIDE,
    TAKEN_BACK,
    AnyDataset,
    Pools,
    Source,
    check_map_style,
    check_single,
)
from lightning_dvc.records import BadSample, Choice
from lightning_dvc.sampler import SelectionSampler
from lightning_dvc.selection import Selection, SelectionRecord
from lightning_dvc.splitting import Groups

Sources = Mapping[str, Source | AnyDataset]
# First of all a function, so that LightningCLI does not take the path of one for a column.
SourcesInside = Callable[[Any], Any] | Sources | Groups | None
"""How the sources of a wrapped datamodule are told; a function returns one of the others."""


class DVCDataModule(LightningDataModule):
    """Serves a training set that is selected, while a model trains, from several sources.

    Give it to ``Trainer.fit`` together with a :class:`~lightning_dvc.DVCCallback`, which does the
    selecting. Training starts on a small warm-up, drawn equally from all sources.

    Args:
        sources: Name to map-style dataset, or to a :class:`~lightning_dvc.Source`, which can bound
            its share of the selection. Samples must be alike, whichever source they come from.
        val: Held-out samples: the validation loader, and what candidates are compared with, so keep
            them clean. Without any, the selection itself is the reference.
        reference: What candidates are compared with in place of ``val``: with random augmentation,
            the same samples as the transforms of training make them, for a plain sample is more
            plausible than an augmented one, whatever their labels.
        test: For the test loader.
        predict: For the predict loader.
        budget: The most samples that are selected at the same time: a fraction of all in
            ``(0, 1]`` if a float, a count if an int.
        batch_size: Samples in a batch of every loader.
        num_workers: Worker processes of every loader.
        collate_fn: Makes a batch of a list of samples; torch's ``default_collate`` when not given.
        pin_memory: Whether loaders copy batches to pinned memory.
        seed: Of every draw and of the order of samples, at least 0.
        warmup: Part of the budget to start with, in ``(0, 1]``.
        rounds: Rounds over which the rest of the budget is spent, at least 1; a run of fewer epochs
            has fewer rounds.
        oversample: Candidates looked at for each sample that is added, at least 1.

    Raises:
        ConfigurationError: If an argument cannot work.

    Example:
        >>> from torch.utils.data import TensorDataset
        >>> good, bad = (TensorDataset(torch.randn(100, 4)) for _ in range(2))
        >>> dm = DVCDataModule({"good": good, "bad": bad}, budget=0.5, batch_size=16)
        >>> dm.setup("fit")
        >>> len(dm.selection), dm.selection.shares()
        (3, {'good': 0.6666666666666666, 'bad': 0.3333333333333333})
    """

    def __init__(
        self,
        sources: Sources,
        val: AnyDataset | None = None,
        test: AnyDataset | None = None,
        predict: AnyDataset | None = None,
        *,
        budget: int | float,
        reference: AnyDataset | None = None,
        batch_size: int = 32,
        num_workers: int = 0,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        pin_memory: bool = False,
        seed: int = 0,
        warmup: float = 0.03,
        rounds: int = 10,
        oversample: float = 4.0,
    ) -> None:
        self._start(budget, seed, warmup, rounds, oversample)
        self.loading = LoaderSettings(
            batch_size=batch_size,
            num_workers=num_workers,
            collate_fn=collate_fn or default_collate,
            pin_memory=pin_memory,
            persistent_workers=bool(num_workers),
        )
        self._open(sources)
        name, held_out = ("val", val) if reference is None else ("reference", reference)
        self.reference: AnyDataset | None = (
            None if held_out is None else checked_reference(held_out, name)
        )
        for name, dataset in (("val", val), ("test", test), ("predict", predict)):
            if dataset is not None:
                check_single(dataset, name)
                # Set on the object, because Lightning takes a method of the class as a sign that
                # there is such a loader.
                setattr(self, f"{name}_dataloader", partial(self._loader_of, dataset))

    def _start(
        self, budget: int | float, seed: int, warmup: float, rounds: int, oversample: float
    ) -> None:
        super().__init__()
        check_settings(
            ("seed", seed, is_whole(seed, least=0), "at least 0, a whole number"),
            (
                "warmup",
                warmup,
                is_number(warmup) and 0 < warmup <= 1,
                "greater than 0 and at most 1",
            ),
            ("rounds", rounds, is_whole(rounds, least=1), "at least 1, a whole number"),
            (
                "oversample",
                oversample,
                is_number(oversample) and 1 <= oversample < math.inf,
                "at least 1",
            ),
        )
        # Plain numbers, which a checkpoint can hold.
        self.seed = int(seed)
        self.warmup = float(warmup)
        self.rounds = int(rounds)
        self.oversample = float(oversample)
        self.loading = LoaderSettings()
        self._given_budget = budget
        self._record = SelectionRecord()
        self._pools: Pools | None = None
        self._sampler: SelectionSampler | None = None
        self._train_loader: DataLoader[Any] | None = None
        self._batch_size: int | None = None  # that was set since
        self._plan: Plan | None = None
        self._grows_first = False
        self._adopted = False
        self._stage: str | None = None
        self._saved: Mapping[str, Any] | None = None

    def _open(self, sources: Sources) -> None:
        """Build the pools, and nothing that looks at a sample."""
        pools = Pools(sources, self.seed)
        self._budget_of = pools.n_samples
        self.budget = resolve_budget(self._given_budget, self._budget_of)
        for name, source in pools.sources.items():
            self._check_share(name, source)
        parts = [(len(source), source.max_share) for source in pools.sources.values()]
        reachable = sum(min(size, math.floor(most * self.budget + 1e-9)) for size, most in parts)
        # Rounding each share down may cost one sample per source.
        if reachable + len(parts) <= self.budget:
            raise ConfigurationError(
                f"the sources can fill {reachable} of the budget of {self.budget} samples within "
                "their max_share; raise a max_share, or lower the budget"
            )
        self._pools = pools
        self._sampler = SelectionSampler(pools.dataset, self.seed)

    def _check_share(self, name: str, source: Source) -> None:
        least = math.ceil(source.min_share * self.budget - 1e-9)
        if least > len(source):
            raise ConfigurationError(
                f"source {name!r} must fill {least} of the budget of {self.budget} samples "
                f"(min_share={source.min_share}), but holds {len(source)}; lower one of them"
            )

    def add_source(self, name: str, source: Source | AnyDataset) -> None:
        """Append a source to those that are selected from, also while a model trains.

        Nothing selected changes, and the budget stays the number of samples that it was: a round
        selects from the source if the budget has room, or if the strategy refines. Call it between
        epochs or between two fits, and on every process: in a callback's ``on_train_epoch_end``,
        or in its ``on_train_epoch_start`` if it stands before the
        :class:`~lightning_dvc.DVCCallback`.

        A resumed run needs at least the sources of its checkpoint, those that were added last and
        in that order: give all from the start, or add them in a callback's ``setup``.

        Args:
            name: One that no source has.
            source: A map-style dataset, or a :class:`~lightning_dvc.Source`.

        Raises:
            ConfigurationError: If the name is taken, the source is empty or not map-style, it
                cannot fill its minimum share, the minimum shares add up to more than 1, or no
                source is known yet, as before ``setup("fit")`` of a wrapped datamodule. Then
                nothing has changed.

        Example:
            >>> from torch.utils.data import TensorDataset
            >>> dm = DVCDataModule({"one": TensorDataset(torch.randn(9, 4))}, budget=3)
            >>> dm.setup("fit")
            >>> dm.add_source("two", TensorDataset(torch.randn(5, 4)))
            >>> dm.pools.names, dm.arm_counts().tolist(), dm.budget
            (['one', 'two'], [1, 0], 3)
        """
        pools, source = self.pools, Source.of(source)
        self._check_share(name, source)
        pools.add(name, source)
        self._current_sampler.dataset = pools.dataset
        # Its workers may hold the pools without the source. What is selected until Lightning asks
        # for the next loader, it can still read.
        self._train_loader = None

    @classmethod
    def from_selection(
        cls,
        selection: Selection | str | Path,
        sources: Sources,
        val: AnyDataset | None = None,
        test: AnyDataset | None = None,
        **settings: Any,
    ) -> Self:
        """Train again on what was selected, without selecting: a larger model, or from scratch.

        Args:
            selection: A :attr:`selection`, or a file that one was written to.
            sources: The sources that it was made from; new ones may follow, and are not trained on.
            val: For the validation loader.
            test: For the test loader.
            settings: Further arguments of the class; the budget is the selection.

        Returns:
            A datamodule that needs no callback.

        Raises:
            StateError: If the selection does not fit the sources.

        Example:
            >>> from torch.utils.data import TensorDataset
            >>> sources = {"one": TensorDataset(torch.randn(9, 4))}
            >>> dm = DVCDataModule(sources, budget=3, warmup=1.0)
            >>> dm.setup("fit")
            >>> again = DVCDataModule.from_selection(dm.selection, sources, batch_size=2)
            >>> len(again.train_dataloader())
            2
        """
        if not isinstance(selection, Selection):
            selection = Selection.load(selection)
        module = cls(sources, val, test, budget=max(len(selection), 1), **settings)
        module._adopt(selection)
        return module

    def _adopt(self, selection: Selection) -> None:
        self._record = SelectionRecord.of(selection, self.pools)
        self.pools.mark(self._record.ids, SELECTED)
        self._current_sampler.select(self._record.ids)
        self._adopted = True

    @staticmethod
    def wrap(
        datamodule: LightningDataModule,
        sources: SourcesInside = None,
        *,
        budget: int | float | None = None,
        selection: Selection | str | Path | None = None,
        reference: AnyDataset | None = None,
        seed: int = 0,
        warmup: float = 0.03,
        rounds: int = 10,
        oversample: float = 4.0,
    ) -> "DVCDataModule":
        """Select from the training data of an existing datamodule.

        Its collate function, transforms, workers, transfer hooks, state, hyperparameters and its
        validation, test and predict loaders stay as they are, and its attributes can be read from
        the result. It is set up as often as Lightning would; each time its training set must be
        the same, so give a random split in its ``setup`` a generator of its own.

        Args:
            datamodule: The project's own, with one training loader over a map-style dataset.
            sources: Separate datasets by name; or, to tell its training dataset apart, a column of
                it, one name per sample, indices by name, or a list of index ranges, see
                :func:`lightning_dvc.split_by`; or a function that makes any of these out of the
                training dataset, once the datamodule is set up. When not given, the training
                dataset is a single source.
            budget: As for the class.
            selection: In place of a budget, a :attr:`selection` that was made from the same
                sources, or a file of one, to train on it again: no callback is needed.
            reference: As for the class. When not given, the samples of its validation loader; of
                all its validation loaders, if their samples are like those of the training set;
                without these, the selection itself.
            seed: As for the class.
            warmup: As for the class.
            rounds: As for the class.
            oversample: As for the class.

        Returns:
            A datamodule to use in its place; ``wrapped`` is the project's own.

        Raises:
            ConfigurationError: If there is not either a budget or a selection, or an argument
                cannot work; in ``setup``, if the training loader or the sources cannot.

        Example:
            >>> from lightning.pytorch.demos.boring_classes import BoringDataModule
            >>> dm = DVCDataModule.wrap(BoringDataModule(), {"early": range(9)}, budget=3)
            >>> dm.setup("fit")
            >>> dm.pools.names, dm.pools.sizes
            (['early'], [9])
        """
        from lightning_dvc.wrapping import WrappingDataModule  # builds on this module

        return WrappingDataModule(
            datamodule,
            sources,
            budget=budget,
            selection=selection,
            reference=reference,
            seed=seed,
            warmup=warmup,
            rounds=rounds,
            oversample=oversample,
        )

    @property
    def pools(self) -> Pools:
        """The sources and what is free in each.

        Raises:
            ConfigurationError: If they are not known before ``setup("fit")``.
        """
        if self._pools is None:
            raise ConfigurationError(
                'the sources are known only after setup("fit"); call it, or start Trainer.fit'
            )
        return self._pools

    @property
    def selection(self) -> Selection:
        """What is selected at present, from where, when and why."""
        return self._record.table(self.pools)

    @property
    def selected_ids(self) -> Tensor:
        """``(s,)`` global ids of the selected samples, in order of selection."""
        return self._record.ids

    def arm_counts(self) -> Tensor:
        """``(K,)`` selected samples of each source."""
        return torch.bincount(
            self.pools.arms_of(self.selected_ids), minlength=len(self.pools.names)
        )

    @property
    def batch_size(self) -> int:
        """Samples in a batch; Lightning's batch-size finder sets it, for loaders made from then on.

        Of a wrapped datamodule, those of the training loader, known after ``setup("fit")``.

        Raises:
            ConfigurationError: If set to anything but a whole number of at least 1; then nothing
                has changed.
        """
        return self.loading.batch_size

    @batch_size.setter
    def batch_size(self, size: int) -> None:
        self.loading = replace(self.loading, batch_size=size)
        self._batch_size = self.loading.batch_size
        self._train_loader = None

    def planned_steps(self, trainer: Trainer) -> int:
        """Optimiser steps of the whole run, with a selection that grows as planned.

        Meant for ``configure_optimizers``, as the ``total_steps`` of a learning-rate schedule. It
        counts the batches of every epoch as ``drop_last``, ``accumulate_grad_batches``,
        ``limit_train_batches`` and the number of processes make them, up to ``max_epochs`` or
        ``max_steps``. It is exact if every round adds all that it is to add. A round that adds
        less, is left out or takes samples back makes the run shorter than this, never longer, and
        so does whatever stops training early, or a ``GradientAccumulationScheduler``. A resumed run
        gets the same number, and with a larger budget one that is too large. It goes by the batch
        size of the moment, so let ``Tuner.scale_batch_size`` find one before the fit. With manual
        optimisation, a batch counts as one step.

        Args:
            trainer: The one that fits, ``self.trainer`` of a LightningModule.

        Raises:
            ConfigurationError: If ``Trainer.fit`` has not begun, or no limit of epochs or steps is
                set.

        Example:
            In a LightningModule,
            ``OneCycleLR(optimizer, 0.1, self.trainer.datamodule.planned_steps(self.trainer))``; for
            a selection that stays as it is:

            >>> from torch.utils.data import TensorDataset
            >>> sources = {"one": TensorDataset(torch.randn(9, 4))}
            >>> dm = DVCDataModule(sources, budget=5, warmup=1.0)
            >>> dm.setup("fit")
            >>> again = DVCDataModule.from_selection(dm.selection, sources, batch_size=2)
            >>> again.planned_steps(Trainer(max_epochs=3, accelerator="cpu", logger=False))
            9
        """
        plan = Plan(len(self.selected_ids), 0, 1) if self._adopted else self._plan
        if plan is None:
            raise ConfigurationError(
                "the number of steps is known once Trainer.fit has set up DVCCallback; call "
                "planned_steps in configure_optimizers, and add DVCCallback() to the callbacks"
            )
        steps = planned_steps(plan, self.budget, trainer_bridge.run_of(trainer, self.loading))
        if steps is None:
            raise ConfigurationError(
                "a run without max_epochs and max_steps has no planned number of steps; set one"
            )
        return steps

    @property
    def is_adopted(self) -> bool:
        """Whether the selection was loaded, to be trained on as it is."""
        return self._adopted

    @property
    def n_set_aside(self) -> int:
        """Samples that could not be scored so far."""
        return len(self._record.bad)

    @property
    def _current_sampler(self) -> SelectionSampler:
        assert self._sampler is not None, "made together with the pools"
        return self._sampler

    @override
    def setup(self, stage: str) -> None:
        """Draw the warm-up, if this is the first time that training is set up."""
        self._stage = stage
        if stage != "fit":
            return
        if self._batch_size is not None:  # a wrapped datamodule tells its own in each fit
            self.batch_size = self._batch_size
        if self._saved is not None:
            self.load_state_dict(self._saved)
        if not len(self._record):
            self.apply(Choice.unscored(self._warm_up()), 0)

    def _warm_up(self) -> Tensor:
        pools = self.pools
        shares = [(source.min_share, source.max_share) for source in pools.sources.values()]
        least = 1
        if self.loading.drop_last:  # less than a batch would be no training at all
            least = self.loading.batch_size * (self.trainer.world_size if self.trainer else 1)
            if least > self.budget:
                raise ConfigurationError(
                    f"drop_last leaves nothing of a budget of {self.budget} samples, which is less "
                    f"than a batch on every process, {least}; raise the budget or lower batch_size"
                )
        share = max(self.warmup, least / self.budget)
        counts = warm_up_counts(self.budget, share, pools.stock, shares)
        return pools.draw_each(counts, "warm-up")

    @override
    def train_dataloader(self) -> DataLoader[Any]:
        """The loader over the selected samples: always the same, whatever is selected.

        Raises:
            ConfigurationError: If training starts without a callback that selects.
        """
        sampler = self._current_sampler
        if self.trainer is not None:
            if self.trainer.training and not (self._plan or self._adopted):
                raise ConfigurationError(
                    "a DVCDataModule selects nothing by itself; add DVCCallback() to the "
                    "callbacks of the Trainer, or train on a saved selection with "
                    "DVCDataModule.from_selection"
                )
            trainer_bridge.finish_epoch(self.trainer)
            sampler.place(self.trainer.global_rank, self.trainer.world_size, self._where)
            sampler.select(self._served_ids)
        if self._train_loader is None:
            self._train_loader = self.loading.training_loader(self.pools.dataset, sampler)
        return self._train_loader

    def _where(self) -> tuple[int, int]:
        """The epoch that is trained, and the samples of it that a resumed run has trained on."""
        done = trainer_bridge.batches_done(self.trainer)
        return trainer_bridge.training_epoch(self.trainer), done * self.loading.batch_size

    def _loader_of(self, dataset: AnyDataset) -> DataLoader[Any]:
        return self.loading.loader(dataset)

    @property
    def _served_ids(self) -> Tensor:
        """What is selected; until the first round, repeated to the length of the full selection.

        No epoch begins before that round, but Lightning looks at the loader, and compares it with
        ``limit_train_batches`` and ``val_check_interval``; and its tuners train on it.
        """
        ids = self.selected_ids
        if not self._grows_first or self._adopted:
            return ids
        return ids.repeat(-(-self.budget // len(ids)))[: self.budget]

    def attach(self, plan: Plan, grows_first: bool) -> None:
        """Tell that a callback does the selecting.

        Args:
            plan: When it does.
            grows_first: Whether its first round is still to come, before any training.
        """
        self._plan, self._grows_first = plan, grows_first

    def apply(self, choice: Choice, number: int, bad: Iterable[BadSample] = ()) -> None:
        """Make a round's decision true.

        Args:
            choice: Free samples to add and selected ones to take back.
            number: The round; 0 is the warm-up.
            bad: Samples that could not be scored, selected or not: they leave for good.
        """
        pools, record = self.pools, self._record
        self._grows_first = self._grows_first and number == 0
        bad = list(bad)
        pools.mark(choice.remove, TAKEN_BACK)
        pools.mark(choice.add, SELECTED)
        record.remove(choice.remove)
        record.add(choice, number)
        if bad:
            bad_ids = torch.tensor([sample.id for sample in bad], dtype=torch.int64)
            pools.mark(bad_ids, SET_ASIDE)
            record.remove(bad_ids)
            record.set_aside(bad)
        self._current_sampler.select(record.ids)

    @override
    def state_dict(self) -> dict[str, Any]:
        """The state of every sample that is not free, and the record of the selection."""
        if self._pools is None:
            return dict(self._saved or {})
        return {
            "pools": self._pools.state_dict(),
            "record": self._record.state_dict(),
            "budget_of": self._budget_of,
        }

    @override
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on with a saved selection.

        Without pools, as when a wrapped datamodule is not set up yet, it waits for
        ``setup("fit")``. A run that only validates or tests leaves the selection as it is.

        Further sources than it was saved with may follow; a fractional budget remains one of the
        samples that it was first a fraction of.

        Raises:
            StateError: If it was made from other sources, or these are not the first ones, if it
                does not fit within the budget, or if it is not the selection that was adopted.
        """
        if self._stage not in (None, "fit"):
            return
        if self._pools is None or not state_dict:
            self._saved = state_dict
            return
        budget, budget_of = self.budget, state_dict["budget_of"]
        if not is_whole(self._given_budget, least=1):
            budget = resolve_budget(self._given_budget, budget_of)
        n_selected = len(state_dict["record"]["ids"])
        if self._adopted and not torch.equal(state_dict["record"]["ids"], self._record.ids):
            raise StateError(
                f"expected a checkpoint of a run on the {len(self._record.ids)} samples that "
                f"were adopted, but it has other ones selected ({n_selected}); to train on the "
                "adopted ones from its parameters, load those into the model and give no "
                "ckpt_path, and to go on selecting, give the sources and a budget"
            )
        if n_selected > budget:
            raise StateError(
                f"expected a checkpoint with at most {budget} selected samples, the budget, "
                f"but it has {n_selected}; give a budget of at least {n_selected}, or start "
                "selection anew"
            )
        self._pools.load_state_dict(state_dict["pools"])
        self._record.load_state_dict(state_dict["record"])
        self._current_sampler.select(self._record.ids)
        self.budget, self._budget_of = budget, budget_of
        self._saved = None


def checked_reference(reference: AnyDataset, name: str) -> AnyDataset:
    """Refuse held-out samples that cannot be drawn from.

    Args:
        reference: The dataset.
        name: Of the argument that it was given as.

    Raises:
        ConfigurationError: If it is several datasets, not map-style, or empty.
    """
    check_map_style(reference, name)
    assert isinstance(reference, Sized), "checked above"
    if len(reference) == 0:
        raise ConfigurationError(
            f"{name} is empty ({type(reference).__name__}); leave it out to use the selection "
            "itself as the reference"
        )
    return reference
