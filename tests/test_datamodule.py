import math

import numpy as np
import pytest
import torch
from helpers.problems import Net, good, trainer, wrong
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset, default_collate

from lightning_dvc import DVCDataModule, Source
from lightning_dvc.errors import ConfigurationError, StateError
from lightning_dvc.records import BadSample, Choice


def make(sources=None, **settings):
    sources = {"a": good(60), "b": wrong(40)} if sources is None else sources
    return DVCDataModule(sources, **{"budget": 30, "batch_size": 8, **settings})


def ready(*args, **settings):
    datamodule = make(*args, **settings)
    datamodule.setup("fit")
    return datamodule


class Stream(IterableDataset):
    def __iter__(self):
        return iter([])


class Counted(Stream):
    """Has a length, and from its base class a ``__getitem__`` that only raises."""

    def __len__(self):
        return 5


class NoLength(Dataset):
    def __getitem__(self, index):
        return index


# --- what cannot be ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sources", "settings", "message"),
    [
        ({}, {}, "at least one"),
        ({"a": TensorDataset(torch.empty(0, 2))}, {}, "'a' has no samples"),
        ({"a": Stream()}, {}, "map-style dataset .* got Stream"),
        ({"a": NoLength()}, {}, "map-style dataset .* got NoLength"),
        ({"a": Counted()}, {}, "source needs .* got Counted"),
        ([good(60), wrong(40)], {}, r"{'name': dataset, ...}, but is a list; give each"),
        (good(60), {}, "'name': dataset, ...}, but is a TensorDataset"),
        ({"a": [good(60), wrong(40)]}, {}, "a list of datasets; .*ConcatDataset"),
        (None, {"budget": 0}, "above 0 and at most 100 .* is 0"),
        (None, {"budget": 0.0}, "above 0"),
        (None, {"budget": 101}, "at most 100 .* is 101"),
        (None, {"budget": 1.5}, r"at most 1.0 .* is 1.5"),
        (None, {"budget": "many"}, "a fraction .* or a count .* 'many'"),
        (None, {"budget": True}, "a fraction .* or a count"),
        (None, {"batch_size": 0}, "batch_size >= 1"),
        (None, {"num_workers": -1}, "num_workers >= 0"),
        (None, {"seed": -1}, "seed must be at least 0"),
        (None, {"warmup": 0.0}, "warmup must be greater than 0"),
        (None, {"rounds": 0}, "rounds must be at least 1"),
        (None, {"oversample": 0.5}, "oversample must be at least 1"),
        (None, {"budget": None}, "a fraction .* or a count .* None"),
        (None, {"batch_size": None}, "whole numbers batch_size >= 1 .* got batch_size=None"),
        (None, {"batch_size": "8"}, "whole numbers batch_size >= 1 .* got batch_size='8'"),
        (None, {"batch_size": 8.0}, "whole numbers batch_size >= 1 .* got batch_size=8.0"),
        (None, {"batch_size": True}, "whole numbers batch_size >= 1 .* got batch_size=True"),
        (None, {"num_workers": "2"}, "num_workers >= 0, but got .* num_workers='2'"),
        (None, {"num_workers": None}, "num_workers >= 0, but got .* num_workers=None"),
        (None, {"seed": None}, "seed must be at least 0, a whole number, but is None"),
        (None, {"seed": 1.5}, "seed must be at least 0, a whole number, but is 1.5"),
        (None, {"warmup": None}, "warmup must be greater than 0 and at most 1, but is None"),
        (None, {"rounds": "x"}, "rounds must be at least 1, a whole number, but is 'x'"),
        (None, {"rounds": 2.5}, "rounds must be at least 1, a whole number, but is 2.5"),
        (None, {"rounds": True}, "rounds must be at least 1, a whole number, but is True"),
        (None, {"oversample": "x"}, "oversample must be at least 1, but is 'x'"),
        (None, {"oversample": math.inf}, "oversample must be at least 1, but is inf"),
        (None, {"val": Stream()}, "val needs __len__"),
        (None, {"val": Counted()}, "val needs __len__ .* got Counted"),
        (None, {"reference": Counted()}, "reference needs __len__ .* got Counted"),
        (None, {"val": [good(9), good(9)]}, "val must be one dataset, .* list .*ConcatDataset"),
        (None, {"val": {"a": good(9)}}, "val must be one dataset, .* dict .*ConcatDataset"),
        (None, {"reference": good(9), "val": [good(9)]}, "val must be one dataset"),
        (None, {"test": (good(9), good(9))}, "test must be one dataset, .* tuple"),
        (None, {"val": TensorDataset(torch.empty(0, 2))}, "val is empty"),
        (None, {"reference": TensorDataset(torch.empty(0, 2))}, "reference is empty"),
        (
            {"a": Source(good(10), min_share=0.5), "b": good(90)},
            {"budget": 50},
            "'a' must fill 25 of the budget of 50 .* holds 10",
        ),
        (
            {"a": good(20), "b": Source(good(90), max_share=0.5)},
            {"budget": 80},
            "can fill 60 of the budget of 80",
        ),
        (
            {"a": Source(good(60), min_share=0.7), "b": Source(good(60), min_share=0.7)},
            {},
            "add up to 1.4",
        ),
        (
            {"a": Source(good(60), max_share=0.2), "b": Source(good(60), max_share=0.2)},
            {},
            "add up to 0.4",
        ),
    ],
)
def test_what_cannot_work_is_refused_at_once(sources, settings, message):
    with pytest.raises(ConfigurationError, match=message):
        make(sources, **settings)


