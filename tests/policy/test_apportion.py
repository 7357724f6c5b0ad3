import itertools
from fractions import Fraction
from math import floor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_dvc.policy.apportion import apportion


def integers(*values):
    return torch.tensor(values, dtype=torch.int64)


def divided(quota, shares, lower, upper):
    shares = torch.tensor(shares, dtype=torch.float64)
    return apportion(quota, shares, integers(*lower), integers(*upper)).tolist()


# -- the oracle: fractions, and every guess of which parts are at which bound


def exact_parts(quota, shares, lower, upper):
    """The parts before rounding, for positive shares and bounds that allow the quota."""
    for guess in itertools.product("lsu", repeat=len(shares)):
        scaled = [k for k, where in enumerate(guess) if where == "s"]
        parts = [{"l": lo, "u": up}.get(g) for g, lo, up in zip(guess, lower, upper, strict=True)]
        rest = quota - sum(part for part in parts if part is not None)
        if not scaled:
            if rest == 0 and _common_scale_exists(guess, shares, lower, upper):
                return [Fraction(part) for part in parts]
            continue
        scale = Fraction(rest) / sum(shares[k] for k in scaled)
        if scale >= 0:
            clamped = [
                min(max(scale * share, Fraction(lo)), Fraction(up))
                for share, lo, up in zip(shares, lower, upper, strict=True)
            ]
            if sum(clamped) == quota:
                return clamped
    raise AssertionError("no scale fits")


def _common_scale_exists(guess, shares, lower, upper):
    """Whether one scale puts each part at the bound guessed for it."""
    rows = list(zip(guess, shares, lower, upper, strict=True))
    at_most = [lo / share for where, share, lo, _ in rows if where == "l"]
    at_least = [up / share for where, share, _, up in rows if where == "u"]
    return max(at_least, default=0) <= min(at_most, default=max(at_least, default=0))


def oracle(quota, shares, lower, upper):
    """Exact rounding by largest remainder; shares of zero get only what the others leave."""
    if quota >= sum(upper):
        return list(upper)
    if quota <= sum(lower):
        return list(lower)
    zero = [k for k, share in enumerate(shares) if share == 0]
    some = [k for k, share in enumerate(shares) if share > 0]
    parts = [Fraction(0)] * len(shares)
    for_some = quota - sum(lower[k] for k in zero)
    most = sum(upper[k] for k in some)
    groups = [(some, [Fraction(shares[k]) for k in some], min(for_some, most))]
    groups.append((zero, [Fraction(1)] * len(zero), quota - groups[0][2]))
    for group, proportions, part in groups:
        bounds = [lower[k] for k in group], [upper[k] for k in group]
        for k, value in zip(group, exact_parts(part, proportions, *bounds), strict=True):
            parts[k] = value
    whole = [floor(part) for part in parts]
    order = sorted(range(len(parts)), key=lambda k: (whole[k] - parts[k], k))
    for k in order[: quota - sum(whole)]:
        whole[k] += 1
    return whole


def bounds_of(draw, n_arms):
    """Bounds as separate lists; some equal, so that parts without any play occur."""
    lower = draw(st.lists(st.integers(0, 8), min_size=n_arms, max_size=n_arms))
    extra = draw(st.lists(st.integers(0, 12), min_size=n_arms, max_size=n_arms))
    return lower, [lo + more for lo, more in zip(lower, extra, strict=True)]


@st.composite
def problems(draw, shares, most_arms):
    n_arms = draw(st.integers(1, most_arms))
    lower, upper = bounds_of(draw, n_arms)
    quota = draw(st.integers(max(sum(lower) - 3, 0), sum(upper) + 3))
    return quota, draw(st.lists(shares, min_size=n_arms, max_size=n_arms)), lower, upper


@settings(max_examples=400)
@given(problems(shares=st.integers(0, 9), most_arms=4))
def test_equals_exact_arithmetic(problem):
    assert divided(*problem) == oracle(*problem)


# From the denormal to the greatest number that there is.
ANY_SHARE = st.one_of(
    st.floats(0, 1), st.floats(0, allow_infinity=False), st.sampled_from([0.0, 5e-324, 1e-200])
)


