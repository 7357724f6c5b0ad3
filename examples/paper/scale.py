"""The paper's Table 3: a small network selects, a larger one trains, from pools of growing size."""

import time
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Trainer, seed_everything
from torch import nn
from torch.utils.data import DataLoader, Subset

from examples.classifier import Classifier
from examples.compare import Problem, clean_and_random, deal_out, quiet
from examples.datasets import LOADERS, Data
from lightning_dvc import DVCCallback, DVCDataModule

DATASET = "cifar10"
BUDGETS = (0.1, 0.15, 0.2)
EPOCHS = 15
BATCH_SIZE = 64
N_VAL = 500


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
    "epochs",
    "device",
    "torch",
)


class Convolutional(Classifier):
    """A convolutional network for images of 3 x 32 x 32, given flat.

    Args:
        channels: Of the stages, each of which halves the image.
        depth: Convolutions in a stage.
        n_classes: Number of classes.
    """

    def __init__(self, channels: Sequence[int], depth: int, n_classes: int) -> None:
        super().__init__([1, n_classes])
        layers: list[nn.Module] = [nn.Unflatten(1, (3, 32, 32))]
        width = 3
        for stage in channels:
            for number in range(depth):
                stride = 2 if number == 0 else 1
                layers += [nn.Conv2d(width, stage, 3, stride, 1), nn.ReLU()]
                width = stage
        self.net = nn.Sequential(
            *layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * width, n_classes)
        )


def proxy(n_classes: int) -> Convolutional:
    """The network that selects."""
    return Convolutional((16, 32), 1, n_classes)


def large(n_classes: int) -> Convolutional:
    """The network that is to be trained."""
    return Convolutional((32, 64, 128), 2, n_classes)


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
    problem = _problem(job, data_dir)
    pool, clean, anything = clean_and_random(problem, job.seed)
    chosen, selection_s = (
        {
            "full": list(range(len(problem.is_clean))),
            "clean": clean,
            "random": anything,
        }.get(job.method),
        0.0,
    )
    if chosen is None:
        chosen, selection_s = _selected(problem, job.seed, accelerator)
    seed_everything(job.seed, verbose=False)
    model = large(problem.n_classes)
    loader = DataLoader(Subset(pool, chosen), batch_size=BATCH_SIZE, shuffle=True)
    trainer = _trainer(accelerator, max_epochs=EPOCHS, limit_val_batches=0)
    start = time.perf_counter()
    trainer.fit(model, loader)
    training_s = time.perf_counter() - start
    (found,) = trainer.test(model, DataLoader(problem.test, batch_size=500), verbose=False)
    small = proxy(problem.n_classes)
    device = torch.cuda.get_device_name() if accelerator == "gpu" else "cpu"
    return {
        **job._asdict(),
        "accuracy": float(found["test_acc"]),
        "selection_s": selection_s,
        "training_s": training_s,
        "proxy_parameters": sum(p.numel() for p in small.parameters()),
        "parameters": sum(p.numel() for p in model.parameters()),
        "epochs": EPOCHS,
        "device": device,
        "torch": torch.__version__,
    }


def _problem(job: ScaleJob, data_dir: Path | None) -> Problem:
    cut = _cut(job.rows, data_dir)
    return deal_out(cut, job.seed, N_VAL, job.budget, batch_size=BATCH_SIZE, epochs=EPOCHS)


@lru_cache(maxsize=1)
def _cut(n: int, data_dir: Path | None) -> Data:
    """So many training rows, those held out beside them, and the test rows."""
    data = LOADERS[DATASET](data_dir)
    most = data.n_train - N_VAL
    if n > most:
        raise ValueError(
            f"expected at most {most} rows, which is all that {DATASET} has beside {N_VAL} to "
            f"validate on, but got {n}; name fewer"
        )
    generator = torch.Generator().manual_seed(0)
    kept = torch.randperm(data.n_train, generator=generator)[: n + N_VAL]
    rows = torch.cat([kept, torch.arange(data.n_train, len(data.labels))])
    return Data(data.features[rows], data.labels[rows], data.n_classes, len(kept))


def _selected(problem: Problem, seed: int, accelerator: str) -> tuple[list[int], float]:
    """What a run of the proxy selects, and the seconds of that run, training included."""
    sources: Any = problem.sources
    datamodule = DVCDataModule(
        sources, val=problem.val, budget=problem.budget, batch_size=problem.batch_size, seed=seed
    )
    seed_everything(seed, verbose=False)
    callback = DVCCallback(monitor="val_acc")
    trainer = _trainer(accelerator, max_epochs=problem.epochs, callbacks=[callback])
    start = time.perf_counter()
    trainer.fit(proxy(problem.n_classes), datamodule)
    return datamodule.selected_ids.tolist(), time.perf_counter() - start


def _trainer(accelerator: str, **settings: Any) -> Trainer:
    return Trainer(
        accelerator=accelerator,
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )


def runner(data_dir: Path | None, accelerator: str) -> partial[dict[str, Any]]:
    """What runs jobs in a process of its own."""
    return partial(run, data_dir=data_dir, accelerator=accelerator)


def job_of(row: Mapping[str, str]) -> ScaleJob:
    """The job that a row came of."""
    return ScaleJob(row["method"], int(row["rows"]), float(row["budget"]), int(row["seed"]))
