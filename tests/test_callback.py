import csv
import math
import random
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.problems import WIDTH, Faulty, Net, good, repeated, trainer, wrong
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_dvc import (
    DVC,
    BayesianWeights,
    DVCCallback,
    DVCDataModule,
    FixedWeights,
    Random,
    Source,
)
from lightning_dvc.capture import loading
from lightning_dvc.errors import BadSampleError, CaptureError, ConfigurationError, ObjectiveError
from lightning_dvc.policy.weights import DEFAULT_WEIGHTS
from lightning_dvc.records import METRICS


def make(sources=None, **settings):
    sources = sources or {"good": good(), "wrong": wrong(), "repeated": repeated()}
    settings = {"val": good(90, seed=50), "budget": 120, "batch_size": 16, "rounds": 3, **settings}
    return DVCDataModule(sources, **settings)


def fit(datamodule=None, net=None, callback=None, **settings):
    datamodule, net = datamodule or make(), net or Net()
    callback = callback or DVCCallback(monitor="val_acc")
    ckpt_path = settings.pop("ckpt_path", None)
    run = trainer(callbacks=[callback, *settings.pop("callbacks", [])], **settings)
    run.fit(net, datamodule, ckpt_path=ckpt_path)
    return datamodule, net, callback


class Sizes(Callback):
    """Notes how many samples are selected when an epoch's batches begin."""

    def __init__(self):
        self.selected = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == 0:
            self.selected.append(len(trainer.datamodule.selected_ids))


# --- what is selected is trained on ------------------------------------------------------------


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("strategy", [DVC, Random])
def test_every_epoch_trains_on_what_is_selected_then(strategy, num_workers):
    sizes = Sizes()
    datamodule = make(num_workers=num_workers)
    _, net, callback = fit(datamodule, callback=DVCCallback(strategy()), callbacks=[sizes])
    assert [sum(batches) for batches in net.seen.values()] == sizes.selected
    assert sizes.selected == sorted(sizes.selected)
    assert 4 < sizes.selected[0] < sizes.selected[1]  # already more than the warm-up in epoch 0
    assert sizes.selected[-2:] == [120, 120]
    assert callback.rounds_done == 3


def test_a_round_reads_everything_with_one_set_of_workers(monkeypatch):
    made = []

    class Counted(DataLoader):
        def __init__(self, *args, **settings):
            super().__init__(*args, **settings)
            made.append(settings["num_workers"])

    monkeypatch.setattr(loading, "DataLoader", Counted)
    _, _, callback = fit(make(num_workers=1))
    assert callback.rounds_done == 3
    assert made == [1] * (1 + 3)  # the first tries the model out


def test_rounds_are_spread_over_the_epochs_asked_for():
    sizes = Sizes()
    fit(callback=DVCCallback(every_n_epochs=2), callbacks=[sizes], max_epochs=8)
    selected = sizes.selected
    assert selected[0] == selected[1] < selected[2] == selected[3] < selected[4] == 120


def test_rounds_are_spread_over_two_thirds_of_the_run():
    sizes = Sizes()
    fit(callbacks=[sizes], max_epochs=9)
    assert sizes.selected[3] < sizes.selected[4] == 120
    assert sizes.selected[0] == sizes.selected[1] < sizes.selected[2] == sizes.selected[3]


def test_fewer_epochs_than_rounds_still_spend_the_budget():
    datamodule, _, callback = fit(make(rounds=20), max_epochs=2)
    assert callback.rounds_done == 2
    assert len(datamodule.selected_ids) == 120


def test_budget_of_everything_selects_everything():
    datamodule, _, _ = fit(make({"good": good(40), "wrong": wrong(20)}, budget=1.0))
    assert sorted(datamodule.selected_ids.tolist()) == list(range(60))


def test_no_validation_data():
    datamodule, _, _ = fit(make(val=None), callback=DVCCallback())
    assert len(datamodule.selected_ids) == 120


def test_trial_run_does_one_round_of_the_planned_ones():
    datamodule, _, callback = fit(fast_dev_run=True)
    assert callback.rounds_done == 1
    assert len(datamodule.selected_ids) < 60


# --- it chooses well ---------------------------------------------------------------------------


def test_planted_sources_get_what_they_deserve():
    datamodule, _, _ = fit(make(rounds=6), max_epochs=8)
    table = datamodule.selection
    later = [s for s, r in zip(table.source, table.round.tolist(), strict=True) if r > 0]
    shares = {name: later.count(name) / len(later) for name in ("good", "wrong", "repeated")}
    assert shares["good"] > 0.8
    assert shares["wrong"] < 0.05


def test_selection_tells_why():
    datamodule, _, _ = fit(callback=DVCCallback(DVC(FixedWeights({"relevance": 1}))))
    table = datamodule.selection
    scored = table.round > 0
    assert (table.value[scored] >= 0).all()
    assert (table.value[scored] <= 1).all()
    # What has no weight is not measured.
    assert table.raw[scored].isfinite().all(0).tolist() == [False, True, *[False] * 4]
    assert table.raw[scored][:, [0, 2, 3, 4, 5]].isnan().all()
    assert table.weights[scored][:, 1].eq(1).all()
    assert table.raw[~scored].isnan().all()


