"""Matching pursuit against the best subset, and against scikit-learn's where that applies."""

import itertools

import numpy as np
import pytest
import torch
from helpers.problems import good, wrong
from helpers.rounds import Run
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import nnls
from sklearn.linear_model import orthogonal_mp_gram

from lightning_dvc import GradientMatching
from lightning_dvc.errors import ConfigurationError
from lightning_dvc.strategies.gradient_matching import match


def left_over(atoms, target, chosen):
    """Distance of the target from the nearest combination with weights of at least 0."""
    return nnls(atoms[:, list(chosen)], target)[1]


@settings(max_examples=60)
@given(n=st.integers(2, 7), k=st.integers(1, 4), seed=st.integers(0, 199))
def test_the_most_alike_is_chosen_and_the_rest_is_near_the_best(n, k, seed):
    rng = np.random.default_rng(seed)
    atoms = rng.normal(size=(5, n))
    atoms /= np.linalg.norm(atoms, axis=0)
    target = np.abs(rng.normal(size=n)) @ atoms.T
    k = min(k, n)
    chosen = match(atoms.T @ atoms, atoms.T @ target, k, ridge=0.0).tolist()
    assert len(set(chosen)) == k
    if k == 1:  # of several, its weight may vanish beside the others': once in all these seeds
        assert chosen == [(atoms.T @ target).argmax()]
    best = min(left_over(atoms, target, some) for some in itertools.combinations(range(n), k))
    nothing = np.linalg.norm(target)
    # A greedy choice need not be the best one, but never is the worst.
    assert left_over(atoms, target, chosen) <= best + 0.6 * (nothing - best)


def test_choices_are_scikit_learns_where_that_has_no_negative_weight():
    agreed = 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        atoms = np.abs(rng.normal(size=(30, 12)))
        atoms /= np.linalg.norm(atoms, axis=0)
        target = atoms[:, :3] @ np.array([3.0, 2.0, 1.0])
        gram, products = atoms.T @ atoms, atoms.T @ target
        theirs = orthogonal_mp_gram(gram, products, n_nonzero_coefs=3)
        if (theirs >= 0).all():
            assert set(np.flatnonzero(theirs)) == set(match(gram, products, 3, 0.0).tolist())
            agreed += 1
    assert agreed > 10


def test_what_points_the_other_way_comes_last():
    atoms = np.array([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]]).T
    target = np.array([2.0, 1.0])
    assert match(atoms.T @ atoms, atoms.T @ target, 4, 0.0).tolist() == [0, 1, 3, 2]


def test_more_is_chosen_than_the_gradients_have_dimensions():
    rng = np.random.default_rng(0)
    atoms = np.abs(rng.normal(size=(2, 40)))
    target = atoms.sum(1)
    chosen = match(atoms.T @ atoms, atoms.T @ target, 25, 0.0).tolist()
    assert len(set(chosen)) == 25


@settings(max_examples=60)
@given(n=st.integers(1, 6), k=st.integers(1, 6), seed=st.integers(0, 199))
def test_of_orthogonal_gradients_the_best_subset_is_chosen(n, k, seed):
    rng = np.random.default_rng(seed)
    atoms = np.linalg.qr(rng.normal(size=(8, 8)))[0][:, :n]
    target, k = rng.normal(size=8), min(k, n)
    chosen = match(atoms.T @ atoms, atoms.T @ target, k, ridge=0.0)
    best = min(left_over(atoms, target, some) for some in itertools.combinations(range(n), k))
    assert left_over(atoms, target, chosen) == pytest.approx(best, abs=1e-9)


def test_near_copies_are_passed_over():
    one, other, third, fourth = np.eye(4)
    copy = 0.5 * (one + 1e-4 * other)
    atoms = np.stack([one, copy, 1e-4 * third, 1e-4 * fourth], axis=1)
    target = one + 100 * other + 0.5 * third + 0.4 * fourth
    assert match(atoms.T @ atoms, atoms.T @ target, 4, ridge=0.0).tolist() == [0, 2, 3, 1]


@settings(max_examples=80)
@given(
    n=st.integers(1, 40),
    width=st.integers(1, 9),
    spread=st.sampled_from([0.0, 1e-5, 1e-3, 1.0]),
    ridge=st.sampled_from([0.0, 1e-9, 0.05]),
    share=st.floats(0, 1),
    seed=st.integers(0, 999),
)
def test_as_many_as_wanted_whatever_the_gradients(n, width, spread, ridge, share, seed):
    rng = np.random.default_rng(seed)
    copied = rng.normal(size=(n, width))[rng.integers(0, n, n)]
    # In single precision, as gradients are.
    atoms = (copied + spread * rng.normal(size=(n, width))).astype(np.float32)
    gram, products = (atoms @ x.T for x in (atoms, atoms[: n // 2 + 1].mean(0)))
    k = round(share * n)
    chosen = match(gram.astype(float), products.astype(float), k, ridge).tolist()
    assert len(set(chosen)) == len(chosen) == k
    assert set(chosen) <= set(range(n))


def test_nothing_but_zeros_is_chosen_all_the_same():
    assert match(np.zeros((3, 3)), np.zeros(3), 2, ridge=0.5).tolist() == [0, 1]


def test_wrong_labels_are_chosen_less():
    run = Run(GradientMatching(), {"good": good(), "wrong": wrong()})
    run.all()
    assert run.shares()["wrong"] < 0.35  # half of what is drawn


def test_every_class_gets_its_share():
    run = Run(GradientMatching(), {"good": good()})
    _, y = good().tensors
    choice = run.round()
    counts = torch.bincount(y[choice.add], minlength=3)
    assert (counts - counts.double().mean()).abs().max() <= 3


def test_a_ridge_below_zero_is_refused():
    with pytest.raises(ConfigurationError, match="ridge must be at least 0"):
        GradientMatching(ridge=-1.0)
