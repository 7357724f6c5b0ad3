import multiprocessing as mp
import os
import time

import pytest
import torch
from helpers.files import n_open_files
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import Dataset, default_collate

from lightning_dvc.capture.loading import Reader


class Rows(Dataset):
    """Sample ``i`` is ``(i, i + 0.5, ...)``; what stands in ``odd`` happens instead."""

    def __init__(self, odd=None, width=3):
        self.odd, self.width = odd or {}, width

    def __getitem__(self, i):
        odd = self.odd.get(i)
        if isinstance(odd, Exception):
            raise odd
        return torch.arange(self.width) / 2 + i if odd is None else odd


class Slow(Rows):
    def __getitem__(self, i):
        time.sleep(0.2 if i == 0 else 0.0)
        return super().__getitem__(i)


class Unknown:
    """No collate function of torch knows what to do with it."""


def load(ids, dataset=None, collate=default_collate, batch_size=4, num_workers=0):
    ids = torch.tensor(ids, dtype=torch.int64)
    return list(Reader(collate, num_workers).batches(dataset or Rows(), ids, batch_size))


def loaded_ids(batches):
    return [batch.ids.tolist() for batch in batches]


def reasons(batches):
    return {entry.id: entry.reason for batch in batches for entry in batch.bad}


def assert_rows_match_ids(batches):
    for batch in batches:
        assert batch.ids.dtype == torch.int64
        if len(batch.ids):
            expected = batch.ids[:, None] + torch.arange(3) / 2
            assert torch.equal(batch.batch, expected)


@settings(max_examples=60)
@given(
    ids=st.lists(st.integers(0, 20), max_size=12),
    broken=st.sets(st.integers(0, 20)),
    unfit=st.sets(st.integers(0, 20)),
    batch_size=st.integers(1, 5),
)
def test_the_readable_ones_arrive_in_order_and_the_others_are_named(ids, broken, unfit, batch_size):
    odd = {**dict.fromkeys(unfit, Unknown()), **{i: KeyError(i) for i in broken}}
    batches = load(ids, Rows(odd), batch_size=batch_size)
    parts = [ids[start : start + batch_size] for start in range(0, len(ids), batch_size)]
    assert loaded_ids(batches) == [[i for i in part if i not in odd] for part in parts]
    assert [sorted(entry.id for entry in batch.bad) for batch in batches] == [
        sorted(i for i in part if i in odd) for part in parts
    ]
    assert_rows_match_ids(batches)


def test_reasons_say_what_was_raised_and_where():
    dataset = Rows({2: ValueError("torn page"), 5: Unknown()})
    found = reasons(load(range(8), dataset))
    assert found[2] == "reading it raised ValueError: torn page"
    assert found[5].startswith("collating it raised TypeError: default_collate")


def test_batch_without_a_readable_sample():
    batches = load([0, 1, 2], Rows({0: OSError(), 1: OSError()}), batch_size=2)
    assert loaded_ids(batches) == [[], [2]]
    assert batches[0].batch is None
    assert sorted(reasons(batches)) == [0, 1]


@pytest.mark.parametrize("odd", [0, 2, 3])
def test_sample_of_another_shape_does_not_take_its_batch_along(odd):
    # It makes a batch of one, but none with the others.
    batches = load(range(8), Rows({odd: torch.zeros(2)}))
    assert loaded_ids(batches) == [[i for i in range(4) if i != odd], [4, 5, 6, 7]]
    assert reasons(batches)[odd].startswith("collating it")
    assert_rows_match_ids(batches)


@settings(max_examples=40)
@given(widths=st.lists(st.integers(1, 3), min_size=1, max_size=8))
def test_most_samples_that_make_a_batch_together_are_kept(widths):
    batch = load(range(len(widths)), Rows(dict(enumerate(map(torch.zeros, widths)))), batch_size=8)
    kept = batch[0].ids.tolist()
    assert len(kept) == max(map(widths.count, widths))
    assert {widths[i] for i in kept} == {batch[0].batch.shape[1]}
    assert sorted([*kept, *reasons(batch)]) == list(range(len(widths)))
    assert kept == sorted(kept)


def test_collate_that_always_fails_names_every_sample():
    def collate(samples):
        raise RuntimeError("no batches today")

    batches = load(range(3), collate=collate)
    assert loaded_ids(batches) == [[]]
    assert set(reasons(batches).values()) == {"collating it raised RuntimeError: no batches today"}


def test_the_users_collate_makes_the_batch():
    batches = load(range(3), collate=lambda samples: {"x": torch.stack(samples).sum(0), "n": 3})
    assert batches[0].batch["x"].tolist() == [3, 4.5, 6]


@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")
def test_worker_processes_give_the_same_in_the_same_order():
    odd = {3: ValueError("torn"), 6: Unknown(), 8: OSError("gone")}
    here = load(range(10), Rows(odd))
    there = load(range(10), Slow(odd), num_workers=2)
    assert loaded_ids(there) == loaded_ids(here)
    assert reasons(there) == reasons(here)
    assert_rows_match_ids(there)


