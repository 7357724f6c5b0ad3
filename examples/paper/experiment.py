"""One run of the paper's experiments: select, train from scratch on what was selected, judge."""

import time
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import lightning
import torch
from lightning.pytorch import seed_everything

from examples import scratch
from examples.compare import Problem, clean_and_random, deal_out, quiet, quiet_trainer
from examples.datasets import LOADERS, Data
from examples.paper.methods import METHODS, PARTS, REFERENCES, Method
from lightning_dvc import DVCCallback, DVCDataModule, Random, __version__
from lightning_dvc.policy import plan as policy_plan
from lightning_dvc.policy.budget import warm_up_counts
from lightning_dvc.policy.plan import Run, plan_rounds

DATASETS: dict[str, dict[str, Any]] = {
    "mnist": {},
    "fashion_mnist": {},
    "cifar10": {},
    "adult": {},
    "wine": {"batch_size": 32},
    "news": {},
}
SEEDS = dict.fromkeys(DATASETS, 5) | {"wine": 40}
"""How many runs of each kind, with seeds from 0. Runs of Wine take seconds, and five of them leave
a standard error of 20% in the share of the way closed at its largest budget."""

BUDGETS = (0.1, 0.2, 0.3, 0.4)
N_VAL = 500
MOST_VAL = 0.05
"""Validation samples, and their largest share of the training rows where nothing else is said."""

FEW_OR_MANY = (50, 200, 2000)

LONGER = 4
"""How many times as long ``full_long`` is trained."""


class Job(NamedTuple):
    """What to run: a method on a data set."""

    method: str
    dataset: str
    budget: float
    n_val: int
    seed: int


COLUMNS = (
    *Job._fields,
    "run_accuracy",
    "run_f1",
    "scratch_accuracy",
    "scratch_f1",
    "selection_s",
    "training_s",
    "warmup_s",
    "selected",
    "ever_selected",
    "selected_clean",
    "epochs",
    "run_steps",
    "scratch_steps",
    "batch_size",
    "hidden",
    "rounds",
    "warmup",
    "oversample",
    "lightning_dvc",
    "torch",
    "lightning",
)


@lru_cache(maxsize=1)
def _loaded(dataset: str, data_dir: Path | None) -> Data:
    return LOADERS[dataset](data_dir)


@lru_cache(maxsize=1)
def _dealt_out(dataset: str, data_dir: Path | None, n_val: int, seed: int, tuning: bool) -> Problem:
    data = _loaded(dataset, data_dir)
    most = int(MOST_VAL * data.n_train) if n_val == N_VAL else data.n_train
    return deal_out(data, seed, min(n_val, most), 1.0, tuning, **DATASETS[dataset])


def problem_of(job: Job, data_dir: Path | None, tuning: bool = False) -> Problem:
    """Deal the data set of a job out to sources; at ``N_VAL``, at most 5% of it is held out."""
    dealt = _dealt_out(job.dataset, data_dir, job.n_val, job.seed, tuning)
    return replace(dealt, budget=job.budget)


def run(job: Job, data_dir: Path | None, tuning: bool = False) -> dict[str, Any]:
    """Run one job in this process, on one thread, and return its row; see ``COLUMNS``."""
    quiet()
    torch.set_num_threads(1)
    problem = problem_of(job, data_dir, tuning)
    about = {
        "epochs": problem.epochs,
        "scratch_steps": problem.steps,
        "batch_size": problem.batch_size,
        "hidden": "-".join(map(str, problem.hidden)),
        "lightning_dvc": __version__,
        "torch": torch.__version__,
        "lightning": lightning.__version__,
    }
    row = dict.fromkeys(COLUMNS, float("nan")) | job._asdict() | about
    if job.method in REFERENCES:
        return row | _from_reference(problem, job)
    return row | _from_selection(problem, (METHODS | PARTS)[job.method], job.seed)


