"""Settings of Lightning's loops, its tuners and learning-rate schedules, in small real fits."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from helpers.problems import Faulty, Net, good, repeated, trainer, wrong
from lightning.pytorch import LightningDataModule
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    Callback,
    EarlyStopping,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelCheckpoint,
)
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.tuner import Tuner
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader

from lightning_dvc import DVC, DVCCallback, DVCDataModule, Random
from lightning_dvc.errors import ConfigurationError

SHORT = pytest.mark.filterwarnings("ignore:The run ended with:UserWarning")
AGAIN = pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists:UserWarning")

# With three rounds at the starts of epochs 0 to 2: in epochs of 3, 6, 8, 8, ... batches.
GROWTH = [43, 82, 120, 120]


def make(sources=None, **settings):
    sources = sources or {"good": good(), "wrong": wrong()}
    settings = {"val": good(60, seed=50), "budget": 120, "batch_size": 16, "rounds": 3, **settings}
    return DVCDataModule(sources, **settings)


class Watching(Net):
    """Notes at which steps the model is validated, and how often before training."""

    def __init__(self, lr=1e-2):
        super().__init__()
        self.lr, self.validated, self.before = lr, [], 0

    def validation_step(self, batch, batch_idx):
        super().validation_step(batch, batch_idx)
        self.before += self.trainer.sanity_checking

    def on_validation_epoch_start(self):
        if not self.trainer.sanity_checking:
            self.validated.append(self.trainer.global_step)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=self.lr)


class Listening(Random):
    """Chooses at random, and notes the scores that it is told."""

    def __init__(self):
        self.scores = []

    def observe(self, score):
        self.scores.append(score)


def fit(datamodule=None, net=None, select=None, **settings):
    """Fit, with random selection unless told otherwise, which always adds what is planned."""
    datamodule, net = datamodule or make(), net or Watching()
    every = settings.pop("every_n_epochs", None)
    callback = DVCCallback(select or Random(), monitor="val_acc", every_n_epochs=every)
    ckpt_path = settings.pop("ckpt_path", None)
    run = trainer(callbacks=[*settings.pop("callbacks", []), callback], **settings)
    run.fit(net, datamodule, ckpt_path=ckpt_path)
    return run, net, callback


def trained_on(net):
    return [sum(batches) for batches in net.seen.values()]


# --- where a run ends --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "sizes"),
    [
        # Nine epochs, of which the first six have the rounds.
        ({"max_steps": 58}, [43, 43, 82, 82, *[120] * 5]),
        ({"max_steps": 12}, [62, 120]),
        ({"max_steps": 5}, [80]),
        ({"max_steps": 51, "max_epochs": 4}, GROWTH),
        ({"max_steps": 10, "accumulate_grad_batches": 3}, [*GROWTH, 48]),
        ({"max_steps": 9, "limit_train_batches": 2}, [32, 32, 32, 32, 16]),
    ],
)
def test_rounds_are_planned_from_max_steps(settings, sizes):
    run, net, callback = fit(**{"max_epochs": -1, **settings})
    assert trained_on(net) == sizes
    assert len(run.datamodule.selected_ids) == 120
    assert callback.rounds_done == callback.state_dict()["n_rounds"]


@pytest.mark.parametrize(("seconds", "epochs"), [(70, 4), (10, 1)])
def test_max_time_ends_a_run_of_one_round_an_epoch(monkeypatch, seconds, epochs):
    ticks = itertools.count()
    clock = SimpleNamespace(monotonic=lambda: next(ticks))  # asked at every batch
    monkeypatch.setattr("lightning.pytorch.callbacks.timer.time", clock)
    settings = {"max_epochs": None, "max_time": {"seconds": seconds}}
    if epochs > 3:
        _, net, _ = fit(**settings)
        assert trained_on(net)[:4] == GROWTH
    else:
        with pytest.warns(UserWarning, match=r"ended with 82 .* after 2 of 3 rounds. Give it more"):
            fit(**settings)


@SHORT
def test_early_stopping_and_checkpoints_of_the_best_epoch(tmp_path):
    stopper = EarlyStopping("val_acc", mode="max", patience=1, min_delta=1.0)
    saver = ModelCheckpoint(tmp_path, monitor="val_acc", mode="max", save_top_k=1)
    _, net, _ = fit(callbacks=[stopper, saver], enable_checkpointing=True)
    assert trained_on(net) == GROWTH[:2]  # nothing improves by 1
    assert len(net.validated) == 2
    saved = torch.load(saver.best_model_path, weights_only=True)
    assert saved["epoch"] in (0, 1)
    Watching().load_state_dict(saved["state_dict"])


@pytest.mark.parametrize("strategy", [Random, DVC])
def test_a_trial_run_takes_the_steps_that_it_is_asked_for(strategy):
    run, net, callback = fit(fast_dev_run=2, net=Scheduled(), select=strategy())
    assert (run.global_step, net.planned) == (2, 2)
    assert trained_on(net) == [32]
    assert callback.rounds_done == 1


# --- batches and validation --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("limit", "batches"),
    [(2, [2, 2, 2, 2]), (7, [3, 6, 7, 7]), (0.5, [1, 3, 4, 4]), (0.01, [1, 1, 1, 1])],
)
def test_limit_train_batches(limit, batches):
    run, net, _ = fit(limit_train_batches=limit)
    assert [len(sizes) for sizes in net.seen.values()] == batches
    assert run.limit_train_batches == limit


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({}, [3, 9, 17, 25]),
        ({"val_check_interval": 0.5}, [1, 2, 3, 6, 9, 13, 17, 21, 25]),
        # A short epoch is validated at its end.
        ({"val_check_interval": 5}, [3, 8, 14, 22]),
        ({"val_check_interval": 100}, [3, 9, 17, 25]),
        ({"val_check_interval": 5, "check_val_every_n_epoch": None}, [5, 10, 15, 20, 25]),
        ({"check_val_every_n_epoch": 2}, [9, 25]),
        ({"limit_val_batches": 0}, []),
        ({"limit_val_batches": 0, "val_check_interval": 100}, []),
        ({"num_sanity_val_steps": 0}, [3, 9, 17, 25]),
        ({"num_sanity_val_steps": -1}, [3, 9, 17, 25]),
        ({"accumulate_grad_batches": 3}, [1, 3, 6, 9]),
    ],
)
def test_validation_comes_when_it_is_asked_for_and_every_score_is_told(settings, steps):
    strategy = Listening()
    run, net, _ = fit(select=strategy, **settings)
    assert net.validated == steps
    assert len(strategy.scores) == len(steps)
    sanity = settings.get("num_sanity_val_steps", 2) if steps else 0
    assert net.before == (4 if sanity == -1 else sanity)
    assert trained_on(net) == GROWTH
    assert run.val_check_interval == settings.get("val_check_interval", 1.0)


@AGAIN
@SHORT
@pytest.mark.parametrize(
    "settings",
    [{"val_check_interval": 5}, {"limit_train_batches": 0.2}, {"max_steps": 20, "max_epochs": -1}],
)
def test_a_run_with_short_epochs_goes_on_after_a_resume(tmp_path, settings):
    def parts():
        return make(), Watching()

    # Epoch 1, which comes first after the resume, has no round, and the batches of epoch 0.
    settings = {"every_n_epochs": 2, "max_epochs": 5, "enable_checkpointing": True, **settings}
    saver = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    _, whole, _ = fit(*parts(), callbacks=[saver], **settings)
    path = tmp_path / "epoch=0.ckpt"
    resumed, net, _ = fit(*parts(), callbacks=[saver], ckpt_path=path, **settings)
    assert trained_on(net) == trained_on(whole)[1:]
    assert net.validated == whole.validated[1:]
    assert resumed.val_check_interval == settings.get("val_check_interval", 1.0)
    assert resumed.limit_train_batches == settings.get("limit_train_batches", 1.0)


def test_settings_of_the_trainer_are_as_before_after_an_error():
    class Broken(Watching):
        def validation_step(self, batch, batch_idx):
            raise RuntimeError("broken")

    run = trainer(callbacks=[DVCCallback(Random())], val_check_interval=100)
    with pytest.raises(RuntimeError, match="broken"):
        run.fit(Broken(), make())
    assert run.val_check_interval == 100


def test_settings_of_the_trainer_are_as_before_if_nothing_is_trained():
    # And nothing is said of the budget.
    run, net, _ = fit(val_check_interval=100, limit_train_batches=0.001, max_time="00:00:00:00")
    assert net.seen == {}
    assert (run.val_check_interval, run.limit_train_batches) == (100, 0.001)


def test_a_round_does_not_begin_the_time_to_the_next_validation_anew(monkeypatch):
    ticks = itertools.count()
    for loop in ("fit_loop", "training_epoch_loop", "evaluation_loop"):
        clock = SimpleNamespace(monotonic=lambda: next(ticks))  # asked at every batch
        monkeypatch.setattr(f"lightning.pytorch.loops.{loop}.time", clock)
    _, net, _ = fit(val_check_interval={"seconds": 7}, log_every_n_steps=1)
    # Rounds come after 3 and 9 steps.
    assert net.validated[0] < 9
    assert all(2 < later - one < 9 for one, later in itertools.pairwise(net.validated))


def test_a_short_warm_up_does_not_warn_of_the_interval_of_logging(tmp_path):
    logger = CSVLogger(tmp_path)
    run, _, _ = fit(logger=logger, log_every_n_steps=8, limit_val_batches=0)
    assert run.num_training_batches == 8


# --- learning-rate schedules -------------------------------------------------------------------


class Scheduled(Watching):
    """Its learning rate goes up and down once, over as many steps as are planned."""

    estimates = False

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        if self.estimates:
            self.planned = self.trainer.estimated_stepping_batches
        else:
            self.planned = self.trainer.datamodule.planned_steps(self.trainer)
        self.schedule = OneCycleLR(optimizer, 0.01, total_steps=self.planned)
        return [optimizer], [{"scheduler": self.schedule, "interval": "step"}]


class Estimating(Scheduled):
    estimates = True


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({}, 25),
        ({"max_epochs": 9}, 58),
        ({"max_epochs": -1, "max_steps": 51}, 51),
        ({"max_epochs": 9, "max_steps": 20}, 20),
        ({"accumulate_grad_batches": 3}, 9),
        ({"limit_train_batches": 5}, 18),
        ({"limit_train_batches": 0.3}, 6),
        ({"every_n_epochs": 2}, 24),
        ({"datamodule": {"rounds": 20}}, 21),
        ({"datamodule": {"warmup": 1.0}}, 32),
        ({"datamodule": {"budget": 1.0}}, 76),
        ({"datamodule": {"batch_size": 7}}, 55),
    ],
)
def test_as_many_steps_are_taken_as_planned(settings, steps):
    datamodule = make(**settings.pop("datamodule", {}))
    run, net, _ = fit(datamodule, Scheduled(), limit_val_batches=0, **settings)
    assert run.global_step == net.planned == steps
    assert net.schedule.last_epoch == steps  # which it counts, too


@pytest.mark.parametrize(
    ("factors", "steps"), [({2: 2}, 3 + 6 + 4 + 4), ({0: 4, 2: 1}, 1 + 2 + 8 + 8)]
)
def test_a_schedule_of_accumulation_takes_fewer_steps_than_planned(factors, steps):
    schedule = GradientAccumulationScheduler(factors)
    run, net, _ = fit(net=Scheduled(), limit_val_batches=0, callbacks=[schedule])
    assert net.planned == 25
    assert run.global_step == steps


def test_a_run_of_steps_with_a_schedule_of_accumulation_spends_the_budget():
    schedule = GradientAccumulationScheduler({0: 4})
    settings = {"max_steps": 9, "max_epochs": -1, "callbacks": [schedule]}
    run, net, _ = fit(net=Scheduled(), limit_val_batches=0, **settings)
    assert run.global_step == net.planned == 9
    assert trained_on(net)[-2] == len(run.datamodule.selected_ids) == 120


def test_no_more_steps_are_taken_than_lightning_estimates():
    run, net, _ = fit(net=Estimating())
    assert (run.global_step, net.planned) == (25, 32)  # four epochs of the full selection


class TheirData(LightningDataModule):
    def train_dataloader(self):
        return DataLoader(good(), batch_size=16, drop_last=True)

    def val_dataloader(self):
        return DataLoader(good(60, seed=50), batch_size=16)


def test_batches_left_out_by_drop_last_are_not_planned():
    datamodule = DVCDataModule.wrap(TheirData(), budget=120, rounds=3)
    run, net, _ = fit(datamodule, Scheduled(), limit_val_batches=0)
    assert [len(sizes) for sizes in net.seen.values()] == [3, 5, 7, 7]
    assert run.global_step == net.planned == 22


def test_no_batch_at_all_is_an_error_rather_than_an_end():
    datamodule = DVCDataModule.wrap(TheirData(), budget=120, rounds=3)
    datamodule.setup("fit")
    datamodule.batch_size = 60
    with pytest.raises(ConfigurationError, match=r"no batch of 60 of the 51 .* lower the batch"):
        fit(datamodule, limit_val_batches=0)


def bad():
    return Faulty(dict.fromkeys(range(40), "nan"), n=60)


@SHORT
@pytest.mark.filterwarnings("ignore:.*set aside:UserWarning")
@pytest.mark.parametrize(
    ("sources", "strategy", "settings"),
    [
        ({"repeated": repeated(distinct=60), "good": good(90)}, DVC(), {}),
        ({"bad": bad(), "good": good(100)}, DVC(), {"warmup": 0.5}),
        ({"good": good(90), "wrong": wrong(90)}, DVC(refine=True, take_back=0.4), {"rounds": 2}),
    ],
)
def test_rounds_that_fall_short_make_the_run_no_longer_than_planned(sources, strategy, settings):
    run, net, _ = fit(make(sources, **settings), Scheduled(), strategy, max_epochs=7)
    sizes = trained_on(net)
    assert min(sizes) > 0
    assert 0.7 * net.planned < run.global_step <= net.planned


def test_rounds_that_are_left_out_make_the_run_shorter():
    net, callback = Scheduled(), DVCCallback(max_overhead=1e-9)
    run = trainer(callbacks=[callback], max_epochs=7)
    run.fit(net, make(rounds=5))
    assert callback.rounds_left_out == 3
    assert run.global_step < net.planned


@AGAIN
def test_a_resumed_run_and_a_selection_that_stays_are_planned_too(tmp_path):
    saver = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    settings = {"callbacks": [saver], "enable_checkpointing": True}
    _, whole, _ = fit(net=Scheduled(), **settings)
    for epoch in (0, 2):
        path = tmp_path / f"epoch={epoch}.ckpt"
        run, net, _ = fit(net=Scheduled(), ckpt_path=path, **settings)
        assert run.global_step == net.planned == whole.planned == 25
    sources = {"good": good(), "wrong": wrong()}
    again = DVCDataModule.from_selection(run.datamodule.selection, sources, batch_size=16)
    net = Scheduled()
    run = trainer(max_epochs=3, limit_val_batches=0)
    run.fit(net, again)
    assert run.global_step == net.planned == 24


@SHORT
@pytest.mark.parametrize("strategy", [Random(), DVC(refine=True)])
def test_a_second_fit_is_planned_from_what_the_first_has_selected(strategy):
    datamodule, callback = make(), DVCCallback(strategy, every_n_epochs=1)
    stopped = trainer(callbacks=[callback], max_epochs=4, max_steps=9)
    stopped.fit(Scheduled(), datamodule)
    net = Scheduled()
    run = trainer(callbacks=[callback], max_epochs=4)
    run.fit(net, datamodule)
    assert run.global_step == net.planned
    assert trained_on(net)[-1] == 120


def test_steps_are_not_planned_without_an_end_or_before_a_fit():
    with pytest.raises(ConfigurationError, match="without max_epochs and max_steps"):
        fit(net=Scheduled(), max_epochs=-1)
    with pytest.raises(ConfigurationError, match="call planned_steps in configure_optimizers"):
        make().planned_steps(trainer())


class InEachProcess(Callback):
    def on_train_end(self, trainer, pl_module):
        assert trainer.global_step == pl_module.planned == 13


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_steps_of_two_processes_are_planned():
    two = {"accelerator": "cpu", "devices": 2, "strategy": "ddp_fork"}
    fit(net=Scheduled(), select=Random(), callbacks=[InEachProcess()], limit_val_batches=0, **two)


# --- Lightning's tuners ------------------------------------------------------------------------


class Hungry(Watching):
    def training_step(self, batch, batch_idx):
        if len(batch[0]) > 20:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return super().training_step(batch, batch_idx)


@pytest.fixture
def quick(monkeypatch):
    """Without what takes the batch-size finder nearly all of its time."""
    collect = "lightning.pytorch.tuner.batch_size_scaling.garbage_collection_cuda"
    monkeypatch.setattr(collect, lambda: None)


def with_tuner(run, net, datamodule, mode="power"):
    size = Tuner(run).scale_batch_size(net, datamodule=datamodule, mode=mode, init_val=4)
    assert size == datamodule.batch_size
    net.seen.clear()
    run.fit(net, datamodule)


def with_binary_search(run, net, datamodule):
    with_tuner(run, net, datamodule, "binsearch")


def with_callback(run, net, datamodule):
    run.callbacks.insert(0, BatchSizeFinder(init_val=4))
    run.fit(net, datamodule)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("find", "found"), [(with_tuner, 16), (with_callback, 16), (with_binary_search, 19)]
)
def test_a_batch_size_is_found_with_full_batches_and_costs_no_round(tmp_path, find, found):
    def parts(size):
        callback = DVCCallback(score_batch_size=16)
        run = trainer(callbacks=[callback], default_root_dir=tmp_path, max_steps=20, max_epochs=-1)
        return callback, run, Hungry(), make(batch_size=size)

    callback, run, net, datamodule = parts(4)
    find(run, net, datamodule)
    assert datamodule.batch_size == datamodule.val_dataloader().batch_size == found
    plain, plain_run, plain_net, plain_data = parts(found)
    plain_run.fit(plain_net, plain_data)
    assert callback.rounds_done == plain.rounds_done == 3
    assert datamodule.selected_ids.tolist() == plain_data.selected_ids.tolist()
    for mine, theirs in zip(net.parameters(), plain_net.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_a_batch_size_that_is_set_counts_from_the_next_loader_on():
    datamodule = make()
    datamodule.setup("fit")
    datamodule.batch_size = 2
    assert datamodule.train_dataloader().batch_size == 2
    assert datamodule.val_dataloader().batch_size == 2
    with pytest.raises(ConfigurationError, match="batch_size >= 1"):
        datamodule.batch_size = 0


@pytest.mark.usefixtures("quick")
def test_a_batch_size_found_for_a_wrapped_datamodule_stays(tmp_path):
    datamodule, net = DVCDataModule.wrap(TheirData(), budget=120, rounds=3), Watching()
    run = trainer(callbacks=[DVCCallback(Random())], default_root_dir=tmp_path)
    size = Tuner(run).scale_batch_size(net, datamodule=datamodule, init_val=8, max_trials=1)
    assert size == 8
    net.seen.clear()
    run.fit(net, datamodule)
    assert {n for sizes in net.seen.values() for n in sizes} == {8}


class FindingAgain(LearningRateFinder):
    """Looks for a rate in the middle of training, as in Lightning's documentation."""

    def on_fit_start(self, trainer, pl_module):
        return

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == 2:
            self.lr_find(trainer, pl_module)


