import logging
import math
import random
import statistics

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_dvc.errors import ConfigurationError, StateError
from lightning_dvc.policy.weights import BayesianWeights, FixedWeights
from lightning_dvc.records import METRICS

BEST = torch.tensor([0.05, 0.35, 0.1, 0.1, 0.35, 0.05], dtype=torch.float64)


def distance(weights):
    return float(((weights - BEST) ** 2).sum())


def response(weights, progress, generator):
    """A validation score: a quadratic in the weights under a much greater trend, and noise."""
    noise = 0.005 * torch.randn((), generator=generator).item()
    return 0.5 + 0.4 * (1 - math.exp(-4 * progress)) - 0.3 * distance(weights) + noise


def distances(seed, asks):
    """Squared distance from the best weights of each ask."""
    policy = BayesianWeights(seed=seed)
    generator = torch.Generator().manual_seed(seed)
    asked = []
    for i in range(asks):
        weights = policy.ask(i / asks)
        score = response(weights, i / asks, generator)
        policy.tell(weights, i / asks, score)
        asked.append(distance(weights))
    return asked


def random_distances(seed, asks):
    generator = np.random.default_rng(seed)
    return [distance(torch.from_numpy(w)) for w in generator.dirichlet([1] * 6, size=asks)]


def taught(n, seed=0, **settings):
    policy = BayesianWeights(seed=seed, **settings)
    generator = torch.Generator().manual_seed(seed)
    for i in range(n):
        weights = policy.ask(i / 100)
        policy.tell(weights, i / 100, response(weights, i / 100, generator))
    return policy


def assert_on_simplex(weights):
    assert weights.shape == (6,)
    assert weights.dtype == torch.float64
    assert weights.device.type == "cpu"
    assert weights.isfinite().all()
    assert (weights >= 0).all()
    assert weights.sum().item() == pytest.approx(1, abs=1e-12)


# -- fixed


def test_fixed_weights_default_to_equal():
    torch.testing.assert_close(FixedWeights().ask(0.3), torch.full((6,), 1 / 6).double())


@settings(deadline=None)
@given(st.lists(st.floats(0, 1e6), min_size=6, max_size=6).filter(lambda w: sum(w) > 1e-6))
def test_fixed_weights_by_name_or_by_position(numbers):
    weights = FixedWeights(numbers).ask(0.0)
    assert_on_simplex(weights)
    by_name = FixedWeights(dict(reversed(list(zip(METRICS, numbers, strict=True)))))
    assert torch.equal(by_name.ask(1.0), weights)
    assert int(weights.argmax()) == numbers.index(max(numbers))


def test_fixed_weights_learn_nothing():
    policy = FixedWeights([1, 2, 3, 4, 5, 6])
    before = policy.ask(0.0)
    policy.ask(0.0).zero_()
    policy.tell(before, 0.5, math.nan)
    other = FixedWeights([1, 2, 3, 4, 5, 6])
    other.load_state_dict(policy.state_dict())
    assert torch.equal(other.ask(1.0), before)


@pytest.mark.parametrize(
    "bad",
    [
        [1, 1, 1],
        [0] * 6,
        [1, 1, 1, 1, 1, -1],
        [1, 1, 1, 1, 1, math.nan],
        [1, 1, 1, 1, 1, math.inf],
        {"quality": 0},
        {"beauty": 1},
        {},
    ],
)
def test_fixed_weights_refuse_what_is_no_mix(bad):
    with pytest.raises(ConfigurationError):
        FixedWeights(bad)


# -- Bayesian: asks without a model


def test_first_ask_is_equal_and_the_next_differ():
    policy = BayesianWeights(seed=3)
    asks = torch.stack([policy.ask(0.0) for _ in range(6)])
    torch.testing.assert_close(asks[0], torch.full((6,), 1 / 6).double())
    assert len(asks.unique(dim=0)) == 6
    for weights in asks:
        assert_on_simplex(weights)


def test_draws_are_uniform_on_the_simplex():
    policy = BayesianWeights()
    policy.ask(0.0)
    asks = torch.stack([policy.ask(0.0) for _ in range(512)])
    torch.testing.assert_close(asks.mean(0), torch.full((6,), 1 / 6).double(), atol=0.01, rtol=0)
    # Beta(1, 5): the distribution of one coordinate of a uniform point of the 6-simplex.
    for level in (0.05, 0.2, 0.5):
        share = (asks <= level).double().mean().item()
        assert share == pytest.approx(1 - (1 - level) ** 5, abs=0.02)


def test_seeds_differ():
    asks = []
    for seed in range(3):
        policy = BayesianWeights(seed=seed)
        policy.ask(0.0)
        asks.append(policy.ask(0.0))
    assert len(torch.stack(asks).unique(dim=0)) == 3


def without_model(n):
    """What the same asks yield while nothing is known."""
    policy = BayesianWeights()
    return [policy.ask(0.5) for _ in range(n)][-1]


@pytest.mark.parametrize("scores", [[0.5] * 8, [1e308, -1e308] * 4, [0.0, math.ulp(0)] * 4])
def test_degenerate_scores_fall_back_to_a_draw(scores):
    policy = BayesianWeights()
    for score in scores:
        policy.tell(policy.ask(0.5), 0.5, score)
    assert torch.equal(policy.ask(0.5), without_model(len(scores) + 1))


