"""The main job on real data that comes with scikit-learn: handwritten digits from six sources.

Run ``make demo``, or ``python -m examples.demo``.
"""

from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch.utils.data import TensorDataset

from examples.compare import Problem, compare, quiet, report
from examples.sources import make_sources

FOLDER = Path("artefacts/demo")
N_VAL, N_TEST = 150, 450


def digits(seed: int) -> Problem:
    """1,797 digits of 8 x 8 pixels: 450 to test, 150 to validate, the rest over six sources."""
    data = load_digits()
    features = torch.tensor(data.data, dtype=torch.float32)
    labels = torch.tensor(data.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    test, val, train = order.split([N_TEST, N_VAL, len(order) - N_TEST - N_VAL])
    mean, std = features[train].mean(), features[train].std()
    features = (features - mean) / std
    return Problem(
        parts=make_sources(features[train], labels[train], n_classes=10, seed=seed),
        val=TensorDataset(features[val], labels[val]),
        test=TensorDataset(features[test], labels[test]),
        hidden=(64, 32),
        n_classes=10,
        budget=0.25,
        epochs=40,
        steps=1000,
    )


def main() -> None:
    """Compare on a few seeds and print what came of it."""
    quiet()
    problems = {seed: digits(seed) for seed in range(3)}
    results = [compare(problem, FOLDER, seed) for seed, problem in problems.items()]
    print(report(problems[0], results, FOLDER))


if __name__ == "__main__":
    main()