FINDING = {"num_training_steps": 14, "update_attr": False}


@pytest.mark.filterwarnings("ignore:.*progress bar.*:UserWarning")
@pytest.mark.parametrize("finder", [LearningRateFinder, FindingAgain])
def test_a_learning_rate_is_found_and_the_run_is_as_it_would_have_been(tmp_path, finder):
    def run(*callbacks):
        net, callback = Watching(), DVCCallback()
        datamodule = make({"good": good(), "wrong": wrong(), "repeated": repeated()})
        this = trainer(callbacks=[*callbacks, callback], default_root_dir=tmp_path, max_epochs=5)
        this.fit(net, datamodule)
        return net, datamodule, callback

    (net, data, callback), (plain_net, plain_data, plain) = run(finder(**FINDING)), run()
    assert callback.rounds_done == plain.rounds_done == 3
    assert data.selected_ids.tolist() == plain_data.selected_ids.tolist()
    for mine, theirs in zip(net.parameters(), plain_net.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_a_learning_rate_is_found_by_the_tuner_before_the_fit(tmp_path):
    net, datamodule, callback = Watching(), make(), DVCCallback()
    run = trainer(callbacks=[callback], default_root_dir=tmp_path)
    found = Tuner(run).lr_find(net, datamodule=datamodule, num_training=14, update_attr=False)
    assert len(found.results["lr"]) == 14
    assert callback.rounds_done == 0
    assert len(datamodule.selected_ids) == 4
    run.fit(net, datamodule)
    assert callback.rounds_done == 3
    assert len(datamodule.selected_ids) == 120
