"""Where the time of a run goes: ``python -m examples.bench.run --data-dir FOLDER``.

A tenth of a pool of CIFAR-10's images is selected while the proxy of the paper's Table 3 is
trained, with several sizes of a batch of candidates in turns. With ``--accelerator gpu`` the proxy
is a ResNet-8 and the pool has 100,000 images, as in the paper.
"""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median

from examples.bench.measure import Figure
from examples.compare import Problem, quiet
from examples.paper import scale
from lightning_dvc import DVCCallback

REPEATS = 3


def figures(
    data_dir: Path | None, accelerator: str, score_batch_sizes: Sequence[int]
) -> Iterator[Figure]:
    """Median seconds of the whole run and of the sections of its selection."""
    scale.start_device(accelerator)
    n = scale.SIZES[accelerator].rows[0]
    problem = replace(scale.problem_of(n, 0, data_dir, accelerator), budget=0.1)
    _seconds(problem, accelerator, score_batch_sizes[0])  # the first run of a process takes longer
    turns = [
        [_seconds(problem, accelerator, size) for size in score_batch_sizes] for _ in range(REPEATS)
    ]
    for size, runs in zip(score_batch_sizes, zip(*turns, strict=True), strict=True):
        for section in runs[0]:
            yield Figure(f"{section}_{size}", median(run[section] for run in runs), "s")


def _seconds(problem: Problem, accelerator: str, score_batch_size: int) -> Mapping[str, float]:
    callback = DVCCallback(monitor="val_acc", score_batch_size=score_batch_size)
    _, seconds = scale.selected(problem, 0, accelerator, callback)
    return {"run": seconds, "selection": callback.watch.total, **callback.watch.seconds}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-dir", type=Path, help="folder with CIFAR-10; OpenML if not given")
    parser.add_argument("--accelerator", choices=list(scale.SIZES), default="cpu")
    parser.add_argument("--score-batch-sizes", nargs="+", type=int, default=[512, 2048])
    arguments = parser.parse_args()
    quiet()
    for figure in figures(arguments.data_dir, arguments.accelerator, arguments.score_batch_sizes):
        print(figure)


if __name__ == "__main__":
    main()
