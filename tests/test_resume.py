"""A run that was killed and resumed ends like the one that was not."""

import random

import numpy as np
import pytest
import torch
from helpers.killing import Events, Hooks, Noted, is_killed, plain, saved, savers
from helpers.problems import WIDTH, Net, good, repeated, trainer, wrong
from lightning.pytorch import LightningDataModule
from lightning.pytorch.callbacks import (
    Callback,
    EMAWeightAveraging,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from torch import nn
from torch.utils.data import ConcatDataset, DataLoader, Dataset

from lightning_dvc import DVC, BayesianWeights, DVCCallback, DVCDataModule, FixedWeights, Random
from lightning_dvc.errors import ConfigurationError, StateError

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*Checkpoint directory .* exists:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint:UserWarning"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed:UserWarning"),
    pytest.mark.filterwarnings("ignore:The run ended with:UserWarning"),
    # Python 3.12 warns about fork in a process with threads, which torch always has.
    pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning"),
]


class Existing(LightningDataModule):
    """Somebody's datamodule, whose last batch is dropped and whose workers do not persist."""

    def __init__(self, events, num_workers):
        super().__init__()
        self.events, self.num_workers = events, num_workers

    def setup(self, stage):
        self.train = ConcatDataset([Noted(good(60), self.events), Noted(wrong(60), self.events)])

    def train_dataloader(self):
        return DataLoader(self.train, batch_size=8, drop_last=True, num_workers=self.num_workers)

    def val_dataloader(self):
        return DataLoader(good(30, seed=50), batch_size=10)

    test_dataloader = predict_dataloader = val_dataloader


class Batches(Callback):
    """Notes which batch was trained on in which epoch."""

    def __init__(self):
        self.noted = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.noted.append((trainer.current_epoch, batch_idx, batch[0].tolist()))


def learning():
    return DVC(BayesianWeights(initial=2, max_share=None))


def fixed():
    return DVC(FixedWeights())


def refining():
    """With all that is learnt and remembered beside learnt weights of metrics."""
    return DVC(
        FixedWeights(),
        layer_weights="learned",
        reward="gain",
        refine=True,
        take_back=0.3,
        disown_rate=1.0,
        drift_tolerance=10.0,
    )


def datamodule(events=None, wrapped=False, num_workers=0, **settings):
    events = events or Events()
    settings = {"budget": 48, "rounds": 3, "warmup": 0.3, **settings}
    if wrapped:
        names = ["good"] * 60 + ["wrong"] * 60
        return DVCDataModule.wrap(Existing(events, num_workers), names, **settings)
    sources = {"good": Noted(good(60), events), "wrong": Noted(wrong(60), events)}
    held_out = good(30, seed=50)
    settings = {"batch_size": 8, "num_workers": num_workers, **settings}
    return DVCDataModule(sources, held_out, held_out, held_out, **settings)


def run(
    folder,
    events=None,
    ckpt_path=None,
    strategy=learning,
    every=2,
    data=None,
    net=Net,
    more=list,
    checkpoints=savers,
    **settings,
):
    """Train for 4 epochs; return all that has to be the same."""
    events = events or Events()
    module, batches = datamodule(events, **(data or {})), Batches()
    callback = DVCCallback(strategy(), monitor="val_acc")
    callbacks = [callback, batches, *more(), *checkpoints(folder, every), Hooks(events)]
    settings = {"max_epochs": 4, "enable_checkpointing": True, **settings}
    net = net()
    trainer(callbacks=callbacks, **settings).fit(
        net, module, ckpt_path=ckpt_path, weights_only=True
    )
    return module, net, callback, batches.noted


def assert_same_end(one, other):
    for left, right in zip(one[1].parameters(), other[1].parameters(), strict=True):
        assert torch.equal(left, right)
    assert plain(one[0].state_dict()) == plain(other[0].state_dict())
    mine, theirs = one[2].state_dict(), other[2].state_dict()
    for state in (mine, theirs):
        del state["seconds"], state["training_seconds"]
        del state["layers"]  # not known where nothing was left to train
    for name in mine["strategy"]:  # a smaller message than of all at once
        assert plain(mine["strategy"][name]) == plain(theirs["strategy"][name]), name
    assert plain(mine) == plain(theirs)