def test_weights_are_learnt_from_the_monitored_score():
    weights = BayesianWeights(seed=0, initial=2, max_share=None)
    callback = DVCCallback(DVC(weights), monitor="val_acc")
    fit(make(rounds=5), callback=callback, max_epochs=6)
    observed = weights.state_dict()["observations"]
    assert len(observed) == 4  # the score of each round but the last, once
    assert all(0 < row[-1] <= 1 for row in observed)
    assert [row[-2] for row in observed] == pytest.approx([0, 0.2, 0.4, 0.6])
    in_force = {tuple(row) for row in fit_weights(callback)}
    assert len(in_force) > 1


def fit_weights(callback):
    return [row[:6] for row in callback.strategy.weights.state_dict()["observations"]]


def test_smaller_is_better_turns_the_score_around():
    class Lossy(Net):
        def validation_step(self, batch, batch_idx):
            self.log("val_loss", self.training_step(batch, batch_idx))

    weights = BayesianWeights()
    fit(net=Lossy(), callback=DVCCallback(DVC(weights), monitor="val_loss", mode="min"))
    assert all(row[-1] < 0 for row in weights.state_dict()["observations"])


# --- nothing else is disturbed -----------------------------------------------------------------


class Dropping(Net):
    """Dropout and BatchNorm, the usual victims."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(16)
        self.drop = nn.Dropout(0.3)

    def forward(self, x):
        return self.head(self.drop(self.norm(self.body(x)).relu()))


def global_streams():
    return torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # noqa: NPY002 - the stream guarded


@pytest.mark.filterwarnings("ignore:The run ended with:UserWarning")
def test_scoring_without_adding_leaves_no_trace():
    class LooksOnly(DVC):
        def choose(self, this):
            choice = super().choose(this)
            nothing = torch.empty(0, dtype=torch.int64)
            return type(choice).unscored(nothing)

    def run(strategy):
        torch.manual_seed(7)
        random.seed(7)
        np.random.seed(7)  # noqa: NPY002 - the stream guarded
        _, net, _ = fit(make(warmup=0.5), Dropping(), DVCCallback(strategy))
        return net.state_dict(), global_streams()

    (looked, streams), (blind, other_streams) = run(LooksOnly()), run(NoChoice())
    assert all(torch.equal(looked[name], blind[name]) for name in blind)
    assert torch.equal(streams[0], other_streams[0])
    assert streams[1:] == other_streams[1:]


class NoChoice(Random):
    def choose(self, this):
        choice = super().choose(this)
        return type(choice).unscored(choice.add[:0])


# --- samples that cannot be used ---------------------------------------------------------------


FAULTS = {3: "raises", 8: "nan", 21: "inf"}


def faulty(**settings):
    # Everything is drawn, so that every fault is met.
    return make({"good": good(40), "faulty": Faulty(FAULTS)}, budget=70, oversample=4, **settings)


def test_samples_that_fail_are_set_aside_and_named():
    with pytest.warns(UserWarning, match="samples could not be scored and are set aside") as caught:
        datamodule, _, _ = fit(faulty(warmup=0.5), max_epochs=5)
    assert sum("set aside" in str(entry.message) for entry in caught) == 1
    found = {entry.index: entry.reason for entry in datamodule.selection.set_aside}
    assert found.keys() == FAULTS.keys()
    assert found[3] == "reading it raised OSError: page 3 is torn"
    assert found[8] == found[21] == "its loss, a feature or a gradient is not finite"
    ids = datamodule.pools.ids_of(1, torch.tensor(list(FAULTS)))
    assert not torch.isin(datamodule.selected_ids, ids).any()
    assert len(datamodule.selected_ids) == 70


def test_samples_that_fail_stop_the_run_if_asked_to():
    with pytest.raises(BadSampleError, match=r"page 3 is torn|not finite"):
        fit(faulty(warmup=0.5), callback=DVCCallback(on_bad_sample="raise"))


# --- what cannot work fails before training ----------------------------------------------------


class NoLayer(Net):
    def __init__(self):
        super().__init__()
        self.body = self.head = None
        self.weight = nn.Parameter(torch.zeros(WIDTH, 3))

    def forward(self, x):
        return x @ self.weight


class OwnLoss(Net):
    def training_step(self, batch, batch_idx):
        return (self(batch[0]).logsumexp(1) - self(batch[0])[range(len(batch[1])), batch[1]]).mean()


class Manual(Net):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False


class WrongShape(Net):
    def per_sample_loss(self, batch):
        return F.cross_entropy(self(batch[0]), batch[1]), None


@pytest.mark.parametrize(
    ("net", "callback", "error", "message"),
    [
        (NoLayer(), {}, CaptureError, "no trainable layer to capture among Linear"),
        (Net(), {"layers": ["tail"]}, CaptureError, "'tail' does not exist"),
        (OwnLoss(), {}, ObjectiveError, "pass objective="),
        (Manual(), {}, ObjectiveError, "optimises manually"),
        (WrongShape(), {}, ObjectiveError, "losses of shape"),
        (Net(), {"monitor": "val_f1"}, ConfigurationError, r"val_f1.*logged \['val_acc'\]"),
    ],
)
def test_fails_before_the_first_step(net, callback, error, message):
    with pytest.raises(error, match=message):
        fit(net=net, callback=DVCCallback(**callback))
    assert net.seen == {}


def test_overfit_batches_is_refused():
    with pytest.raises(ConfigurationError, match="overfit_batches replaces the sampler"):
        fit(overfit_batches=2)


def test_another_datamodule_is_refused():
    with pytest.raises(ConfigurationError, match=r"DVCDataModule.wrap"):
        trainer(callbacks=[DVCCallback()]).fit(Net(), make().train_dataloader())


def test_a_callback_serves_one_datamodule():
    datamodule, _, callback = fit()
    fit(datamodule, callback=callback)
    with pytest.raises(ConfigurationError, match="another DVCDataModule"):
        fit(make(), callback=callback)


class Deeper(Net):
    def __init__(self, width=16, deep=True):
        super().__init__()
        self.body, self.head = nn.Linear(WIDTH, width), nn.Linear(width, 3)
        self.middle = nn.Linear(width, width) if deep else nn.Identity()

    def forward(self, x):
        return self.head(self.middle(self.body(x)).relu())


def frozen(net):
    net.body.requires_grad_(False)
    return net


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda net: Deeper(32, deep=False), r"now .*'body': \[32, 9\], 'head': \[3, 33\]"),
        (lambda net: Deeper(), r"\['body', 'head'\] were captured, but now .*'middle'"),
        (frozen, r"\['body', 'head'\] were captured, but now .*\{'head': \[3, 17\]\}"),
    ],
)
def test_another_fit_that_would_select_by_other_layers_is_refused(other, message):
    refining = DVCCallback(DVC(refine=True))
    datamodule, net, _ = fit(callback=refining)
    other = other(net)
    other.seen = {}
    with pytest.raises(ConfigurationError, match=f"{message}.*new callback and a new datamodule"):
        fit(datamodule, other, refining)
    assert other.seen == {}


def test_another_fit_of_the_same_model_goes_on_refining_also_after_a_test():
    refining = DVCCallback(DVC(refine=True), every_n_epochs=1)
    datamodule, net, _ = fit(make(test=good(20, seed=8)), callback=refining)
    trainer(callbacks=[refining]).test(net, datamodule, verbose=False)
    fit(datamodule, net, refining)
    assert refining.rounds_done == 8


@pytest.mark.parametrize("other", [lambda net: Deeper(32), frozen])
def test_a_full_selection_may_be_trained_on_by_a_model_of_other_layers(other):
    datamodule, net, callback = fit(callback=DVCCallback())
    ids, other = datamodule.selected_ids, other(net)
    fit(datamodule, other, callback)
    assert torch.equal(datamodule.selected_ids, ids)
    assert sum(other.seen[3]) >= 120


@pytest.mark.filterwarnings("ignore:The run ended with:UserWarning")
def test_a_strategy_that_remembers_nothing_goes_on_with_other_layers():
    parts = fit(make(rounds=4), callback=DVCCallback(Random()), callbacks=[StopAfter(2)])
    datamodule, _, callback = fit(parts[0], Deeper(), parts[2])
    assert callback.rounds_done == 4
    assert len(datamodule.selected_ids) == 120


@pytest.mark.filterwarnings("ignore:The run ended with:UserWarning")
def test_a_second_fit_goes_on_selecting():
    datamodule, _, callback = fit(
        make(rounds=6),
        callback=DVCCallback(every_n_epochs=1),
        max_epochs=6,
        callbacks=[StopAfter(2)],
    )
    assert callback.rounds_done == 2
    fit(datamodule, callback=callback, max_epochs=6)
    assert callback.rounds_done == 6
    assert len(datamodule.selected_ids) == 120


def test_a_budget_that_cannot_be_spent_is_told_with_what_keeps_it():
    third = {name: Source(good(seed=seed), max_share=1 / 3) for seed, name in enumerate("abc")}
    with pytest.warns(UserWarning, match="after 3 of 3 rounds. There was no more .* max_share"):
        datamodule, _, _ = fit(make(third, budget=100), max_epochs=6)
    assert len(datamodule.selected_ids) == 99
    with pytest.warns(UserWarning, match="after 1 of 3 rounds. Give it more epochs"):
        fit(max_epochs=4, callbacks=[StopAfter(1)])


class Impatient(Net):
    """Logs a score that never gets better."""

    def validation_step(self, batch, batch_idx):
        self.log("val_acc", 0.0)


def test_a_run_that_was_stopped_early_is_told_so():
    stopping = EarlyStopping("val_acc", mode="max", patience=2)
    with pytest.warns(UserWarning, match="Give it more epochs: it was stopped before .*min_epochs"):
        _, _, callback = fit(make(rounds=6), Impatient(), callbacks=[stopping], max_epochs=9)
    assert callback.rounds_done == 3
    stopping = EarlyStopping("val_acc", mode="max", patience=2)
    settings = {"max_epochs": 9, "min_epochs": 6}  # what was advised
    datamodule, _, _ = fit(make(rounds=6), Impatient(), callbacks=[stopping], **settings)
    assert len(datamodule.selected_ids) == 120


def test_a_run_that_its_own_limit_ended_was_not_stopped():
    with pytest.warns(UserWarning, match="Give it more epochs: it was stopped"):
        parts = fit(make(rounds=6), max_epochs=6, callbacks=[StopAfter(1)])
    with pytest.warns(UserWarning, match="after 3 of 6 rounds. Give it more epochs, or set rounds"):
        fit(*parts, max_epochs=2, callbacks=[StopAfter(2)])


@pytest.mark.parametrize("settings", [{"max_epochs": 0}, {"limit_train_batches": 0}])
def test_a_run_that_trains_nothing_is_not_told_to_select(settings):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _, net, callback = fit(**settings)
    assert net.seen == {}
    assert callback.rounds_done == 0
    assert [str(entry.message) for entry in caught if "The run ended" in str(entry.message)] == []


def test_a_strategy_that_learns_needs_a_score():
    with pytest.raises(ConfigurationError, match="monitor is None"):
        DVCCallback(DVC(BayesianWeights()))
    callback = DVCCallback(DVC(BayesianWeights()), monitor="val_acc")
    with pytest.raises(ConfigurationError, match="limit_val_batches=0"):
        fit(callback=callback, limit_val_batches=0)
    callback = DVCCallback(DVC(BayesianWeights()), monitor="val_acc")
    with pytest.raises(ConfigurationError, match="there is no val dataset"):
        fit(make(val=None), callback=callback)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "best"}, "'max' or 'min'"),
        ({"every_n_epochs": 0}, "every_n_epochs must be at least 1"),
        ({"score_batch_size": 0}, "score_batch_size must be at least 1, or 'auto'"),
        ({"score_batch_size": "large"}, "score_batch_size must be at least 1, or 'auto'"),
        ({"score_batch_size": 2.5}, "score_batch_size must be at least 1, or 'auto'"),
        ({"exact_numbers": -1}, "exact_numbers must be at least 0"),
        ({"on_bad_sample": "ignore"}, "'set_aside' or 'raise'"),
        ({"every_n_epochs": 1.5}, "every_n_epochs must be at least 1, a whole number, .* is 1.5"),
        ({"every_n_epochs": "2"}, "every_n_epochs must be at least 1, a whole number, .* is '2'"),
        ({"score_batch_size": True}, "score_batch_size must be at least 1, or 'auto', .* is True"),
        ({"exact_numbers": "a"}, "exact_numbers must be at least 0, but is 'a'"),
        ({"max_overhead": "x"}, r"max_overhead must be in \(0, 1\], or None, but is 'x'"),
        ({"layers": "body"}, r"layers must be a list of names.*, but is 'body'"),
        ({"layers": []}, r"layers must be a list of names.*, but is \[\]"),
        ({"layers": [nn.Linear(1, 1)]}, r"layers must be a list of names.*, but is \[Linear"),
        ({"strategy": "dvc"}, r"strategy must be .* such as DVC\(\).*, but is 'dvc'"),
        ({"strategy": DVC}, r"strategy must be .* such as DVC\(\).*, but is <class "),
        ({"strategy": 0}, r"strategy must be .* such as DVC\(\).*, but is 0"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ConfigurationError, match=message):
        DVCCallback(**settings)


def test_numbers_may_be_those_of_numpy(tmp_path):
    given = {"budget": 40, "batch_size": 8, "rounds": 2, "seed": 3, "warmup": 0.25, "oversample": 2}
    datamodule, _, callback = fit(make(**given), callback=DVCCallback(every_n_epochs=2))
    kinds = [np.int64, np.int32, np.int16, np.uint8, np.float32, np.float64]
    given = {name: kind(value) for (name, value), kind in zip(given.items(), kinds, strict=True)}
    of_numpy = DVCCallback(every_n_epochs=np.int64(2), score_batch_size=np.int64(512))
    same, _, _ = fit(make(**given), callback=of_numpy)
    assert same.selected_ids.tolist() == datamodule.selected_ids.tolist()
    state = {"datamodule": same.state_dict(), "callback": of_numpy.state_dict()}
    torch.save(state, tmp_path / "state.pt")
    saved = torch.load(tmp_path / "state.pt", weights_only=True)["callback"]
    assert saved["plan"] == callback.state_dict()["plan"]


def test_a_missing_score_that_shows_late_is_an_error_too():
    class Shy(Net):
        def validation_step(self, batch, batch_idx):
            if not self.trainer.sanity_checking:
                super().validation_step(batch, batch_idx)

    with pytest.raises(ConfigurationError, match="set num_sanity_val_steps=0"):
        fit(net=Shy())
    fit(net=Shy(), num_sanity_val_steps=0)  # logs in the end
    with pytest.raises(ConfigurationError, match="val_f1"):
        fit(net=Shy(), callback=DVCCallback(monitor="val_f1"), num_sanity_val_steps=0)


# --- objectives of every kind ------------------------------------------------------------------


class Regression(Net):
    def __init__(self):
        super().__init__(d_out=1)

    def training_step(self, batch, batch_idx):
        return F.mse_loss(self(batch[0]).squeeze(1), batch[1].float())

    def validation_step(self, batch, batch_idx):
        self.log("val_acc", -self.training_step(batch, batch_idx))


class Gaussian(Regression):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(16, 2)

    def training_step(self, batch, batch_idx):
        mean, log_variance = self(batch[0]).unbind(1)
        return F.gaussian_nll_loss(mean, batch[1].float(), log_variance.exp())


class MultiLabel(Regression):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(16, 3)

    def training_step(self, batch, batch_idx):
        return F.binary_cross_entropy_with_logits(self(batch[0]), F.one_hot(batch[1], 3).float())


class ManualWithLosses(Net):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def per_sample_loss(self, batch):
        logits = self(batch[0])
        return F.cross_entropy(logits, batch[1], reduction="none"), logits, batch[1]

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.per_sample_loss(batch)[0].mean())
        optimizer.step()


@pytest.mark.parametrize("net", [Regression, Gaussian, MultiLabel, ManualWithLosses])
def test_other_tasks_run_to_the_end(net):
    callback = DVCCallback(DVC(FixedWeights()), monitor="val_acc")
    datamodule, net, _ = fit(net=net(), callback=callback)
    assert len(datamodule.selected_ids) == 120
    assert datamodule.selection.raw[datamodule.selection.round > 0].isfinite().all()


def test_dict_batches_and_an_objective_of_the_user():
    class Dicts(TensorDataset):
        def __getitem__(self, index):
            x, y = super().__getitem__(index)
            return {"x": x, "label": y}

    class Reader(Net):
        def training_step(self, batch, batch_idx):
            return OwnLoss.training_step(self, (batch["x"], batch["label"]), batch_idx)

        def validation_step(self, batch, batch_idx):
            super().validation_step((batch["x"], batch["label"]), batch_idx)

    def objective(module, batch):
        logits = module(batch["x"])
        return F.cross_entropy(logits, batch["label"], reduction="none"), logits, batch["label"]

    sources = {"good": Dicts(*good().tensors), "wrong": Dicts(*wrong().tensors)}
    datamodule = make(sources, val=Dicts(*good(60, seed=9).tensors))
    net = Reader()
    net.on_train_batch_end = lambda *args: None
    fit(datamodule, net, DVCCallback(objective=objective))
    assert len(datamodule.selected_ids) == 120


# --- it goes on where it stopped ---------------------------------------------------------------


def strategies():
    return [
        DVC(),
        DVC(FixedWeights()),
        DVC(BayesianWeights(initial=2, max_share=None)),
        DVC(stability_window=0, cache_bytes=0),
        Random(),
    ]


@pytest.mark.filterwarnings("ignore:The run ended with:UserWarning")
@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty:UserWarning")
@pytest.mark.parametrize("number", range(len(strategies())))
@pytest.mark.parametrize("stop", [1, 3])
def test_a_resumed_run_ends_like_the_uninterrupted_one(tmp_path, number, stop):
    def parts():
        callback = DVCCallback(strategies()[number], monitor="val_acc")
        return make(rounds=5), Net(), callback

    datamodule, net, _ = fit(*parts(), max_epochs=6)
    settings = {"max_epochs": 6, "enable_checkpointing": True}
    saver = ModelCheckpoint(tmp_path, save_last=True)
    fit(*parts(), callbacks=[saver, StopAfter(stop)], **settings)
    path = tmp_path / "last.ckpt"
    torch.load(path, weights_only=True)
    again, other, _ = parts_again = parts()
    fit(*parts_again, callbacks=[saver], ckpt_path=path, **settings)
    assert again.selected_ids.tolist() == datamodule.selected_ids.tolist()
    assert torch.equal(again.selection.raw.nan_to_num(), datamodule.selection.raw.nan_to_num())
    for mine, theirs in zip(other.parameters(), net.parameters(), strict=True):
        assert torch.equal(mine, theirs)


class StopAfter(Callback):
    def __init__(self, epochs):
        self.epochs = epochs

    def on_train_epoch_end(self, trainer, pl_module):
        if trainer.current_epoch + 1 == self.epochs:
            trainer.should_stop = True


# --- it tells what it does ---------------------------------------------------------------------


def test_figures_of_every_round_reach_the_logger(tmp_path):
    logger = CSVLogger(tmp_path, name="run", version="")
    equal = DVCCallback(DVC(FixedWeights()), monitor="val_acc")
    _, net, callback = fit(callback=equal, logger=logger)
    rows = logged(tmp_path)
    assert [float(row["dvc/round"]) for row in rows] == [1, 2, 3]
    steps = [0]
    for batches in net.seen.values():
        steps.append(steps[-1] + len(batches))
    assert [int(row["step"]) for row in rows] == steps[:3]
    shares = [sum(float(r[f"dvc/share/{n}"]) for n in ("good", "wrong", "repeated")) for r in rows]
    assert shares == pytest.approx([1, 1, 1])
    for name in ("reward/good", "weight/relevance", "metric/stability", "cache_hit_rate"):
        assert math.isfinite(float(rows[-1][f"dvc/{name}"]))
    assert 0 < float(rows[-1]["dvc/selection_time_share"]) < 1
    assert callback.watch.seconds.keys() >= {"examine", "draw", "score", "choose", "learn", "apply"}


def logged(folder, having="dvc/round"):
    with (folder / "run" / "metrics.csv").open(newline="") as file:
        return [row for row in csv.DictReader(file) if row[having]]


def test_only_what_has_a_weight_is_measured_and_logged(tmp_path):
    datamodule, _, _ = fit(logger=CSVLogger(tmp_path, name="run", version=""))
    row = logged(tmp_path)[-1]
    raw = datamodule.selection.raw[datamodule.selection.round > 0]
    assert set(DEFAULT_WEIGHTS) == set(METRICS) - {"gradient_impact", "stability"}
    for number, metric in enumerate(METRICS):
        measured = metric in DEFAULT_WEIGHTS
        assert (f"dvc/metric/{metric}" in row) == measured
        assert raw[:, number].isnan().all() == (not measured)
        assert raw[:, number].isfinite().all() == measured


def test_the_forms_of_gradients_are_known_from_the_start_of_training():
    forms = []

    class Notes(Callback):
        def on_train_start(self, trainer, pl_module):
            forms.append(callback.layer_forms)

    class WithWords(Net):
        def __init__(self):
            super().__init__()
            self.words, self.body = nn.Embedding(500, 4), nn.Linear(WIDTH + 4, 16)

        def forward(self, x):
            words = self.words((x * 50).long().abs() % 500).mean(1)
            return super().forward(torch.cat([x, words], 1))

    callback = DVCCallback(exact_numbers=1000)
    assert callback.layer_forms == {}
    datamodule, _, _ = fit(net=WithWords(), callback=callback, callbacks=[Notes()])
    assert forms == [{"words": "projected", "body": "factors", "head": "factors"}]
    assert callback.layer_forms == forms[0]
    raw = datamodule.selection.raw[datamodule.selection.round > 0]
    assert raw[:, [METRICS.index(name) for name in DEFAULT_WEIGHTS]].isfinite().all()
    exact = DVCCallback()
    fit(net=WithWords(), callback=exact)
    assert exact.layer_forms == {**forms[0], "words": "scattered over tokens"}


def test_no_warnings_of_our_own():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit()
    ours = [str(entry.message) for entry in caught if "lightning_dvc" in str(entry.filename)]
    assert ours == []


# --- what a review found -----------------------------------------------------------------------


def test_a_bad_validation_sample_costs_no_training_sample():
    datamodule = make({"good": good(), "wrong": wrong()}, val=Faulty({0: "nan", 3: "raises"}))
    net = Net()
    net.validation_step = lambda *args: None
    with pytest.warns(UserWarning, match="some reference samples cannot be used"):
        fit(datamodule, net, DVCCallback(), limit_val_batches=0)
    assert datamodule.selection.set_aside == ()
    assert len(datamodule.selected_ids) == 120


def test_testing_an_earlier_checkpoint_leaves_the_selection_alone(tmp_path):
    datamodule, callback = make(test=good(20, seed=8)), DVCCallback()
    saver = ModelCheckpoint(tmp_path, save_top_k=-1)
    run = trainer(callbacks=[callback, saver], enable_checkpointing=True)
    run.fit(Net(), datamodule)
    ids, done = datamodule.selected_ids.clone(), callback.rounds_done
    first = sorted(tmp_path.glob("epoch=0*.ckpt"))[0]
    run.test(Net(), datamodule, ckpt_path=first, verbose=False)
    assert torch.equal(datamodule.selected_ids, ids)
    assert callback.rounds_done == done


def test_validating_on_other_data_is_none_of_our_business():
    datamodule, callback = make(), DVCCallback(monitor="val_f1")
    run = trainer(callbacks=[callback])
    run.validate(Net(), datamodule.val_dataloader(), verbose=False)


def test_a_run_too_short_for_the_budget_says_so():
    with pytest.warns(UserWarning, match=r"ended with \d+ of a budget of 120 samples"):
        fit(callbacks=[StopAfter(1)])


def test_a_wholly_bad_source_does_not_stop_the_others():
    faults = dict.fromkeys(range(40), "nan")
    with pytest.warns(UserWarning, match="set aside"):
        datamodule, _, _ = fit(make({"bad": Faulty(faults), "good": good()}, warmup=0.5))
    assert set(datamodule.selection.source) == {"good"}


class TimeFirst(Net):
    """A layer that sees the sequence before the batch."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(1, 16)
        self.block = nn.TransformerEncoderLayer(16, 2, 32)  # batch_first=False
        self.body = None

    def forward(self, x):
        tokens = self.embed(x[:, :, None]).transpose(0, 1)
        return self.head(self.block(tokens).mean(0))


