"""The paper's tables as Markdown, and plots, from the rows of finished runs."""

import csv
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from examples.paper.experiment import BUDGETS, DATASETS, N_VAL, Job
from examples.paper.methods import METHODS, PARTS, REFERENCES, WITHOUT_BUDGET
from examples.paper.scale import ScaleJob

Rows = Mapping[Job, Mapping[str, str]]

NAMES = {
    "random": "Random",
    "uncertainty": "Uncertainty",
    "core_set": "Core-Set",
    "gradient_matching": "Gradient Matching",
    "data_shapley": "Data Shapley",
    "influence": "Influence",
    "meta_learning": "Meta-learning",
    "data_efficient": "Data-efficient",
    "dvc": "DVC",
    "validation": "*validation set alone*",
    "clean": "*truly clean samples*",
    "full": "*whole pool*",
    "full_long": "*whole pool, 4 x the steps*",
}


def by_seed(rows: Rows, figure: str, job: Job) -> dict[int, float]:
    """A figure of a job, of every seed that has it, in order."""
    if job.method in WITHOUT_BUDGET:
        job = job._replace(budget=1.0)
    found = {
        other.seed: float(row[figure])
        for other, row in rows.items()
        if other[:-1] == job[:-1]  # all but the seed
    }
    return {seed: found[seed] for seed in sorted(found) if not math.isnan(found[seed])}


def numbers(rows: Rows, figure: str, job: Job) -> np.ndarray:
    """The same as an array."""
    return np.array(list(by_seed(rows, figure, job).values()))


def cell(values: np.ndarray, percent: bool = True) -> str:
    """Mean and standard deviation over seeds."""
    if not len(values):
        return "-"
    scale = 100 if percent else 1
    mean = f"{scale * values.mean():.1f}"
    return f"{mean} ± {scale * values.std(ddof=1):.1f}" if len(values) > 1 else mean


