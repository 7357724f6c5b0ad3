"""What a round tells the loggers, read back from what they have written."""

import csv
import math
from types import SimpleNamespace

import pytest
import torch
from helpers.problems import Net, good, repeated, trainer, wrong
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from lightning_dvc import DVC, DVCCallback, DVCDataModule, FixedWeights, Random
from lightning_dvc.records import METRICS

SOURCES = ("good", "wrong", "repeated")


class Logging(Net):
    """Logs its loss, and how many steps it has taken, at every step."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.log("taken", float(self.trainer.global_step))
        return loss


class Starts(Callback):
    """Notes the steps taken before each epoch."""

    def __init__(self):
        self.steps = []

    def on_train_epoch_start(self, trainer, pl_module):
        self.steps.append(trainer.global_step)


def fit(loggers, strategy=None, net=None, **settings):
    sources = dict(zip(SOURCES, (good(), wrong(), repeated()), strict=True))
    datamodule = DVCDataModule(
        sources, good(90, seed=50), budget=120, batch_size=16, rounds=3, warmup=0.2
    )
    callback, starts = DVCCallback(strategy or DVC(FixedWeights())), Starts()
    ckpt_path = settings.pop("ckpt_path", None)
    callbacks = [callback, starts, *settings.pop("callbacks", [])]
    run = trainer(logger=loggers, callbacks=callbacks, **settings)
    run.fit(net or Logging(), datamodule, ckpt_path=ckpt_path)
    return datamodule, callback, starts.steps


def of_csv(folder):
    """Name to ``(step, value)`` pairs, from what a CSVLogger has written."""
    with (folder / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    names = rows[0].keys() - {"step", "epoch"}
    return {
        name: [(int(row["step"]), float(row[name])) for row in rows if row[name]] for name in names
    }


def of_tensorboard(folder):
    """The same from the event files of a TensorBoardLogger."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    names = set(events.Tags()["scalars"]) - {"epoch"}
    return {name: [(e.step, e.value) for e in events.Scalars(name)] for name in names}


def both(folder):
    return [
        CSVLogger(folder, name="csv", version=""),
        TensorBoardLogger(folder, name="board", version=""),
    ]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_every_round_is_told_to_all_loggers_at_the_step_where_it_takes_place(tmp_path, accumulate):
    datamodule, callback, starts = fit(both(tmp_path), accumulate_grad_batches=accumulate)
    written, board = of_csv(tmp_path / "csv"), of_tensorboard(tmp_path / "board")
    assert written.keys() == board.keys()
    for name, points in written.items():
        assert [step for step, _ in points] == [step for step, _ in board[name]]
        values = [value for _, value in board[name]]
        assert values == pytest.approx([value for _, value in points], rel=1e-5)
    # The axis is that of Lightning's own metrics.
    assert starts[0] == 0 < starts[1] < starts[2]
    assert written["dvc/round"] == [(step, n) for n, step in enumerate(starts[:3], 1)]
    assert set(dict(written["taken"])) >= set(range(starts[3]))
    expected = {f"share/{name}" for name in SOURCES} | {f"reward/{name}" for name in SOURCES}
    expected |= {f"{kind}/{metric}" for kind in ("weight", "metric") for metric in METRICS}
    expected |= {"cache_hit_rate", "selection_seconds", "selection_time_share", "selected"}
    for name in expected:
        points = dict(written[f"dvc/{name}"])
        assert points.keys() <= set(starts[:3])
        assert all(map(math.isfinite, points.values()))
    table = datamodule.selection
    last = {name: value for name, ((*_, (_, value))) in written.items()}
    assert {name: last[f"dvc/share/{name}"] for name in SOURCES} == pytest.approx(table.shares())
    newest = table.round == 3
    means, weights = (x[newest].double().mean(0).tolist() for x in (table.raw, table.weights))
    for number, metric in enumerate(METRICS):
        assert last[f"dvc/metric/{metric}"] == pytest.approx(means[number], rel=1e-5)
        assert last[f"dvc/weight/{metric}"] == pytest.approx(weights[number], rel=1e-5)
    assert last["dvc/selected"] == len(table) == 120
    assert last["dvc/selection_seconds"] == pytest.approx(callback.watch.total)
    seconds = [value for _, value in written["dvc/selection_seconds"]]
    assert seconds == sorted(seconds)
    assert all(0 < value <= 1 for _, value in written["dvc/selection_time_share"])
    assert all(0 <= value <= 1 for _, value in written["dvc/cache_hit_rate"])
    rewards = {name: written[f"dvc/reward/{name}"][0][1] for name in SOURCES}
    assert rewards["wrong"] < rewards["good"] <= 1


