import io
from collections import OrderedDict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_dvc.errors import ConfigurationError, StateError
from lightning_dvc.memory.gradient_cache import GradientCache

ROW_BYTES = 2 * 4 + 8 + 32  # two floats, one integer, bookkeeping


def tensor(ids):
    return torch.tensor(ids, dtype=torch.int64)


def fields_of(ids, version):
    ids = tensor(ids)
    count = torch.arange(len(ids)) + 1000 * version
    return {"delta": torch.stack([ids + 0.5, count + 0.25], dim=1), "label": count}


def saved_and_loaded(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


class Model:
    """One row at a time; drifts are whole numbers of 1/64, so that sums are exact."""

    def __init__(self, capacity, tolerance):
        self.capacity, self.tolerance = capacity, tolerance
        self.held, self.odometer = OrderedDict(), [0.0, 0.0]

    def put(self, ids, fields):
        for k, i in enumerate(ids):
            self.held.pop(i, None)
            row = {name: value[k] for name, value in fields.items()}
            self.held[i] = (row, list(self.odometer))
            if len(self.held) > self.capacity:
                self.held.popitem(last=False)

    def move(self, drift):
        self.odometer = [a + b for a, b in zip(self.odometer, drift, strict=True)]
        for i, (_, written) in list(self.held.items()):
            moved = [a - b for a, b in zip(self.odometer, written, strict=True)]
            if max(moved) > self.tolerance:
                del self.held[i]

    def get(self, ids):
        hits = []
        for i in ids:
            if i in self.held:
                self.held.move_to_end(i)
            hits.append(i in self.held)
        return hits, [self.held[i][0] for i in ids if i in self.held]


BATCH = st.lists(st.integers(0, 9), min_size=1, max_size=8)
STEP = st.one_of(
    st.tuples(st.just("put"), BATCH),
    st.tuples(st.just("get"), BATCH),
    st.tuples(st.just("move"), st.lists(st.integers(0, 3), min_size=2, max_size=2)),
)


@settings(max_examples=200)
@given(
    capacity=st.integers(0, 6),
    steps=st.lists(STEP, max_size=25),
    reload_at=st.integers(0, 25),
)
def test_behaves_like_a_dictionary_also_across_a_reload(capacity, steps, reload_at):
    budget, tolerance = capacity * ROW_BYTES + 7, 4 / 64
    cache, model = GradientCache(budget, tolerance=tolerance), Model(capacity, tolerance)
    for version, (what, argument) in enumerate(steps):
        if version == reload_at:
            state = saved_and_loaded(cache.state_dict())
            cache = GradientCache(budget, tolerance=tolerance)
            cache.load_state_dict(state)
        if what == "put":
            fields = fields_of(argument, version)
            cache.put(tensor(argument), fields)
            model.put(argument, fields)
        elif what == "move":
            cache.move(torch.tensor(argument) / 64)
            model.move([drift / 64 for drift in argument])
        else:
            hit, got = cache.get(tensor(argument))
            expected_hit, rows = model.get(argument)
            assert hit.tolist() == expected_hit
            for name, value in got.items():
                assert len(value) == len(rows)
                for k, row in enumerate(rows):
                    assert torch.equal(value[k], row[name])
        assert len(cache) == len(model.held)
        assert cache.n_bytes <= budget


@settings(max_examples=50)
@given(BATCH, BATCH, st.integers(0, 4 * ROW_BYTES))
def test_state_round_trip_is_exact(first, second, budget):
    cache = GradientCache(budget)
    cache.put(tensor(first), fields_of(first, 1))
    cache.move(torch.tensor([0.004, 0.002]))
    cache.put(tensor(second), fields_of(second, 2))
    cache.get(tensor(first))
    state = saved_and_loaded(cache.state_dict())
    again = GradientCache(budget)
    again.load_state_dict(state)
    for name, value in again.state_dict().items():
        torch.testing.assert_close(value, state[name], rtol=0, atol=0)
    assert again.hit_rate == cache.hit_rate
    hit, fields = again.get(tensor([*first, 77]))
    expected_hit, expected = cache.get(tensor([*first, 77]))
    assert torch.equal(hit, expected_hit)
    assert all(torch.equal(fields[name], expected[name]) for name in expected)


def test_floats_are_stored_narrow_and_returned_wide():
    wide = torch.tensor([[1 / 3, 2.0]])
    fields = {"a": wide, "label": torch.tensor([2**40]), "good": torch.tensor([True])}
    cache = GradientCache(10_000, dtype=torch.float16)
    cache.put(tensor([0]), fields)
    _, got = cache.get(tensor([0]))
    assert torch.equal(got["a"], wide.half().float())
    assert got["a"].dtype == torch.float32
    assert torch.equal(got["label"], fields["label"])
    assert torch.equal(got["good"], fields["good"])
    assert cache.n_bytes // (2 * 2 + 8 + 1 + 32) * (2 * 2 + 8 + 1 + 32) == cache.n_bytes <= 10_000


def test_narrow_storage_holds_more_rows():
    fields, ids = {"a": torch.zeros(100, 32)}, torch.arange(100)
    held = []
    for dtype in (None, torch.float16):
        cache = GradientCache(100 * 96, dtype=dtype)
        cache.put(ids, fields)
        held.append(len(cache))
    assert held == [60, 100]


def test_the_last_of_two_rows_for_one_sample_counts():
    cache = GradientCache(10_000)
    cache.put(tensor([3, 3]), {"loss": torch.tensor([1.0, 2.0])})
    hit, fields = cache.get(tensor([3, 4, 3]))
    assert hit.tolist() == [True, False, True]
    assert fields["loss"].tolist() == [2.0, 2.0]


def test_a_batch_larger_than_the_budget_keeps_its_end():
    cache = GradientCache(2 * (4 + 32))
    cache.put(torch.arange(5), {"loss": torch.arange(5.0)})
    hit, fields = cache.get(torch.arange(5))
    assert hit.tolist() == [False, False, False, True, True]
    assert fields["loss"].tolist() == [3.0, 4.0]


@pytest.mark.parametrize("budget", [0, 35])
def test_a_budget_below_one_row_never_hits(budget):
    cache = GradientCache(budget)
    cache.put(tensor([1]), {"loss": torch.ones(1)})
    cache.move(torch.tensor([1.0]))
    hit, fields = cache.get(tensor([1]))
    assert not hit.any()
    assert fields["loss"].shape == (0,)
    assert (len(cache), cache.n_bytes, cache.hit_rate) == (0, 0, 0.0)


def test_an_entry_is_valid_up_to_the_tolerance_in_every_layer():
    cache = GradientCache(10_000, tolerance=0.5)
    cache.put(tensor([1]), {"loss": torch.ones(1)})
    cache.move(torch.tensor([0.25, 0.0]))
    cache.put(tensor([2]), {"loss": torch.ones(1)})
    cache.move(torch.tensor([0.25, 0.5]))
    assert cache.get(tensor([1, 2]))[0].tolist() == [True, True]
    cache.move(torch.tensor([0.125, 0.0]))
    assert cache.get(tensor([1, 2]))[0].tolist() == [False, True]  # 0.625 and 0.375 in layer 0
    cache.move(torch.tensor([0.0, 0.125]))
    assert cache.get(tensor([2]))[0].tolist() == [False]  # 0.625 in layer 1


def test_unknown_movement_drops_everything():
    cache = GradientCache(10_000)
    cache.put(tensor([1]), {"loss": torch.ones(1)})
    cache.move(torch.tensor([torch.nan]))
    assert len(cache) == 0
    cache.put(tensor([1]), {"loss": torch.ones(1)})
    cache.move(torch.tensor([0.001]))
    assert len(cache) == 1


def test_clear_accepts_other_fields_and_layers():
    cache = GradientCache(10_000)
    cache.put(tensor([1]), {"loss": torch.ones(1)})
    cache.move(torch.tensor([0.001]))
    cache.clear()
    assert (len(cache), cache.n_bytes) == (0, 0)
    assert cache.get(tensor([1]))[1] == {}
    cache.put(tensor([1]), {"delta": torch.ones(1, 2)})
    cache.move(torch.tensor([0.001, 0.002]))
    assert cache.get(tensor([1]))[0].all()


def test_hit_rate_counts_lookups():
    cache = GradientCache(10_000)
    assert cache.hit_rate == 0
    cache.put(tensor([1]), {"loss": torch.ones(1)})
    cache.get(tensor([1, 2, 3, 1]))
    assert cache.hit_rate == 0.5


def test_a_loading_cache_applies_its_own_limits():
    cache = GradientCache(10_000, tolerance=1.0)
    cache.put(tensor([1]), {"loss": torch.ones(1)})
    cache.move(torch.tensor([0.5]))
    cache.put(tensor([2, 3]), {"loss": torch.ones(2)})
    strict = GradientCache(10_000, tolerance=0.25)
    strict.load_state_dict(cache.state_dict())
    assert strict.get(tensor([1, 2, 3]))[0].tolist() == [False, True, True]
    small = GradientCache(36, tolerance=1.0)
    small.load_state_dict(cache.state_dict())
    assert small.get(tensor([1, 2, 3]))[0].tolist() == [False, False, True]


def test_the_saved_state_holds_what_is_used_and_no_more():
    cache = GradientCache(1_000_000)
    cache.put(tensor([1]), {"a": torch.ones(1, 4)})
    buffer = io.BytesIO()
    torch.save(cache.state_dict(), buffer)
    assert buffer.tell() < 20_000


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"other": torch.ones(2)},
        {"loss": torch.ones(2, 1)},
        {"loss": torch.ones(3)},
        {"loss": torch.ones(())},
        {"loss": torch.ones(2, dtype=torch.float64)},
    ],
)
def test_refuses_fields_that_do_not_fit(fields):
    cache = GradientCache(10_000)
    cache.put(tensor([0, 1]), {"loss": torch.ones(2)})
    with pytest.raises(ConfigurationError, match="expected, for 2 ids"):
        cache.put(tensor([0, 1]), fields)


