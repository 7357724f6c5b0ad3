import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_dvc.errors import ConfigurationError
from lightning_dvc.policy.belief import (
    conformal_p_values,
    disbelieved,
    least_believed,
    like_reference,
    peer_p_values,
)

# Few values, so that ties occur.
values = st.one_of(st.sampled_from([0.0, 0.1, 0.2, 0.5, 1.0, math.nan]), st.floats(0, 1))
p_values = st.one_of(st.sampled_from([0.01, 0.05, 0.2, 1.0, math.nan]), st.floats(0.001, 1))
samples = st.lists(st.tuples(p_values, st.integers(0, 2)), max_size=30)


def tables(states):
    return st.lists(st.tuples(*[values] * states), max_size=20)


def double(numbers, columns=None):
    found = torch.tensor(numbers, dtype=torch.float64)
    return found if columns is None else found.reshape(len(numbers), columns)


def mean_of_known(row):
    known = [c for c in row if not math.isnan(c)]
    return math.fsum(known) / len(known) if known else math.nan


def p_value_by_hand(sample, reference):
    """Compared over the states that saw the sample, and those from before it was first seen."""
    seen = [state for state, c in enumerate(sample) if not math.isnan(c)]
    if not seen:
        return math.nan
    states = [*seen, *range(seen[-1] + 1, len(sample))]  # the latest comes first
    others = [mean_of_known([row[state] for state in states]) for row in reference]
    others = [mean for mean in others if not math.isnan(mean)]
    if not others:
        return math.nan
    return (1 + sum(mean <= mean_of_known(sample) for mean in others)) / (len(others) + 1)


@given(st.integers(1, 4).flatmap(lambda states: st.tuples(tables(states), tables(states))))
def test_p_values_count_the_reference_in_comparable_states(both):
    n_states = max([len(row) for table in both for row in table], default=1)
    # Multiples of 2 ** -10, so that sums are exact in any order.
    both = [[tuple(round(c * 1024) / 1024 if c == c else c for c in r) for r in t] for t in both]
    found = conformal_p_values(*(double(table, n_states) for table in both))
    expected = [p_value_by_hand(sample, both[1]) for sample in both[0]]
    assert found.tolist() == pytest.approx(expected, nan_ok=True)


@given(samples, st.sampled_from([0.0, 0.05, 0.2, 0.5, 1.0]))
def test_rejections_are_those_of_benjamini_and_hochberg(pairs, rate):
    """By adjusted p-values: the least of ``p_(j) n / j`` over all ranks ``j`` from one's own on."""
    expected = []
    for mine, arm in pairs:
        own = sorted(p for p, k in pairs if k == arm and not math.isnan(p))
        adjusted = [p * len(own) / rank for rank, p in enumerate(own, start=1) if p >= mine]
        expected.append(min(adjusted, default=math.inf) <= rate * (1 + 1e-12))
    found = disbelieved(double([p for p, _ in pairs]), torch.tensor([k for _, k in pairs]), rate)
    assert found.tolist() == expected


def test_false_discoveries_keep_to_the_rate_and_wrong_labels_are_found():
    """Half of a source is implausible: of those rejected, at most the rate is like the reference.

    In a source like the reference, hardly ever anything is rejected, however implausible.
    """
    generator = torch.Generator().manual_seed(0)
    shares, found, alone = [], [], []
    for _ in range(300):
        reference = torch.rand(200, 1, generator=generator)
        like, wrong = (torch.rand(50, 1, generator=generator) for _ in range(2))
        clean = torch.rand(100, 1, generator=generator)
        confidence = torch.cat([like, 0.03 * wrong, clean])
        arms = torch.tensor([0] * 100 + [1] * 100)
        rejected = disbelieved(conformal_p_values(confidence, reference), arms, rate=0.2)
        shares.append(float(rejected[:50].sum() / rejected[:100].sum().clamp(min=1)))
        found.append(float(rejected[50:100].float().mean()))
        alone.append(float(rejected[100:].any()))
    # The rate is that of n_k samples of which half are null: 0.2 * 50 / 100.
    assert sum(shares) / len(shares) <= 0.1 + 0.02
    assert sum(found) / len(found) >= 0.9
    assert sum(alone) / len(alone) <= 0.2 + 0.05


@pytest.mark.parametrize("sureness", [[1.0, 0.8, 0.6, 0.4, 0.2], [0.95, 0.9, 0.85, 0.7, 0.1]])
@pytest.mark.parametrize("chosen", [2, 4])  # how many states ago
@pytest.mark.parametrize("share", [1.0, 0.5])
def test_samples_that_not_all_states_saw_are_not_rejected_for_it(share, chosen, sureness):
    """States are the surer the later, samples differ, and each is about as hard for all states."""
    generator = torch.Generator().manual_seed(0)

    def seen(n, share):
        ease = 0.5 + 0.5 * torch.rand(n, 1, generator=generator)
        table = ease * torch.tensor(sureness)
        unseen = torch.rand(n, 5, generator=generator) > share
        unseen[:, chosen] = False
        return table.masked_fill(unseen, torch.nan)

    rejected = 0
    for _ in range(20):
        p = conformal_p_values(seen(200, share), seen(200, 1.0))
        rejected += int(disbelieved(p, torch.zeros(200, dtype=torch.int64), rate=0.5).sum())
    assert rejected <= 0.02 * 20 * 200