@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")
def test_a_sample_keeps_no_file_open():
    """A process may often have 1024, and waits for ever for a worker that wants more."""
    before = n_open_files()
    batches = load(range(400), batch_size=200, num_workers=2)
    assert n_open_files() < before + 40
    assert_rows_match_ids(batches)


@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")
@pytest.mark.parametrize("num_workers", [0, 2])
def test_global_random_state_is_not_touched(num_workers):
    before = torch.get_rng_state()
    load(range(6), num_workers=num_workers)
    assert torch.equal(before, torch.get_rng_state())


class Batched(Dataset):
    """Reads batches at once, unless one of some samples is in it."""

    def __init__(self, bad):
        self.bad = bad

    def __getitem__(self, index):
        if index in self.bad:
            raise KeyError(index)
        return torch.tensor(float(index))

    def __getitems__(self, indices):
        if self.bad & set(indices):
            raise KeyError("some")
        return [torch.tensor(float(index)) for index in indices]


@pytest.mark.parametrize("bad", [set(), {3}])
def test_a_batch_read_at_once_is_told_apart_where_that_fails(bad):
    batches = load(range(6), Batched(bad))
    read = torch.cat([batch.batch for batch in batches]).tolist()
    assert read == [i for i in range(6) if i not in bad]
    assert [entry.id for batch in batches for entry in batch.bad] == sorted(bad)


class Marked(Rows):
    """Rows of ones where a worker was set up, as a project might open files there."""

    def __getitem__(self, i):
        return torch.full((self.width,), float(self.width == 7))


def _widen(worker):
    torch.utils.data.get_worker_info().dataset._datasets[0].width = 7


def test_workers_are_set_up_as_those_of_training():
    ids = torch.arange(4)
    settings = {"worker_init_fn": _widen, "multiprocessing_context": "fork", "timeout": 60}
    (found,) = Reader(default_collate, 1, **settings).batches(Marked(), ids, 4)
    assert torch.equal(found.batch, torch.ones(4, 7))
    (found,) = Reader(default_collate, 0, **settings).batches(Marked(), ids, 4)  # no workers
    assert torch.equal(found.batch, torch.zeros(4, 3))


class Telling(Dataset):
    """Samples that tell their number, the process that read them, and what it drew for them."""

    def __init__(self, first=0):
        self.first = first

    def __getitem__(self, i):
        return torch.tensor([self.first + i, os.getpid(), torch.randint(2**40, ())])


def read(reader, ids, dataset, batch_size=2):
    """Numbers, processes and draws of one pass."""
    parts = [part.batch for part in reader.batches(dataset, torch.tensor(ids), batch_size)]
    numbers, processes, draws = torch.cat(parts).T.tolist()
    return numbers, set(processes), draws


@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")
def test_the_same_workers_serve_all_passes_of_a_block_and_are_gone_afterwards():
    one, other, third = Telling(), Telling(100), Telling(1000)
    reader = Reader(default_collate, 2)
    before = set(mp.active_children())
    with reader.often(one, None, other):
        numbers, first, _ = read(reader, [5, 3, 1, 4], one)
        assert numbers == [5, 3, 1, 4]
        assert len(first) == 2
        assert os.getpid() not in first
        assert read(reader, [7, 7, 0], other)[:2] == ([107, 107, 100], first)
        # Memory ran out, say, so that batches are smaller now.
        assert read(reader, [2, 9, 6, 8], one, batch_size=1)[:2] == ([2, 9, 6, 8], first)
        numbers, others, _ = read(reader, [1, 2, 3], third)
        assert numbers == [1001, 1002, 1003]
        assert not others & first
        assert read(reader, [6, 1, 2], one)[:2] == ([6, 1, 2], first)
    assert set(mp.active_children()) == before
    assert not read(reader, [0, 1, 2, 3], one)[1] & first
    assert set(mp.active_children()) == before


@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")
@pytest.mark.parametrize("num_workers", [0, 2])
def test_passes_may_be_left_early_or_begin_within_another(num_workers):
    dataset, reader = Telling(), Reader(default_collate, num_workers)
    with reader.often(dataset):
        left = reader.batches(dataset, torch.arange(20), 2)
        assert next(left).ids.tolist() == [0, 1]
        found = []
        for part in reader.batches(dataset, torch.arange(30, 34), 2):
            found.append((part.batch[:, 0].tolist(), read(reader, [8, 9, 7], dataset)[0]))
        assert found == [([30, 31], [8, 9, 7]), ([32, 33], [8, 9, 7])]
        assert next(left).batch[:, 0].tolist() == [2, 3]


@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")
def test_workers_draw_as_the_global_seed_says_and_go_on_from_pass_to_pass():
    def draws(seed):
        torch.manual_seed(seed)
        reader = Reader(default_collate, 2)
        with reader.often(dataset):
            return [read(reader, [0, 1, 2, 3], dataset)[2] for _ in range(2)]

    dataset = Telling()
    found = draws(1)
    assert found == draws(1)
    every = [number for seed in (found, draws(2)) for one in seed for number in one]
    assert len(set(every)) == 16
