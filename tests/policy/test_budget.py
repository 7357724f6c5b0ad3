import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from lightning_dvc.policy.budget import (
    arm_bounds,
    bounds_by_yield,
    round_quota,
    warm_up_counts,
)


@given(st.integers(1, 10_000), st.integers(1, 40), st.data())
def test_quotas_spend_the_budget_evenly(budget, n_rounds, data):
    selected = data.draw(st.integers(0, budget))
    quotas = []
    for number in range(1, n_rounds + 1):
        quotas.append(round_quota(budget, selected, number, n_rounds))
        selected += quotas[-1]
    assert selected == budget
    assert max(quotas) - min(quotas) <= 1


def test_what_one_round_leaves_over_the_next_ones_make_up_for():
    assert round_quota(100, 40, number=4, n_rounds=5) == 30
    assert round_quota(100, 100, number=5, n_rounds=5) == 0


SHARE = st.floats(0, 1)


@given(st.lists(st.tuples(st.integers(1, 50), SHARE, SHARE), min_size=1, max_size=5), st.data())
def test_warm_up_keeps_to_stock_budget_and_shares(sources, data):
    stock = torch.tensor([size for size, _, _ in sources])
    shares = [(min(a, b) / len(sources), max(a, b)) for _, a, b in sources]
    assume(sum(high for _, high in shares) >= 1)
    budget = data.draw(st.integers(1, int(stock.sum())))
    counts = warm_up_counts(budget, data.draw(st.floats(0.01, 1)), stock, shares)
    total = int(counts.sum())
    assert total <= budget
    assert (counts <= stock).all()
    quota_at_most = max(budget, len(sources))
    for count, (_, high) in zip(counts.tolist(), shares, strict=True):
        assert count <= high * quota_at_most + 1e-6


def test_every_source_gives_one_to_the_warm_up_if_the_budget_allows():
    free = [(0.0, 1.0)] * 3
    assert warm_up_counts(100, 0.01, torch.tensor([9, 9, 9]), free).tolist() == [1, 1, 1]
    assert warm_up_counts(2, 0.01, torch.tensor([9, 9, 9]), free).tolist() == [1, 1, 0]


@given(
    st.lists(st.tuples(st.integers(0, 20), SHARE, SHARE), min_size=1, max_size=5),
    st.integers(0, 100),
)
def test_bounds_are_the_least_and_most_that_keep_the_shares(sources, more):
    counts = torch.tensor([count for count, _, _ in sources])
    shares = [(min(a, b), max(a, b)) for _, a, b in sources]
    total = int(counts.sum()) + more
    least, most = arm_bounds(counts, total, shares)
    for arm, (count, (low, high)) in enumerate(zip(counts.tolist(), shares, strict=True)):
        added = [n for n in range(total + 1) if low * total - 1e-9 <= count + n]
        fitting = [n for n in range(total + 1) if count + n <= high * total + 1e-9]
        assert int(most[arm]) == max(fitting, default=0)
        assert int(least[arm]) == min(min(added, default=0), int(most[arm]))


@pytest.mark.parametrize("share", [1 / 3, 0.1, 0.7])
def test_shares_that_are_whole_numbers_are_not_rounded_away(share):
    least, most = arm_bounds(torch.tensor([0]), 30, [(share, share)])
    assert int(least) == int(most) == round(30 * share)


COUNT = st.integers(0, 60)


@given(
    st.lists(st.tuples(COUNT, COUNT, COUNT, COUNT, COUNT), min_size=1, max_size=5),
    st.integers(0, 200),
)
def test_further_candidates_are_bounded_by_what_the_first_ones_gave(sources, wanted):
    rows = [(min(a, b), max(a, b), unseen, min(c, d), max(c, d)) for a, b, unseen, c, d in sources]
    usable, drawn, unseen, floor, ceiling = (torch.tensor(row) for row in zip(*rows, strict=True))
    least, most = bounds_by_yield(usable, drawn, unseen, (floor, ceiling), wanted)
    likely = []
    for n_usable, n_drawn, n_unseen, low, high in rows:
        # A share of (n_usable + 1) / (n_drawn + 2), rounded up, between what must and may be drawn.
        rounded_up = -(-((n_usable + 1) * n_unseen) // (n_drawn + 2))
        likely.append(min(max(rounded_up, min(low, n_unseen)), high, n_unseen))
    if sum(likely) >= wanted:
        assert most.tolist() == likely
        assert least.tolist() == [min(low, n) for _, _, n, low, _ in rows]
    else:
        assert least.tolist() == likely
        assert most.tolist() == [min(high, n) for _, _, n, _, high in rows]
