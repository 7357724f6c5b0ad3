import pickle

import numpy as np
import pytest
import torch
from helpers.problems import Net, good, trainer, wrong
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch import LightningDataModule
from lightning.pytorch.callbacks import Callback
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    SequentialSampler,
    WeightedRandomSampler,
)

from lightning_dvc import DVCCallback, DVCDataModule, split_by
from lightning_dvc.errors import ConfigurationError


def doubling(samples):
    x, y = zip(*samples, strict=True)
    return 2 * torch.stack(x), torch.stack(y)


class Existing(LightningDataModule):
    """Somebody's datamodule: makes its datasets in setup, has a collate function and a hook."""

    def __init__(self, **loader):
        super().__init__()
        self.loader = {"batch_size": 16, "collate_fn": doubling, **loader}
        self.calls = []

    def prepare_data(self):
        self.calls.append("prepare_data")

    def setup(self, stage):
        self.calls.append(("setup", stage))
        assert self.trainer is not None
        self.train = ConcatDataset([good(60), wrong(40)])
        self.val = good(30, seed=5)

    def train_dataloader(self):
        return DataLoader(self.train, **self.loader)

    def val_dataloader(self):
        return DataLoader(self.val, batch_size=10, collate_fn=doubling)

    def on_after_batch_transfer(self, batch, dataloader_idx):
        self.calls.append("on_after_batch_transfer")
        return batch

    def teardown(self, stage):
        self.calls.append(("teardown", stage))


class Watching(Net):
    def training_step(self, batch, batch_idx):
        assert batch[0].abs().mean() > 2.5  # doubled by the project's own collate
        return super().training_step(batch, batch_idx)


def fit(existing, sources=None, **settings):
    datamodule = DVCDataModule.wrap(existing, sources, budget=0.3, rounds=2, **settings)
    net = Watching()
    trainer(max_epochs=3, callbacks=[DVCCallback(monitor="val_acc")]).fit(net, datamodule)
    return datamodule, net


BY_NAME = ["good"] * 60 + ["wrong"] * 40


@pytest.mark.parametrize(
    "sources",
    [
        BY_NAME,
        {"good": range(60), "wrong": range(60, 100)},
        [range(60), range(60, 100)],
        {"good": torch.arange(60), "wrong": list(range(60, 100))},
        {"good": good(60), "wrong": wrong(40)},
        None,
    ],
    ids=["names", "ranges", "list of ranges", "indices", "datasets", "one source"],
)
def test_an_existing_datamodule_keeps_what_it_does(sources):
    existing = Existing()
    datamodule, net = fit(existing, sources)
    names = ["train"] if sources is None else ["good", "wrong"]
    if isinstance(sources, list) and isinstance(sources[0], range):
        names = ["0", "1"]
    assert datamodule.pools.names == names
    assert datamodule.budget == len(datamodule.selection) == 30
    assert {
        "prepare_data",
        ("setup", "fit"),
        "on_after_batch_transfer",
        ("teardown", "fit"),
    } <= set(existing.calls)
    assert sum(net.seen[2]) == 30
    assert datamodule.reference is existing.val
    assert datamodule.train_dataloader().collate_fn is doubling


def test_hooks_it_does_not_have_stay_the_models():
    class Plain(Existing):
        on_after_batch_transfer = LightningDataModule.on_after_batch_transfer

    class WithHook(Watching):
        transferred = 0

        def on_after_batch_transfer(self, batch, dataloader_idx):
            self.transferred += 1
            return batch

    datamodule = DVCDataModule.wrap(Plain(), budget=0.3)
    net = WithHook()
    with pytest.warns(
        UserWarning, match="overridden `on_after_batch_transfer` in `LightningModule`"
    ):
        trainer(max_epochs=1, callbacks=[DVCCallback()]).fit(net, datamodule)
    assert net.transferred > 0


class Stream(IterableDataset):
    def __iter__(self):
        return iter([])


class TwoLoaders(Existing):
    def train_dataloader(self):
        return [super().train_dataloader(), super().train_dataloader()]


class OfAStream(Existing):
    def train_dataloader(self):
        return DataLoader(Stream())


class OwnBatches(Existing):
    def train_dataloader(self):
        class Mine(BatchSampler):
            pass

        sampler = Mine(SequentialSampler(self.train), 4, drop_last=False)
        return DataLoader(self.train, batch_sampler=sampler)


@pytest.mark.parametrize(
    ("existing", "sources", "message"),
    [
        (TwoLoaders(), None, "returned a list; return one loader over a torch.utils.data.Concat"),
        (OfAStream(), None, "Stream is iterable-only"),
        (OwnBatches(), None, r"batch_sampler of its own \(Mine\)"),
        (Existing(), ["good"] * 7, "each of 100 samples, but got 7"),
        (Existing(), {"good": range(101)}, r"in 0 \.\. 99"),
        (Existing(), {"good": range(60), "wrong": range(50, 100)}, "more than one source"),
    ],
)
def test_what_cannot_be_wrapped_is_refused(existing, sources, message):
    with pytest.raises(ConfigurationError, match=message):
        fit(existing, sources)


