import io
import math
from collections import OrderedDict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_dvc.errors import ConfigurationError, StateError
from lightning_dvc.memory.history import SampleHistory


def tensor(ids):
    return torch.tensor(ids, dtype=torch.int64)


def saved_and_loaded(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


class Model:
    """A dictionary of dictionaries that forgets nothing but the samples recorded least recently."""

    def __init__(self, window, capacity):
        self.window, self.capacity, self.held = window, capacity, OrderedDict()

    def record(self, ids, values, state):
        for i, row in zip(ids, values, strict=True):
            history = self.held.pop(i, {})
            self.held[i] = history
            for back, value in enumerate(row):
                history[state - back] = value
        while len(self.held) > self.capacity:
            self.held.popitem(last=False)

    def recent(self, ids, state):
        columns = range(self.window)
        return [[self.held.get(i, {}).get(state - j, math.nan) for j in columns] for i in ids]


BATCH = st.lists(st.integers(0, 9), min_size=1, max_size=8, unique=True)
STEP = st.tuples(
    st.sampled_from(["record", "forget", "reload"]),
    BATCH,
    st.integers(0, 3),  # states passed since the last step
    st.integers(1, 4),  # columns
)


@settings(max_examples=200)
@given(st.integers(1, 4), st.integers(1, 12), st.lists(STEP, max_size=20))
def test_behaves_like_a_dictionary_also_across_a_reload(window, capacity, steps):
    history, model, state = SampleHistory(window, capacity), Model(window, capacity), 0
    for number, (what, ids, passed, columns) in enumerate(steps):
        state += passed
        columns = min(columns, window, state + 1)
        if what == "record":
            values = torch.arange(len(ids) * columns).view(len(ids), columns) + 100.0 * number
            history.record(tensor(ids), values, state)
            model.record(ids, values.tolist(), state)
        elif what == "forget":
            history.forget(tensor(ids))
            for i in ids:
                model.held.pop(i, None)
        else:
            saved = saved_and_loaded(history.state_dict())
            history = SampleHistory(window, capacity)
            history.load_state_dict(saved)
        assert len(history) == len(model.held)
        for seen_from in (state, state + 1):
            torch.testing.assert_close(
                history.recent(torch.arange(10), seen_from),
                torch.tensor(model.recent(range(10), seen_from)),
                equal_nan=True,
                rtol=0,
                atol=0,
            )


def test_state_round_trip_is_exact():
    history = SampleHistory(window=3, capacity=4)
    history.record(torch.arange(6), torch.rand(6, 1, generator=torch.Generator()), state=2)
    history.record(tensor([3]), torch.tensor([[1.0, 2.0]]), state=4)
    state = saved_and_loaded(history.state_dict())
    again = SampleHistory(window=3, capacity=4)
    again.load_state_dict(state)
    for name, value in again.state_dict().items():
        torch.testing.assert_close(value, state[name], rtol=0, atol=0, equal_nan=True)
    with pytest.raises(ConfigurationError, match="after state 4"):
        again.record(tensor([3]), torch.ones(1, 1), state=3)


def test_the_same_state_again_overwrites_and_the_last_of_two_rows_counts():
    history = SampleHistory(window=2, capacity=4)
    history.record(tensor([7]), torch.tensor([[1.0]]), state=0)
    history.record(tensor([7, 7]), torch.tensor([[2.0], [3.0]]), state=0)
    assert history.recent(tensor([7, 7]), state=0)[:, 0].tolist() == [3.0, 3.0]


def test_a_reused_row_shows_nothing_of_its_former_sample():
    history = SampleHistory(window=2, capacity=1)
    history.record(tensor([1]), torch.tensor([[1.0]]), state=0)
    history.record(tensor([2]), torch.tensor([[2.0]]), state=1)
    recent = history.recent(tensor([2, 1]), state=1)
    assert recent[0, 0] == 2
    assert recent[0, 1].isnan()
    assert recent[1].isnan().all()


def test_more_samples_than_capacity_keep_the_last():
    history = SampleHistory(window=1, capacity=2)
    history.record(torch.arange(4), torch.arange(4.0)[:, None], state=0)
    assert history.recent(torch.arange(4), 0).flatten().isnan().tolist() == [
        True,
        True,
        False,
        False,
    ]


def test_a_smaller_capacity_loads_the_samples_recorded_last():
    history = SampleHistory(window=1, capacity=4)
    history.record(torch.arange(4), torch.arange(4.0)[:, None], state=0)
    history.record(tensor([0]), torch.tensor([[9.0]]), state=0)
    small = SampleHistory(window=1, capacity=2)
    small.load_state_dict(history.state_dict())
    assert small.recent(tensor([0, 3]), 0).flatten().tolist() == [9.0, 3.0]
    assert len(small) == 2


@pytest.mark.parametrize("shape", [(), (2,), (3, 1), (2, 0), (2, 4), (2, 1, 1)])
def test_refuses_values_of_another_shape(shape):
    with pytest.raises(ConfigurationError, match="one row for each id"):
        SampleHistory(window=3, capacity=4).record(tensor([0, 1]), torch.ones(shape), state=5)


def test_refuses_states_before_the_first_or_out_of_order():
    history = SampleHistory(window=3, capacity=4)
    with pytest.raises(ConfigurationError, match="2 columns ending at state 0"):
        history.record(tensor([0]), torch.ones(1, 2), state=0)
    history.record(tensor([0]), torch.ones(1, 1), state=5)
    with pytest.raises(ConfigurationError, match="after state 5"):
        history.record(tensor([0]), torch.ones(1, 1), state=4)


@pytest.mark.parametrize(("window", "capacity"), [(0, 1), (1, 0)])
def test_refuses_sizes_below_one(window, capacity):
    with pytest.raises(ConfigurationError, match="at least 1"):
        SampleHistory(window, capacity)


def test_refuses_a_state_of_another_window():
    with pytest.raises(StateError, match="window of 2"):
        SampleHistory(3, 4).load_state_dict(SampleHistory(2, 4).state_dict())
