import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from lightning_dvc.errors import ConfigurationError
from lightning_dvc.pools import Pools
from lightning_dvc.sampler import SelectionSampler, epoch_order

IDS = st.lists(st.integers(0, 10**12), min_size=1, max_size=40, unique=True)


def sampler_of(ids, seed=0, size=100, **placed):
    sampler = SelectionSampler(TensorDataset(torch.arange(size)), seed, **placed)
    sampler.select(torch.tensor(ids, dtype=torch.int64))
    return sampler


# -- the order


@settings(max_examples=200)
@given(IDS, st.integers(0, 2**40), st.integers(0, 1000), st.integers(1, 60))
def test_ranks_share_every_sample_and_get_equally_many(ids, seed, epoch, world_size):
    ids = np.array(ids)
    parts = [epoch_order(ids, seed, epoch, rank, world_size) for rank in range(world_size)]
    per_rank = math.ceil(len(ids) / world_size)
    assert {len(part) for part in parts} == {per_rank}
    # Interleaved, the parts are one shuffle of all ids, then the same again from its beginning.
    joined = np.stack(parts, 1).ravel()
    shuffled, padding = joined[: len(ids)], joined[len(ids) :]
    assert sorted(shuffled) == sorted(ids)
    assert (padding == np.resize(shuffled, len(padding))).all()
    # Which shuffle it is depends on neither rank nor number of processes.
    assert (shuffled == epoch_order(ids, seed, epoch)).all()


def test_padding_repeats_evenly_when_there_are_fewer_samples_than_ranks():
    parts = [epoch_order(np.arange(3), 0, 0, rank, 8).tolist() for rank in range(8)]
    assert sorted(Counter(i for part in parts for i in part).values()) == [2, 3, 3]


def test_the_order_differs_by_epoch_and_seed_and_is_no_state():
    ids = np.arange(50)
    orders = {
        (seed, epoch): epoch_order(ids, seed, epoch).tolist()
        for seed in range(3)
        for epoch in range(3)
    }
    assert len(set(map(tuple, orders.values()))) == 9
    assert list(ids) not in orders.values()
    np.random.default_rng().random()
    assert epoch_order(ids, 2, 1).tolist() == orders[2, 1]
    assert ids.tolist() == list(range(50))


def test_every_position_is_equally_likely():
    places = np.zeros((5, 5))
    for epoch in range(2000):
        places[np.arange(5), epoch_order(np.arange(5), 7, epoch)] += 1
    chi_square = ((places - 400) ** 2 / 400).sum()
    assert chi_square < 16 + 4 * math.sqrt(2 * 16)


# -- the sampler


@given(IDS, st.integers(1, 9), st.data())
def test_length_is_the_number_emitted(ids, world_size, data):
    rank = data.draw(st.integers(0, world_size - 1))
    sampler = sampler_of(ids, rank=rank, world_size=world_size)
    emitted = list(sampler)
    assert len(sampler) == len(emitted)
    assert {type(i) for i in emitted} == {int}
    more = data.draw(IDS)
    sampler.select(torch.tensor(more))
    assert len(sampler) == len(list(sampler)) == math.ceil(len(more) / world_size)


def test_is_what_lightning_keeps():
    assert isinstance(sampler_of([1]), DistributedSampler)


def test_set_epoch_changes_the_order_and_only_the_order():
    sampler = sampler_of(range(30))
    orders = []
    for epoch in (0, 1, 0):
        sampler.set_epoch(epoch)
        orders.append(list(sampler))
    assert orders[0] == orders[2] != orders[1]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(30))


def test_iterates_twice_and_nested_alike():
    sampler = sampler_of(range(10))
    order = list(sampler)
    assert list(sampler) == order
    outer = []
    for i in sampler:
        assert list(sampler) == order
        outer.append(i)
    assert outer == order


def test_select_replaces_the_ids_and_keeps_a_copy():
    sampler = sampler_of([4, 7])
    assert sorted(sampler) == [4, 7]
    ids = torch.tensor([4, 7, 50, 9])
    sampler.select(ids)
    ids.zero_()
    assert sorted(sampler) == [4, 7, 9, 50]
    sampler.select(torch.tensor([9]))
    assert list(sampler) == [9]


def test_a_selection_during_an_epoch_counts_from_the_next():
    sampler = sampler_of(range(6))
    running = iter(sampler)
    first = next(running)
    sampler.select(torch.arange(90, 95))
    assert sorted([first, *running]) == list(range(6))
    assert sorted(sampler) == list(range(90, 95))


def test_an_empty_selection_is_refused_and_changes_nothing():
    sampler = sampler_of([3])
    with pytest.raises(ConfigurationError, match=r"selection is empty.*raise the budget"):
        sampler.select(torch.empty(0, dtype=torch.int64))
    assert list(sampler) == [3]


def test_place_makes_it_another_rank():
    sampler = sampler_of(range(10))
    parts = []
    for rank in range(4):
        sampler.place(rank, 4)
        assert len(sampler) == 3
        parts += list(sampler)
    assert set(parts) == set(range(10))
    assert len(parts) == 12


def test_asks_where_training_stands_at_the_beginning_of_each_pass():
    sampler, told = sampler_of(range(10)), sampler_of(range(10))
    where = [3, 0]
    sampler.place(0, 1, lambda: (where[0], where[1]))
    sampler.set_epoch(8)  # does not count
    told.set_epoch(3)
    order = list(told)
    assert list(sampler) == order
    assert sampler.seed_of_pass() == told.seed_of_pass()
    where[1] = 4
    assert list(sampler) == order[4:]
    assert len(sampler) == 10  # of the epoch
    where[1] = 10**30
    assert list(sampler) == []
    where[:] = [4, 0]
    assert sampler.seed_of_pass() != told.seed_of_pass()


# Python 3.12 warns about fork in a process with threads, which torch always has.
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_yields_what_the_sampler_emits_as_it_grows(workers):
    pools = Pools(
        {"a": TensorDataset(torch.arange(20)), "b": TensorDataset(torch.arange(100, 130))}
    )
    sampler = SelectionSampler(pools.dataset, seed=3)
    loader = DataLoader(pools.dataset, batch_size=4, sampler=sampler, num_workers=workers)
    for epoch, ids in enumerate([[1, 25, 19, 20, 49], list(range(5, 35))]):
        sampler.set_epoch(epoch)
        sampler.select(torch.tensor(ids))
        batches = [batch for (batch,) in loader]
        assert len(loader) == len(batches) == math.ceil(len(ids) / 4)
        values = [i if i < 20 else i + 80 for i in sampler]
        assert torch.cat(batches).tolist() == values
