import math
import random

import numpy as np
import pytest
import torch

from lightning_dvc.policy import surrogate
from lightning_dvc.policy.surrogate import FitError

BEST = torch.tensor([0.7, 0.3], dtype=torch.float64)


def propose(weights, past, scores, progress, starts, seed, ago=None):
    """What one run proposes where nothing else is said."""
    ago = torch.zeros_like(past) if ago is None else ago
    return surrogate.propose(weights, past, scores, ago, progress, starts, seed)


def column(numbers):
    return torch.as_tensor(numbers, dtype=torch.float64).view(-1, 1)


def mixes(n, d=2, seed=0):
    """Points of the simplex, its corners first."""
    generator = torch.Generator().manual_seed(seed)
    points = -torch.rand(n - d, d, generator=generator, dtype=torch.float64).log()
    return torch.cat([torch.eye(d, dtype=torch.float64), points / points.sum(1, keepdim=True)])


@pytest.mark.parametrize("d", [2, 3])
@pytest.mark.parametrize("n_starts", [0, 2])
def test_proposals_lie_on_the_simplex(d, n_starts):
    weights = mixes(6, d)
    starts = mixes(n_starts + d, d, seed=1)[:n_starts]
    found = propose(weights, column(torch.arange(6) / 10), weights[:, :1], 0.6, starts, seed=0)
    assert found.shape == (d,)
    assert found.dtype == torch.float64
    assert (found >= 0).all()
    assert found.sum().item() == pytest.approx(1, abs=1e-12)


def test_proposes_the_best_weights_at_the_present_progress():
    """The best mix moves with progress, from (0.2, 0.8) at 0 to (0.8, 0.2) at 1."""
    past = column([0.0] * 8 + [1.0] * 8)
    weights = torch.cat([mixes(8), mixes(8, seed=1)])
    scores = past - (weights[:, :1] - (0.2 + 0.6 * past)) ** 2
    for progress, best in ((0.0, 0.2), (1.0, 0.8)):
        found = propose(weights, past, scores, progress, weights, seed=0)
        assert found[0].item() == pytest.approx(best, abs=0.1)


@pytest.mark.parametrize(
    "scores",
    [[0.3] * 4, [0.3, 0.3, 0.3, 0.3 + 1e-12], [1e300, -1e300, 0, 0], [1.0, 2.0, 3.0, math.nan]],
)
def test_scores_without_a_usable_spread_are_refused(scores):
    weights = mixes(4)
    with pytest.raises(FitError, match="standard deviation"):
        propose(weights, column([0.0] * 4), column(scores), 0.0, weights, seed=0)


def test_the_scale_of_the_scores_does_not_matter():
    weights, past = mixes(6), column([0.0] * 6)
    scores = -((weights - BEST) ** 2).sum(1, keepdim=True)
    small, large = (propose(weights, past, s * scores, 0.0, weights, 0) for s in (2**-20, 2**20))
    torch.testing.assert_close(small, large, rtol=0, atol=1e-6)


def numpy_stream():
    """Numpy's global generator, which only the old functions reach."""
    return np.random.get_state()[1].copy()  # noqa: NPY002 - the stream guarded


def test_what_botorch_refuses_becomes_our_error_and_leaves_the_generators_alone():
    weights = mixes(4)
    weights[1, 0] = math.nan
    before = torch.get_rng_state(), numpy_stream(), random.getstate()
    with pytest.raises(FitError, match="could not be fitted") as caught:
        propose(weights, column([0.0] * 4), column([1, 2, 3, 4]), 0.0, weights, seed=0)
    assert caught.value.__cause__ is not None
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (numpy_stream() == before[1]).all()
    assert random.getstate() == before[2]


def test_global_generators_are_untouched_and_do_not_matter():
    weights, past = mixes(5), column(torch.arange(5) / 10)
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        np.random.seed(seed)  # noqa: NPY002 - the stream guarded
        before = torch.get_rng_state(), numpy_stream()
        found.append(propose(weights, past, weights[:, :1], 0.5, weights, seed=0))
        assert torch.equal(torch.get_rng_state(), before[0])
        assert (numpy_stream() == before[1]).all()
    assert torch.equal(*found)


def test_a_rising_trend_does_not_pass_for_an_effect_of_the_weights():
    """The weights get worse while the score rises: what ignores progress takes the latest."""
    best = torch.tensor([0.6, 0.2, 0.2], dtype=torch.float64)
    weights = mixes(24, d=3)
    distance = ((weights - best) ** 2).sum(1, keepdim=True)
    generator = torch.Generator().manual_seed(0)
    shuffled = distance + 0.3 * torch.rand(24, 1, generator=generator)
    weights, distance = (x[shuffled.flatten().argsort()] for x in (weights, distance))
    past = column(torch.arange(24) / 24)
    scores = 2 * past - distance
    starts = mixes(64, d=3, seed=1)
    found, deceived = (
        propose(weights, seen, scores, 1.0, starts, seed=0)
        for seen in (past, torch.ones_like(past))
    )
    assert ((found - best) ** 2).sum() < 0.02
    assert ((deceived - best) ** 2).sum() > 0.1


def test_the_level_of_an_earlier_run_does_not_matter():
    weights, past = mixes(16), column([*range(8)] * 2) / 8
    ago = column([1.0] * 8 + [0.0] * 8)
    scores = past - ((weights - BEST) ** 2).sum(1, keepdim=True)
    found = [
        propose(weights, past, scores + offset * ago, 0.9, weights, 0, ago)
        for offset in (0, 2, 512)
    ]
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=0, atol=0.05)
    assert found[0][0].item() == pytest.approx(BEST[0].item(), abs=0.1)
