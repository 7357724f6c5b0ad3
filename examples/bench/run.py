"""Where the time of one run goes: ``python -m examples.bench.run --data-dir FOLDER``.

A tenth of a pool of CIFAR-10's images is selected while the proxy of the paper's Table 3 is
trained, with several sizes of a batch of candidates. With ``--accelerator gpu`` the proxy is a
ResNet-8 and the pool has 100,000 images.
"""

import argparse
from dataclasses import replace
from pathlib import Path

from examples.bench.measure import Figure
from examples.compare import quiet
from examples.paper import scale
from lightning_dvc import DVCCallback


def figures(data_dir: Path | None, accelerator: str, score_batch_size: int) -> tuple[Figure, ...]:
    """Seconds of the run, and of the sections of its selection."""
    problem = scale.problem_of(scale.SIZES[accelerator].rows[0], 0, data_dir, accelerator)
    callback = DVCCallback(monitor="val_acc", score_batch_size=score_batch_size)
    _, seconds = scale.selected(replace(problem, budget=0.1), 0, accelerator, callback)
    taken = {"run": seconds, **callback.watch.seconds}
    return tuple(
        Figure(f"{name}_s_{score_batch_size}", seconds, "s") for name, seconds in taken.items()
    )


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
    scale.start_device(arguments.accelerator)
    for size in arguments.score_batch_sizes:
        for figure in figures(arguments.data_dir, arguments.accelerator, size):
            print(figure, flush=True)


if __name__ == "__main__":
    main()
