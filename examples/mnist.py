"""MNIST over six unequal sources, with a budget of a tenth of them.

Run ``python -m examples.mnist --data-dir DIR`` with ``mnist.npz`` in DIR, or without ``--data-dir``
to fetch the data from OpenML.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from examples.compare import Problem, compare, quiet, report
from examples.sources import make_sources

FOLDER = Path("artefacts/mnist")
N_TRAIN = 60_000


def load(data_dir: Path | None) -> tuple[Tensor, Tensor]:
    """All 70,000 images, ``(n, 784)`` in ``[0, 1]``, and labels; the test images come last."""
    if data_dir is not None:
        arrays = np.load(data_dir / "mnist.npz")
        x = np.concatenate([arrays["x_train"], arrays["x_test"]]).reshape(-1, 784)
        y = np.concatenate([arrays["y_train"], arrays["y_test"]])
    else:
        from sklearn.datasets import fetch_openml

        x, y = fetch_openml("mnist_784", version=1, return_X_y=True, as_frame=False, parser="auto")
    return torch.tensor(x).float() / 255, torch.tensor(y.astype(np.int64))


def mnist(features: Tensor, labels: Tensor, seed: int, n_val: int, budget: float) -> Problem:
    """Hold clean validation samples out of the training images, and deal the rest out."""
    features = (features - features[:N_TRAIN].mean()) / features[:N_TRAIN].std()
    order = torch.randperm(N_TRAIN, generator=torch.Generator().manual_seed(seed))
    val, train = order[:n_val], order[n_val:]
    return Problem(
        parts=make_sources(features[train], labels[train], n_classes=10, seed=seed),
        val=TensorDataset(features[val], labels[val]),
        test=TensorDataset(features[N_TRAIN:], labels[N_TRAIN:]),
        hidden=(256, 128),
        n_classes=10,
        budget=budget,
    )


def main() -> None:
    """Compare on the seeds asked for and print what came of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-dir", type=Path, help="folder with mnist.npz; OpenML if not given")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--n-val", type=int, default=500, help="clean validation samples")
    parser.add_argument("--budget", type=float, default=0.1)
    arguments = parser.parse_args()
    quiet()
    features, labels = load(arguments.data_dir)
    results = []
    for seed in range(arguments.seeds):
        problem = mnist(features, labels, seed, arguments.n_val, arguments.budget)
        results.append(compare(problem, FOLDER, seed))
        print(f"seed {seed}: closed {results[-1].closed:.0%}", flush=True)
    print(report(problem, results, FOLDER))


if __name__ == "__main__":
    main()
