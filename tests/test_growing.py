"""Sources that a user's callback adds while a model trains, in real fits."""

import pytest
import torch
from helpers.problems import Net, good, trainer, wrong
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from lightning_dvc import DVC, DVCCallback, DVCDataModule, Source

# Python 3.12 warns about fork in a process with threads, which torch always has.
pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")

ADDED, EPOCHS, BUDGET = 3, 9, 120


class Adding(Callback):
    """A user's callback: adds a source before a given epoch, unless the run has it already."""

    def __init__(self, dataset, hook="on_train_epoch_start", name="new"):
        self.dataset, self.name = dataset, name
        setattr(self, hook, self.add)
        self.epoch = ADDED - (hook == "on_train_epoch_end")

    def add(self, trainer, pl_module):
        datamodule = trainer.datamodule
        if trainer.current_epoch >= self.epoch and self.name not in datamodule.pools.names:
            datamodule.add_source(self.name, self.dataset)


class Watching(Net):
    """Notes in which epochs a sample of the added source trained the model."""

    def __init__(self, dataset):
        super().__init__()
        self.new, self.epochs_of_new = dataset.tensors[0], set()

    def training_step(self, batch, batch_idx):
        if (batch[0].cpu()[:, None] == self.new).all(-1).any():
            self.epochs_of_new.add(self.current_epoch)
        return super().training_step(batch, batch_idx)


def make(sources, **settings):
    settings = {"val": good(90, seed=50), "budget": BUDGET, "rounds": 6, **settings}
    return DVCDataModule(sources, batch_size=16, **settings)


def fit(datamodule, net, callbacks, ckpt_path=None, dvc=None, **settings):
    callbacks = [*callbacks, DVCCallback(dvc, every_n_epochs=1)]
    run = trainer(**{"max_epochs": EPOCHS, "callbacks": callbacks, **settings})
    run.fit(net, datamodule, ckpt_path=ckpt_path)
    return datamodule


def counts_by_round(datamodule, name="new"):
    """Samples of a source that each round selected, and of all."""
    table = datamodule.selection
    mine = torch.tensor([source == name for source in table.source])
    n_rounds = int(table.round.max()) + 1
    return tuple(torch.bincount(r, minlength=n_rounds) for r in (table.round[mine], table.round))


HOOKS = ["on_train_epoch_start", "on_train_epoch_end"]


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("hook", HOOKS)
def test_a_good_source_added_to_bad_ones_is_selected_from_and_trained_on(hook, num_workers):
    new = good(seed=70)
    net = Watching(new)
    sources = {"bad": wrong(), "worse": wrong(seed=80)}
    datamodule = make(sources, num_workers=num_workers)
    fit(datamodule, net, [Adding(new, hook)])
    assert datamodule.budget == len(datamodule.selection) == BUDGET
    assert datamodule.pools.names == ["bad", "worse", "new"]
    ours, everything = counts_by_round(datamodule)
    # Round 1 comes with epoch 0.
    assert ours[: ADDED + 1].sum() == 0
    assert ours[ADDED + 2 :].sum() > 0.8 * everything[ADDED + 2 :].sum()
    assert net.epochs_of_new == set(range(ADDED, EPOCHS))
    assert sum(net.seen[EPOCHS - 1]) == BUDGET


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_source_of_wrong_labels_added_to_good_ones_gets_little_after_its_first_look(num_workers):
    new = wrong(seed=70)
    datamodule = make({"good": good(), "fine": good(seed=80)}, num_workers=num_workers)
    fit(datamodule, Watching(new), [Adding(new)])
    ours, everything = counts_by_round(datamodule)
    assert ours[ADDED + 1] < everything[ADDED + 1] / 3
    assert ours[ADDED + 2 :].sum() < 0.05 * everything[ADDED + 2 :].sum()