class Folded(Net):
    """A layer that sees sequence and batch in one axis, all first places before all second ones."""

    def __init__(self):
        super().__init__()
        self.embed, self.mix = nn.Linear(2, 16), nn.Linear(16, 16)
        self.body = None

    def forward(self, x):
        tokens = self.embed(x.reshape(len(x), 4, 2)).transpose(0, 1)
        return self.head(self.mix(tokens.flatten(0, 1)).relu().unflatten(0, (4, -1)).mean(0))


class Notes(Callback):
    """Notes the forms of the layers when training starts."""

    def __init__(self, of):
        self.of = of

    def on_train_start(self, trainer, pl_module):
        self.forms = self.of.layer_forms


ATTENTION = pytest.mark.filterwarnings("ignore:trainable parameters of block.self_attn:UserWarning")


@ATTENTION
@pytest.mark.parametrize(
    ("net", "warmup", "message"),
    [
        # Eight places can be dealt out to eight samples, but not to thirty.
        (TimeFirst, 0.5, r"block\.linear1'.*do not return one output for each.*batch_first=True"),
        (TimeFirst, 1 / 15, r"block\.linear1'.*left out.*batch_first=True"),
        (Folded, 1 / 15, r"\['mix'\].*left out; use batch_first=True"),
        (Folded, 0.5, r"\['mix'\].*left out; use batch_first=True"),
    ],
)
def test_layers_that_mix_samples_are_left_out_with_a_warning(net, warmup, message):
    callback = DVCCallback(DVC(FixedWeights()))
    notes = Notes(callback)
    with pytest.warns(UserWarning, match=message) as caught:
        datamodule, _, _ = fit(make(warmup=warmup), net(), callback, callbacks=[notes])
    assert sum("batch_first" in str(entry.message) for entry in caught) == 1
    expected = {"embed": "factors, formed in parts", "head": "factors"}
    assert notes.forms == callback.layer_forms == expected
    assert len(datamodule.selected_ids) == 120
    assert datamodule.selection.raw[datamodule.selection.round > 0].isfinite().all()
    assert datamodule.selection.set_aside == ()


