"""Which defaults are the best: variants of DVC on several data sets, judged on training rows only.

Run ``python -m examples.ablation --data-dir DIR``. It writes one row per finished run to a CSV
file, goes on where it stopped, and prints, per variant and cell (data set and budget), the share of
the way from random to clean-only selection, averaged over seeds. ``--table`` prints only.
"""

import argparse
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from examples import scratch
from examples.compare import Problem, clean_and_random, deal_out, quiet, select
from examples.datasets import LOADERS, Data
from examples.runs import read_rows, run_all
from lightning_dvc import DVC, BayesianWeights, FixedWeights
from lightning_dvc.policy.weights import DEFAULT_WEIGHTS
from lightning_dvc.records import METRICS

# The images are cut to a third, so that all of it runs in hours on two cores.
DATASETS: dict[str, dict[str, Any]] = {
    "mnist": {"rows": 20_000, "steps": 1000},
    "fashion_mnist": {"rows": 20_000, "steps": 1000},
    "adult": {},
    "wine": {"batch_size": 32},
    "digits": {"batch_size": 16},
    "news": {},
}
BUDGETS = (0.1, 0.2, 0.4)
USUAL_VAL = 500


@dataclass(frozen=True)
class Variant:
    """One way to run DVC.

    Attributes:
        strategy: Makes the strategy.
        datamodule: Arguments of ``DVCDataModule``.
        callback: Arguments of ``DVCCallback``.
        n_val: Sizes of the validation set with which it is run.
    """

    strategy: Callable[[], DVC] = DVC
    datamodule: Mapping[str, Any] = field(default_factory=dict)
    callback: Mapping[str, Any] = field(default_factory=dict)
    n_val: Sequence[int] = (USUAL_VAL,)


def _of(**settings: Any) -> Variant:
    return Variant(lambda: DVC(**settings))


def _weighing(**weights: float) -> Variant:
    return Variant(lambda: DVC(FixedWeights({**DEFAULT_WEIGHTS, **weights})))


VARIANTS: dict[str, Variant] = {
    "defaults": Variant(n_val=(USUAL_VAL, 50)),
    "reward: value": _of(reward="value"),
    "reward: acceptance": _of(reward="acceptance"),
    "reward: gain": _of(reward="gain"),
    "reference: held-out only": Variant(lambda: DVC(blend=0), n_val=(50,)),
    "reference: no validation": Variant(datamodule={"val": None}),
    "weights: equal": _weighing(**dict.fromkeys(METRICS, 1.0)),
    "weights: global only": Variant(
        lambda: DVC(FixedWeights({"gradient_impact": 1, "uncertainty": 1, "stability": 1}))
    ),
    "weights: learned": Variant(lambda: DVC(BayesianWeights(max_share=None))),
    "weights: relevance 1": _weighing(relevance=1.0),
    "weights: relevance 0.5": _weighing(relevance=0.5),
    "weights: no relevance": _weighing(relevance=0.0),
    "weights: no quality": _weighing(quality=0.0),
    "weights: no diversity": _weighing(diversity=0.0),
    "weights: no uncertainty": _weighing(uncertainty=0.0),
    "weights: some gradient impact": _weighing(gradient_impact=0.3),
    "weights: some stability": _weighing(stability=0.3),
    "relevance: overall": _of(by_class=False),
    "layers: by depth": _of(layer_weights="depth"),
    "layers: learned": _of(layer_weights="learned"),
    "no class quota": _of(class_slack=float("inf")),
    "near-duplicates kept": _of(duplicate_angle=0.0),
    "warm-up: 1%": Variant(datamodule={"warmup": 0.01}),
    "warm-up: 10%": Variant(datamodule={"warmup": 0.1}),
    "oversample: 2": Variant(datamodule={"oversample": 2.0}),
    "oversample: 8": Variant(datamodule={"oversample": 8.0}),
    "rounds: 5": Variant(datamodule={"rounds": 5}),
    "rounds: 20": Variant(datamodule={"rounds": 20}),
    "no take-back": _of(take_back=0.0),
    "nobody passed over": _of(disbelief_rate=0.0),
    "disbelief rate: 0.5": _of(disbelief_rate=0.5),
    "disown rate: 0.2": _of(disown_rate=0.2),
    "refine to the end": _of(refine=True),
    "overhead: at most 15%": Variant(callback={"max_overhead": 0.15}),
    "bandit: flat": _of(temperature=1.0),
    "bandit: all to the best": _of(allocation="argmax"),
    "bandit: discount 0.8": _of(discount=0.8),
}
REFERENCES = ("random", "clean")


