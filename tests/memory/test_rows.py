from collections import OrderedDict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_dvc.errors import ConfigurationError
from lightning_dvc.memory.rows import RowIndex, last_occurrences

BATCH = st.lists(st.integers(0, 12), max_size=10)
STEPS = st.lists(st.tuples(st.sampled_from(["claim", "touch", "forget", "find"]), BATCH))


def tensor(ids):
    return torch.tensor(ids, dtype=torch.int64)


class Model:
    """One id at a time, in a dictionary that remembers its order."""

    def __init__(self, capacity):
        self.capacity = capacity
        self.held = OrderedDict()

    def step(self, what, ids):
        for i in ids:
            if what == "claim":
                self.held[i] = None
                self.held.move_to_end(i)
                if len(self.held) > self.capacity:
                    self.held.popitem(last=False)
            elif what == "touch" and i in self.held:
                self.held.move_to_end(i)
            elif what == "forget":
                self.held.pop(i, None)


@settings(max_examples=200)
@given(capacity=st.integers(0, 6), steps=STEPS)
def test_behaves_like_an_ordered_dictionary(capacity, steps):
    rows, model = RowIndex(capacity), Model(capacity)
    for what, batch in steps:
        ids = tensor(batch)
        before = rows.find(ids)
        if what == "claim":
            after = rows.claim(ids)
            assert torch.equal(after, rows.find(ids))
            stayed = (before >= 0) & (after >= 0)
            if len(set(batch)) <= capacity:
                assert torch.equal(after[stayed], before[stayed])
                assert (after >= 0).all()
        elif what == "touch":
            rows.touch(before)
        elif what == "forget":
            rows.forget(ids)
        model.step(what, batch)
        assert rows.ids().tolist() == list(model.held)
        assert len(rows) == len(model.held)
        assert (rows.find(ids) >= 0).tolist() == [i in model.held for i in batch]
        slots = rows.find(rows.ids())
        assert len(slots.unique()) == len(slots)  # no two ids share a row
        assert ((slots >= 0) & (slots < capacity)).all()


def test_only_the_last_of_too_many_ids_are_kept():
    rows = RowIndex(2)
    slots = rows.claim(tensor([1, 2, 3, 1]))
    assert (slots >= 0).tolist() == [True, False, True, True]
    assert slots[0] == slots[3] != slots[2]


def test_held_ids_of_a_batch_are_not_evicted_by_its_new_ones():
    rows = RowIndex(3)
    old = rows.claim(tensor([1, 2, 3]))
    slots = rows.claim(tensor([1, 8, 9]))  # 1 is the least recently used until now
    assert slots[0] == old[0]
    assert rows.ids().tolist() == [1, 8, 9]


def test_freed_slots_are_taken_before_used_ones():
    rows = RowIndex(3)
    rows.claim(tensor([1, 2, 3]))
    rows.forget(tensor([3]))
    rows.claim(tensor([4]))
    assert rows.ids().tolist() == [1, 2, 4]


def test_looks_up_ids_that_are_not_contiguous():
    rows = RowIndex(4)
    rows.claim(tensor([0, 1, 2, 3])[::2])
    assert (rows.find(torch.arange(8).view(4, 2)[:, 0]) >= 0).tolist() == [True, True, False, False]


@given(BATCH)
@settings(max_examples=50)
def test_last_occurrences(batch):
    expected = [k for k, i in enumerate(batch) if i not in batch[k + 1 :]]
    assert last_occurrences(tensor(batch)).tolist() == expected


def test_refuses_a_negative_capacity():
    with pytest.raises(ConfigurationError, match="got -1"):
        RowIndex(-1)