def test_what_is_left_is_scored_as_if_only_that_had_been_named():
    with pytest.warns(UserWarning, match="left out"):
        whole, _, _ = fit(net=Folded(), callback=DVCCallback())
    named, _, _ = fit(net=Folded(), callback=DVCCallback(layers=["embed", "head"]))
    assert whole.selected_ids.tolist() == named.selected_ids.tolist()
    assert torch.equal(whole.selection.raw.nan_to_num(), named.selection.raw.nan_to_num())


class AllFolded(Folded):
    def __init__(self):
        super().__init__()
        self.embed, self.mix = nn.Identity(), nn.Linear(2, 16)

    def forward(self, x):
        tokens = x.reshape(len(x), 4, 2).transpose(0, 1).flatten(0, 1)
        return self.head(self.mix(tokens).relu()).unflatten(0, (4, -1)).mean(0)


@ATTENTION
@pytest.mark.parametrize(
    ("net", "settings", "error", "message"),
    [
        (
            AllFolded,
            {},
            ConfigurationError,
            r"\['mix', 'head'\].*cannot be scored; use batch_first",
        ),
        (Folded, {"layers": ["mix", "head"]}, ConfigurationError, r"\['mix'\].*cannot be scored"),
        (TimeFirst, {"layers": ["block.linear1"]}, CaptureError, "batch as the first axis"),
    ],
)
def test_layers_that_mix_samples_are_an_error_where_no_others_are_wanted(
    net, settings, error, message
):
    net = net()
    with pytest.raises(error, match=message):
        fit(make(warmup=0.5), net, DVCCallback(**settings))
    assert net.seen == {}