class Job(NamedTuple):
    """One training to judge: a variant, or a reference, in one cell."""

    variant: str
    dataset: str
    budget: float
    n_val: int
    seed: int


class Row(NamedTuple):
    """What came of it.

    Attributes:
        accuracy: After training from scratch on what was selected, in ``[0, 1]``.
        clean: Share of the selection that is truly clean.
        distinct: Distinct samples that were ever selected, over the budget.
        selection_s: Seconds that selection took.
        run_s: Seconds of the whole run that selected.
    """

    accuracy: float
    clean: float = float("nan")
    distinct: float = float("nan")
    selection_s: float = float("nan")
    run_s: float = float("nan")


@lru_cache(maxsize=2)
def _loaded(dataset: str, data_dir: Path | None, rows: int | None) -> Data:
    data = LOADERS[dataset](data_dir)
    n_train = min(rows or data.n_train, data.n_train)
    kept = torch.randperm(data.n_train, generator=torch.Generator().manual_seed(0))[:n_train]
    return Data(data.features[kept], data.labels[kept], data.n_classes, n_train)


def problem_of(job: Job, data_dir: Path | None) -> Problem:
    """The data set of a job, judged on held-out training rows."""
    settings = dict(DATASETS[job.dataset])
    data = _loaded(job.dataset, data_dir, settings.pop("rows", None))
    return deal_out(data, job.seed, job.n_val, job.budget, tuning=True, **settings)


def run(job: Job, data_dir: Path | None) -> dict[str, Any]:
    """Train from scratch on what the variant selects."""
    quiet()
    torch.set_num_threads(1)
    problem = problem_of(job, data_dir)
    if job.variant in REFERENCES:
        _, clean, anything = clean_and_random(problem, job.seed)
        chosen = clean if job.variant == "clean" else anything
        model = scratch.train_on(problem, chosen, job.seed)
        return job._asdict() | Row(scratch.judge(model, problem)[0])._asdict()
    variant = VARIANTS[job.variant]
    datamodule, callback, _, seconds = select(
        problem,
        None,
        job.seed,
        variant.strategy(),
        datamodule_settings=variant.datamodule,
        callback_settings=variant.callback,
    )
    ids = datamodule.selected_ids
    model = scratch.train_on(problem, ids.tolist(), job.seed)
    row = Row(
        scratch.judge(model, problem)[0],
        clean=float(problem.is_clean[ids].float().mean()),
        distinct=datamodule.selection.n_ever_selected / datamodule.budget,
        selection_s=sum(callback.watch.seconds.values()),
        run_s=seconds,
    )
    return job._asdict() | row._asdict()


def finished(rows: Iterable[Mapping[str, str]]) -> dict[Job, Row]:
    """The runs that rows of the file tell of."""
    return {
        Job(
            row["variant"],
            row["dataset"],
            float(row["budget"]),
            int(row["n_val"]),
            int(row["seed"]),
        ): Row(*(float(row[name]) for name in Row._fields))
        for row in rows
    }


