"""Select from six unequal sources, then train from scratch: at random, by DVC, knowing the truth.

Every model is trained for the same number of steps on the same number of samples, and judged on
the test set at its last step. The figure of merit is the share of the way from random selection to
uniform selection from the truly clean samples.
"""

import logging
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset, TensorDataset

from examples.classifier import Classifier
from examples.datasets import Data
from examples.sources import Part, make_sources
from lightning_dvc import DVCCallback, DVCDataModule
from lightning_dvc.policy.budget import resolve_budget
from lightning_dvc.strategies.base import Strategy


@dataclass(frozen=True)
class Problem:
    """A data set, dealt out to sources, and how long to train on it.

    Attributes:
        parts: Name to source.
        val: Clean held-out samples: what candidates are compared with.
        test: Judges the models; never seen by selection.
        n_classes: Number of classes.
        budget: Share of all samples that may be selected.
        hidden: Widths of the hidden layers.
        batch_size: Samples in a training batch.
        epochs: Length of the run that selects.
        steps: Length of a training from scratch.
    """

    parts: Mapping[str, Part]
    val: TensorDataset
    test: TensorDataset
    n_classes: int
    budget: float
    hidden: Sequence[int] = (256, 128)
    batch_size: int = 128
    epochs: int = 30
    steps: int = 2000

    @property
    def sources(self) -> dict[str, Dataset[tuple[Tensor, ...]]]:
        """Name to dataset."""
        return {name: part.dataset() for name, part in self.parts.items()}

    @property
    def is_clean(self) -> Tensor:
        """``(N,)`` which samples of all sources together are truly clean."""
        return torch.cat([part.is_clean for part in self.parts.values()])

    def model(self) -> Classifier:
        """A model with random parameters."""
        width = self.val.tensors[0].shape[1]
        return Classifier([width, *self.hidden, self.n_classes])


