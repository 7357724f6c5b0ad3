"""The greedy k-center choice against one written out, and against the best there is."""

import itertools

import pytest
import torch
from helpers.oracles import normal
from helpers.problems import good
from helpers.rounds import Run
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.utils.data import TensorDataset

from lightning_dvc import CoreSet
from lightning_dvc.strategies import core_set
from lightning_dvc.strategies.core_set import k_center


def farthest_first(points, centres, k):
    """One distance at a time."""
    centres = [c.tolist() for c in centres] or [points.mean(0).tolist()]
    chosen = []
    while len(chosen) < min(k, len(points)):
        best, at = -1.0, None
        for i, point in enumerate(points.tolist()):
            near = min(
                sum((a - b) ** 2 for a, b in zip(point, c, strict=True)) ** 0.5 for c in centres
            )
            if i not in chosen and near > best + 1e-9:
                best, at = near, i
        chosen.append(at)
        centres.append(points[at].tolist())
    return chosen


@settings(max_examples=60)
@given(n=st.integers(1, 12), m=st.integers(0, 5), k=st.integers(1, 14), seed=st.integers(0, 99))
def test_each_choice_is_the_farthest_from_all_before_it(n, m, k, seed):
    assume(m > 0 or n != 2)  # two points are equally far from their mean, up to the last bit
    points, centres = normal(n, 3, seed=seed), normal(m, 3, seed=seed + 1000)
    assert k_center(points, centres, k).tolist() == farthest_first(points, centres, k)


def radius(points, centres):
    return float(torch.cdist(points, centres).amin(1).max())


@settings(max_examples=40)
@given(n=st.integers(3, 8), k=st.integers(1, 3), seed=st.integers(0, 99))
def test_no_point_is_more_than_twice_as_far_as_it_need_be(n, k, seed):
    points = normal(n, 2, seed=seed)
    centres = points[:1]  # as good a first centre as any
    chosen = torch.cat([centres, points[k_center(points, centres, k)]])
    sets = itertools.combinations(range(n), k + 1) if k < n else [range(n)]
    best = min(radius(points, points[list(some)]) for some in sets)
    assert radius(points, chosen) <= 2 * best + 1e-9


@pytest.mark.parametrize("rows", [1, 3])
def test_many_centres_are_gone_through_in_parts(monkeypatch, rows):
    points, centres = normal(9, 2, seed=1), normal(7, 2, seed=2)
    expected = k_center(points, centres, 4)
    monkeypatch.setattr(core_set, "_ROWS", rows)
    assert torch.equal(k_center(points, centres, 4), expected)


@pytest.mark.parametrize("m", [0, 30])
def test_far_from_the_origin_neighbours_are_still_told_apart(m):
    points, centres = normal(40, 4, seed=1).float() + 3000, normal(m, 4, seed=2).float() + 3000
    expected = k_center(points.double(), centres.double(), 10)
    assert torch.equal(k_center(points, centres, 10), expected)


def test_equal_points_are_all_chosen_in_the_end():
    assert k_center(torch.zeros(3, 2), torch.zeros(1, 2), 3).tolist() == [0, 1, 2]


def test_every_cluster_is_visited_before_any_is_visited_again():
    x, y = good(40).tensors
    far = torch.cat([x[:37] / 1000, x[:3] + torch.eye(8)[:3] * 300])
    run = Run(CoreSet(), {"one": TensorDataset(far, y)}, oversample=100.0, steps=0)
    found = set(run.round().add.tolist()) | set(run.selected.tolist())
    assert {37, 38, 39} <= found