# --- killed anywhere ---------------------------------------------------------------------------


def kill_and_resume(folder, number, fatal, uninterrupted, **settings):
    """Kill at an event, resume, kill again at a later one, resume."""
    folder = folder / str(number)
    last = None
    for at in (fatal, fatal // 2):
        if is_killed(lambda at=at, last=last: run(folder, Events(at), last, **settings)):
            last = (saved(folder) or [None])[-1]
    assert_same_end(run(folder, ckpt_path=last, **settings), uninterrupted)


def fatal_events(events, n, seed):
    """Random moments, as many in scoring as between batches and in validation."""
    kinds = [("read",), ("batch begins", "batch ends"), ("validating", "validated", "epoch ends")]
    draw = random.Random(seed)
    for number in range(n):
        kind = kinds[number % len(kinds)]
        yield draw.choice([i for i, name in enumerate(events.noted, 1) if name in kind])


def check_kills(folder, n, seed, **settings):
    events = Events()
    uninterrupted = run(folder / "whole", events, **settings)
    for number, fatal in enumerate(fatal_events(events, n, seed)):
        kill_and_resume(folder, number, fatal, uninterrupted, **settings)


def test_a_killed_run_ends_like_the_uninterrupted_one(tmp_path):
    check_kills(tmp_path, 3, seed=1)


@pytest.mark.slow
def test_a_run_killed_at_any_moment_ends_like_the_uninterrupted_one(tmp_path):
    check_kills(tmp_path, 20, seed=2)


# --- every kind of checkpoint ------------------------------------------------------------------


def resume_from_all(folder, some=slice(None), **settings):
    """Resume from every checkpoint of one run; the batches that follow have to be the same too."""
    whole = run(folder / "whole", **settings)
    paths = saved(folder / "whole")[some]
    assert paths
    for path in paths:
        resumed = run(folder / path.stem, ckpt_path=path, **settings)
        assert_same_end(resumed, whole)
        rest = resumed[3]
        assert rest == whole[3][len(whole[3]) - len(rest) :], path.stem
    return whole


@pytest.mark.parametrize(
    "settings",
    [
        {"some": slice(None)},
        {"strategy": Random, "limit_val_batches": 0, "limit_train_batches": 3, "every": 1},
        {"accumulate_grad_batches": 2, "every": 1},
        {"max_steps": 20, "max_epochs": -1, "every": 3},
        {"data": {"wrapped": True}},
        # A validation within an epoch follows a checkpoint, and is not left out.
        {"val_check_interval": 2},
        {"check_val_every_n_epoch": None, "val_check_interval": 3, "every": 3},
    ],
    ids=str,
)
def test_every_checkpoint_can_be_resumed_from(tmp_path, settings):
    resume_from_all(tmp_path, **{"some": slice(6), **settings})


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_run_with_workers_can_be_resumed_in_the_middle_of_an_epoch(tmp_path, wrapped):
    data = {"wrapped": wrapped, "num_workers": 2}
    resume_from_all(tmp_path, slice(0, 6, 2), strategy=fixed, data=data)


def in_validation(folder, every):
    return [ModelCheckpoint(folder, "{step}", save_top_k=-1, save_on_train_epoch_end=False)]


def test_checkpoints_of_a_validation_can_be_resumed_from(tmp_path):
    resume_from_all(tmp_path, checkpoints=in_validation)


# --- other ways of training --------------------------------------------------------------------


class Normed(Net):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(16)

    def forward(self, x):
        return self.head(self.norm(self.body(x)).relu())


class Double(Normed):
    """In float64 from the start: Lightning loads a checkpoint before it converts a module."""

    def __init__(self):
        super().__init__()
        self.double()


class TwoOptimizers(Net):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def per_sample_loss(self, batch):
        logits = self(batch[0])
        return nn.functional.cross_entropy(logits, batch[1], reduction="none"), logits, batch[1]

    def training_step(self, batch, batch_idx):
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(self.per_sample_loss(batch)[0].mean())
            optimizer.step()

    def configure_optimizers(self):
        parts = (self.body, self.head)
        return [torch.optim.Adam(part.parameters(), lr=1e-2) for part in parts]


STYLES = {
    "batch norm": {"net": Normed, "max_epochs": 6},
    "bf16-true": {"net": Normed, "precision": "bf16-true"},
    "64-true": {"net": Double, "precision": "64-true"},
    "two optimizers": {"net": TwoOptimizers},
    "ema": {"net": Normed, "more": lambda: [EMAWeightAveraging(decay=0.9)]},
    # After the last epoch comes one more, of running means; a round takes place before it too.
    "swa": {
        "net": Normed,
        "more": lambda: [StochasticWeightAveraging(swa_lrs=1e-2, swa_epoch_start=2)],
    },
}


@pytest.mark.filterwarnings("ignore:Using ModelCheckpoint with manual optimization:UserWarning")
@pytest.mark.parametrize("style", STYLES)
def test_other_ways_of_training_are_resumed(tmp_path, style):
    # Not from the last: where nothing is left to train, Lightning does not put averages in place.
    resume_from_all(tmp_path, slice(1, -1, 3), strategy=refining, every=5, **STYLES[style])


# --- what is random ----------------------------------------------------------------------------


class Dropping(Net):
    def __init__(self):
        super().__init__()
        self.drop = nn.Dropout(0.3)

    def forward(self, x):
        return super().forward(self.drop(x))


class Augmented(Dataset):
    """Samples that come out otherwise each time, by all three random streams."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        x, y = self.dataset[index]
        shift = random.random() + np.random.random()  # noqa: NPY002 - the stream restored
        return x + shift + torch.randn(WIDTH), y


class Streams(Callback):
    """Saves the global random streams, which Lightning does not."""

    def __init__(self):
        self.loaded = None

    def state_dict(self):
        kind, words, *rest = np.random.get_state()  # noqa: NPY002 - the stream restored
        return {
            "torch": torch.get_rng_state(),
            "numpy": [kind, words.tolist(), *rest],
            "random": random.getstate(),
        }

    def load_state_dict(self, state):
        self.loaded = state

    def on_train_start(self, trainer, pl_module):
        if self.loaded is not None:
            torch.set_rng_state(self.loaded["torch"])
            np.random.set_state(tuple(self.loaded["numpy"]))  # noqa: NPY002 - the stream restored
            random.setstate(self.loaded["random"])


def augmented(monkeypatch):
    monkeypatch.setattr("test_resume.Noted", lambda dataset, events: Augmented(dataset))


def test_dropout_and_augmentation_go_on_too_if_somebody_restores_the_streams(tmp_path, monkeypatch):
    augmented(monkeypatch)
    resume_from_all(tmp_path, slice(6), net=Dropping, more=lambda: [Streams()])


def at_epochs_ends(folder, every):
    return savers(folder, every)[1:]


def test_workers_that_are_started_anew_augment_alike_after_an_epochs_end(tmp_path, monkeypatch):
    augmented(monkeypatch)
    data = {"wrapped": True, "num_workers": 2}
    resume_from_all(tmp_path, slice(0, 2), strategy=fixed, data=data, checkpoints=at_epochs_ends)


# --- what does not fit together ----------------------------------------------------------------


class Mine(DVCDataModule):
    """A class of another name."""


def resume(folder, module=None, strategy=learning, saved_with=learning, **settings):
    """Go on, with other parts, with a run of two epochs."""
    run(folder / "begun", max_epochs=2, strategy=saved_with, **settings)
    module = module or datamodule()
    trainer(callbacks=[DVCCallback(strategy(), monitor="val_acc")]).fit(
        Net(), module, ckpt_path=saved(folder / "begun")[-1]
    )
    return module


def test_a_budget_below_what_is_selected_is_refused(tmp_path):
    message = r"at most 20 selected samples, the budget, but it has \d\d; give a budget of at least"
    with pytest.raises(StateError, match=message):
        resume(tmp_path, datamodule(budget=20))
    with pytest.raises(StateError, match=message):
        resume(tmp_path / "2", datamodule(budget=20, wrapped=True), data={"wrapped": True})


@pytest.mark.parametrize("budget", [48, 90])
def test_a_finished_run_goes_on_selecting_with_a_larger_budget_only(tmp_path, budget):
    run(tmp_path / "begun", strategy=fixed)
    module = datamodule(budget=budget)
    callback = DVCCallback(fixed(), monitor="val_acc")
    trainer(callbacks=[callback], max_epochs=9).fit(
        Net(), module, ckpt_path=saved(tmp_path / "begun")[-1]
    )
    assert len(module.selected_ids) == budget
    assert callback.rounds_done == (3 if budget == 48 else 6)
    trainer(callbacks=[callback], max_epochs=3).fit(Net(), module)
    assert callback.state_dict()["n_rounds"] == callback.rounds_done


def test_an_adopted_selection_is_not_replaced_by_that_of_a_checkpoint(tmp_path):
    module = datamodule()
    ids = resume(tmp_path, module).selected_ids
    sources = {"good": good(60), "wrong": wrong(60)}
    adopted = DVCDataModule.from_selection(module.selection, sources, batch_size=8)
    message = r"on the 48 samples that were adopted, but it has other ones selected \(\d+\)"
    with pytest.raises(StateError, match=message):
        trainer().fit(Net(), adopted, ckpt_path=saved(tmp_path / "begun")[0])
    assert torch.equal(adopted.selected_ids, ids)
    # Its own checkpoints are gone on from.
    saver = ModelCheckpoint(tmp_path / "own", filename="one")
    trainer(callbacks=[saver], enable_checkpointing=True, max_epochs=1).fit(Net(), adopted)
    again = DVCDataModule.from_selection(module.selection, sources, batch_size=8)
    trainer(max_epochs=2).fit(Net(), again, ckpt_path=tmp_path / "own" / "one.ckpt")
    assert torch.equal(again.selected_ids, ids)


def test_a_datamodule_of_another_class_is_refused(tmp_path):
    sources = {"good": good(60), "wrong": wrong(60)}
    module = Mine(sources, good(30, seed=50), budget=48, rounds=3, warmup=0.3)
    with pytest.raises(StateError, match=r"checkpoint of a DVCDataModule, but the Mine .* has 15"):
        resume(tmp_path, module)


def test_another_strategy_is_refused(tmp_path):
    with pytest.raises(StateError, match="of the strategy Random, but it was made with DVC"):
        resume(tmp_path, strategy=Random)


def test_other_weights_are_refused(tmp_path):
    with pytest.raises(StateError, match="'observations'"):
        resume(tmp_path, saved_with=fixed)


def test_a_strategy_serves_one_datamodule():
    strategy, module = DVC(), datamodule()

    def fit(module):
        trainer(callbacks=[DVCCallback(strategy)], max_epochs=1).fit(Net(), module)

    fit(module)
    with pytest.raises(ConfigurationError, match="or its strategy, has selected for another"):
        fit(datamodule())
    fit(module)


# --- without training --------------------------------------------------------------------------


class Predicting(Net):
    def predict_step(self, batch, batch_idx):
        return self(batch[0])


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("task", ["validate", "test", "predict"])
def test_a_checkpoint_can_be_looked_at_with_other_sources(tmp_path, task, wrapped):
    _, net, _, _ = run(tmp_path, data={"wrapped": wrapped}, max_epochs=2)
    path = saved(tmp_path)[-1]
    if wrapped:
        module = datamodule(wrapped=True)
    else:
        held_out = good(20, seed=9)
        module = DVCDataModule({"few": repeated(6)}, held_out, held_out, held_out, budget=2)
    before = module.state_dict()
    callback = DVCCallback(Random())
    other = Predicting()
    result = getattr(trainer(callbacks=[callback]), task)(
        other, datamodule=module, ckpt_path=path, weights_only=True
    )
    assert result
    for mine, theirs in zip(other.parameters(), net.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    assert callback.rounds_done == 0
    assert plain(module.state_dict()) == plain(before)
    if wrapped:
        with pytest.raises(ConfigurationError, match="known only after"):
            module.pools  # noqa: B018 - not built
