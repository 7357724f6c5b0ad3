"""Print one line for each figure: ``python -m examples.bench --data-dir FOLDER``."""

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch

from examples.bench import exactness, memory, scoring
from examples.bench.measure import Figure


def figures(folder: Path | None) -> Iterator[Figure]:
    """All of them."""
    yield from exactness.figures()
    yield from memory.cache_figures()
    yield from scoring.figures()
    yield from memory.density_figures(folder)


def main() -> None:
    """Measure and print, with two threads."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-dir", type=Path, help="folder with mnist.npz; OpenML if not given")
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    for figure in figures(arguments.data_dir):
        print(figure, flush=True)


if __name__ == "__main__":
    main()