@pytest.mark.filterwarnings("ignore:.*are set aside, for example:UserWarning")
def test_a_bad_sample_among_layers_that_mix_samples():
    # In such a layer it spoils others, each time different ones.
    faults = dict.fromkeys(range(0, 40, 7), "nan")
    datamodule = make({"good": Faulty(faults, n=200)}, warmup=0.5)
    with pytest.warns(UserWarning, match=r"\['mix'\].*left out"):
        fit(datamodule, Folded(), DVCCallback())
    set_aside = {entry.index for entry in datamodule.selection.set_aside}
    assert set_aside
    assert set_aside <= faults.keys()


class Hungry(Net):
    def forward(self, x):
        if len(x) > 20:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return super().forward(x)


def test_as_many_samples_are_scored_at_once_as_fit():
    datamodule, _, _ = fit(net=Hungry())
    roomy, _, _ = fit()
    assert datamodule.selection.set_aside == ()
    # Other batches round otherwise, which can turn a tie.
    same = set(datamodule.selected_ids.tolist()) & set(roomy.selected_ids.tolist())
    assert len(datamodule.selected_ids) == len(roomy.selected_ids)
    assert len(same) > 0.9 * len(roomy.selected_ids)
    callback = DVCCallback(score_batch_size=20)
    assert fit(net=Hungry(), callback=callback)[0].selection.set_aside == ()
    net = Hungry()
    with pytest.raises(CaptureError, match='set score_batch_size="auto", or smaller'):
        fit(net=net, callback=DVCCallback(score_batch_size=21))
    assert net.seen == {}


