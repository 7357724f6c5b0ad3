import io
import itertools
import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import ConcatDataset, Dataset, IterableDataset, TensorDataset

from lightning_dvc.errors import ConfigurationError, StateError
from lightning_dvc.pools import FREE, SELECTED, SET_ASIDE, TAKEN_BACK, Pools, Source


class Numbered(Dataset):
    """Samples that tell where they come from, and cost nothing to have."""

    def __init__(self, size, name=""):
        self.size, self.name = size, name

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        if not 0 <= index < self.size:
            raise IndexError(index)
        return self.name, index


def pools_of(*sizes, seed=0):
    return Pools({f"s{k}": Numbered(size, f"s{k}") for k, size in enumerate(sizes)}, seed)


def integers(*values):
    return torch.tensor(values, dtype=torch.int64)


def saved_and_loaded(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def with_free(size, free, seed=0):
    """One source of which only ``free``, spread over it, are free."""
    pools = pools_of(size, seed=seed)
    taken = np.ones(size, dtype=bool)
    taken[free] = False
    pools.mark(torch.from_numpy(np.flatnonzero(taken)), SELECTED)
    return pools


SIZES = st.lists(st.integers(1, 8), min_size=1, max_size=5)


# -- global ids


@given(SIZES)
def test_ids_name_every_sample_once_and_both_ways(sizes):
    pools = pools_of(*sizes)
    samples = [(arm, index) for arm, size in enumerate(sizes) for index in range(size)]
    ids = torch.arange(len(samples))
    assert pools.arms_of(ids).tolist() == [arm for arm, _ in samples]
    assert pools.indices_of(ids).tolist() == [index for _, index in samples]
    for arm, size in enumerate(sizes):
        owned = pools.ids_of(arm, torch.arange(size))
        assert owned.tolist() == [i for i, sample in enumerate(samples) if sample[0] == arm]
    assert len(pools.dataset) == pools.n_samples == len(samples)
    assert [pools.dataset[i] for i in ids.tolist()] == [(f"s{a}", i) for a, i in samples]
    assert list(pools.dataset) == [(f"s{a}", i) for a, i in samples]


def test_ids_may_come_in_any_order_and_repeat():
    pools = pools_of(3, 5)
    ids = integers(7, 0, 3, 7, 2)
    assert pools.arms_of(ids).tolist() == [1, 0, 1, 1, 0]
    assert pools.indices_of(ids).tolist() == [4, 0, 0, 4, 2]
    assert pools.arms_of(ids).dtype == pools.indices_of(ids).dtype == torch.int64
    assert pools.arms_of(integers()).tolist() == pools.indices_of(integers()).tolist() == []


def test_the_pool_dataset_ends_where_its_sources_end():
    with pytest.raises(IndexError):
        pools_of(3, 5).dataset[8]


def test_arms_are_numbered_in_the_order_given():
    pools = Pools({"z": Numbered(2), "a": Source(Numbered(3), max_share=0.5), "m": Numbered(1)})
    assert pools.names == ["z", "a", "m"]
    assert pools.sizes == [2, 3, 1]
    assert [source.max_share for source in pools.sources.values()] == [1.0, 0.5, 1.0]


# -- draws


# Draws that go through each branch: at least 1 in 16 free and at most half of them wanted; more
# than half of the free ones wanted; less than 1 in 16 free.
BRANCHES = [(8, 6, 3), (8, 6, 4), (200, 6, 2)]


@pytest.mark.parametrize(("size", "n_free", "count"), BRANCHES)
def test_every_subset_of_the_free_is_equally_likely(size, n_free, count):
    free = np.linspace(0, size - 1, n_free).astype(int)
    pools, trials = with_free(size, free, seed=1), 3000
    subsets = dict.fromkeys(itertools.combinations(free.tolist(), count), 0)
    for trial in range(trials):
        subsets[tuple(pools.draw(0, count, "test", trial).tolist())] += 1
    expected, freedom = trials / len(subsets), len(subsets) - 1
    chi_square = sum((seen - expected) ** 2 / expected for seen in subsets.values())
    assert chi_square < freedom + 4 * math.sqrt(2 * freedom)


@st.composite
def draws(draw):
    size = draw(st.integers(1, 120))
    share = draw(st.sampled_from([0.0, 0.02, 1 / 16, 0.3, 0.9, 1.0]))
    generator = np.random.default_rng(draw(st.integers(0, 1000)))
    free = np.flatnonzero(generator.random(size) < share)
    count = draw(st.one_of(st.integers(0, 4), st.integers(0, size + 5)))
    return size, free, count


@settings(max_examples=300)
@given(draws(), st.integers(0, 2**40))
def test_a_draw_holds_distinct_free_ids_of_its_arm(problem, seed):
    size, free, count = problem
    pools = pools_of(7, size, 4, seed=seed)
    taken = np.setdiff1d(np.arange(size), free)
    pools.mark(pools.ids_of(1, torch.from_numpy(taken)), TAKEN_BACK)
    ids = pools.draw(1, count, "test", 3)
    assert ids.dtype == torch.int64
    assert len(ids) == min(count, len(free))
    assert ids.tolist() == sorted(set(ids.tolist()))
    assert set((ids - 7).tolist()) <= set(free.tolist())
    if count >= len(free):
        assert (ids - 7).tolist() == free.tolist()


@pytest.mark.parametrize("status", [SELECTED, TAKEN_BACK, SET_ASIDE])
def test_only_free_samples_are_drawn(status):
    pools = pools_of(40)
    pools.mark(torch.arange(0, 40, 2), status)
    drawn = {i for trial in range(50) for i in pools.draw(0, 5, "test", trial).tolist()}
    assert drawn == set(range(1, 40, 2))


@pytest.mark.parametrize(("size", "n_free", "count"), BRANCHES)
def test_a_draw_depends_on_seed_purpose_arm_and_numbers_only(size, n_free, count):
    size, n_free, count = 50 * size, 50 * n_free, 50 * count
    free = np.linspace(0, size - 1, n_free).astype(int)
    pools = with_free(size, free, seed=5)
    ids = pools.draw(0, count, "test", 1, 2)
    pools.draw(0, count, "something else")
    assert torch.equal(pools.draw(0, count, "test", 1, 2), ids)
    assert torch.equal(with_free(size, free, seed=5).draw(0, count, "test", 1, 2), ids)
    others = [
        pools.draw(0, count, "other", 1, 2),
        pools.draw(0, count, "test", 1, 3),
        pools.draw(0, count, "test", 2, 1),
        with_free(size, free, seed=6).draw(0, count, "test", 1, 2),
    ]
    assert not any(torch.equal(other, ids) for other in others)


def test_arms_draw_independently():
    pools = pools_of(1000, 1000)
    first, second = pools.draw(0, 100, "test", 0), pools.draw(1, 100, "test", 0)
    assert not torch.equal(first, second - 1000)
    pools.mark(torch.arange(500), SELECTED)
    assert torch.equal(pools.draw(1, 100, "test", 0), second)


def test_a_draw_of_each_arm_is_that_of_every_arm_by_itself():
    pools = pools_of(100, 30, 50)
    expected = [*pools.draw(0, 7, "test", 4), *pools.draw(2, 60, "test", 4)]
    drawn = pools.draw_each(torch.tensor([7, 0, 60]), "test", 4)
    assert drawn.tolist() == [int(i) for i in expected]
    assert len(drawn) == 7 + 50


def test_a_draw_changes_nothing():
    pools = pools_of(100, 100)
    generators = np.random.get_state()[1].copy(), torch.get_rng_state(), random.getstate()  # noqa: NPY002 - the stream guarded
    pools.draw(0, 10, "test")
    pools.draw(1, 90, "test")
    assert pools.stock.tolist() == [100, 100]
    assert len(pools.state_dict()["ids"]) == 0
    assert (np.random.get_state()[1] == generators[0]).all()  # noqa: NPY002 - the stream guarded
    assert torch.equal(torch.get_rng_state(), generators[1])
    assert random.getstate() == generators[2]


# -- memory and work for large pools


class Counted(np.ndarray):
    """An array that counts how many of its elements are read."""

    touched = 0

    def __getitem__(self, key):
        found = super().__getitem__(key)
        if not isinstance(key, slice):
            Counted.touched += np.size(found)
        return found.view(np.ndarray) if not isinstance(key, slice) else found

    def __array_ufunc__(self, ufunc, method, *inputs, **kwargs):
        Counted.touched += self.size
        plain = [x.view(np.ndarray) if isinstance(x, Counted) else x for x in inputs]
        return getattr(ufunc, method)(*plain, **kwargs)


@pytest.fixture
def huge():
    pools = pools_of(10_000_000, 3)
    pools._status = pools._status.view(Counted)
    Counted.touched = 0
    return pools


def test_a_sample_costs_one_byte(huge):
    assert huge._status.nbytes == huge.n_samples == 10_000_003
    arrays = [x for x in vars(huge).values() if isinstance(x, np.ndarray)]
    assert sum(x.nbytes for x in arrays) < huge.n_samples + 1000


def test_a_draw_from_ten_million_looks_at_few(huge):
    huge.mark(huge.draw(0, 1000, "first"), SELECTED)
    assert len(huge.draw(0, 1000, "second")) == 1000
    assert Counted.touched < 10_000


def test_a_draw_of_most_samples_looks_at_each_once(huge):
    assert len(huge.draw(0, 6_000_000, "more than half")) == 6_000_000
    assert Counted.touched == 10_000_000


def test_a_draw_of_the_last_free_samples_looks_at_each_once():
    pools = with_free(100_000, np.arange(0, 100_000, 10_000))
    pools._status = pools._status.view(Counted)
    Counted.touched = 0
    assert len(pools.draw(0, 10, "the last")) == 10
    assert Counted.touched == 100_000


def test_nothing_is_drawn_without_a_look():
    pools = with_free(100_000, [])
    pools._status = pools._status.view(Counted)
    Counted.touched = 0
    for count in (0, 10):
        drawn = pools.draw(0, count, "none")
        assert (drawn.tolist(), drawn.dtype) == ([], torch.int64)
    assert Counted.touched == 0


# -- states of samples


STATES = st.sampled_from([FREE, SELECTED, TAKEN_BACK, SET_ASIDE])
MARKS = st.lists(st.tuples(st.sets(st.integers(0, 11), max_size=6), STATES), max_size=12)


def assert_equals_oracle(pools, held):
    """``held`` maps each id of pools of 5, 1 and 6 samples to its state."""
    arms = [range(5), range(5, 6), range(6, 12)]
    free = [[i for i in arm if held[i] == FREE] for arm in arms]
    assert pools.stock.tolist() == [len(ids) for ids in free]
    for arm, ids in enumerate(free):
        assert pools.draw(arm, 99, "all").tolist() == ids
    state = pools.state_dict()
    stored = dict(zip(state["ids"].tolist(), state["status"].tolist(), strict=True))
    assert stored == {i: status for i, status in held.items() if status != FREE}


def apply_marks(pools, held, marks):
    for ids, status in marks:
        pools.mark(integers(*ids), status)
        held.update(dict.fromkeys(ids, status))
        assert_equals_oracle(pools, held)


@settings(max_examples=150)
@given(MARKS, MARKS, MARKS)
def test_behaves_like_a_dictionary_also_across_a_reload(before, overwritten, after):
    pools, held = pools_of(5, 1, 6), dict.fromkeys(range(12), FREE)
    apply_marks(pools, held, before)
    state = saved_and_loaded(pools.state_dict())
    again = pools_of(5, 1, 6)
    apply_marks(again, dict.fromkeys(range(12), FREE), overwritten)
    again.load_state_dict(state)
    assert_equals_oracle(again, held)
    apply_marks(again, held, after)


def test_state_and_stock_are_copies():
    pools = pools_of(4)
    pools.mark(integers(1), SELECTED)
    state, stock = pools.state_dict(), pools.stock
    pools.mark(integers(1, 2), TAKEN_BACK)
    assert state["ids"].tolist() == [1]
    assert state["status"].tolist() == [SELECTED]
    assert stock.tolist() == [3]
    stock.zero_()
    assert pools.stock.tolist() == [2]


@pytest.mark.parametrize(
    "other",
    [
        {"a": 4, "b": 3},
        {"b": 4, "a": 3},
        {"a": 3, "c": 4},
        {"b": 4},
        {"a": 2},
        {"a": 3, "b": 4, "c": 1},
    ],
)
def test_a_checkpoint_of_other_pools_is_refused_and_changes_nothing(other):
    saved = Pools({name: Numbered(size) for name, size in other.items()})
    saved.mark(integers(0), SELECTED)
    pools = Pools({"a": Numbered(3), "b": Numbered(4)})
    pools.mark(integers(5), SET_ASIDE)
    message = r"checkpoint's selection.*\{'a': 3, 'b': 4\}; give .*same order.*only new"
    with pytest.raises(StateError, match=message):
        pools.load_state_dict(saved_and_loaded(saved.state_dict()))
    assert pools.state_dict()["ids"].tolist() == [5]
    assert pools.stock.tolist() == [3, 3]


def test_a_fingerprint_is_names_and_sizes_in_order():
    pools = pools_of(3, 5)
    assert list(pools.fingerprint().items()) == [("s0", 3), ("s1", 5)]
    pools.check_fingerprint(saved_and_loaded(pools.fingerprint()), "the cache")
    pools.check_fingerprint({"s0": 3}, "the cache")
    with pytest.raises(StateError, match="the cache was saved for the sources"):
        pools.check_fingerprint({"s0": 3, "s1": 6}, "the cache")


# -- sources added later


@settings(max_examples=100)
@given(MARKS, MARKS)
def test_pools_that_grew_are_like_pools_that_were_made_so(before, after):
    pools, held = pools_of(5, 1), dict.fromkeys(range(6), FREE)
    for ids, status in before:
        known = {i for i in ids if i < 6}
        pools.mark(integers(*known), status)
        held.update(dict.fromkeys(known, status))
    drawn = pools.draw(0, 2, "test", 3)
    pools.add("s2", Numbered(6, "s2"))
    assert torch.equal(pools.draw(0, 2, "test", 3), drawn)
    held.update(dict.fromkeys(range(6, 12), FREE))
    assert_equals_oracle(pools, held)
    apply_marks(pools, held, after)
    made = pools_of(5, 1, 6)
    made.load_state_dict(saved_and_loaded(pools.state_dict()))
    assert_equals_oracle(made, held)
    assert pools.fingerprint() == made.fingerprint()
    assert list(pools.dataset) == list(made.dataset)
    ids = torch.arange(12)
    assert torch.equal(pools.arms_of(ids), made.arms_of(ids))
    assert torch.equal(pools.indices_of(ids), made.indices_of(ids))
    assert torch.equal(pools.draw(2, 3, "test"), made.draw(2, 3, "test"))


def test_a_dataset_handed_out_before_stays_as_it_was():
    pools = pools_of(3)
    before = pools.dataset
    pools.add("more", Numbered(2, "more"))
    assert (len(before), len(pools.dataset)) == (3, 5)
    assert before.__getitems__([0, 2]) == pools.dataset.__getitems__([0, 2])
    assert pools.dataset[4] == ("more", 1)


@pytest.mark.parametrize(
    ("name", "source", "message"),
    [
        ("s0", Numbered(2), r"new source, but there is a source 's0' already, of \['s0'\]; give"),
        ("more", Numbered(0), "'more' has no samples"),
        ("more", Source(Numbered(2), min_share=0.6), r"minimum shares.*1\.200.*lower"),
    ],
)
def test_a_source_that_cannot_be_added_changes_nothing(name, source, message):
    pools = Pools({"s0": Source(Numbered(3), min_share=0.6)})
    with pytest.raises(ConfigurationError, match=message):
        pools.add(name, source)
    assert pools.fingerprint() == {"s0": 3}
    assert pools.names == ["s0"]
    assert pools.n_samples == len(pools.dataset) == 3


def test_a_state_is_loaded_with_sources_that_were_added_since():
    saved = pools_of(3, 4)
    saved.mark(integers(0, 5), SELECTED)
    pools = pools_of(3, 4, 2)
    pools.mark(integers(8), SELECTED)
    pools.load_state_dict(saved_and_loaded(saved.state_dict()))
    assert pools.stock.tolist() == [2, 3, 2]
    assert pools.state_dict()["ids"].tolist() == [0, 5]


# -- what is refused


class Endless(IterableDataset):
    def __iter__(self):
        return itertools.count()


class NoLength(Dataset):
    def __getitem__(self, index):
        return index


@pytest.mark.parametrize(
    ("dataset", "kind"), [(Endless(), "Endless"), (NoLength(), "NoLength"), (object(), "object")]
)
def test_only_map_style_datasets_are_sources(dataset, kind):
    with pytest.raises(ConfigurationError, match=f"map-style.*got {kind}; .*load an iterable"):
        Source(dataset)
    with pytest.raises(ConfigurationError, match=f"map-style.*got {kind}"):
        Pools({"a": dataset})


def test_lists_and_concatenations_are_sources():
    assert len(Source([1, 2, 3])) == 3
    assert len(Source(ConcatDataset([Numbered(3), TensorDataset(torch.zeros(2))]))) == 5


@pytest.mark.parametrize(
    ("least", "most"), [(-0.1, 1), (0, 1.1), (0.6, 0.5), (math.nan, 1), (0, math.nan)]
)
def test_shares_out_of_order_are_refused(least, most):
    with pytest.raises(ConfigurationError, match=f"min_share={least}, max_share={most}"):
        Source(Numbered(1), min_share=least, max_share=most)


@pytest.mark.parametrize("cost", [0, -1.0, math.inf, math.nan])
def test_costs_out_of_range_are_refused(cost):
    with pytest.raises(ConfigurationError, match=f"cost of a source .* but is {cost}; give what"):
        Source(Numbered(1), cost=cost)


@pytest.mark.parametrize("settings", [{"min_share": "x"}, {"max_share": None}, {"cost": "much"}])
def test_shares_and_costs_that_are_no_numbers_are_refused(settings):
    ((name, value),) = settings.items()
    with pytest.raises(ConfigurationError, match=f"{name}.*{value!r}"):
        Source(Numbered(1), **settings)


def test_shares_and_costs_may_be_numbers_of_numpy():
    settings = {"min_share": np.float32(0.25), "max_share": np.int64(1), "cost": np.float64(2)}
    source = Source(Numbered(1), **settings)
    assert (source.min_share, source.max_share, source.cost) == (0.25, 1, 2)


def test_a_sample_costs_one_unless_told_otherwise():
    pools = Pools({"plain": Numbered(1), "dear": Source(Numbered(1), cost=2.5)})
    assert [source.cost for source in pools.sources.values()] == [1.0, 2.5]


def test_no_source_is_refused():
    with pytest.raises(ConfigurationError, match="sources is empty"):
        Pools({})


def test_names_that_are_the_same_as_text_are_refused():
    with pytest.raises(ConfigurationError, match=r"differ as text, but they are \[1, '1'\]"):
        Pools({1: Numbered(1), "1": Numbered(2)})


def test_an_empty_source_is_refused_by_name():
    with pytest.raises(ConfigurationError, match="source 'b' has no samples"):
        Pools({"a": Numbered(1), "b": Numbered(0)})


def test_shares_that_cannot_be_kept_together_are_refused():
    with pytest.raises(ConfigurationError, match=r"minimum shares.*1\.100"):
        Pools({"a": Source(Numbered(1), 0.5), "b": Source(Numbered(1), 0.6)})
    with pytest.raises(ConfigurationError, match=r"maximum shares.*0\.900"):
        Pools({"a": Source(Numbered(1), 0, 0.4), "b": Source(Numbered(1), 0, 0.5)})


@pytest.mark.parametrize(("share", "n_arms"), [(0.1 * (1 + 1e-12), 10), (0.05 * (1 - 1e-12), 20)])
def test_shares_may_add_up_to_one_but_for_rounding(share, n_arms):
    assert sum([share] * n_arms) != 1
    Pools({str(k): Source(Numbered(1), share, share) for k in range(n_arms)})


class Batched(Dataset):
    """Reads batches, and notes them."""

    def __init__(self, first, size):
        self.first, self.size, self.read = first, size, []

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        return self.first + index

    def __getitems__(self, indices):
        self.read.append(indices)
        return [self[index] for index in indices]


def test_batches_are_read_from_each_source_at_once_and_in_order():
    batched = Batched(100, 4)
    pools = Pools({"plain": [0, 1, 2], "batched": batched, "more": [7, 8]})
    assert pools.dataset.__getitems__([4, 1, 8, 3, 0]) == [101, 1, 8, 100, 0]
    assert batched.read == [[1, 0]]