def wanted(datasets: Sequence[str], variants: Sequence[str], seeds: int) -> Iterator[Job]:
    """All jobs, seed by seed, the usual validation size and the references first."""
    sizes = {n_val for name in variants for n_val in VARIANTS[name].n_val}
    for n_val in sorted(sizes, key=lambda n: (n != USUAL_VAL, n)):
        names = [*REFERENCES, *(name for name in variants if n_val in VARIANTS[name].n_val)]
        for seed in range(seeds):
            for budget in BUDGETS:
                for dataset in datasets:
                    for name in names:
                        yield Job(name, dataset, budget, n_val, seed)


def table(done: Mapping[Job, Row]) -> str:
    """Gains over random, divided by the gaps between random and clean-only, per variant and cell.

    Both are added up over seeds first, and in ``all`` over cells, so that a seed or a cell in which
    random and clean-only hardly differ does not rule. The last column is how much more or less
    that is than by the defaults, seed by seed, with the standard error of the mean.
    """
    gains: dict[tuple[str, int], dict[tuple[str, float, int], tuple[float, float]]] = {}
    for job, row in done.items():
        ends = [done.get(job._replace(variant=reference)) for reference in REFERENCES]
        if job.variant not in REFERENCES and None not in ends:
            low, high = (end.accuracy for end in ends if end is not None)
            of_variant = gains.setdefault((job.variant, job.n_val), {})
            of_variant[job.dataset, job.budget, job.seed] = (row.accuracy - low, high - low)
    cells = sorted({run[:2] for found in gains.values() for run in found}, key=_place)
    heads = ["variant", "val", *(f"{name} {budget:.0%}" for name, budget in cells), "all"]
    lines = [
        f"| {' | '.join([*heads, 'more than the defaults'])} |",
        "|---" * (len(heads) + 1) + "|",
    ]
    order = list(VARIANTS)
    for variant, n_val in sorted(gains, key=lambda key: (order.index(key[0]), key[1])):
        found, usual = gains[variant, n_val], gains.get(("defaults", n_val), {})
        shares = [_share([v for run, v in found.items() if run[:2] == cell]) for cell in cells]
        shares.append(_share(list(found.values())))
        figures = " | ".join(f"{x:.0%}" for x in shares)
        lines.append(f"| {variant} | {n_val} | {figures} | {_difference(found, usual)} |")
    return "\n".join(lines)


def _difference(
    found: Mapping[tuple[str, float, int], tuple[float, float]],
    usual: Mapping[tuple[str, float, int], tuple[float, float]],
) -> str:
    """Mean difference of two variants, seed by seed, over the runs that both have."""
    runs = found.keys() & usual.keys()
    seeds = sorted({run[2] for run in runs})
    both = [
        [_share([each[run] for run in runs if run[2] == seed]) for seed in seeds]
        for each in (found, usual)
    ]
    if found is usual or len(seeds) < 2:
        return ""
    differences = np.array(both[0]) - np.array(both[1])
    return f"{differences.mean():+.0%} ± {differences.std(ddof=1) / len(seeds) ** 0.5:.0%}"


def _place(cell: tuple[str, float]) -> tuple[int, float]:
    return list(DATASETS).index(cell[0]), cell[1]


def _share(pairs: Sequence[tuple[float, float]]) -> float:
    gain, gap = np.sum(pairs, axis=0) if pairs else (np.nan, np.nan)
    return float(gain / gap)


def main() -> None:
    """Run what is not finished, two processes at a time, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--datasets", nargs="+", default=list(DATASETS)[:4], choices=list(DATASETS))
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--file", type=Path, default=Path("artefacts/ablation.csv"))
    parser.add_argument("--table", action="store_true", help="run nothing")
    arguments = parser.parse_args()
    done = finished(read_rows(arguments.file))
    if not arguments.table:
        jobs = [
            job
            for job in wanted(arguments.datasets, arguments.variants, arguments.seeds)
            if job not in done
        ]
        columns = (*Job._fields, *Row._fields)
        one = partial(run, data_dir=arguments.data_dir)
        done |= finished(run_all(jobs, one, arguments.file, columns, arguments.processes))
    print(table(done))


if __name__ == "__main__":
    main()