class Still(Logging):
    """Takes steps that lead nowhere, so that what is known of a sample stays true."""

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


def test_candidates_that_are_known_already_are_told_as_hits_of_the_cache(tmp_path):
    fit(CSVLogger(tmp_path, name="csv", version=""), net=Still())
    first, *_, (_, last) = of_csv(tmp_path / "csv")["dvc/cache_hit_rate"]
    assert first == (0, 0.0)
    assert 0 < last <= 1


def test_the_share_of_time_is_that_of_all_time_since_training_began(tmp_path, monkeypatch):
    now = [100.0]
    clock = SimpleNamespace(perf_counter=lambda: now[0])
    for module in ("callback", "timing"):
        monkeypatch.setattr(f"lightning_dvc.{module}.time", clock)

    class Takes(Random):
        def choose(self, this):
            with this.watch.section("score"):
                now[0] += 3
            return super().choose(this)

    class Steps(Callback):
        def on_train_batch_start(self, *args):
            now[0] += 1

    logger = CSVLogger(tmp_path, name="csv", version="")
    _, _, starts = fit(logger, Takes(), callbacks=[Steps()])
    written = of_csv(tmp_path / "csv")
    seconds = [3 * number for number in (1, 2, 3)]
    assert [value for _, value in written["dvc/selection_seconds"]] == seconds
    shares = [spent / (spent + step) for spent, step in zip(seconds, starts, strict=False)]
    told = [value for _, value in written["dvc/selection_time_share"]]
    assert told == pytest.approx(shares)


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists:UserWarning")
def test_the_axis_goes_on_after_a_resume(tmp_path):
    saver = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    settings = {"callbacks": [saver], "enable_checkpointing": True}
    _, _, starts = fit(CSVLogger(tmp_path, name="whole", version=""), **settings)
    path = tmp_path / "epoch=0.ckpt"
    fit(CSVLogger(tmp_path, name="resumed", version=""), ckpt_path=path, **settings)
    whole, resumed = of_csv(tmp_path / "whole"), of_csv(tmp_path / "resumed")
    assert resumed["dvc/round"] == whole["dvc/round"][1:] == [(starts[1], 2), (starts[2], 3)]
    assert resumed["dvc/share/good"] == whole["dvc/share/good"][1:]


def test_rounds_that_are_left_out_are_told_too(tmp_path):
    callback = DVCCallback(max_overhead=1e-9)
    sources = {"good": good(), "wrong": wrong()}
    datamodule = DVCDataModule(sources, good(90, seed=50), budget=120, batch_size=16, rounds=3)
    starts = Starts()
    logger = TensorBoardLogger(tmp_path, name="board", version="")
    trainer(logger=logger, callbacks=[callback, starts]).fit(Net(), datamodule)
    told = of_tensorboard(tmp_path / "board")["dvc/rounds_left_out"]
    assert told == [(starts.steps[0], 0), (starts.steps[1], 1), (starts.steps[2], 1)]


def test_without_a_logger_nothing_is_told():
    datamodule, callback, _ = fit(False)
    assert callback.rounds_done == 3
    assert len(datamodule.selection) == 120
