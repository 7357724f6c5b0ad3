"""Influence against dense linear algebra, and against training again without an approximation."""

import math

import pytest
import torch
from helpers.oracles import normal
from helpers.problems import good, wrong
from helpers.rounds import Run
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_dvc import Influence
from lightning_dvc.capture.convolution import Convolved
from lightning_dvc.capture.gradients import Materialised, OuterProducts
from lightning_dvc.capture.scattered import Scattered
from lightning_dvc.errors import ConfigurationError
from lightning_dvc.strategies.influence import conditioned


def layers_of(n, seed):
    """Gradients of ``n`` samples in layers of every form."""
    layer = nn.Conv1d(1, 2, kernel_size=2, bias=False).double()
    words = normal(n, 3, seed=seed + 4).mul(2).long().abs() % 4
    return [
        OuterProducts(normal(n, 1, 2, seed=seed), normal(n, 1, 3, seed=seed + 1), True),
        Convolved(layer, [normal(n, 1, 4, seed=seed + 2)], [normal(n, 2, 3, seed=seed + 3)]),
        Scattered(words, normal(n, 3, 2, seed=seed + 5), n_tokens=4),
        Materialised(normal(n, 2, 2, seed=seed + 6)),
    ]


@settings(max_examples=40)
@given(n=st.integers(1, 9), damping=st.sampled_from([0.01, 1.0, 30.0]), seed=st.integers(0, 99))
def test_the_inverse_is_that_of_the_whole_matrix(n, damping, seed):
    layers = layers_of(n, seed)
    wanted = [normal(*layer.full_shape, seed=seed + 50 + k) for k, layer in enumerate(layers)]
    rows = torch.cat([layer.formed().gradients.flatten(1) for layer in layers], dim=1)
    fisher = rows.T @ rows / n
    ridge = damping * rows.square().sum(1).mean() / n
    expected = torch.linalg.solve(
        fisher + ridge * torch.eye(len(fisher)), torch.cat([full.flatten() for full in wanted])
    )
    found = torch.cat([full.flatten() for full in conditioned(wanted, layers, damping)])
    torch.testing.assert_close(found, expected)


def test_without_gradients_nothing_is_conditioned():
    flat = Materialised(torch.zeros(3, 2, 2))
    (found,) = conditioned([torch.eye(2)], [flat], damping=1.0)
    assert torch.equal(found, torch.eye(2))


def logistic(x, y, weights, start=None):
    """Weights of least regularised logistic loss, by Newton's method."""
    w = torch.zeros(x.shape[1], dtype=torch.float64) if start is None else start
    for _ in range(30):
        p = torch.sigmoid(x @ w)
        gradient = x.T @ (weights * (p - y)) + 0.1 * w
        hessian = (x * (weights * p * (1 - p))[:, None]).T @ x + 0.1 * torch.eye(len(w))
        w = w - torch.linalg.solve(hessian, gradient)
    return w


def test_influence_tells_how_training_again_would_end():
    # The Fisher information is the Hessian only on average, so that ranks agree, not numbers.
    true, n = normal(4, seed=1), 400
    x, held_out = normal(n, 4, seed=2), normal(200, 4, seed=3)
    y = (torch.sigmoid(x @ true) > torch.rand(n, generator=torch.Generator().manual_seed(0))) * 1.0
    wanted_y = torch.sigmoid(held_out @ true)
    ones = torch.ones(n, dtype=torch.float64)
    w = logistic(x, y, ones)

    def loss(w):
        z = held_out @ w
        return float(nn.functional.binary_cross_entropy_with_logits(z, wanted_y))

    changes = []
    for i in range(40):
        heavier = ones.clone()
        heavier[i] += 1.0
        changes.append(loss(logistic(x, y, heavier, w)) - loss(w))
    deltas = torch.sigmoid(x @ w) - y
    known = OuterProducts(x[:, None], deltas[:, None, None], bias=False)
    full = (torch.sigmoid(held_out @ w) - wanted_y)[None] @ held_out / 200
    (direction,) = conditioned([full], [known], damping=0.01)
    influences = known.rows(torch.arange(40)).dot(direction)
    ranks = [torch.tensor(v).argsort().argsort().double() for v in ([-c for c in changes],)]
    ranks.append(influences.argsort().argsort().double())
    assert torch.corrcoef(torch.stack(ranks))[0, 1] > 0.95


def test_wrong_labels_are_kept_out():
    run = Run(Influence(), {"good": good(), "wrong": wrong()})
    run.all()
    assert run.shares()["wrong"] < 0.15


@pytest.mark.parametrize(("name", "value"), [("damping", 0.0), ("fisher_size", 0)])
def test_settings_out_of_range_are_refused(name, value):
    with pytest.raises(ConfigurationError, match=name):
        Influence(**{name: value})
    assert math.isfinite(Influence().damping)