@pytest.mark.filterwarnings("ignore:.*Checkpoint directory .* exists:UserWarning")
@pytest.mark.filterwarnings("ignore:The run ended with:UserWarning")
def test_a_resumed_run_knows_how_many_samples_fit(tmp_path):
    saver = ModelCheckpoint(tmp_path, save_last=True)
    settings = {"enable_checkpointing": True, "limit_val_batches": 0}
    _, _, callback = fit(net=Hungry(), callbacks=[saver, StopAfter(1)], **settings)
    most = callback.state_dict()["fits"]
    assert most <= 20
    at_once = []

    class Noting(Net):
        def forward(self, x):
            at_once.append(0 if self.training else len(x))
            return super().forward(x)

    resumed = [ModelCheckpoint(tmp_path)]
    fit(net=Noting(), callbacks=resumed, ckpt_path=tmp_path / "last.ckpt", **settings)
    assert max(at_once) == most
    assert fit()[2].state_dict()["fits"] is None


def test_refining_goes_on_when_the_budget_is_full_and_never_exceeds_it():
    sizes = Sizes()
    sources = {"good": good(), "wrong": wrong()}
    datamodule, _, callback = fit(
        make(sources, rounds=2, warmup=0.4),
        callback=DVCCallback(DVC(refine=True, temperature=1.0), every_n_epochs=1),
        callbacks=[sizes],
        max_epochs=10,
    )
    assert callback.rounds_done == 10
    assert max(sizes.selected) == sizes.selected[-1] == 120
    assert datamodule.selection.n_ever_selected > 120
    plain, _, _ = fit(
        make(sources, rounds=2, warmup=0.4),
        callback=DVCCallback(DVC(temperature=1.0), every_n_epochs=1),
        max_epochs=10,
    )
    assert datamodule.selection.shares()["good"] > plain.selection.shares()["good"]


