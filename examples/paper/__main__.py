"""The paper's tables from one command each.

Run ``python -m examples.paper table1 --data-dir DIR``; likewise ``sizes`` (Table 1 with other sizes
of the validation set), ``table2`` (which metrics help) and ``table3`` (scale). Each writes one row
per finished run to ``artefacts/paper/<table>.csv``, goes on where it stopped, prints the table, and
plots it beside the file, but for ``table2``; with ``--only-report``, of what there is. With
``--held-out`` models are judged on held-out rows of the training data, which is how to choose
between changes of a method; the rows are in a file of their own.
"""

import argparse
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import product
from pathlib import Path

from examples.paper import report, scale
from examples.paper.experiment import (
    BUDGETS,
    COLUMNS,
    DATASETS,
    FEW_OR_MANY,
    N_VAL,
    SEEDS,
    Job,
    job_of,
    runner,
)
from examples.paper.methods import METHODS, PARTS, WITHOUT_BUDGET
from examples.runs import read_rows, run_all


def jobs_of(table: str, seeds: Sequence[int] | None, datasets: Sequence[str]) -> Iterator[Job]:
    """The runs of a table, seed by seed, so that a part of them is a smaller table.

    Args:
        table: Name of the table.
        seeds: The seeds of each data set; None: as many as it has in ``SEEDS``.
        datasets: Names of data sets.
    """
    for seed, dataset in product(seeds or range(max(SEEDS.values())), datasets):
        if seeds or seed < SEEDS[dataset]:
            yield from _CELLS[table](dataset, seed)


def _table1(dataset: str, seed: int) -> Iterator[Job]:
    for name in WITHOUT_BUDGET:
        yield Job(name, dataset, 1.0, N_VAL, seed)
    for budget, name in product(BUDGETS, (*METHODS, "clean")):
        yield Job(name, dataset, budget, N_VAL, seed)


def _sizes(dataset: str, seed: int) -> Iterator[Job]:
    if dataset in ("news", "adult", "mnist"):
        for n_val in FEW_OR_MANY:
            yield Job("validation", dataset, 1.0, n_val, seed)
            for budget, name in product((0.1, 0.2), (*METHODS, "clean")):
                yield Job(name, dataset, budget, n_val, seed)


def _table2(dataset: str, seed: int) -> Iterator[Job]:
    if dataset in ("mnist", "fashion_mnist"):
        for budget, name in product((0.2, 0.3), PARTS):
            yield Job(name, dataset, budget, N_VAL, seed)


_CELLS: dict[str, Callable[[str, int], Iterator[Job]]] = {
    "table1": _table1,
    "sizes": _sizes,
    "table2": _table2,
}


def main() -> None:
    """Run what is not finished, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("table", choices=[*_CELLS, "table3"])
    parser.add_argument("--data-dir", type=Path, help="files of the data sets; OpenML without")
    parser.add_argument("--datasets", nargs="+", choices=list(DATASETS), default=list(DATASETS))
    parser.add_argument("--methods", nargs="+", help="only some of them")
    parser.add_argument("--budgets", nargs="+", type=float, help="only some of them")
    parser.add_argument("--seeds", nargs="+", type=int, help="0 to 4; of wine, 0 to 39")
    parser.add_argument("--rows", nargs="+", type=int, help="sizes of the pools of table3")
    parser.add_argument(
        "--accelerator",
        choices=list(scale.SIZES),
        default="cpu",
        help="of table3; on a gpu it has the paper's size",
    )
    parser.add_argument("--held-out", action="store_true", help="not on test rows; not of table3")
    parser.add_argument("--processes", type=int, help="2, but 1 for table3, if nothing is said")
    parser.add_argument("--folder", type=Path, default=Path("artefacts/paper"))
    parser.add_argument("--only-report", action="store_true", help="run nothing")
    arguments = parser.parse_args()
    if arguments.processes is None:
        arguments.processes = 1 if arguments.table == "table3" else 2
    _check(parser, arguments)
    of_gpu = arguments.table == "table3" and arguments.accelerator == "gpu"
    end = "_gpu" if of_gpu else "_held_out" if arguments.held_out else ""
    path = arguments.folder / f"{arguments.table}{end}.csv"
    if arguments.only_report and not read_rows(path):
        parser.error(f"expected finished runs in {path}, but there are none; run some first")
    print(_table3(arguments, path) if arguments.table == "table3" else _tables(arguments, path))


def _tables(arguments: argparse.Namespace, path: Path) -> str:
    done = {job_of(row): row for row in read_rows(path)}
    if not arguments.only_report:
        wanted = jobs_of(arguments.table, arguments.seeds, arguments.datasets)
        jobs = [job for job in wanted if job not in done and _is_wanted(job, arguments)]
        run = runner(arguments.data_dir, tuning=arguments.held_out)
        rows = run_all(jobs, run, path, COLUMNS, arguments.processes)
        done |= {job_of(row): row for row in rows}
    if arguments.table in report.PLOTS:
        report.PLOTS[arguments.table](done, path.with_suffix(".svg"))
    return report.REPORTS[arguments.table](done)


def _table3(arguments: argparse.Namespace, path: Path) -> str:
    done = {scale.job_of(row): row for row in read_rows(path)}
    if not arguments.only_report:
        size = scale.SIZES[arguments.accelerator]
        wanted = scale.jobs_of(arguments.rows or size.rows, arguments.seeds or range(size.seeds))
        jobs = [job for job in wanted if job not in done and _is_wanted(job, arguments)]
        run = scale.runner(arguments.data_dir, arguments.accelerator)
        rows = run_all(jobs, run, path, scale.COLUMNS, arguments.processes)
        done |= {scale.job_of(row): row for row in rows}
    report.draw_table3(done, path.with_suffix(".svg"))
    return report.table3(done)


def _check(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    jobs: Iterable[Job | scale.ScaleJob] = (
        scale.jobs_of([0], [0])
        if arguments.table == "table3"
        else jobs_of(arguments.table, [0], list(DATASETS))
    )
    known = sorted({job.method for job in jobs})
    unknown = sorted(set(arguments.methods or ()) - set(known))
    if unknown:
        parser.error(f"expected methods of {arguments.table} among {known}, but got {unknown}")
    if arguments.held_out and arguments.table == "table3":
        parser.error("expected no --held-out with table3, which is judged on test rows only")


def _is_wanted(job: Job | scale.ScaleJob, arguments: argparse.Namespace) -> bool:
    return all(
        not wanted or value in wanted
        for value, wanted in ((job.method, arguments.methods), (job.budget, arguments.budgets))
    )


if __name__ == "__main__":
    main()