def test_failing_fit_falls_back_to_a_draw_and_says_so(monkeypatch, caplog):
    policy = taught(8)

    def fail(*args, **kwargs):
        raise RuntimeError("not positive definite")

    monkeypatch.setattr("lightning_dvc.policy.surrogate.fit_gpytorch_mll", fail)
    with caplog.at_level(logging.INFO):
        weights = policy.ask(0.5)
    assert torch.equal(weights, without_model(9))
    assert "not positive definite" in caplog.text


def test_scores_that_are_not_finite_are_left_out():
    policy = BayesianWeights()
    for score in (math.nan, math.inf, -math.inf):
        policy.tell(policy.ask(0.0), 0.0, score)
    assert policy.state_dict()["observations"] == []


# -- Bayesian: asks of the model


def test_ask_of_the_model_is_deterministic_and_needs_nothing_but_seed_count_and_observations():
    policy = taught(8)
    other = BayesianWeights(seed=0)
    other.load_state_dict(policy.state_dict())
    torch.manual_seed(99)
    first = policy.ask(0.5)
    torch.manual_seed(7)
    assert torch.equal(other.ask(0.5), first)
    assert_on_simplex(first)
    assert not torch.equal(first, without_model(9))


def test_resumed_run_asks_what_the_uninterrupted_one_asks(tmp_path):
    policy = taught(7)
    torch.save(policy.state_dict(), tmp_path / "state.pt")
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    resumed = BayesianWeights(seed=0)
    resumed.load_state_dict(saved)
    for progress in (0.3, 0.4):
        weights = policy.ask(progress)
        assert torch.equal(resumed.ask(progress), weights)
        policy.tell(weights, progress, 0.8)
        resumed.tell(weights, progress, 0.8)


def test_global_generators_are_untouched():
    policy = taught(8)
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002 - the stream guarded
    policy.ask(0.5)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()  # noqa: NPY002 - the stream guarded
    assert random.getstate() == before[2]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_works_where_callbacks_run(mode):
    expected = taught(8).ask(0.5)
    with mode():
        weights = taught(8).ask(0.5)
    assert torch.equal(weights, expected)
    assert not weights.is_inference()
    assert not weights.requires_grad


def test_only_the_most_recent_observations_are_kept():
    policy = BayesianWeights(max_observations=6)
    for i in range(10):
        policy.tell(torch.full((6,), 1 / 6), 0.1 * i, float(i))
    assert [row[-1] for row in policy.state_dict()["observations"]] == [4, 5, 6, 7, 8, 9]


def test_many_repetitions_of_one_point_do_not_break_the_model():
    policy = BayesianWeights()
    equal = torch.full((6,), 1 / 6)
    for i in range(20):
        policy.tell(equal, i / 20, 0.5 + 0.01 * i)
    assert_on_simplex(policy.ask(1.0))


def test_finds_planted_weights_under_a_rising_trend():
    asks = 20
    found = [distances(seed, asks) for seed in (0, 1)]
    at_random = [random_distances(seed, asks) for seed in range(201)]
    typical = statistics.median(min(run) for run in at_random)
    assert all(min(run) < typical for run in found)
    # Asks are used for training, so the late ones must be good, not the luckiest one only.
    assert statistics.mean(d for run in found for d in run[-5:]) < 0.6 * statistics.mean(
        d for run in at_random for d in run
    )


@pytest.mark.slow
def test_finds_planted_weights_on_many_seeds():
    asks, seeds = 40, range(8)
    found = [distances(seed, asks) for seed in seeds]
    at_random = [random_distances(seed, asks) for seed in range(201)]
    typical = statistics.median(min(run) for run in at_random)
    assert statistics.median(min(run) for run in found) < typical
    late = statistics.mean(d for run in found for d in run[-10:])
    assert late < 0.3 * statistics.mean(d for run in at_random for d in run)


@pytest.mark.slow
@settings(deadline=None, max_examples=30)
@given(
    st.lists(
        st.tuples(st.floats(0, 1), st.floats(allow_nan=False, allow_infinity=False)),
        min_size=6,
        max_size=12,
    )
)
def test_any_finite_scores_give_weights(told):
    policy = BayesianWeights()
    for progress, score in told:
        policy.tell(policy.ask(progress), progress, score)
    assert_on_simplex(policy.ask(0.5))


# -- what is refused


@pytest.mark.parametrize("progress", [-0.1, 1.1, math.nan])
def test_progress_outside_its_range_is_refused(progress):
    with pytest.raises(ConfigurationError, match="progress"):
        BayesianWeights().ask(progress)
    with pytest.raises(ConfigurationError, match="progress"):
        BayesianWeights().tell(torch.full((6,), 1 / 6), progress, 0.5)


@pytest.mark.parametrize("weights", [torch.ones(6), torch.ones(3) / 3, torch.full((6,), math.nan)])
def test_weights_off_the_simplex_are_refused(weights):
    with pytest.raises(ConfigurationError, match="sum 1"):
        BayesianWeights().tell(weights, 0.5, 0.5)


@pytest.mark.parametrize("bad", [{"seed": -1}, {"initial": 1}, {"max_observations": 5}])
def test_bad_settings_are_refused(bad):
    with pytest.raises(ConfigurationError, match=next(iter(bad))):
        BayesianWeights(**bad)


def test_state_of_another_kind_is_refused():
    with pytest.raises(StateError, match="8 numbers"):
        BayesianWeights().load_state_dict({"asks": 1, "observations": [[0.5, 0.5]]})