def test_training_without_a_callback_is_refused():
    with pytest.raises(ConfigurationError, match=r"add DVCCallback\(\)"):
        trainer().fit(Net(), make())


# --- the warm-up and the loader ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("budget", "count"),
    [
        *[(0.5, 50), (1.0, 100), (1, 1), (100, 100)],
        *[(np.int64(20), 20), (np.uint8(1), 1), (np.float64(0.2), 20), (np.float32(0.2), 20)],
    ],
)
def test_budget_is_a_fraction_or_a_count(budget, count):
    assert make(budget=budget).budget == count


def test_warm_up_comes_equally_from_all_sources():
    datamodule = ready(warmup=0.4)
    assert datamodule.selection.shares() == {"a": 0.5, "b": 0.5}
    assert len(datamodule.selection) == 12
    assert datamodule.selection.round.tolist() == [0] * 12
    assert datamodule.selection.value.isnan().all()


def test_warm_up_keeps_to_the_shares():
    sources = {"a": Source(good(60), max_share=0.1), "b": Source(good(60), min_share=0.6)}
    shares = ready({**sources, "c": good(60)}, warmup=1.0, budget=40).selection.shares()
    assert shares["a"] <= 0.1
    assert shares["b"] >= 0.6


def test_setting_up_again_draws_nothing():
    datamodule = ready()
    ids = datamodule.selected_ids
    datamodule.setup("fit")
    assert torch.equal(datamodule.selected_ids, ids)


def test_seeds_tell_the_warm_up():
    assert torch.equal(ready(seed=1).selected_ids, ready(seed=1).selected_ids)
    assert not torch.equal(ready(seed=1).selected_ids, ready(seed=2).selected_ids)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_loader_is_always_the_same_and_follows_the_selection(num_workers):
    datamodule = ready(num_workers=num_workers)
    loader = datamodule.train_dataloader()
    state = torch.get_rng_state()

    def emitted():
        return torch.cat([x for x, _ in loader]).sort(dim=0).values

    def expected():
        rows = [datamodule.pools.dataset[i][0] for i in datamodule.selected_ids.tolist()]
        return torch.stack(rows).sort(dim=0).values

    assert torch.equal(emitted(), expected())
    datamodule.apply(Choice.unscored(datamodule.pools.draw(0, 5, "more")), 1)
    assert datamodule.train_dataloader() is loader
    assert torch.equal(emitted(), expected())
    assert torch.equal(torch.get_rng_state(), state)


def test_candidates_are_compared_with_the_reference_where_one_is_given():
    val, augmented = (TensorDataset(torch.zeros(n, 2)) for n in (4, 5))
    sources = {"one": TensorDataset(torch.zeros(9, 2))}
    for given, expected in (({}, val), ({"reference": augmented}, augmented)):
        dm = DVCDataModule(sources, val, budget=3, **given)
        assert dm.reference is expected
        assert dm.val_dataloader().dataset is val
    dm = DVCDataModule(sources, budget=3, reference=augmented)
    assert dm.reference is augmented
    with pytest.raises(Exception, match="val_dataloader` must be implemented"):
        dm.val_dataloader()


def test_other_loaders_exist_only_for_what_was_given():
    datamodule = make(val=good(20), test=good(10))
    assert len(datamodule.val_dataloader()) == 3
    assert len(datamodule.test_dataloader().dataset) == 10
    with pytest.raises(Exception, match="predict_dataloader` must be implemented"):
        datamodule.predict_dataloader()