def test_the_unknown_is_no_test_and_without_a_reference_nothing_is():
    arms, unknown = torch.zeros(4).long(), double([[math.nan], [0.0], [0.0], [0.0]])
    p = conformal_p_values(unknown, torch.ones(99, 1))
    assert disbelieved(p, arms, 1.0).tolist() == [False, True, True, True]
    for reference in (torch.empty(0, 1), torch.full((9, 1), math.nan)):
        assert not disbelieved(conformal_p_values(unknown, reference), arms, 1.0).any()


@given(st.lists(st.tuples(st.integers(0, 120), st.integers(0, 3), st.integers(0, 5)), max_size=4))
def test_sources_are_like_the_reference_where_less_than_a_fiftieth_is_rejected(sources):
    """Of each source so many samples are known, so many of them rejected, and so many unknown."""
    p, arms, rejected, expected = [], [], [], []
    for arm, (n, n_rejected, n_unknown) in enumerate(sources):
        n_rejected = min(n_rejected, n)
        p += [0.5] * n + [math.nan] * n_unknown
        arms += [arm] * (n + n_unknown)
        rejected += [True] * n_rejected + [False] * (n - n_rejected) + [True] * n_unknown
        expected.append(n >= 20 and 50 * n_rejected < n)
    arguments = double(p), torch.tensor(arms, dtype=torch.int64), torch.tensor(rejected).bool()
    assert like_reference(*arguments, len(sources)).tolist() == expected


def peer_p_value_by_hand(sample, peers):
    """Compared over the states that saw the sample, with the peers that all of these saw."""
    states = [state for state, c in enumerate(sample) if not math.isnan(c)]
    others = [[row[state] for state in states] for row in peers]
    others = [sum(row) for row in others if not any(math.isnan(c) for c in row)]
    if not states or len(others) < 20:
        return math.nan
    mine = sum(sample[state] for state in states)
    return (1 + sum(other <= mine for other in others)) / (len(others) + 1)


@given(
    st.integers(1, 3).flatmap(
        lambda states: st.tuples(
            tables(states), st.lists(st.tuples(*[values] * states), min_size=18, max_size=40)
        )
    )
)
def test_peers_are_those_that_the_same_states_saw(both):
    n_states = len(both[1][0])
    # Multiples of 2 ** -10, so that sums are exact in any order.
    both = [[tuple(round(c * 1024) / 1024 if c == c else c for c in r) for r in t] for t in both]
    found = peer_p_values(*(double(table, n_states) for table in both))
    expected = [peer_p_value_by_hand(sample, both[1]) for sample in both[0]]
    assert found.tolist() == pytest.approx(expected, nan_ok=True)


@pytest.mark.parametrize("n_states", [31, 32, 70])
def test_states_may_be_many(n_states):
    draw = torch.Generator().manual_seed(n_states)
    # Multiples of 2 ** -10, so that sums are exact in any order.
    table = torch.randint(1024, (60, n_states), generator=draw).double() / 1024
    samples = table[:30].clone()
    for row, sample in enumerate(samples):  # each unknown to one state
        sample[row % 25 * (n_states - 1) // 24] = torch.nan
    both = samples.tolist(), table[30:].tolist()
    for p_values, by_hand in (
        (conformal_p_values, p_value_by_hand),
        (peer_p_values, peer_p_value_by_hand),
    ):
        expected = [by_hand(sample, both[1]) for sample in both[0]]
        assert p_values(samples, table[30:]).tolist() == pytest.approx(expected)


few = st.sampled_from([0.0, 0.1, 0.5])


@given(st.lists(st.tuples(few, few, st.booleans()), max_size=20))
def test_least_believed_equals_a_sort_in_python(rows):
    expected = sorted((p, c, at) for at, (p, c, among) in enumerate(rows) if among)
    p, confidence = double([p for p, *_ in rows]), double([[c] for _, c, _ in rows], 1)
    among = torch.tensor([a for *_, a in rows], dtype=torch.bool)
    for most in (0, 3, 40):
        found = least_believed(p, confidence, among, most)
        assert found.dtype == torch.int64
        assert found.tolist() == [at for *_, at in expected[:most]]


def test_bad_settings_are_refused():
    with pytest.raises(ConfigurationError, match="rate"):
        disbelieved(torch.ones(2), torch.zeros(2).long(), rate=1.5)
    with pytest.raises(ConfigurationError, match="most"):
        least_believed(torch.ones(2), torch.ones(2, 1), torch.ones(2).bool(), most=-1)
