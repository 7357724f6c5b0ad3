"""Lazy facility location against the plain greedy one, and against the best there is."""

import itertools

import numpy as np
import torch
from helpers.problems import labelled
from helpers.rounds import Run
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import TensorDataset

from lightning_dvc import DataEfficient
from lightning_dvc.strategies.data_efficient import facility_location


def covered(similarity, chosen):
    return similarity[:, list(chosen)].max(1).sum() if len(chosen) else 0.0


def greedy(similarity, k):
    chosen = []
    for _ in range(k):
        gains = [
            -np.inf if j in chosen else covered(similarity, [*chosen, j])
            for j in range(len(similarity))
        ]
        chosen.append(int(np.argmax(np.round(gains, 9))))
    return chosen


def similarity_of(n, seed):
    points = np.random.default_rng(seed).normal(size=(n, 3))
    distances = np.linalg.norm(points[:, None] - points, axis=2)
    return distances.max() - distances


@settings(max_examples=60)
@given(n=st.integers(1, 12), k=st.integers(1, 12), seed=st.integers(0, 199))
def test_the_lazy_choice_is_the_greedy_one(n, k, seed):
    k = min(k, n)
    similarity = similarity_of(n, seed)
    found = facility_location(similarity, k).tolist()
    assert len(set(found)) == k
    for size in range(1, k + 1):  # ties may be broken otherwise in the last bits
        lazy, plain = (
            covered(similarity, found[:size]),
            covered(similarity, greedy(similarity, size)),
        )
        assert lazy >= plain * (1 - 1e-9)


@settings(max_examples=30)
@given(n=st.integers(2, 8), k=st.integers(1, 3), seed=st.integers(0, 99))
def test_it_covers_nearly_as_much_as_can_be(n, k, seed):
    k = min(k, n)
    similarity = similarity_of(n, seed)
    best = max(covered(similarity, some) for some in itertools.combinations(range(n), k))
    assert covered(similarity, facility_location(similarity, k)) >= (1 - 1 / np.e) * best - 1e-9


def test_one_of_each_group_of_repetitions_comes_first():
    x, y = labelled(6, seed=3)
    repeated = TensorDataset(x.repeat_interleave(10, 0), y.repeat_interleave(10))
    run = Run(DataEfficient(), {"one": repeated}, oversample=100.0, budget=36, steps=0)
    choice = run.round()
    groups = (choice.add // 10).tolist()
    assert len(groups) == 6  # (36 - 2) / 6 rounds
    assert len(set(groups)) >= 5
    assert torch.equal(choice.values, torch.sort(choice.values, descending=True).values)