def hold_out(
    data: Data, seed: int, n_val: int, tuning: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of the validation, the training and the test set, at random.

    Args:
        data: The data set.
        seed: Of the split.
        n_val: Validation samples, held out of the training rows.
        tuning: Take held-out training rows as the test set, and leave the test rows alone.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(data.n_train, generator=generator)
    test = torch.arange(data.n_train, len(data.labels))
    if tuning:
        n_test = min(5000, data.n_train // 5)
        test, order = order[:n_test], order[n_test:]
    if n_val >= len(order):
        raise ValueError(
            f"expected fewer validation samples than rows, of which there are {len(order)}, "
            f"but got {n_val}; hold out fewer"
        )
    return order[:n_val], order[n_val:], test


def deal_out(
    data: Data, seed: int, n_val: int, budget: float, tuning: bool = False, **settings: Any
) -> Problem:
    """Hold clean validation samples out of the training rows, and deal the rest out to sources.

    Args:
        data: The data set.
        seed: Of the split and of what is spoilt.
        n_val: Clean validation samples.
        budget: Share of the pool that may be selected.
        tuning: As of :func:`hold_out`.
        settings: Further fields of :class:`Problem`.
    """
    val, train, test = hold_out(data, seed, n_val, tuning)
    return Problem(
        parts=make_sources(data.features[train], data.labels[train], data.n_classes, seed),
        val=TensorDataset(data.features[val], data.labels[val]),
        test=TensorDataset(data.features[test], data.labels[test]),
        n_classes=data.n_classes,
        budget=budget,
        **settings,
    )


@dataclass(frozen=True)
class Result:
    """What came of one seed; accuracies are of the test set, in ``[0, 1]``.

    Attributes:
        random: Trained from scratch on a random selection.
        dvc: Trained from scratch on what DVC selected.
        clean: Trained from scratch on a random selection of the truly clean samples.
        validation: Trained from scratch on the validation set alone.
        run: The model at the end of the run that selected.
        shares: Share of the selection that each source has.
        later_shares: The same, without the warm-up.
        selected_clean: Share of the selection that is truly clean.
        seconds: Where selection spent its time.
        run_seconds: The whole run that selected.
        n_selected: Samples selected.
    """

    random: float
    dvc: float
    clean: float
    validation: float
    run: float
    shares: dict[str, float]
    later_shares: dict[str, float]
    selected_clean: float
    seconds: dict[str, float]
    run_seconds: float
    n_selected: int

    @property
    def closed(self) -> float:
        """Share of the way from random to clean-only selection."""
        return (self.dvc - self.random) / (self.clean - self.random)


def quiet_trainer(logger: CSVLogger | None = None, **settings: Any) -> Trainer:
    """A trainer that prints nothing."""
    return Trainer(
        accelerator="cpu",
        logger=logger or False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        **settings,
    )


def train_from_scratch(
    problem: Problem, data: DVCDataModule | Dataset[tuple[Tensor, ...]], seed: int
) -> float:
    """Train a new model for the problem's number of steps.

    Args:
        problem: Tells the model, the steps and the test set.
        data: What to train on.
        seed: Of the parameters and the order of samples.

    Returns:
        Test accuracy at the last step.
    """
    seed_everything(seed, verbose=False)
    model, trainer = problem.model(), quiet_trainer(max_steps=problem.steps)
    if isinstance(data, DVCDataModule):
        trainer.fit(model, data)
    else:
        trainer.fit(model, DataLoader(data, batch_size=problem.batch_size, shuffle=True))
    (found,) = trainer.test(model, DataLoader(problem.test, batch_size=1024), verbose=False)
    return float(found["test_acc"])


def select(
    problem: Problem,
    folder: Path | None,
    seed: int,
    strategy: Strategy | None = None,
    *,
    datamodule_settings: Mapping[str, Any] | None = None,
    callback_settings: Mapping[str, Any] | None = None,
) -> tuple[DVCDataModule, DVCCallback, float, float]:
    """One run that selects while it trains; its metrics are logged if there is a folder.

    Args:
        problem: The data set.
        folder: Where metrics are logged.
        seed: Of all that is drawn.
        strategy: How to select; DVC with its defaults when not given.
        datamodule_settings: Arguments of :class:`DVCDataModule` beside those of the problem.
        callback_settings: Arguments of :class:`DVCCallback`.

    Returns:
        The datamodule and the callback after the run, its test accuracy and its seconds.
    """
    settings = {
        "val": problem.val,
        "budget": problem.budget,
        "batch_size": problem.batch_size,
        "seed": seed,
        **(datamodule_settings or {}),
    }
    datamodule = DVCDataModule(problem.sources, **settings)
    callback = DVCCallback(strategy, monitor="val_acc", **(callback_settings or {}))
    seed_everything(seed, verbose=False)
    model = problem.model()
    logger = None if folder is None else CSVLogger(folder, name="metrics", version=f"seed_{seed}")
    trainer = quiet_trainer(logger, max_epochs=problem.epochs, callbacks=[callback])
    start = time.perf_counter()
    trainer.fit(model, datamodule)
    seconds = time.perf_counter() - start
    (found,) = trainer.test(model, DataLoader(problem.test, batch_size=1024), verbose=False)
    return datamodule, callback, float(found["test_acc"]), seconds


def clean_and_random(
    problem: Problem, seed: int
) -> tuple[Dataset[tuple[Tensor, ...]], list[int], list[int]]:
    """All sources as one dataset, and a budget's worth of indices: truly clean ones, and any."""
    generator = torch.Generator().manual_seed(seed)
    n_samples = len(problem.is_clean)
    budget = resolve_budget(problem.budget, n_samples)
    anything = torch.randperm(n_samples, generator=generator)[:budget]
    clean = torch.nonzero(problem.is_clean).flatten()
    clean = clean[torch.randperm(len(clean), generator=generator)][:budget]
    return ConcatDataset(list(problem.sources.values())), clean.tolist(), anything.tolist()


def compare(problem: Problem, folder: Path, seed: int, strategy: Strategy | None = None) -> Result:
    """Select by DVC, and train from scratch on its selection and on the references.

    Args:
        problem: The data set.
        folder: Where the selection and the metrics are written.
        seed: Of all that is drawn.
        strategy: How to select; DVC with its defaults when not given.
    """
    folder.mkdir(parents=True, exist_ok=True)
    datamodule, callback, run_accuracy, seconds = select(problem, folder, seed, strategy)
    file = folder / f"selection_{seed}.parquet"
    selection = datamodule.selection
    selection.to_parquet(file)
    again = DVCDataModule.from_selection(
        file, problem.sources, seed=seed + 1000, batch_size=problem.batch_size
    )
    pool, clean, anything = clean_and_random(problem, seed)
    later = [
        source
        for source, number in zip(selection.source, selection.round.tolist(), strict=True)
        if number > 0
    ]
    return Result(
        random=train_from_scratch(problem, Subset(pool, anything), seed),
        dvc=train_from_scratch(problem, again, seed),
        clean=train_from_scratch(problem, Subset(pool, clean), seed),
        validation=train_from_scratch(problem, problem.val, seed),
        run=run_accuracy,
        shares=selection.shares(problem.parts),
        later_shares={name: later.count(name) / max(len(later), 1) for name in problem.parts},
        selected_clean=float(problem.is_clean[datamodule.selected_ids].float().mean()),
        seconds=dict(callback.watch.seconds),
        run_seconds=seconds,
        n_selected=len(selection),
    )


def report(problem: Problem, results: Sequence[Result], folder: Path) -> str:
    """The results as text, averaged over seeds."""

    def mean(name: str) -> float:
        return float(np.mean([getattr(result, name) for result in results]))

    n_pool = sum(len(part.labels) for part in problem.parts.values())
    lines = [
        f"{results[0].n_selected} of {n_pool} samples, {problem.steps} steps from scratch, test "
        f"accuracy, {len(results)} seed(s):",
        f"  random selection                    {mean('random'):6.1%}",
        f"  DVC                                 {mean('dvc'):6.1%}",
        f"  random, but truly clean only        {mean('clean'):6.1%}",
        f"  validation set alone ({len(problem.val):4d} samples)  {mean('validation'):6.1%}",
        "DVC closes, seed by seed, of the way from random to clean only: "
        + ", ".join(f"{result.closed:.0%}" for result in results),
        f"Model at the end of the run that selected: {mean('run'):.1%}",
        f"Share of DVC's selection that is truly clean: {mean('selected_clean'):.1%}",
        "",
        "share of the budget        all  after warm-up",
    ]
    for name in problem.parts:
        share = sum(result.shares[name] for result in results) / len(results)
        later = sum(result.later_shares[name] for result in results) / len(results)
        lines.append(f"  {name:20s} {share:7.1%} {later:14.1%}")
    total = sum(sum(result.seconds.values()) for result in results)
    lines += ["", f"selection took {total:.1f} s of {mean('run_seconds') * len(results):.1f} s:"]
    for section in results[0].seconds:
        seconds = sum(result.seconds[section] for result in results)
        lines.append(f"  {section:8s} {seconds:6.2f} s")
    lines += ["", f"Written to {folder}/: selection_<seed>.parquet, metrics/<seed>/metrics.csv"]
    return "\n".join(lines)


def quiet() -> None:
    """Keep Lightning's start-up notices out of a short report."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    for notice in ("does not have many workers", "exists and is not empty", "LeafSpec"):
        warnings.filterwarnings("ignore", f".*{notice}.*")
    warnings.filterwarnings("ignore", ".*have no `val_dataloader`.*")
