import json
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
from lightning_dvc.policy.bayesian import BayesianWeights
from lightning_dvc.policy.surrogate import FitError
from lightning_dvc.policy.weights import FixedWeights
from lightning_dvc.records import METRICS

BEST = torch.tensor([0.05, 0.35, 0.1, 0.1, 0.35, 0.05], dtype=torch.float64)


def distance(weights):
    return float(((weights - BEST) ** 2).sum())


def regret(weights):
    """How far the noise-free response is below the greatest one, at any progress."""
    return 0.3 * distance(weights)


def trend(progress):
    """About 80 times the noise."""
    return 0.4 * (1 - math.exp(-4 * progress))


def response(weights, progress, generator):
    """A validation score: a quadratic in the weights under a much greater trend, and noise."""
    noise = 0.005 * torch.randn((), generator=generator).item()
    return 0.5 + trend(progress) - regret(weights) + noise


def unlimited(seed=0, **settings):
    """A policy whose answers do not depend on the clock."""
    return BayesianWeights(seed=seed, max_share=None, **settings)


def play(policy, asks, seed=0, of=30, score=response):
    """The answers to the first asks of a training with ``of`` rounds."""
    generator = torch.Generator().manual_seed(seed)
    answers = []
    for progress in [i / of for i in range(asks)]:
        answers.append(policy.ask(progress))
        policy.tell(answers[-1], progress, score(answers[-1], progress, generator))
    return answers


def regrets(seed, asks):
    return [regret(weights) for weights in play(unlimited(seed), asks, seed, of=asks)]


def random_weights(seed, asks):
    return torch.from_numpy(np.random.default_rng(seed).dirichlet([1] * 6, size=asks))


def random_regrets(seed, asks):
    return [regret(weights) for weights in random_weights(seed, asks)]


def taught(n, seed=0, **settings):
    policy = unlimited(seed, **settings)
    play(policy, n, seed, of=100)
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


@given(st.lists(st.floats(0, 1e6), min_size=6, max_size=6).filter(lambda w: sum(w) > 1e-6))
def test_fixed_weights_by_name_or_by_position(numbers):
    weights = FixedWeights(numbers).ask(0.0)
    assert_on_simplex(weights)
    by_name = FixedWeights(dict(reversed(list(zip(METRICS, numbers, strict=True)))))
    assert torch.equal(by_name.ask(1.0), weights)
    # Numbers that differ in their last bits may give weights that do not.
    assert weights[numbers.index(max(numbers))] == weights.max()


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
    policy = unlimited()
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
    other = unlimited()
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
    resumed = unlimited()
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
    policy = unlimited()
    equal = torch.full((6,), 1 / 6)
    for i in range(20):
        policy.tell(equal, i / 20, 0.5 + 0.01 * i)
    assert_on_simplex(policy.ask(1.0))


# Simple regret: of the best answer so far, by the noise-free response; the same for random search.


def test_finds_planted_weights_under_a_rising_trend():
    found = [regrets(seed, asks=20) for seed in range(2)]
    at_random = [random_regrets(seed, 20) for seed in range(201)]
    assert statistics.mean(map(min, found)) < statistics.median(map(min, at_random)) / 2
    # Asks are used for training, so the late ones must be good, not the luckiest one only.
    late = statistics.mean(statistics.mean(run[-5:]) for run in found)
    assert late < 0.85 * statistics.mean(map(statistics.mean, at_random))


@pytest.mark.slow
def test_simple_regret_after_30_asks_is_a_third_of_random_search():
    found = [regrets(seed, 30) for seed in range(20)]
    at_random = [random_regrets(seed, 30) for seed in range(20)]
    assert statistics.median(map(min, found)) <= statistics.median(map(min, at_random)) / 3
    late = statistics.median(statistics.mean(run[-5:]) for run in found)
    assert late < 0.4 * statistics.mean(map(statistics.mean, at_random))


def test_a_trend_without_an_effect_of_weights_does_not_gather_the_asks():
    def no_effect(weights, progress, generator):
        return response(BEST, progress, generator)

    late = torch.stack(play(unlimited(), 20, of=20, score=no_effect)[10:])
    typical = statistics.mean(spread(random_weights(seed, 10)) for seed in range(20))
    assert spread(late) > typical / 2


def spread(weights):
    return float(weights.var(0).sum())


@pytest.mark.slow
@settings(max_examples=30)
@given(
    st.lists(
        st.tuples(st.floats(0, 1), st.floats(allow_nan=False, allow_infinity=False)),
        min_size=6,
        max_size=12,
    )
)
def test_any_finite_scores_give_weights(told):
    policy = unlimited()
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


