"""MNIST over six unequal sources, with a budget of a tenth of them.

Run ``python -m examples.mnist --data-dir DIR`` with ``mnist.npz`` in DIR, or without ``--data-dir``
to fetch the data from OpenML.
"""

import argparse
from pathlib import Path

from examples.compare import compare, deal_out, quiet, report
from examples.datasets import mnist

FOLDER = Path("artefacts/mnist")


def main() -> None:
    """Compare on the seeds asked for and print what came of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-dir", type=Path, help="folder with mnist.npz; OpenML if not given")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--n-val", type=int, default=500, help="clean validation samples")
    parser.add_argument("--budget", type=float, default=0.1)
    arguments = parser.parse_args()
    quiet()
    data, results = mnist(arguments.data_dir), []
    for seed in range(arguments.seeds):
        problem = deal_out(data, seed, arguments.n_val, arguments.budget)
        results.append(compare(problem, FOLDER, seed))
        print(f"seed {seed}: closed {results[-1].closed:.0%}", flush=True)
    print(report(problem, results, FOLDER))


if __name__ == "__main__":
    main()