def test_a_refused_first_put_fixes_nothing():
    cache = GradientCache(10_000)
    with pytest.raises(ConfigurationError):
        cache.put(tensor([0, 1]), {"loss": torch.ones(3)})
    cache.put(tensor([0, 1]), {"delta": torch.ones(2, 2)})
    assert len(cache) == 2


@pytest.mark.parametrize("drift", [[-0.1, 0.1], [0.1], [[0.1, 0.1]]])
def test_refuses_drifts_that_do_not_fit(drift):
    cache = GradientCache(10_000)
    cache.move(torch.tensor([0.1, 0.1]))
    with pytest.raises(ConfigurationError, match="2 layers"):
        cache.move(torch.tensor(drift))


@pytest.mark.parametrize(
    "settings", [{"max_bytes": -1}, {"tolerance": -0.1}, {"tolerance": float("nan")}]
)
def test_refuses_settings_out_of_range(settings):
    with pytest.raises(ConfigurationError, match="at least 0"):
        GradientCache(**{"max_bytes": 1, **settings})


def test_refuses_an_integer_dtype():
    with pytest.raises(ConfigurationError, match="floating"):
        GradientCache(1, dtype=torch.int8)


def test_refuses_a_foreign_state():
    with pytest.raises(StateError, match="fields"):
        GradientCache(1).load_state_dict({"ids": tensor([1])})