@pytest.mark.parametrize(
    "bad",
    [
        {"seed": -1},
        {"initial": 1},
        {"max_observations": 5},
        {"max_share": 0.0},
        {"max_share": 1.1},
        {"max_share": math.nan},
    ],
)
def test_bad_settings_are_refused(bad):
    with pytest.raises(ConfigurationError, match=next(iter(bad))):
        BayesianWeights(**bad)


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("observations", [[0.5, 0.5]], "8 numbers"),
        ("observations", [[0.5] * 6 + [0.1, 0.7]], "simplex"),
        ("earlier", [[[0.5, 0.5]]], "8 numbers"),
    ],
)
def test_state_of_another_kind_is_refused(part, value, message):
    with pytest.raises(StateError, match=message):
        BayesianWeights().load_state_dict({**BayesianWeights().state_dict(), part: value})
    with pytest.raises(StateError, match="clock"):
        BayesianWeights().load_state_dict({"asks": 1, "observations": []})


# -- the share of time


class FakeTime:
    """A clock that stands still, but for the model, which takes ``cost`` seconds."""

    def __init__(self, monkeypatch):
        self.now, self.cost, self.fails, self.updates = 100.0, 2.0, False, 0
        monkeypatch.setattr("lightning_dvc.timing.time.perf_counter", lambda: self.now)
        monkeypatch.setattr("lightning_dvc.policy.surrogate.propose", self.propose)

    def propose(self, weights, *rest):
        self.now += self.cost
        if self.fails:
            raise FitError("planted")
        self.updates += 1
        return random_weights(self.updates, 1)[0]


@pytest.fixture
def clock(monkeypatch):
    return FakeTime(monkeypatch)


def told(n, **settings):
    policy = BayesianWeights(**settings)
    for i in range(n):
        policy.tell(random_weights(i, 1)[0], 0.0, float(i))
    return policy


def test_updates_are_made_less_often_where_they_would_take_more_than_their_share(clock):
    policy = told(6, max_share=0.1)
    first = policy.ask(0.0)  # its cost is not known before
    clock.now = 139.9
    assert torch.equal(policy.ask(0.1), first)
    clock.now = 140.0  # (2 s spent + 2 s to come) / 40 s
    assert not torch.equal(policy.ask(0.2), first)
    assert policy.figures == {
        "optimiser_seconds": 4.0,
        "optimiser_left_out": 1.0,
        "optimiser_observations": 6.0,
    }


def test_without_a_limit_no_update_is_left_out(clock):
    policy = told(6, max_share=None)
    for _ in range(5):
        policy.ask(0.0)
    assert clock.updates == 5
    assert policy.figures["optimiser_left_out"] == 0


def test_without_an_answer_to_repeat_it_is_a_draw(clock):
    policy = told(6)
    clock.fails = True
    for number in range(3):
        assert torch.equal(policy.ask(0.0), without_model(number + 1))
    assert policy.figures["optimiser_left_out"] == 2


def test_time_goes_on_after_a_resume_but_does_not_count_in_between(clock, tmp_path):
    policy = told(6, max_share=0.1)
    first = policy.ask(0.0)
    clock.now = 130.0
    torch.save(policy.state_dict(), tmp_path / "state.pt")
    clock.now = 5.0  # another process
    resumed = BayesianWeights(max_share=0.1)
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    clock.now = 14.9
    assert torch.equal(resumed.ask(0.1), first)
    clock.now = 15.0
    assert not torch.equal(resumed.ask(0.1), first)
    assert resumed.figures["optimiser_seconds"] == 4.0
    assert resumed.figures["optimiser_left_out"] == 1.0


@settings(max_examples=50)
@given(
    st.floats(0.01, 1),
    st.lists(st.tuples(st.floats(0, 100), st.floats(0, 10), st.booleans()), max_size=20),
)
def test_the_share_is_exceeded_by_no_more_than_an_update_got_longer(share, steps):
    with pytest.MonkeyPatch.context() as monkeypatch:
        clock = FakeTime(monkeypatch)
        policy, longest = told(6, max_share=share), 0.0
        for wait, cost, resume in steps:
            clock.now += wait
            clock.cost = cost
            policy.ask(0.0)
            longest = max(longest, cost)
            if resume:
                state, policy = policy.state_dict(), BayesianWeights(max_share=share)
                policy.load_state_dict(state)
            elapsed = clock.now - 100.0 - steps[0][0]
            assert policy.figures["optimiser_seconds"] <= share * elapsed + longest + 1e-6