def test_nothing_is_taken_back_that_the_budget_needs():
    datamodule, _, _ = fit(
        make({"good": good(60), "wrong": wrong(60)}, budget=1.0, rounds=6), max_epochs=9
    )
    assert len(datamodule.selected_ids) == 120


# --- selection that takes too much of the time -------------------------------------------------


def test_rounds_that_take_too_much_time_are_left_out_but_the_budget_is_spent(tmp_path):
    sizes, callback = Sizes(), DVCCallback(max_overhead=1e-9)
    datamodule, net, _ = fit(
        make(rounds=5),
        callback=callback,
        callbacks=[sizes],
        max_epochs=7,
        logger=CSVLogger(tmp_path, name="run", version=""),
    )
    assert (callback.rounds_done, callback.rounds_left_out) == (2, 3)
    assert sizes.selected[0] == sizes.selected[3] < sizes.selected[4] == 120
    assert [sum(batches) for batches in net.seen.values()] == sizes.selected
    left_out = [
        float(row["dvc/rounds_left_out"]) for row in logged(tmp_path, "dvc/rounds_left_out")
    ]
    assert left_out == [0, 1, 2, 3, 3]
    assert len(datamodule.selected_ids) == 120


def test_all_the_time_there_is_leaves_no_round_out():
    callback = DVCCallback(max_overhead=1.0)
    fit(make(rounds=5), callback=callback, max_epochs=7)
    assert (callback.rounds_done, callback.rounds_left_out) == (5, 0)