def markdown(heads: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A table."""
    both = [heads, ["---"] * len(heads), *lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in both)


def published(figure: str) -> dict[tuple[str, str, float], str]:
    """The paper's Table 1, by method, data set and budget.

    Args:
        figure: ``"accuracy"`` or ``"f1"``.
    """
    with Path(__file__).with_name("published.csv").open(newline="") as file:
        return {
            (row["method"], row["dataset"], float(row["budget"])): row[figure]
            for row in csv.DictReader(file)
        }


def table(rows: Rows, figure: str, budget: float, n_val: int = N_VAL) -> str:
    """A figure of all methods on all data sets, for one budget; the paper's own in brackets."""
    theirs = published(figure.partition("_")[2])

    def both(name: str, dataset: str) -> str:
        ours = cell(numbers(rows, figure, Job(name, dataset, budget, n_val, 0)))
        paper = theirs.get((name, dataset, budget))
        return f"{ours} ({100 * float(paper):.1f})" if paper else ours

    names = [*METHODS, *(REFERENCES if figure.startswith("scratch") else ())]
    datasets = [d for d in DATASETS if any(job.dataset == d for job in rows)]
    return markdown(
        [f"{budget:.0%}", *datasets],
        ([NAMES[name], *(both(name, dataset) for dataset in datasets)] for name in names),
    )


def means_of(
    rows: Rows, names: Sequence[str], dataset: str, budget: float, n_val: int = N_VAL
) -> dict[str, float]:
    """Mean accuracy from scratch of some methods, over the seeds that all have; none without any.

    Different seeds are different problems: what was dealt out to the sources differs.
    """
    found = {
        name: by_seed(rows, "scratch_accuracy", Job(name, dataset, budget, n_val, 0))
        for name in names
    }
    seeds = set.intersection(*(set(own) for own in found.values()))
    if not seeds:
        return {}
    return {name: float(np.mean([own[s] for s in seeds])) for name, own in found.items()}


def closed(means: Mapping[str, float], method: str) -> float:
    """Share of the way from random to clean-only selection that a method closes."""
    return (means[method] - means["random"]) / (means["clean"] - means["random"])


def summary(rows: Rows, n_val: int = N_VAL) -> str:
    """Per cell: DVC, the best of the others, who is first, and the share closed.

    Of methods that were not run, nothing is told.
    """
    lines = []
    firsts, shares = 0, []
    cells = [(d, b) for d in DATASETS for b in BUDGETS]
    present = {job.method for job in rows}
    names = [name for name in (*METHODS, *REFERENCES) if name in present]
    for dataset, budget in cells:
        means = means_of(rows, names, dataset, budget, n_val)
        if not {"random", "dvc", "clean"} <= means.keys():
            continue
        others = [name for name in METHODS if name in means and name != "dvc"]
        best = max(others, key=lambda name: means[name])
        share = closed(means, "dvc")
        firsts += means["dvc"] > means[best]
        shares.append(share)
        lines.append(
            [
                f"{dataset} {budget:.0%}",
                f"{means['dvc']:.1%}",
                f"{NAMES[best]} {means[best]:.1%}",
                *(f"{means[name]:.1%}" if name in means else "-" for name in REFERENCES),
                f"{share:.0%}{_error_of_share(rows, Job('', dataset, budget, n_val, 0))}",
            ]
        )
    heads = ["cell", "DVC", "best other", *(NAMES[name] for name in REFERENCES), "closed by DVC"]
    end = f"\n\nDVC is first in {firsts} of {len(lines)} cells"
    if shares:
        end += f"; it closes {np.mean(shares):.0%} on average, {min(shares):.0%} at least."
    return markdown(heads, lines) + end


def _error_of_share(rows: Rows, job: Job) -> str:
    """Standard error of the share that DVC closes (jackknife over seeds); nothing of one seed."""
    own = {
        name: by_seed(rows, "scratch_accuracy", job._replace(method=name))
        for name in ("random", "dvc", "clean")
    }
    seeds = set.intersection(*map(set, own.values()))
    if len(seeds) < 2:
        return ""
    shares = []
    for left_out in seeds:
        sums = {name: sum(of[seed] for seed in seeds - {left_out}) for name, of in own.items()}
        shares.append(closed(sums, "dvc"))
    return f" ± {math.sqrt((len(seeds) - 1) * np.var(shares)):.0%}"


def seconds(rows: Rows) -> str:
    """Seconds of selection and of training, per method, means over cells of their mean runs."""
    lines = []
    for name in METHODS:
        cells = sorted({job._replace(seed=0) for job in rows if job.method == name})
        if not cells:
            continue
        selection, warmup, training = (
            np.mean([numbers(rows, column, one).mean() for one in cells])
            for column in ("selection_s", "warmup_s", "training_s")
        )
        share = (selection + warmup) / (selection + warmup + training)
        lines.append(
            [NAMES[name], *(f"{x:.1f}" for x in (selection, warmup, training)), f"{share:.0%}"]
        )
    heads = ["method", "selection", "training on the warm-up", "training", "not training"]
    return markdown(heads, lines)


def table1(rows: Rows) -> str:
    """All budgets, accuracy and macro-F1 of both models, and the summary."""
    parts = []
    for budget in BUDGETS:
        for figure, title in (
            ("scratch_accuracy", "accuracy, trained from scratch on the selection"),
            ("scratch_f1", "macro-F1, trained from scratch on the selection"),
            ("run_accuracy", "accuracy, model at the end of the run that selected"),
            ("run_f1", "macro-F1, model at the end of the run that selected"),
        ):
            parts.append(f"**{title}**\n\n{table(rows, figure, budget)}")
    return "\n\n".join([*parts, summary(rows), seconds(rows)])


def sizes(rows: Rows) -> str:
    """Accuracy from scratch by size of the validation set."""
    cells = sorted({(job.dataset, job.budget) for job in rows if job.budget < 1})
    n_vals = sorted({job.n_val for job in rows})
    parts = []
    for n_val in n_vals:
        lines = [
            [
                NAMES[name],
                *(
                    cell(numbers(rows, "scratch_accuracy", Job(name, d, b, n_val, 0)))
                    for d, b in cells
                ),
            ]
            for name in (*METHODS, "validation", "clean")
        ]
        heads = [f"{n_val} validation samples", *(f"{d} {b:.0%}" for d, b in cells)]
        parts.append(markdown(heads, lines))
    return "\n\n".join(parts)


def table2(rows: Rows) -> str:
    """Accuracy from scratch with metrics left out, and the difference to all six, seed by seed."""
    cells = sorted({(job.dataset, job.budget) for job in rows})
    lines = []
    for name in PARTS:
        own, full = (
            [by_seed(rows, "scratch_accuracy", Job(each, d, b, N_VAL, 0)) for d, b in cells]
            for each in (name, "all_six")
        )
        differences = [
            mine[seed] - all_[seed]
            for mine, all_ in zip(own, full, strict=True)
            for seed in mine.keys() & all_.keys()
        ]
        told = "" if name == "all_six" else _difference(np.array(differences))
        lines.append([name, *(cell(np.array(list(mine.values()))) for mine in own), told])
    heads = ["variant", *(f"{d} {b:.0%}" for d, b in cells), "more than all six"]
    return markdown(heads, lines)


def _difference(values: np.ndarray) -> str:
    """Mean and its standard error, in percentage points."""
    if len(values) < 2:
        return f"{100 * values.mean():+.2f}" if len(values) else "-"
    error = values.std(ddof=1) / math.sqrt(len(values))
    return f"{100 * values.mean():+.2f} ± {100 * error:.2f}"


def table3(rows: Mapping[ScaleJob, Mapping[str, str]]) -> str:
    """Accuracy of the large network, and seconds, by size of the pool; means over seeds."""
    lines = []
    cells = {(job.rows, job.budget, job.method) for job in rows}
    for n, budget, method in sorted(cells):
        own = [row for job, row in rows.items() if job[:3] == (method, n, budget)]
        accuracy, selection, training = (
            np.array([float(row[name]) for row in own])
            for name in ("accuracy", "selection_s", "training_s")
        )
        lines.append(
            [
                str(n),
                method,
                f"{budget:.0%}",
                cell(accuracy),
                f"{(selection + training).mean():.0f}",
                f"{selection.mean():.0f}",
                f"{training.mean():.0f}",
            ]
        )
    heads = ["pool", "method", "budget", "accuracy", "seconds", "of them selection", "training"]
    return markdown(heads, lines)


REPORTS: dict[str, Callable[[Rows], str]] = {"table1": table1, "sizes": sizes, "table2": table2}


def draw_table1(rows: Rows, path: Path) -> None:
    """Plot accuracy from scratch against the budget, one panel for each data set."""
    datasets = [d for d in DATASETS if any(job.dataset == d for job in rows)]
    figure, panels = _panels(datasets, 3, "budget, % of the pool")
    for panel, dataset in zip(panels, datasets, strict=True):
        for name in (*METHODS, "clean", "full"):
            jobs = [Job(name, dataset, budget, N_VAL, 0) for budget in BUDGETS]
            _line(panel, name, [100 * b for b in BUDGETS], [_percent(rows, job) for job in jobs])
        panel.set_xticks([100 * b for b in BUDGETS])
    _finish(figure, panels, path)


def draw_sizes(rows: Rows, path: Path) -> None:
    """Plot accuracy from scratch against the size of the validation set, one panel per cell."""
    cells = sorted({(job.dataset, job.budget) for job in rows if job.budget < 1})
    n_vals = sorted({job.n_val for job in rows})
    figure, panels = _panels([f"{d} {b:.0%}" for d, b in cells], 3, "validation samples")
    for panel, (dataset, budget) in zip(panels, cells, strict=True):
        for name in (*METHODS, "clean", "validation"):
            jobs = [Job(name, dataset, budget, n_val, 0) for n_val in n_vals]
            _line(panel, name, n_vals, [_percent(rows, job) for job in jobs])
        panel.set_xscale("log")
        panel.set_xticks(n_vals, [str(n) for n in n_vals])
        panel.minorticks_off()
    _finish(figure, panels, path)


def draw_table3(rows: Mapping[ScaleJob, Mapping[str, str]], path: Path) -> None:
    """Plot accuracy against seconds of selection and training, one panel for each size of pool."""
    pools = sorted({job.rows for job in rows})
    figure, panels = _panels([f"pool of {n}" for n in pools], 3, "seconds, selection included")
    for panel, n in zip(panels, pools, strict=True):
        for name in ("random", "dvc", "clean", "full"):
            budgets = sorted({job.budget for job in rows if (job.method, job.rows) == (name, n)})
            own = [
                [row for job, row in rows.items() if job[:3] == (name, n, budget)]
                for budget in budgets
            ]
            spent = [_mean_of(some, "selection_s") + _mean_of(some, "training_s") for some in own]
            _line(panel, name, spent, [100 * _mean_of(some, "accuracy") for some in own])
    _finish(figure, panels, path)


def _percent(rows: Rows, job: Job) -> float:
    values = numbers(rows, "scratch_accuracy", job)
    return float(100 * values.mean()) if len(values) else math.nan


def _mean_of(rows: Sequence[Mapping[str, str]], column: str) -> float:
    return float(np.mean([float(row[column]) for row in rows]))


def _panels(titles: Sequence[str], columns: int, below: str) -> tuple[Any, list[Any]]:
    """A figure with a panel for each title, so many in a row."""
    from matplotlib.figure import Figure

    n_rows = max(1, -(-len(titles) // columns))
    figure = Figure(figsize=(11, 3.2 * n_rows + 0.5), layout="constrained")
    panels = list(figure.subplots(n_rows, columns, squeeze=False).flatten())
    for panel in panels[len(titles) :]:
        panel.set_axis_off()
    for number, (panel, title) in enumerate(zip(panels, titles, strict=False)):
        panel.set_title(title)
        if number + columns >= len(titles):
            panel.set_xlabel(below)
        if number % columns == 0:
            panel.set_ylabel("accuracy, %")
    return figure, panels[: len(titles)]


def _line(panel: Any, name: str, x: Sequence[float], y: Sequence[float]) -> None:
    styles = {"dvc": ("C3", "-", 2.5), "clean": ("k", "--", 1.2)}
    colour, style, width = styles.get(name, (f"C{_order(name)}", "-", 1.0))
    if name in ("full", "validation"):
        colour, style, width = "k", ":", 1.2
    marker = "o" if len(x) == 1 else None
    panel.plot(x, y, style, color=colour, linewidth=width, marker=marker, label=NAMES[name])


def _finish(figure: Any, panels: Sequence[Any], path: Path) -> None:
    from matplotlib import rc_context

    if panels:
        handles, labels = panels[0].get_legend_handles_labels()
        labels = [label.strip("*") for label in labels]
        figure.legend(handles, labels, loc="outside lower center", ncols=6, frameon=False)
    # The same runs make the same file.
    with rc_context({"svg.hashsalt": path.stem}):
        figure.savefig(path, metadata={"Date": None})


def _order(name: str) -> int:
    """A colour that is not DVC's."""
    place = list(METHODS).index(name) if name in METHODS else 0
    return place if place < 3 else place + 1


PLOTS: dict[str, Callable[[Rows, Path], None]] = {"table1": draw_table1, "sizes": draw_sizes}
