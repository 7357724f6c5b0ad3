import io
from collections import deque

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_dvc.errors import ConfigurationError, StateError
from lightning_dvc.memory.statistics import StreamingMedian, Welford

VALUE = st.floats(-1e6, 1e6, width=32)
BATCHES = st.lists(st.lists(VALUE, max_size=9), max_size=6)


def saved_and_loaded(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def welford_of(batches):
    statistic = Welford(())
    for batch in batches:
        statistic.update(torch.tensor(batch))
    return statistic


def median_of(batches, window):
    statistic = StreamingMedian(window)
    for batch in batches:
        statistic.update(torch.tensor(batch))
    return statistic


def check_welford(statistic, values):
    assert statistic.count == len(values)
    if values:
        exact = np.asarray(values, dtype=np.float64)
        scale = np.abs(exact).max() + 1e-300
        assert statistic.mean.item() == pytest.approx(exact.mean(), abs=1e-13 * scale)
        assert statistic.variance.item() == pytest.approx(exact.var(), abs=1e-13 * scale**2)


@settings(max_examples=100)
@given(BATCHES, BATCHES)
def test_welford_is_the_two_pass_formula_also_merged_and_reloaded(first, second):
    left, right = welford_of(first), welford_of(second)
    again = Welford(())
    again.load_state_dict(saved_and_loaded(left.state_dict()))
    again.merge(right)
    check_welford(again, [value for batch in first + second for value in batch])
    check_welford(left, [value for batch in first for value in batch])


def test_welford_keeps_a_small_variance_beside_a_large_mean():
    # Sums of squares in float32 would lose it, 2^24 + 1 is no float32.
    values = 2.0**22 + torch.tensor([-1.0, 0.0, 1.0]).repeat(1000)
    statistic = Welford(())
    for batch in values.split(7):
        statistic.update(batch)
    assert statistic.variance.item() == pytest.approx(2 / 3, rel=1e-9)


def test_welford_of_rows():
    rows = torch.randn(20, 2, 3, generator=torch.Generator().manual_seed(0))
    statistic = Welford((2, 3))
    statistic.update(rows[:4])
    statistic.update(rows[4:])
    torch.testing.assert_close(statistic.mean, rows.double().mean(0))
    torch.testing.assert_close(statistic.variance, rows.double().var(0, correction=0))


def test_welford_merged_with_itself_counts_twice():
    statistic = welford_of([[1.0, 3.0]])
    statistic.merge(statistic)
    assert (statistic.count, statistic.mean.item(), statistic.variance.item()) == (4, 2.0, 1.0)


def test_welford_is_not_changed_through_what_it_returned():
    statistic = welford_of([[1.0, 3.0]])
    statistic.mean.zero_()
    assert statistic.mean.item() == 2


def test_welford_refuses_other_shapes():
    statistic = Welford((3,))
    with pytest.raises(ConfigurationError, match="got"):
        statistic.update(torch.ones(4, 1))
    with pytest.raises(ConfigurationError, match="cannot be merged"):
        statistic.merge(Welford((1,)))
    with pytest.raises(StateError, match="shape"):
        statistic.load_state_dict(Welford((2,)).state_dict())


def check_median(statistic, values):
    assert len(statistic) == len(values)
    if values:
        exact = np.asarray(values, dtype=np.float64)
        median = np.median(exact)
        assert statistic.median == pytest.approx(median, rel=1e-12, abs=1e-9)
        assert statistic.mad == pytest.approx(np.median(np.abs(exact - median)), abs=1e-9)


@settings(max_examples=100)
@given(BATCHES, st.integers(1, 12), st.integers(0, 6))
def test_median_of_the_window_also_across_a_reload(batches, window, reload_at):
    statistic, values = StreamingMedian(window), deque(maxlen=window)
    for number, batch in enumerate(batches):
        if number == reload_at:
            state = saved_and_loaded(statistic.state_dict())
            statistic = StreamingMedian(window)
            statistic.load_state_dict(state)
        statistic.update(torch.tensor(batch))
        values.extend(batch)
        check_median(statistic, values)


@settings(max_examples=100)
@given(st.lists(BATCHES, min_size=1, max_size=3), st.integers(1, 12))
def test_merged_median_keeps_the_newest_of_all_streams(streams, window):
    statistics = [median_of(batches, window) for batches in streams]
    windows = [[v for batch in batches for v in batch][-window:] for batches in streams]
    tagged = [
        (len(values) - k, -stream, values[k])
        for stream, values in enumerate(windows)
        for k in range(len(values))
    ]
    newest = sorted(tagged, key=lambda entry: entry[:2])[:window]
    statistics[0].merge(*statistics[1:])
    check_median(statistics[0], [value for _, _, value in newest])


def test_merge_gives_each_of_three_full_windows_its_part():
    statistics = [median_of([[float(k)] * 30], window=30) for k in range(3)]
    statistics[0].merge(*statistics[1:])
    assert statistics[0].median == 1
    assert (
        sorted(statistics[0].state_dict()["values"].tolist())
        == [0.0] * 10 + [1.0] * 10 + [2.0] * 10
    )


def test_a_smaller_window_loads_the_newest_values():
    small = StreamingMedian(2)
    small.load_state_dict(median_of([[9.0, 1.0, 3.0]], window=5).state_dict())
    assert small.median == 2


def test_median_refuses_an_empty_window():
    with pytest.raises(ConfigurationError, match="at least 1"):
        StreamingMedian(0)


@pytest.mark.parametrize(
    "read",
    [
        lambda: Welford((2,)).mean,
        lambda: Welford((2,)).variance,
        lambda: StreamingMedian().median,
        lambda: StreamingMedian().mad,
    ],
)
def test_reading_before_any_value_says_so(read):
    with pytest.raises(StateError, match="no values yet"):
        read()