@settings(max_examples=400)
@given(problems(shares=ANY_SHARE, most_arms=8))
def test_sums_to_the_quota_within_the_bounds(problem):
    quota, _, lower, upper = problem
    parts = divided(*problem)
    assert sum(parts) == min(max(quota, sum(lower)), sum(upper))
    assert all(lo <= x <= up for x, lo, up in zip(parts, lower, upper, strict=True))


@settings(max_examples=200)
@given(problems(shares=st.integers(0, 9), most_arms=6), st.data())
def test_a_greater_share_gets_no_less(problem, data):
    quota, shares, lower, upper = problem
    arm = data.draw(st.integers(0, len(shares) - 1))
    greater = [share + (k == arm) * 3 for k, share in enumerate(shares)]
    assert divided(quota, greater, lower, upper)[arm] >= divided(*problem)[arm]


@settings(max_examples=200)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=6), st.integers(0, 60))
def test_under_equal_bounds_parts_are_ordered_like_shares(shares, quota):
    parts = divided(quota, shares, [1] * len(shares), [9] * len(shares))
    for (s, x), (t, y) in itertools.combinations(zip(shares, parts, strict=True), 2):
        # Of equal shares the first gets the odd one.
        assert x >= y if s >= t else x <= y


@given(problems(shares=st.integers(0, 9), most_arms=6), st.sampled_from([2.0**-40, 3.0, 1e12]))
def test_only_proportions_count(problem, factor):
    quota, shares, lower, upper = problem
    assert divided(quota, [factor * s for s in shares], lower, upper) == divided(*problem)


# -- by hand


def test_ties_go_to_the_lower_position():
    assert divided(43, [1] * 40, [0] * 40, [9] * 40) == [2] * 3 + [1] * 37
    assert divided(2, [0.1, 0.7, 0.1, 0.1], [0] * 4, [9, 0, 9, 9]) == [1, 0, 1, 0]


def test_the_last_bits_of_equal_shares_break_no_tie():
    third = 1 / 3
    shares = [third, third + 1e-16, third + 2e-16]
    assert divided(4, shares, [0] * 3, [9] * 3) == [2, 1, 1]


@pytest.mark.parametrize("tiny", [0.0, 1e-320, 1e-250])
def test_vanishing_shares_come_last_and_share_equally(tiny):
    assert divided(5, [tiny, 1, 0], [0] * 3, [9] * 3) == [0, 5, 0]
    assert divided(13, [tiny, 1, 0], [0] * 3, [9] * 3) == [2, 9, 2]
    assert divided(9, [tiny, 0, 0], [0] * 3, [9] * 3) == [3, 3, 3]


def test_a_small_share_is_not_a_vanishing_one():
    assert divided(13, [1e-100, 1, 0], [0] * 3, [9] * 3) == [4, 9, 0]
    assert divided(13, [3e-100, 1, 1e-100], [0] * 3, [9] * 3) == [3, 9, 1]


def test_quotas_that_the_bounds_do_not_allow():
    assert divided(3, [1, 2], [4, 1], [9, 9]) == [4, 1]
    assert divided(99, [1, 2], [4, 1], [9, 7]) == [9, 7]
    assert divided(5, [1, 2], [4, 1], [9, 7]) == [4, 1]


def test_large_quotas_stay_exact():
    parts = divided(10**12 + 1, [1, 1, 2], [0] * 3, [10**12] * 3)
    assert sum(parts) == 10**12 + 1
    assert max(abs(x - y * 10**12 / 4) for x, y in zip(parts, [1, 1, 2], strict=True)) <= 1


def test_arguments_are_left_alone():
    shares, lower, upper = torch.tensor([0.0, 2.0]), integers(1, 0), integers(3, 3)
    for quota in (0, 3, 9):
        apportion(quota, shares, lower, upper).add_(7)
    assert shares.tolist() == [0, 2]
    assert lower.tolist() == [1, 0]
    assert upper.tolist() == [3, 3]


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32, torch.float64])
def test_shares_of_any_type(dtype):
    zeros = integers(0, 0)
    parts = apportion(4, torch.tensor([3, 1], dtype=dtype), zeros, integers(9, 9))
    assert parts.dtype == torch.int64
    assert parts.tolist() == [3, 1]