def test_other_loaders_than_that_of_the_reference_may_be_of_streams():
    datamodule = make(reference=good(20), val=Stream(), test=Counted())
    assert datamodule.val_dataloader().dataset.__class__ is Stream
    assert datamodule.test_dataloader().dataset.__class__ is Counted


def test_a_list_of_samples_is_a_dataset():
    samples = [(torch.zeros(2), 0)] * 9
    datamodule = make({"a": samples}, val=samples, budget=3)
    assert datamodule.reference is samples
    assert datamodule.pools.sizes == [9]


def test_printing_it_is_harmless():
    datamodule = ready(val=good(20))
    before = datamodule.selected_ids
    assert "train" in str(datamodule).lower()
    assert torch.equal(datamodule.selected_ids, before)


# --- a round's decision ------------------------------------------------------------------------


def test_apply_adds_takes_back_and_sets_aside():
    datamodule = ready(warmup=1.0, budget=10)
    first, second, *_ = datamodule.selected_ids.tolist()
    fresh = datamodule.pools.draw(1, 3, "more")
    choice = Choice.unscored(fresh[:2])
    choice = Choice(choice.add, choice.values, choice.raw, choice.weights, torch.tensor([first]))
    bad = [BadSample(second, "torn"), BadSample(int(fresh[2]), "not finite")]
    datamodule.apply(choice, 1, bad)
    selected = datamodule.selected_ids.tolist()
    assert selected[-2:] == fresh[:2].tolist()
    assert {first, second, int(fresh[2])}.isdisjoint(selected)
    assert len(selected) == 10
    reasons = [entry.reason for entry in datamodule.selection.set_aside]
    assert reasons == ["torn", "not finite"]
    again = torch.cat([datamodule.pools.draw(arm, 1000, "all") for arm in (0, 1)]).tolist()
    assert {first, second, *selected, int(fresh[2])}.isdisjoint(again)


def test_state_survives_a_file_read_with_weights_only(tmp_path):
    datamodule = ready()
    fresh = datamodule.pools.draw(1, 4, "more")
    datamodule.apply(Choice.unscored(fresh[:3]), 2, [BadSample(int(fresh[3]), "torn")])
    torch.save(datamodule.state_dict(), tmp_path / "state.pt")
    other = make()
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    other.setup("fit")
    assert torch.equal(other.selected_ids, datamodule.selected_ids)
    assert other.selection.columns()["round"] == datamodule.selection.columns()["round"]
    assert other.selection.set_aside == datamodule.selection.set_aside
    assert other.pools.stock.tolist() == datamodule.pools.stock.tolist()
    assert [x.tolist() for x, _ in other.train_dataloader()] == [
        x.tolist() for x, _ in datamodule.train_dataloader()
    ]


def test_state_of_other_sources_is_refused():
    with pytest.raises(StateError, match=r"'a': 60, 'b': 40.*; only new ones may follow"):
        make({"a": good(60)}).load_state_dict(ready().state_dict())


# --- sources added later -----------------------------------------------------------------------


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_added_source_changes_nothing_but_what_can_be_selected(num_workers):
    datamodule = ready(num_workers=num_workers)
    loader, ids = datamodule.train_dataloader(), datamodule.selected_ids
    before = [x.tolist() for x, _ in loader]
    new = good(20, seed=7)
    datamodule.add_source("new", new)
    assert datamodule.pools.names == ["a", "b", "new"]
    assert datamodule.budget == 30
    assert torch.equal(datamodule.selected_ids, ids)
    assert datamodule.arm_counts().tolist() == [1, 1, 0]
    assert [x.tolist() for x, _ in loader] == before  # also where Lightning still has the old one
    again = datamodule.train_dataloader()
    assert again.dataset is again.sampler.dataset is datamodule.pools.dataset
    assert [x.tolist() for x, _ in again] == before
    datamodule.apply(Choice.unscored(datamodule.pools.draw(2, 5, "more")), 1)
    assert datamodule.train_dataloader() is again
    assert datamodule.selection.source[-5:] == ("new",) * 5
    rows = [new[i][0] for i in datamodule.selection.index[-5:].tolist()]
    emitted = torch.cat([x for x, _ in again])
    assert all((emitted == row).all(1).any() for row in rows)