def _from_reference(problem: Problem, job: Job) -> dict[str, Any]:
    features, labels = scratch.pool_of(problem)
    if job.method == "validation":
        features, labels = problem.val.tensors
    elif job.method == "clean":
        rows = torch.tensor(clean_and_random(problem, job.seed)[1])
        features, labels = features[rows], labels[rows]
    elif job.method == "full_long":
        problem = replace(problem, steps=LONGER * problem.steps)
    start = time.perf_counter()
    model = scratch.train(problem, features, labels, job.seed)
    seconds = time.perf_counter() - start
    accuracy, f1 = scratch.judge(model, problem)
    return {
        "scratch_accuracy": accuracy,
        "scratch_f1": f1,
        "training_s": seconds,
        "scratch_steps": problem.steps,
    }


def _from_selection(problem: Problem, method: Method, seed: int) -> dict[str, Any]:
    settings: dict[str, Any] = {"val": problem.val, "batch_size": problem.batch_size, "seed": seed}
    pool: Any = problem.sources
    datamodule = DVCDataModule(pool, budget=problem.budget, **settings, **method.datamodule)
    seed_everything(seed, verbose=False)
    model, warmup_s = problem.model(), 0.0
    steps = planned_steps(problem)
    if method.trained_first:
        # The same samples as the other datamodule's warm-up.
        warm = DVCDataModule(pool, budget=n_warmup(datamodule), warmup=1.0, **settings)
        callback = DVCCallback(Random(), monitor="val_acc")
        warmup_s = _timed(quiet_trainer(max_steps=steps, callbacks=[callback]), model, warm)
    callback = DVCCallback(method.strategy(), monitor="val_acc")
    limits: dict[str, Any] = (
        {"max_steps": steps} if method.trained_first else {"max_epochs": problem.epochs}
    )
    seconds = _timed(quiet_trainer(**limits, callbacks=[callback]), model, datamodule)
    selection_s = sum(callback.watch.seconds.values())
    ids = datamodule.selected_ids
    run_accuracy, run_f1 = scratch.judge(model, problem)
    again = scratch.train_on(problem, ids.tolist(), seed)
    accuracy, f1 = scratch.judge(again, problem)
    return {
        "run_accuracy": run_accuracy,
        "run_f1": run_f1,
        "scratch_accuracy": accuracy,
        "scratch_f1": f1,
        "selection_s": selection_s,
        "training_s": seconds - selection_s,
        "warmup_s": warmup_s,
        "selected": len(ids),
        "ever_selected": datamodule.selection.n_ever_selected,
        "selected_clean": float(problem.is_clean[ids].float().mean()),
        # As planned; of a run limited by epochs, rounds that add less than they may take some off.
        "run_steps": steps,
        "rounds": datamodule.rounds,
        "warmup": datamodule.warmup,
        "oversample": datamodule.oversample,
    }


def planned_steps(problem: Problem) -> int:
    """Steps of a run of the problem's epochs that selects in rounds, with the default settings."""
    usual = DVCDataModule(problem.sources, budget=problem.budget)
    first, limits = n_warmup(usual), Run(problem.batch_size, max_epochs=problem.epochs)
    plan = plan_rounds(usual.rounds, None, first, usual.budget, limits)
    steps = policy_plan.planned_steps(plan, usual.budget, limits)
    assert steps is not None, "the run has an end"
    return steps


def n_warmup(datamodule: DVCDataModule) -> int:
    """Samples that a run begins with."""
    stock = datamodule.pools.stock
    no_limits = [(0.0, 1.0)] * len(stock)
    return int(warm_up_counts(datamodule.budget, datamodule.warmup, stock, no_limits).sum())


def _timed(trainer: Any, model: Any, datamodule: DVCDataModule) -> float:
    start = time.perf_counter()
    trainer.fit(model, datamodule)
    return time.perf_counter() - start


def runner(data_dir: Path | None, tuning: bool = False) -> partial[dict[str, Any]]:
    """What runs jobs in a pool of processes."""
    return partial(run, data_dir=data_dir, tuning=tuning)


def job_of(row: Mapping[str, str]) -> Job:
    """The job that a row came of."""
    return Job(
        row["method"],
        row["dataset"],
        float(row["budget"]),
        int(row["n_val"]),
        int(row["seed"]),
    )
