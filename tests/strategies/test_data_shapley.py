"""Shapley values in closed form against those over all subsets."""

import itertools
import math

import pytest
import torch
from helpers.oracles import normal, tokens
from helpers.problems import good, wrong
from helpers.rounds import Run
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_dvc import DataShapley
from lightning_dvc.errors import ConfigurationError
from lightning_dvc.strategies import data_shapley
from lightning_dvc.strategies.data_shapley import knn_shapley


def worth(subset, points, labels, judges, classes, k):
    """Mean share of the right class among the k nearest, a missing neighbour being wrong."""
    total = 0.0
    for judge, wanted in zip(judges, classes.tolist(), strict=True):
        near = sorted(subset, key=lambda i: (float((points[i] - judge).norm()), i))[:k]
        total += sum(int(labels[i]) == wanted for i in near) / k
    return total / len(judges)


def shapley(points, labels, judges, classes, k):
    n = len(points)
    values = []
    for i in range(n):
        others, value = [j for j in range(n) if j != i], 0.0
        for size in range(n):
            weight = math.factorial(size) * math.factorial(n - 1 - size) / math.factorial(n)
            for some in itertools.combinations(others, size):
                with_it = worth([*some, i], points, labels, judges, classes, k)
                value += weight * (with_it - worth(some, points, labels, judges, classes, k))
        values.append(value)
    return values


@settings(max_examples=30)
@given(n=st.integers(1, 6), m=st.integers(1, 3), k=st.integers(1, 8), seed=st.integers(0, 99))
def test_values_are_those_over_all_subsets(n, m, k, seed):
    points, judges = normal(n, 2, seed=seed), normal(m, 2, seed=seed + 1000)
    labels, classes = tokens(n, below=3, seed=seed), tokens(m, below=3, seed=seed + 1)
    found = knn_shapley(points, labels, judges, classes, k)
    assert found.tolist() == pytest.approx(shapley(points, labels, judges, classes, k), abs=1e-12)


@settings(max_examples=30)
@given(n=st.integers(2, 7), m=st.integers(1, 2), k=st.integers(1, 3), seed=st.integers(0, 99))
def test_of_equal_points_the_first_is_the_nearer(n, m, k, seed):
    # At 0, 1 or 4, so that many are the same and only those are equally near.
    points = tokens(n, 1, below=3, seed=seed).double().square()
    judges = tokens(m, 1, below=3, seed=seed + 1000).double().square()
    labels, classes = tokens(n, below=2, seed=seed), tokens(m, below=2, seed=seed + 1)
    found = knn_shapley(points, labels, judges, classes, k)
    assert found.tolist() == pytest.approx(shapley(points, labels, judges, classes, k), abs=1e-12)


def test_far_from_the_origin_neighbours_are_still_told_apart():
    points, judges = normal(60, 4, seed=1).float() + 3000, normal(30, 4, seed=2).float() + 3000
    labels, classes = tokens(60, below=3, seed=0), tokens(30, below=3, seed=1)
    expected = knn_shapley(points.double(), labels, judges.double(), classes, 3)
    assert torch.equal(knn_shapley(points, labels, judges, classes, 3), expected)


@pytest.mark.parametrize("numbers", [1, 20])
def test_values_add_up_to_the_worth_of_all_also_in_parts(monkeypatch, numbers):
    points, judges = normal(40, 3, seed=0), normal(7, 3, seed=1)
    labels, classes = tokens(40, below=4, seed=0), tokens(7, below=4, seed=1)
    expected = worth(range(40), points, labels, judges, classes, 5)
    monkeypatch.setattr(data_shapley, "_NUMBERS", numbers)
    found = knn_shapley(points, labels, judges, classes, 5)
    assert float(found.sum()) == pytest.approx(expected, abs=1e-12)


def test_wrong_labels_are_worth_less():
    run = Run(DataShapley(), {"good": good(), "wrong": wrong()})
    run.all()
    assert run.shares()["wrong"] < 0.15  # of which two samples are the warm-up's


def test_targets_without_classes_are_refused():
    run = Run(DataShapley(), {"good": good()})
    run.net.training_step = lambda batch, _: nn.functional.mse_loss(
        run.net(batch[0])[:, 0], batch[1].float()
    )
    with pytest.raises(ConfigurationError, match=r"that are classes.*use another strategy"):
        run.round()