@pytest.mark.parametrize(
    ("name", "source", "message"),
    [
        ("a", good(20), "a source 'a' already"),
        ("new", Stream(), "map-style dataset .* got Stream"),
        ("new", NoLength(), "map-style dataset .* got NoLength"),
        ("new", TensorDataset(torch.empty(0, 2)), "'new' has no samples"),
        ("new", Source(good(100), min_share=0.6), "minimum shares .* 1.100"),
        ("new", Source(good(5), min_share=0.5), "'new' must fill 15 of the budget .* holds 5"),
    ],
)
def test_a_source_that_cannot_be_added_changes_nothing(name, source, message):
    datamodule = ready({"a": Source(good(60), min_share=0.5), "b": wrong(40)})
    loader = datamodule.train_dataloader()
    with pytest.raises(ConfigurationError, match=message):
        datamodule.add_source(name, source)
    assert datamodule.pools.fingerprint() == {"a": 60, "b": 40}
    assert datamodule.train_dataloader() is loader


def test_a_source_may_be_added_before_training_is_set_up():
    datamodule = make(warmup=0.4)
    datamodule.add_source("new", good(20))
    datamodule.setup("fit")
    assert datamodule.arm_counts().tolist() == [4, 4, 4]


@pytest.mark.parametrize(
    ("budget", "expected"), [(0.3, 30), (30, 30), (np.float32(0.3), 30), (np.int32(30), 30)]
)
def test_a_budget_stays_what_it_was_when_sources_are_added(budget, expected):
    datamodule = ready(budget=budget)
    saved = datamodule.state_dict()  # before
    everything = {"a": good(60), "b": wrong(40), "new": good(100)}
    datamodule.add_source("new", everything["new"])
    assert datamodule.budget == expected
    for state in (saved, datamodule.state_dict()):
        again = make(everything, budget=budget)
        again.load_state_dict(state)
        assert again.budget == expected
        assert again.state_dict()["budget_of"] == 100
    more = make(everything, budget=0.5)  # a share given anew is one of the same samples
    more.load_state_dict(saved)
    assert more.budget == 50


def test_saved_states_and_selections_fit_if_new_sources_follow_the_saved_ones(tmp_path):
    datamodule = ready(warmup=1.0)
    everything = {"a": good(60), "b": wrong(40), "new": good(100)}
    again = make(everything)
    again.load_state_dict(datamodule.state_dict())
    csv, parquet = tmp_path / "selected.csv", tmp_path / "selected.parquet"
    datamodule.selection.to_csv(csv)
    datamodule.selection.to_parquet(parquet)
    saved = (datamodule.selection, csv, parquet)
    loaded = [DVCDataModule.from_selection(given, everything) for given in saved]
    for other in (again, *loaded):
        assert torch.equal(other.selected_ids, datamodule.selected_ids)
        assert other.pools.stock.tolist() == [*datamodule.pools.stock.tolist(), 100]


# --- a saved selection -------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".parquet", ".csv"])
def test_saved_selection_is_trained_on_without_a_callback(tmp_path, suffix):
    datamodule = ready(warmup=1.0)
    path = tmp_path / f"selected{suffix}"
    (datamodule.selection.to_parquet if suffix == ".parquet" else datamodule.selection.to_csv)(path)
    again = DVCDataModule.from_selection(path, {"a": good(60), "b": wrong(40)}, batch_size=8)
    net = Net()
    trainer(max_epochs=2).fit(net, again)
    assert {epoch: sum(sizes) for epoch, sizes in net.seen.items()} == {0: 30, 1: 30}
    assert torch.equal(again.selected_ids, datamodule.selected_ids)
    assert again.selection.columns()["index"] == datamodule.selection.columns()["index"]


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ({"a": good(60)}, r"sources \['b'\].*; only new ones may follow"),
        ({"a": good(60), "b": good(2)}, "which holds 2.*; only new ones may follow"),
    ],
)
def test_saved_selection_of_other_sources_is_refused(sources, message):
    selection = ready(warmup=1.0).selection
    with pytest.raises(StateError, match=message):
        DVCDataModule.from_selection(selection, sources)


def test_a_batch_size_that_is_refused_is_not_set():
    datamodule = make()
    with pytest.raises(ConfigurationError, match="got batch_size=0"):
        datamodule.batch_size = 0
    assert datamodule.batch_size == 8
    datamodule.setup("fit")
    assert datamodule.train_dataloader().batch_size == 8


def test_batches_are_made_as_torch_does_unless_told_otherwise():
    for given in ({}, {"collate_fn": None}):
        assert make(**given).loading.collate_fn is default_collate


def test_loader_settings_reach_every_loader():
    def collate(samples):
        return torch.stack([x for x, _ in samples])

    datamodule = ready(val=good(8), collate_fn=collate)
    for loader in (datamodule.train_dataloader(), datamodule.val_dataloader()):
        assert isinstance(loader, DataLoader)
        assert loader.batch_size == 8
        assert next(iter(loader)).ndim == 2
