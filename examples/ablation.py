"""Which defaults are the best: variants of DVC on several data sets, judged on training rows only.

Run ``python -m examples.ablation --data-dir DIR``. It writes one row per finished run to
``artefacts/ablation.csv``, goes on where it stopped, and prints, per variant and data set, the
share of the way from random to clean-only selection, averaged over seeds. With ``--n-val N`` every
data set has N validation samples, and the file is ``artefacts/ablation_N.csv``.
"""

import argparse
import csv
import multiprocessing
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import Subset

from examples.compare import Problem, clean_and_random, deal_out, quiet, select, train_from_scratch
from examples.datasets import LOADERS
from lightning_dvc import DVC, FixedWeights
from lightning_dvc.policy.weights import DEFAULT_WEIGHTS

CELLS: dict[str, dict[str, Any]] = {
    "digits": {"n_val": 150, "budget": 0.2, "batch_size": 16},
    "mnist": {"n_val": 500, "budget": 0.1},
    "fashion_mnist": {"n_val": 500, "budget": 0.1},
    "adult": {"n_val": 500, "budget": 0.1},
    "wine": {"n_val": 300, "budget": 0.2, "batch_size": 32},
    "news": {"n_val": 500, "budget": 0.2},
}
EQUAL = dict.fromkeys(("quality", "relevance", "diversity", "gradient_impact"), 1.0) | {
    "uncertainty": 1.0,
    "stability": 1.0,
}


def _without(metric: str) -> Callable[[], DVC]:
    return lambda: DVC(FixedWeights({**DEFAULT_WEIGHTS, metric: 0.0}))


VARIANTS: dict[str, Callable[[], DVC]] = {
    "defaults": DVC,
    "equal weights": lambda: DVC(FixedWeights(EQUAL)),
    "without relevance": _without("relevance"),
    "without uncertainty": _without("uncertainty"),
    "no take-back": lambda: DVC(take_back=0.0),
    "no class quota": lambda: DVC(class_slack=float("inf")),
    "near-duplicates kept": lambda: DVC(duplicate_angle=0.0),
    "flat bandit": lambda: DVC(temperature=1.0),
    "held-out reference only": lambda: DVC(blend=0),
}
REFERENCES = ("random", "clean")


class Job(NamedTuple):
    """One training to judge: a variant, or a reference, on a data set."""

    variant: str
    dataset: str
    seed: int


def problem_of(job: Job, data_dir: Path | None, n_val: int | None = None) -> Problem:
    """The data set of a job, judged on held-out training rows."""
    data = LOADERS[job.dataset](data_dir)
    cell = CELLS[job.dataset] if n_val is None else {**CELLS[job.dataset], "n_val": n_val}
    return deal_out(data, job.seed, tuning=True, **cell)


def run(job: Job, data_dir: Path | None, n_val: int | None) -> tuple[Job, float]:
    """Accuracy after training from scratch on what the variant selects."""
    quiet()
    torch.set_num_threads(1)
    problem = problem_of(job, data_dir, n_val)
    if job.variant in REFERENCES:
        pool, clean, anything = clean_and_random(problem, job.seed)
        chosen = clean if job.variant == "clean" else anything
        return job, train_from_scratch(problem, Subset(pool, chosen), job.seed)
    datamodule, *_ = select(problem, None, job.seed, VARIANTS[job.variant]())
    chosen = datamodule.selected_ids.tolist()
    return job, train_from_scratch(problem, Subset(datamodule.pools.dataset, chosen), job.seed)


def finished(path: Path) -> dict[Job, float]:
    """The rows written so far."""
    if not path.exists():
        return {}
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    return {
        Job(row["variant"], row["dataset"], int(row["seed"])): float(row["accuracy"])
        for row in rows
    }


def remaining(path: Path, datasets: list[str], variants: list[str], seeds: int) -> Iterator[Job]:
    """What is still to be run, the references first."""
    done = finished(path)
    for dataset in datasets:
        for variant in (*REFERENCES, *variants):
            for seed in range(seeds):
                if Job(variant, dataset, seed) not in done:
                    yield Job(variant, dataset, seed)


def table(path: Path) -> str:
    """Share closed per variant and data set, their mean, and all gains over all gaps.

    The last column is not ruled by a data set on which random and clean-only hardly differ.
    """
    done = finished(path)
    shares: dict[tuple[str, str], list[float]] = defaultdict(list)
    gains: dict[str, float] = defaultdict(float)
    gaps: dict[str, float] = defaultdict(float)
    for (variant, dataset, seed), accuracy in done.items():
        ends = [done.get(Job(reference, dataset, seed)) for reference in REFERENCES]
        if variant not in REFERENCES and None not in ends:
            low, high = (float(end) for end in ends if end is not None)
            shares[variant, dataset].append((accuracy - low) / (high - low))
            gains[variant] += accuracy - low
            gaps[variant] += high - low
    datasets = [name for name in CELLS if any(name == found for _, found in shares)]
    heads = ["variant", *datasets, "mean", "gains / gaps"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for variant in [name for name in VARIANTS if name in gains]:
        means = [float(np.mean(shares[variant, name])) for name in datasets]
        pooled = gains[variant] / gaps[variant]
        cells = " | ".join(f"{x:.0%}" for x in (*means, float(np.mean(means)), pooled))
        lines.append(f"| {variant} | {cells} |")
    return "\n".join(lines)


def main() -> None:
    """Run what is not finished, two processes at a time, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--datasets", nargs="+", default=list(CELLS), choices=list(CELLS))
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--n-val", type=int, help="validation samples, the same for all data sets")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--processes", type=int, default=2)
    arguments = parser.parse_args()
    n_val = arguments.n_val
    path = Path("artefacts") / ("ablation.csv" if n_val is None else f"ablation_{n_val}.csv")
    path.parent.mkdir(parents=True, exist_ok=True)
    is_new = not path.exists()
    wanted = remaining(path, arguments.datasets, arguments.variants, arguments.seeds)
    jobs = [(job, arguments.data_dir, n_val) for job in wanted]
    context = multiprocessing.get_context("spawn")
    with context.Pool(arguments.processes) as pool, path.open("a", newline="") as file:
        writer = csv.writer(file)
        if is_new:
            writer.writerow((*Job._fields, "accuracy"))
        for done in [pool.apply_async(run, job) for job in jobs]:
            job, accuracy = done.get()
            writer.writerow((*job, f"{accuracy:.4f}"))
            file.flush()
    print(table(path))


if __name__ == "__main__":
    main()
