"""Many runs, in several processes, one row of a CSV file for each as it ends; resumable."""

import csv
import multiprocessing
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import torch
from tqdm import tqdm

J = TypeVar("J")


def read_rows(path: Path) -> list[dict[str, str]]:
    """Rows of a CSV file; none if there is no file.

    A last line that a killed process left unfinished is left out.
    """
    if not path.exists():
        return []
    *finished, _ = path.read_text().split("\n")
    return list(csv.DictReader(finished))


def run_all(
    jobs: Sequence[J],
    run: Callable[[J], Mapping[str, Any]],
    path: Path,
    columns: Sequence[str],
    processes: int,
) -> Iterator[dict[str, str]]:
    """Run what is to be run, and write a row as each run ends, with an estimate of what is left.

    The processes may have their own, such as the workers of a loader, and share the cores.

    Args:
        jobs: What to run, in this order.
        run: Runs one in a process of its own and returns the row.
        path: The file, to which rows are added.
        columns: Names of the row's fields.
        processes: How many run at the same time.

    Yields:
        The rows, as they are written.

    Raises:
        ValueError: If the file has other columns.
        Exception: What the first run that failed raised, once those that had begun have ended; of a
            process that was killed, at once.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _begin(path, columns)
    executor = ProcessPoolExecutor(
        processes, multiprocessing.get_context("spawn"), _share_cores, (processes,)
    )
    with executor, path.open("a") as file, tqdm(total=len(jobs), unit="run") as bar:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        waiting = iter(jobs)
        error: BaseException | None = None
        running = {executor.submit(run, job) for job in islice(waiting, processes)}
        while running:
            ended, running = wait(running, return_when=FIRST_COMPLETED)
            for end in ended:
                if (raised := end.exception()) is not None:
                    error = error or raised
                    continue
                row = end.result()
                written = {name: _written(row[name]) for name in columns}
                writer.writerow(written)
                file.flush()
                bar.update()
                yield written
            if error is None:  # else none begins, and those that have begun are written
                running |= {executor.submit(run, job) for job in islice(waiting, len(ended))}
        if error is not None:
            raise error


def _share_cores(processes: int) -> None:
    torch.set_num_threads(max(1, torch.get_num_threads() // processes))


def _begin(path: Path, columns: Sequence[str]) -> None:
    """Write the head of a new file; of an old one, check it, and remove an unfinished last line."""
    head = ",".join(columns) + "\n"
    if not path.exists() or not path.read_text():
        path.write_text(head)
        return
    text = path.read_text()
    found = text.partition("\n")[0] + "\n"
    if found != head:
        raise ValueError(
            f"expected {path} to have the columns {head.strip()}, but it has {found.strip()}; name "
            "another file, or remove it"
        )
    if not text.endswith("\n"):
        path.write_text(text[: text.rindex("\n") + 1])


def _written(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)