def test_refinement_that_takes_too_much_time_is_left_out_and_plans_stay():
    callback = DVCCallback(DVC(refine=True), max_overhead=1e-9)
    datamodule, _, _ = fit(make(rounds=3), callback=callback, max_epochs=7)
    assert (callback.rounds_done, callback.rounds_left_out) == (2, 5)
    assert callback.state_dict()["n_rounds"] == 2
    assert len(datamodule.selected_ids) == 120


def test_time_goes_on_where_a_run_was_interrupted():
    callback = DVCCallback()
    fit(make(rounds=3), callback=callback, max_epochs=3)
    state = callback.state_dict()
    resumed = DVCCallback()
    resumed.load_state_dict(state)
    assert resumed.state_dict()["training_seconds"] == state["training_seconds"] > 0
    assert resumed.watch.total == pytest.approx(sum(state["seconds"].values()))


@pytest.mark.parametrize("share", [0, -0.1, 1.5, float("nan")])
def test_shares_of_time_out_of_range_are_refused(share):
    with pytest.raises(ConfigurationError, match="max_overhead"):
        DVCCallback(max_overhead=share)


# --- samples and losses that are others each time ----------------------------------------------


class Augmented(torch.utils.data.Dataset):
    """Samples that come out otherwise each time they are read."""

    def __init__(self, n=200):
        self.samples = good(n)

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        x, y = self.samples[index]
        return x + torch.randn(WIDTH), y


@pytest.mark.filterwarnings("ignore:.*Checkpoint directory .* exists:UserWarning")
@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint:UserWarning")
def test_random_augmentation_leaves_no_layer_out_and_a_run_can_be_resumed(tmp_path):
    saver = ModelCheckpoint(tmp_path, save_top_k=-1, every_n_epochs=1)
    _, _, callback = fit(
        make({"good": Augmented()}), callbacks=[saver], max_epochs=3, enable_checkpointing=True
    )
    assert list(callback.layer_forms) == ["body", "head"]
    first = min(tmp_path.glob("*.ckpt"), key=lambda path: path.stat().st_mtime)
    datamodule, _, callback = fit(
        make({"good": Augmented()}),
        callbacks=[ModelCheckpoint(tmp_path)],
        max_epochs=4,
        ckpt_path=first,
        enable_checkpointing=True,
    )
    assert list(callback.layer_forms) == ["body", "head"]
    assert len(datamodule.selected_ids) == 120


class RandomLoss(Net):
    def training_step(self, batch, batch_idx):
        noise = 5 * torch.randn(len(batch[0]), 3, device=self.device)
        return F.cross_entropy(self(batch[0]) + noise, batch[1])


@pytest.mark.parametrize("layers", [None, ["body", "head"]])
def test_a_random_loss_is_told_and_trained_with(layers):
    with pytest.warns(UserWarning, match="the loss, or what .* is random"):
        datamodule, _, callback = fit(net=RandomLoss(), callback=DVCCallback(layers=layers))
    assert list(callback.layer_forms) == ["body", "head"]
    assert len(datamodule.selected_ids) == 120


@pytest.mark.filterwarnings("ignore:.*Checkpoint directory .* exists:UserWarning")
@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint:UserWarning")
def test_a_checkpoint_made_with_other_layers_is_refused(tmp_path):
    saver = ModelCheckpoint(tmp_path, save_last=True)
    fit(callbacks=[saver], max_epochs=2, enable_checkpointing=True)
    with pytest.raises(ConfigurationError, match=r"\['body', 'head'\] were captured, but now"):
        fit(
            callback=DVCCallback(layers=["head"], monitor="val_acc"),
            callbacks=[ModelCheckpoint(tmp_path)],
            ckpt_path=tmp_path / "last.ckpt",
            max_epochs=4,
            enable_checkpointing=True,
        )