def test_weighted_sampler_is_replaced_with_a_warning():
    class Weighted(Existing):
        def train_dataloader(self):
            sampler = WeightedRandomSampler(torch.ones(100).tolist(), 50)
            return DataLoader(self.train, sampler=sampler, **self.loader)

    with pytest.warns(UserWarning, match="WeightedRandomSampler. Selection replaces"):
        fit(Weighted())


def test_pools_are_known_only_after_setup():
    datamodule = DVCDataModule.wrap(Existing(), budget=0.3)
    with pytest.raises(ConfigurationError, match='after setup\\("fit"\\)'):
        _ = datamodule.selection


def test_a_source_can_be_added_once_the_pools_are_known_also_to_be_resumed(tmp_path):
    class Adding(Callback):
        def setup(self, trainer, pl_module, stage):
            trainer.datamodule.add_source("new", good(20, seed=7))

    def fit_grown(max_epochs, ckpt_path=None):
        datamodule = DVCDataModule.wrap(Existing(), BY_NAME, budget=0.3, rounds=2)
        with pytest.raises(ConfigurationError, match='after setup\\("fit"\\)'):
            datamodule.add_source("new", good(20, seed=7))
        run = trainer(max_epochs=max_epochs, callbacks=[Adding(), DVCCallback(monitor="val_acc")])
        run.fit(Watching(), datamodule, ckpt_path=ckpt_path)
        return datamodule, run

    datamodule, run = fit_grown(3)
    assert datamodule.pools.names == ["good", "wrong", "new"]
    assert datamodule.budget == len(datamodule.selection) == 30
    assert "new" in datamodule.selection.source
    run.save_checkpoint(tmp_path / "saved.ckpt")
    again, _ = fit_grown(4, tmp_path / "saved.ckpt")
    assert torch.equal(again.selected_ids, datamodule.selected_ids)
    assert again.budget == 30


def test_validation_needs_no_pools(tmp_path):
    datamodule, net = fit(Existing(), BY_NAME)
    saved = datamodule.state_dict()
    fresh = DVCDataModule.wrap(Existing(), BY_NAME, budget=0.3, rounds=2)
    fresh.load_state_dict(saved)
    trainer().validate(net, fresh, verbose=False)
    assert fresh.state_dict() == saved


@pytest.mark.parametrize("names", [["x", "y", "x"], [1, 2, 1], torch.tensor([1, 2, 1])])
def test_split_by_names(names):
    parts = split_by(["a", "b", "c"], names)
    assert [[part[i] for i in range(len(part))] for part in parts.values()] == [["a", "c"], ["b"]]


@given(st.lists(st.sampled_from("abcde"), min_size=1, max_size=30))
def test_sources_keep_the_order_of_their_samples_and_of_first_appearance(names):
    expected = {}
    for index, name in enumerate(names):
        expected.setdefault(name, []).append(index)
    parts = split_by(range(len(names)), names)
    assert list(parts) == list(expected)
    assert {name: list(part) for name, part in parts.items()} == expected


def test_ranges_stay_ranges_and_other_indices_take_eight_bytes():
    parts = split_by(range(10), {"first": range(4), "last": range(9, 5, -2), "none": []})
    assert [parts[name].indices for name in ("first", "last")] == [range(4), range(9, 5, -2)]
    assert len(parts["none"]) == 0
    given = [np.array([7, 2]), torch.tensor([7, 2], dtype=torch.int32), [7, 2], (7, 2)]
    parts = [split_by(range(10), {"some": indices})["some"] for indices in given]
    parts.append(split_by(range(8), list("aaxaaaax"))["x"])
    assert [list(part) for part in parts] == [[7, 2]] * 4 + [[2, 7]]
    assert [memoryview(part.indices).nbytes for part in parts] == [16] * 5


class IndexKinds(Dataset):
    def __len__(self):
        return 6

    def __getitem__(self, index):
        return type(index).__name__, index


@pytest.mark.parametrize("workers", [{}, {"num_workers": 1, "multiprocessing_context": "spawn"}])
def test_datasets_are_asked_for_plain_numbers(workers):
    for part in split_by(IndexKinds(), [*"xyxyxy"]).values():
        part = pickle.loads(pickle.dumps(part))
        (batch,) = DataLoader(part, batch_size=3, collate_fn=list, **workers)
        assert batch == list(part)
        assert {kind for kind, _ in batch} == {"int"}


def test_a_loader_that_drops_its_last_batch_trains_from_the_first_epoch_on():
    datamodule, net = fit(Existing(drop_last=True))
    assert sum(net.seen[0]) >= 16
    with pytest.raises(ConfigurationError, match="drop_last leaves nothing"):
        fit(Existing(drop_last=True, batch_size=64))
    assert datamodule.budget == 30


def test_a_dataset_without_a_length_cannot_be_told_apart_into_sources():
    with pytest.raises(ConfigurationError, match="got a generator; load an iterable one"):
        split_by((i for i in range(3)), ["a", "b", "a"])
