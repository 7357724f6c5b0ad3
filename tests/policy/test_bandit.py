import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_dvc.errors import ConfigurationError, StateError
from lightning_dvc.policy.bandit import SourceBandit

NAN = torch.nan


def integers(*values):
    return torch.tensor(values, dtype=torch.int64)


def index_by_hand(rounds, n_arms, discount, exploration):
    """Discounted UCB as written in the paper: every past round is summed anew."""
    weight = [discount ** (len(rounds) - 1 - i) for i in range(len(rounds))]
    index = []
    counts = [
        sum(w for w, r in zip(weight, rounds, strict=True) if not math.isnan(r[k]))
        for k in range(n_arms)
    ]
    for k in range(n_arms):
        if counts[k] == 0:
            index.append(math.inf)
            continue
        total = sum(w * r[k] for w, r in zip(weight, rounds, strict=True) if not math.isnan(r[k]))
        width = math.sqrt(2 * math.log(sum(counts) + 1) / counts[k])
        index.append(total / counts[k] + exploration * width)
    return index


reward = st.one_of(st.floats(0, 1), st.just(NAN))


@settings(deadline=None)
@given(
    rounds=st.lists(st.tuples(reward, reward, reward), max_size=12),
    discount=st.sampled_from([1.0, 0.9, 0.5]),
    exploration=st.sampled_from([0.0, 0.05, 1.0]),
)
def test_index_equals_the_sum_over_all_rounds(rounds, discount, exploration):
    bandit = SourceBandit(3, discount, exploration)
    for rewards in rounds:
        bandit.update(torch.tensor(rewards, dtype=torch.float64))
    expected = index_by_hand(rounds, 3, discount, exploration)
    torch.testing.assert_close(bandit.index(), torch.tensor(expected, dtype=torch.float64))


def test_forgotten_arm_counts_as_never_observed():
    bandit = SourceBandit(2, discount=0.01)
    bandit.update(torch.tensor([0.5, 0.5]))
    for _ in range(200):
        bandit.update(torch.tensor([0.5, NAN]))
    assert bandit.index()[1] == torch.inf


def ucb1_mean_regret(means, horizon, runs, seed):
    """Mean regret of one pull of the greatest index per round, all runs at once."""
    generator = torch.Generator().manual_seed(seed)
    means = torch.tensor(means, dtype=torch.float64)
    counts = torch.zeros(runs, len(means), dtype=torch.float64)
    sums = torch.zeros_like(counts)
    regret = torch.zeros(runs, dtype=torch.float64)
    for t in range(horizon):
        # sqrt keeps 0/0 out: an arm never pulled has an infinite index.
        index = sums / counts.clamp(min=1) + (2 * math.log(t + 1) / counts.clamp(min=1)).sqrt()
        arm = torch.where(counts > 0, index, torch.inf).argmax(1, keepdim=True)
        p = means.expand_as(counts).gather(1, arm)
        drawn = (torch.rand(runs, 1, generator=generator, dtype=torch.float64) < p).double()
        counts.scatter_add_(1, arm, torch.ones_like(drawn))
        sums.scatter_add_(1, arm, drawn)
        regret += means.max() - p.squeeze(1)
    return regret.mean().item()


def bound(means, horizon):
    """Theorem 6.1 (eq 14)."""
    gaps = [max(means) - mean for mean in means if mean < max(means)]
    return sum(8 * math.log(horizon) / gap + (1 + math.pi**2 / 3) * gap for gap in gaps)