def test_the_first_look_at_an_added_source_takes_an_equal_share_of_the_candidates():
    drawn = []

    class Noting(DVC):
        def _draw(self, this, *others):
            candidates = super()._draw(this, *others)
            arms = this.pools.arms_of(candidates)
            drawn.append(torch.bincount(arms, minlength=len(this.pools.names)).tolist())
            return candidates

    datamodule = make({"good": good(), "fine": good(seed=80)})
    fit(datamodule, Net(), [Adding(wrong(seed=70))], dvc=Noting())
    first, second = drawn[ADDED : ADDED + 2]
    assert first[2] == -(-sum(first) // 3)
    assert second[2] < sum(second) / 10


SOURCES = {"good": good(60), "wrong": wrong()}
NEW = good(seed=70)


def saver(folder):
    return ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty:UserWarning")
@pytest.mark.parametrize(
    ("hook", "budget"), [("on_train_epoch_start", BUDGET / 260), ("on_train_epoch_end", BUDGET)]
)
@pytest.mark.parametrize("stop", [ADDED - 2, ADDED - 1, ADDED, ADDED + 1])
def test_a_run_resumed_before_or_after_the_adding_selects_like_the_uninterrupted_one(
    tmp_path, stop, hook, budget
):
    def resumed(sources=SOURCES, **settings):
        callbacks = [Adding(NEW, hook), saver(tmp_path)]
        return fit(make(sources, budget=budget), Net(), callbacks, **settings)

    whole = resumed(enable_checkpointing=True)
    path = tmp_path / f"epoch={stop}.ckpt"
    saved = torch.load(path, weights_only=True)["DVCDataModule"]["pools"]["fingerprint"]
    assert ("new" in saved) is (stop >= Adding(NEW, hook).epoch)
    sources = {**SOURCES, "new": NEW} if "new" in saved else SOURCES
    again = resumed(sources, enable_checkpointing=True, ckpt_path=path)
    assert whole.budget == again.budget == BUDGET
    assert torch.equal(again.selected_ids, whole.selected_ids)
    assert again.selection.columns()["source"] == whole.selection.columns()["source"]
    assert "new" in whole.selection.source


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty:UserWarning")
def test_a_run_is_resumed_with_a_source_that_is_added_in_between(tmp_path):
    fit(make(SOURCES), Net(), [saver(tmp_path)], enable_checkpointing=True)
    again = make({**SOURCES, "new": NEW})
    path = tmp_path / f"epoch={ADDED - 1}.ckpt"
    fit(again, Net(), [saver(tmp_path)], enable_checkpointing=True, ckpt_path=path)
    ours, _ = counts_by_round(again)
    assert ours[: ADDED + 1].sum() == 0
    assert ours[ADDED + 1 :].sum() > 0
    assert again.budget == len(again.selection) == BUDGET


def test_a_source_added_between_two_fits_is_selected_from():
    class Stopping(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            trainer.should_stop = trainer.current_epoch + 1 == ADDED

    datamodule = make({"bad": wrong()}, num_workers=2)
    callback, net = DVCCallback(every_n_epochs=1), Watching(NEW)
    with pytest.warns(UserWarning, match="The run ended with"):
        trainer(max_epochs=EPOCHS, callbacks=[callback, Stopping()]).fit(net, datamodule)
    before = datamodule.selected_ids
    datamodule.add_source("new", NEW)
    assert torch.equal(datamodule.selected_ids, before)
    trainer(max_epochs=EPOCHS, callbacks=[callback]).fit(net, datamodule)
    ours, everything = counts_by_round(datamodule)
    assert ours[ADDED + 1 :].sum() > everything[ADDED + 1 :].sum() / 2
    assert net.epochs_of_new == set(range(EPOCHS))


class Writing(Callback):
    """Every process writes down what is selected, and on how many samples it trained at last."""

    def __init__(self, folder):
        self.folder = folder

    def on_train_end(self, trainer, pl_module):
        kept = (trainer.datamodule.selected_ids, sum(pl_module.seen[EPOCHS - 1]))
        torch.save(kept, self.folder / f"{trainer.global_rank}.pt")


@pytest.mark.filterwarnings("ignore:.*sync_dist=True:UserWarning")
def test_two_processes_that_add_a_source_select_alike(tmp_path):
    callbacks = [Adding(NEW), Writing(tmp_path)]
    two = {"accelerator": "cpu", "devices": 2, "strategy": "ddp_fork"}
    fit(make({"bad": wrong()}), Net(), callbacks, **two)
    (ids, n_trained), (others, n_others) = (torch.load(tmp_path / f"{r}.pt") for r in (0, 1))
    assert torch.equal(ids, others)
    assert n_trained == n_others == BUDGET / 2
    assert (ids >= 200).sum() > BUDGET / 4


def test_an_added_source_gets_its_least_share_of_what_is_left_and_no_more_than_its_largest():
    for source, least, most in (
        (Source(wrong(seed=70), min_share=0.3), 36, 40),
        (Source(good(seed=70), max_share=0.1), 1, 12),
    ):
        datamodule = fit(make({"good": good()}), Net(), [Adding(source)])
        count = datamodule.arm_counts()[1]
        assert least <= count <= most


def test_a_full_budget_makes_room_for_an_added_source_only_where_it_is_refined():
    for refine in (False, True):
        datamodule = make({"good": good(60), "bad": wrong()}, rounds=2)
        fit(datamodule, Net(), [Adding(NEW)], dvc=DVC(refine=refine, disown_rate=1.0))
        assert len(datamodule.selection) == BUDGET
        assert bool(datamodule.arm_counts()[2] > 0) is refine
