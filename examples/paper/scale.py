"""The paper's Table 3: a small network selects, a larger one trains, from pools of growing size."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import lightning
import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer, seed_everything
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

from examples.classifier import Classifier
from examples.compare import Problem, clean_and_random, hold_out, quiet
from examples.datasets import LOADERS, Data
from examples.paper import networks
from examples.sources import make_sources
from lightning_dvc import DVCCallback, DVCDataModule, __version__

DATASET = "cifar10"
BUDGETS = (0.1, 0.15, 0.2)
N_VAL = 500
MOST_SHIFT = 4


@dataclass(frozen=True)
class Size:
    """How large everything is.

    Attributes:
        rows: Sizes of the pools, if nothing else is said.
        seeds: How many runs of each kind, with seeds from 0, if nothing else is said.
        proxy: Makes the network that selects, for a number of classes.
        large: Makes the one that is to be trained.
        proxy_epochs: How long the proxy is trained.
        epochs: How long the large network is.
        proxy_batch_size: Samples in a batch of the proxy.
        batch_size: Samples in a batch of the large network.
        num_workers: Processes that read batches of the large network's training.
        precision: Of both trainings, by Lightning's names.
    """

    rows: Sequence[int]
    seeds: int
    proxy: Callable[[int], Classifier]
    large: Callable[[int], Classifier]
    proxy_epochs: int
    epochs: int
    proxy_batch_size: int
    batch_size: int
    num_workers: int
    precision: Any


SIZES = {
    "cpu": Size(
        rows=(3000, 6000, 12_000),
        seeds=5,
        proxy=networks.small_proxy,
        large=networks.small,
        proxy_epochs=15,
        epochs=15,
        proxy_batch_size=64,
        batch_size=64,
        num_workers=0,
        precision="32-true",
    ),
    "gpu": Size(
        rows=(100_000, 200_000, 500_000),
        seeds=1,
        proxy=networks.resnet8,
        large=networks.resnet18,
        proxy_epochs=12,
        epochs=6,
        proxy_batch_size=256,
        batch_size=512,
        num_workers=4,
        precision="bf16-mixed",
    ),
}
"""By accelerator: what takes minutes on two cores, and what the paper has."""


class ScaleJob(NamedTuple):
    """What to run: a method on a pool of so many samples."""

    method: str
    rows: int
    budget: float
    seed: int


COLUMNS = (
    *ScaleJob._fields,
    "accuracy",
    "selection_s",
    "training_s",
    "proxy_parameters",
    "parameters",
    "proxy_epochs",
    "epochs",
    "proxy_batch_size",
    "batch_size",
    "precision",
    "device",
    "lightning_dvc",
    "torch",
    "lightning",
)


def jobs_of(rows: Sequence[int], seeds: Sequence[int]) -> Iterator[ScaleJob]:
    """All runs, the smaller pools first."""
    for seed in seeds:
        for n in rows:
            yield ScaleJob("full", n, 1.0, seed)
            for budget in BUDGETS:
                for method in ("random", "dvc", "clean"):
                    yield ScaleJob(method, n, budget, seed)


def run(job: ScaleJob, data_dir: Path | None, accelerator: str) -> dict[str, Any]:
    """Select with the proxy, train the large network on the selection, and judge it."""
    quiet()
    size = SIZES[accelerator]
    problem = replace(problem_of(job.rows, job.seed, data_dir, accelerator), budget=job.budget)
    start_device(accelerator)
    pool, clean, anything = clean_and_random(problem, job.seed)
    known = {"full": list(range(len(problem.is_clean))), "clean": clean, "random": anything}
    chosen, selection_s = known.get(job.method), 0.0
    if chosen is None:
        callback = DVCCallback(monitor="val_acc")
        chosen, selection_s = selected(problem, job.seed, accelerator, callback)
    model, training_s = _trained(problem, Subset(pool, chosen), job.seed, accelerator)
    test = DataLoader(problem.test, batch_size=500)
    (found,) = _trainer(accelerator).test(model, test, verbose=False)
    return {
        **job._asdict(),
        "accuracy": float(found["test_acc"]),
        "selection_s": selection_s,
        "training_s": training_s,
        "proxy_parameters": _n_parameters(size.proxy(problem.n_classes)),
        "parameters": _n_parameters(model),
        "proxy_epochs": size.proxy_epochs,
        "epochs": size.epochs,
        "proxy_batch_size": size.proxy_batch_size,
        "batch_size": size.batch_size,
        "precision": size.precision,
        "device": torch.cuda.get_device_name() if accelerator == "gpu" else "cpu",
        "lightning_dvc": __version__,
        "torch": torch.__version__,
        "lightning": lightning.__version__,
    }


@lru_cache(maxsize=1)
def problem_of(n: int, seed: int, data_dir: Path | None, accelerator: str) -> Problem:
    """A pool of so many rows of the training data; those held out and the test rows beside it."""
    size, data = SIZES[accelerator], _cut(n, data_dir)
    val, train, test = hold_out(data, seed, N_VAL)
    features, labels = more_of(data.features[train], data.labels[train], n, seed)
    return Problem(
        parts=make_sources(features, labels, data.n_classes, seed),
        val=TensorDataset(data.features[val], data.labels[val]),
        test=TensorDataset(data.features[test], data.labels[test]),
        n_classes=data.n_classes,
        budget=1.0,
        batch_size=size.proxy_batch_size,
        epochs=size.proxy_epochs,
    )


@lru_cache(maxsize=1)
def _loaded(data_dir: Path | None) -> Data:
    return LOADERS[DATASET](data_dir)


def _cut(n: int, data_dir: Path | None) -> Data:
    """At most so many training rows, those held out beside them, and the test rows."""
    data = _loaded(data_dir)
    generator = torch.Generator().manual_seed(0)
    kept = torch.randperm(data.n_train, generator=generator)[: n + N_VAL]
    rows = torch.cat([kept, torch.arange(data.n_train, len(data.labels))])
    return Data(data.features[rows], data.labels[rows], data.n_classes, len(kept))


def more_of(features: Tensor, labels: Tensor, n: int, seed: int) -> tuple[Tensor, Tensor]:
    """As many images as are wanted: the given ones first, then copies of one after the other.

    A copy is shifted by up to four pixels along both axes, and mirrored or not; one of 162 is as it
    was.

    Args:
        features: ``(m, 3072)`` images, standardised, so that 0 is grey; ``m <= n``.
        labels: ``(m,)`` their classes.
        n: How many are wanted.
        seed: Of the shifts.
    """
    generator = torch.Generator().manual_seed(seed)
    images, m = features.view(-1, 3, 32, 32), len(features)
    wider = F.pad(images, [MOST_SHIFT] * 4)
    parts = [images]
    for start in range(m, n, m):
        k = min(m, n - start)
        left, top = torch.randint(2 * MOST_SHIFT + 1, (2, k, 1), generator=generator)
        across = torch.arange(32).expand(k, 32)
        is_mirrored = torch.rand(k, 1, generator=generator) < 0.5
        across = left + torch.where(is_mirrored, across.flip(1), across)
        down = top + torch.arange(32)
        parts.append(
            wider[
                torch.arange(k)[:, None, None, None],
                torch.arange(3)[:, None, None],
                down[:, None, :, None],
                across[:, None, None, :],
            ]
        )
    return torch.cat(parts).flatten(1), labels.repeat(-(-n // m))[:n]


@lru_cache(maxsize=1)
def start_device(accelerator: str) -> None:
    """Train both networks on a batch: what a device does first is no part of any method."""
    size = SIZES[accelerator]
    batch = TensorDataset(torch.randn(size.batch_size, 3072), torch.arange(size.batch_size) % 10)
    for make in (size.proxy, size.large):
        trainer = _trainer(accelerator, max_epochs=1, limit_val_batches=0)
        trainer.fit(make(10), DataLoader(batch, batch_size=size.batch_size))


def selected(
    problem: Problem, seed: int, accelerator: str, callback: DVCCallback
) -> tuple[list[int], float]:
    """What a run of the proxy selects, and the seconds of that run, training included."""
    sources: Any = problem.sources
    datamodule = DVCDataModule(
        sources, val=problem.val, budget=problem.budget, batch_size=problem.batch_size, seed=seed
    )
    seed_everything(seed, verbose=False)
    trainer = _trainer(accelerator, max_epochs=problem.epochs, callbacks=[callback])
    model = SIZES[accelerator].proxy(problem.n_classes)
    start = time.perf_counter()
    trainer.fit(model, datamodule)
    return datamodule.selected_ids.tolist(), time.perf_counter() - start


def _trained(
    problem: Problem, data: Dataset[Any], seed: int, accelerator: str
) -> tuple[Classifier, float]:
    """The large network, trained on some samples, and the seconds that took."""
    size = SIZES[accelerator]
    seed_everything(seed, verbose=False)
    model = size.large(problem.n_classes)
    loader = DataLoader(
        data,
        batch_size=size.batch_size,
        shuffle=True,
        num_workers=size.num_workers,
        persistent_workers=size.num_workers > 0,
    )
    trainer = _trainer(accelerator, max_epochs=size.epochs, limit_val_batches=0)
    start = time.perf_counter()
    trainer.fit(model, loader)
    return model, time.perf_counter() - start


def _trainer(accelerator: str, **settings: Any) -> Trainer:
    return Trainer(
        accelerator=accelerator,
        devices=1,
        precision=SIZES[accelerator].precision,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )


def _n_parameters(model: Classifier) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def runner(data_dir: Path | None, accelerator: str) -> partial[dict[str, Any]]:
    """What runs jobs in a process of its own."""
    return partial(run, data_dir=data_dir, accelerator=accelerator)


def job_of(row: Mapping[str, str]) -> ScaleJob:
    """The job that a row came of."""
    return ScaleJob(row["method"], int(row["rows"]), float(row["budget"]), int(row["seed"]))