# -- observations of earlier runs


def level(offset, best=BEST):
    def score(weights, progress, generator):
        noise = 0.005 * torch.randn((), generator=generator).item()
        return offset + 0.8 * trend(progress) - 0.3 * float(((weights - best) ** 2).sum()) + noise

    return score


def saved(path, offset=0.0):
    """A file of one run of 24 observations, at weights drawn at random."""
    policy, generator = BayesianWeights(), torch.Generator().manual_seed(5)
    for i, weights in enumerate(random_weights(3, 24)):
        policy.tell(weights, i / 24, level(offset)(weights, i / 24, generator))
    policy.save(path)
    return path


def test_a_file_tells_what_its_numbers_are(tmp_path):
    content = json.loads(saved(tmp_path / "run.json").read_text())
    assert content["columns"] == [*METRICS, "progress", "score"]
    assert [len(run) for run in content["runs"]] == [24]
    # One observation a line.
    assert len((tmp_path / "run.json").read_text().splitlines()) > 24


def test_a_warm_start_is_better_from_the_first_ask_on_whatever_the_level(tmp_path):
    warm = unlimited(warm_start=saved(tmp_path / "run.json"))
    found = play(warm, 4)
    cold = play(unlimited(), 4)
    assert statistics.mean(map(regret, found)) < 0.4 * statistics.mean(map(regret, cold))
    elsewhere = unlimited(warm_start=saved(tmp_path / "other.json", offset=10.0))
    for mine, theirs in zip(play(elsewhere, 2), found, strict=False):
        assert regret(mine) == pytest.approx(regret(theirs), abs=0.01)


def test_a_chain_of_runs_keeps_them_apart(tmp_path):
    first, second = saved(tmp_path / "1.json"), tmp_path / "2.json"
    policy = BayesianWeights(warm_start=first)
    for i in range(3):
        policy.tell(BEST, i / 3, 0.5)
    policy.save(second)
    runs = json.loads(second.read_text())["runs"]
    assert [len(run) for run in runs] == [24, 3]
    assert runs[0] == json.loads(first.read_text())["runs"][0]
    third = BayesianWeights(warm_start=second)
    assert [len(run) for run in third.state_dict()["earlier"]] == [24, 3]
    assert third.state_dict()["observations"] == []
    third.save(second)
    assert json.loads(second.read_text())["runs"] == runs


def test_observations_of_the_oldest_run_are_dropped_first(tmp_path):
    policy = told(3)
    policy.save(tmp_path / "1.json")
    policy = BayesianWeights(warm_start=tmp_path / "1.json")
    policy.tell(BEST, 0.0, 10.0)
    policy.save(tmp_path / "2.json")

    def scores(policy):
        state = policy.state_dict()
        return [[row[-1] for row in run] for run in [*state["earlier"], state["observations"]]]

    policy = BayesianWeights(warm_start=tmp_path / "2.json", initial=2, max_observations=3)
    assert scores(policy) == [[1, 2], [10], []]
    policy.tell(BEST, 0.0, 20.0)
    assert scores(policy) == [[2], [10], [20]]
    for score in (21.0, 22.0, 23.0):
        policy.tell(BEST, 0.0, score)
    assert scores(policy) == [[21, 22, 23]]


def test_a_resumed_run_asks_the_same_after_a_warm_start(tmp_path):
    policy = unlimited(warm_start=saved(tmp_path / "run.json"))
    play(policy, 2)
    torch.save(policy.state_dict(), tmp_path / "state.pt")
    resumed = unlimited()
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert torch.equal(resumed.ask(0.4), policy.ask(0.4))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("quality, relevance", "cannot be read"),
        ('{"columns": COLUMNS}', "columns"),
        ("[]", "has None"),
        ('{"columns": ["quality", "score"], "runs": []}', "stability"),
        ('{"columns": COLUMNS, "runs": [[[0.5, 0.5]]]}', "8 numbers"),
        ('{"columns": COLUMNS, "runs": [[[1, 0, 0, 0, 0, 0, 0.5, NaN]]]}', "finite"),
    ],
)
def test_files_of_another_kind_are_refused(tmp_path, text, message):
    path = tmp_path / "run.json"
    path.write_text(text.replace("COLUMNS", json.dumps([*METRICS, "progress", "score"])))
    with pytest.raises(StateError, match=message):
        BayesianWeights(warm_start=path)
    with pytest.raises(StateError, match="cannot be read"):
        BayesianWeights(warm_start=tmp_path / "none.json")