def test_the_bandit_pulls_like_the_vectorised_ucb1():
    """Ties the class to the simulation of the bound: same index at every step of a run."""
    means = torch.tensor([0.9, 0.5, 0.3])
    generator = torch.Generator().manual_seed(5)
    bandit = SourceBandit(3, exploration=1.0)
    counts, sums = torch.zeros(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    for t in range(300):
        index = sums / counts.clamp(min=1) + (2 * math.log(t + 1) / counts.clamp(min=1)).sqrt()
        index = torch.where(counts > 0, index, torch.inf)
        torch.testing.assert_close(bandit.index(), index)
        arm = int(bandit.index().argmax())
        rewards = torch.full((3,), NAN)
        rewards[arm] = float(torch.rand((), generator=generator) < means[arm])
        bandit.update(rewards)
        counts[arm] += 1
        sums[arm] += rewards[arm]


@pytest.mark.parametrize("means", [(0.9, 0.6), (0.5, 0.45, 0.2), (0.8, 0.7, 0.6, 0.5, 0.1)])
def test_regret_stays_under_the_bound_and_grows_slower_than_time(means):
    regrets = {T: ucb1_mean_regret(means, T, runs=200, seed=T) for T in (100, 1_000, 10_000)}
    for horizon, regret in regrets.items():
        assert regret < bound(means, horizon)
    assert regrets[1_000] < 10 * regrets[100] * 0.8
    assert regrets[10_000] < 10 * regrets[1_000] * 0.6


def rounds_until_it_leads_again(discount):
    """Arm 0 is the best for 500 rounds, worthless for 500, then the best again."""
    bandit = SourceBandit(2, discount, exploration=0.3)
    for t in range(1_300):
        worth = torch.tensor([0.9 if t < 500 or t >= 1_000 else 0.1, 0.5])
        arm = int(bandit.index().argmax())
        if t >= 1_000 and arm == 0 and bandit.index()[0] - bandit.index()[1] > 0.1:
            return t - 1_000
        bandit.update(torch.where(torch.arange(2) == arm, worth, NAN))
    return None


def test_discounted_bandit_finds_an_arm_again_within_100_rounds_and_ucb1_not_within_300():
    assert rounds_until_it_leads_again(discount=0.95) <= 100
    assert rounds_until_it_leads_again(discount=1.0) is None


@st.composite
def problems(draw):
    k = draw(st.integers(1, 6))
    numbers = st.lists(st.integers(0, 40), min_size=k, max_size=k)
    rewards = draw(st.lists(reward, min_size=k, max_size=k))
    quota = draw(st.integers(0, 150))
    temperature = draw(st.sampled_from([1e-6, 0.03, 1.0]))
    stock, floor, ceiling = (torch.tensor(draw(numbers)) for _ in range(3))
    return rewards, temperature, quota, stock, floor, ceiling


def prepared(rewards, temperature=0.03):
    bandit = SourceBandit(len(rewards), temperature=temperature)
    bandit.update(torch.tensor(rewards, dtype=torch.float64))
    return bandit


@settings(max_examples=300, deadline=None)
@given(problems())
def test_allocation_keeps_to_quota_and_bounds(problem):
    rewards, temperature, quota, stock, floor, ceiling = problem
    bandit = prepared(rewards, temperature)
    parts = bandit.allocate(quota, stock, floor, ceiling)
    upper = torch.minimum(stock, ceiling)
    lower = torch.minimum(floor, upper)
    assert parts.dtype == torch.int64
    assert parts.sum() == min(quota, upper.sum())
    assert (parts <= upper).all()
    assert (parts >= 0).all()
    if quota >= lower.sum():
        assert (parts >= lower).all()
    else:
        assert (parts <= lower).all()
    assert torch.equal(parts, bandit.allocate(quota, stock, floor, ceiling))


@settings(max_examples=200, deadline=None)
@given(problems())
def test_allocation_is_a_rounding_of_clamped_proportions(problem):
    """The oracle finds the scale by bisection."""
    rewards, _, quota, stock, floor, ceiling = problem
    rewards = [0.5 if math.isnan(r) else r for r in rewards]
    bandit = prepared(rewards, temperature=0.5)
    upper = torch.minimum(stock, ceiling)
    lower = torch.minimum(floor, upper)
    if not lower.sum() < quota < upper.sum():
        return
    shares = torch.softmax(bandit.index() / 0.5, 0)
    low, high = 0.0, 1e6
    for _ in range(200):
        middle = (low + high) / 2
        exact = torch.clamp(middle * shares, lower.double(), upper.double())
        low, high = (middle, high) if exact.sum() < quota else (low, middle)
    parts = bandit.allocate(quota, stock, floor, ceiling)
    assert (parts - exact).abs().max() < 1 + 1e-6


def test_allocation_is_in_proportion_to_the_softmax():
    bandit = SourceBandit(2, exploration=0.0, temperature=0.1)
    bandit.update(torch.tensor([0.5, 0.5 - 0.1 * math.log(3)], dtype=torch.float64))
    assert bandit.allocate(100, integers(999, 999)).tolist() == [75, 25]


def test_ties_go_to_the_lower_arm():
    assert prepared([0.5] * 4).allocate(6, integers(9, 9, 9, 9)).tolist() == [2, 2, 1, 1]


def test_what_a_full_arm_leaves_goes_to_the_others():
    bandit = prepared([0.9, 0.5, 0.5])
    assert bandit.allocate(30, integers(10, 50, 50)).tolist() == [10, 10, 10]


def test_unobserved_arms_come_first_and_share_equally():
    bandit = prepared([0.9, NAN, NAN])
    stock = integers(50, 50, 50)
    assert bandit.allocate(20, stock, floor=integers(2, 0, 0)).tolist() == [2, 9, 9]
    assert bandit.allocate(20, stock, ceiling=integers(50, 3, 4)).tolist() == [13, 3, 4]
    assert SourceBandit(3).allocate(9, stock).tolist() == [3, 3, 3]


def test_floors_beyond_the_quota_are_shared_in_proportion():
    parts = prepared([0.9, 0.1]).allocate(6, integers(50, 50), floor=integers(4, 8))
    assert parts.tolist() == [2, 4]


@settings(deadline=None)
@given(st.lists(st.tuples(reward, reward), max_size=6), st.lists(st.tuples(reward, reward)))
def test_state_round_trip_goes_on_alike(before, after):
    bandit, other = SourceBandit(2, discount=0.9), SourceBandit(2, discount=0.9)
    for rewards in before:
        bandit.update(torch.tensor(rewards, dtype=torch.float64))
    other.load_state_dict(bandit.state_dict())
    for rewards in after:
        bandit.update(torch.tensor(rewards, dtype=torch.float64))
        other.update(torch.tensor(rewards, dtype=torch.float64))
    assert torch.equal(bandit.index(), other.index())


def test_state_is_a_copy_and_loads_with_weights_only(tmp_path):
    bandit = prepared([0.3, NAN])
    torch.save(bandit.state_dict(), tmp_path / "state.pt")
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    bandit.update(torch.tensor([0.9, 0.9]))
    other = SourceBandit(2)
    other.load_state_dict(saved)
    assert torch.equal(other.index(), prepared([0.3, NAN]).index())


def test_state_of_other_sources_is_refused():
    with pytest.raises(StateError, match="2 arms"):
        SourceBandit(2).load_state_dict(SourceBandit(3).state_dict())


@pytest.mark.parametrize("bad", [[1.1, 0.5], [-0.1, 0.5], [torch.inf, 0.5], [0.5]])
def test_bad_rewards_are_refused_and_change_nothing(bad):
    bandit = SourceBandit(2)
    with pytest.raises(ConfigurationError):
        bandit.update(torch.tensor(bad))
    assert bandit.index().isinf().all()


@pytest.mark.parametrize(
    "bad",
    [{"n_arms": 0}, {"discount": 0.0}, {"discount": 1.1}, {"exploration": -1}, {"temperature": 0}],
)
def test_bad_settings_are_refused(bad):
    with pytest.raises(ConfigurationError, match=next(iter(bad))):
        SourceBandit(**{"n_arms": 2, **bad})


def test_bad_limits_are_refused():
    bandit = SourceBandit(2)
    with pytest.raises(ConfigurationError, match="stock"):
        bandit.allocate(1, integers(1))
    with pytest.raises(ConfigurationError, match="floor"):
        bandit.allocate(1, integers(1, 1), floor=integers(-1, 0))
    with pytest.raises(ConfigurationError, match="ceiling"):
        bandit.allocate(1, integers(1, 1), ceiling=torch.tensor([0.5, 1.0]))
    with pytest.raises(ConfigurationError, match="quota"):
        bandit.allocate(-1, integers(1, 1))


def test_argmax_gives_all_to_the_best_arms_within_their_bounds():
    bandit = SourceBandit(3, exploration=0.0, allocation="argmax")
    bandit.update(torch.tensor([0.5, 0.9, 0.7]))
    stock = torch.tensor([50, 4, 50])
    assert bandit.allocate(10, stock).tolist() == [0, 4, 6]
    assert bandit.allocate(10, stock, floor=torch.tensor([2, 0, 0])).tolist() == [2, 4, 4]
    assert bandit.allocate(200, stock).tolist() == [50, 4, 50]
    with pytest.raises(ConfigurationError, match="'softmax' or 'argmax'"):
        SourceBandit(2, allocation="best")
