"""Runs told in a file, through Lightning's command line."""

from pathlib import Path

import pytest
import torch
from helpers.problems import Net, Planted
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader

from lightning_dvc import DVC, BayesianWeights, DVCCallback, FixedWeights

pytestmark = [
    # Lightning's command line uses what a newer jsonargparse deprecates.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* is not empty:UserWarning"),
]

EXAMPLE = Path(__file__).parent.parent / "examples" / "config.yaml"
CONFIG = """
seed_everything: 0
trainer:
  accelerator: cpu
  max_epochs: 3
  logger: false
  enable_progress_bar: false
  enable_model_summary: false
  default_root_dir: FOLDER
  callbacks:
    - class_path: lightning_dvc.DVCCallback
      init_args:
        monitor: val_acc
        strategy:
          class_path: lightning_dvc.DVC
          init_args: STRATEGY
    - class_path: lightning.pytorch.callbacks.ModelCheckpoint
      init_args: {dirpath: FOLDER, filename: "{epoch}", save_top_k: -1}
model:
  class_path: test_cli.Predicting
"""
OWN = """
data:
  class_path: lightning_dvc.DVCDataModule
  init_args:
    sources:
      plain: {class_path: helpers.problems.Planted}
      bounded:
        class_path: lightning_dvc.Source
        init_args:
          dataset: {class_path: helpers.problems.Planted, init_args: {n: 80, seed: 7}}
          max_share: 0.25
    val: &held_out {class_path: helpers.problems.Planted, init_args: {n: 30, seed: 9}}
    test: *held_out
    predict: *held_out
    budget: 40
    batch_size: 16
"""
WRAPPED = """
data:
  class_path: lightning_dvc.DVCDataModule.wrap
  init_args:
    datamodule: {class_path: test_cli.Theirs}
    sources: SOURCES
    budget: 20
"""
BY_VALUE = "{take_back: 0.05, weights: {class_path: lightning_dvc.FixedWeights, init_args: "
BY_VALUE += "{weights: {relevance: 1.0, uncertainty: 3.0}}}, layer_weights: [1.0, 2.0]}"
LEARNT = "{reward: gain, layer_weights: learned, weights: {class_path: lightning_dvc."
LEARNT += "BayesianWeights, init_args: {initial: 2}}}"


class Predicting(Net):
    predicted = 0

    def predict_step(self, batch, batch_idx):
        predictions = self(batch[0]).argmax(1)
        self.predicted += len(predictions)
        return predictions


class Theirs(LightningDataModule):
    def setup(self, stage):
        self.train, self.val = Planted(60), Planted(20, seed=5)

    def train_dataloader(self):
        return DataLoader(self.train, batch_size=10)

    def val_dataloader(self):
        return DataLoader(self.val, batch_size=10)

    def test_dataloader(self):
        return DataLoader(self.val, batch_size=10)

    def predict_dataloader(self):
        return DataLoader(self.val, batch_size=10)


def thirds(train):
    return [number % 3 for number in range(len(train))]


@pytest.fixture
def run(tmp_path, monkeypatch):
    """The command line in a folder of its own, where it saves its configuration each time."""
    from lightning.pytorch.cli import LightningCLI  # old ones are deprecated when imported

    monkeypatch.setattr("sys.argv", ["train"])
    monkeypatch.chdir(tmp_path)

    def command(*args):
        return LightningCLI(
            subclass_mode_model=True,
            subclass_mode_data=True,
            save_config_kwargs={"overwrite": True},
            args=[str(arg) for arg in args],
        )

    return command


@pytest.fixture
def config(tmp_path):
    def write(strategy="{}", data=OWN):
        text = (CONFIG + data).replace("FOLDER", str(tmp_path)).replace("STRATEGY", strategy)
        path = tmp_path / "told.yaml"
        path.write_text(text)
        return path

    return write


def callback_of(cli):
    return next(each for each in cli.trainer.callbacks if isinstance(each, DVCCallback))


def test_sources_callback_and_strategy_are_told_in_a_file(run, config):
    cli = run("fit", "--config", config(BY_VALUE))
    selection = cli.datamodule.selection
    assert cli.datamodule.pools.sizes == [100, 80]
    assert len(selection) == 40
    assert selection.shares()["bounded"] <= 0.25
    strategy = callback_of(cli).strategy
    assert isinstance(strategy, DVC)
    assert isinstance(strategy.weights, FixedWeights)
    assert strategy.take_back == 0.05
    assert strategy.weights.ask(0.0)[4] == 0.75


@pytest.mark.parametrize(
    ("data", "held_out"), [(OWN, 30), (WRAPPED.replace("SOURCES", "test_cli.thirds"), 20)]
)
def test_a_run_is_resumed_from_the_file_that_was_saved_and_evaluated(
    run, config, tmp_path, data, held_out
):
    whole = run("fit", "--config", config(LEARNT, data))
    assert isinstance(callback_of(whole).strategy.weights, BayesianWeights)
    saved = ["--config", tmp_path / "config.yaml", "--ckpt_path", tmp_path / "epoch=0.ckpt"]

    resumed = run("fit", *saved)
    assert list(resumed.model.seen) == [1, 2]
    assert resumed.model.seen == {epoch: whole.model.seen[epoch] for epoch in (1, 2)}
    assert callback_of(resumed).rounds_done == callback_of(whole).rounds_done == 3
    assert torch.equal(resumed.datamodule.selected_ids, whole.datamodule.selected_ids)
    for mine, theirs in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)

    # Not the saved file, which has options of the command that saved it.
    told = ["--config", config(LEARNT, data), "--ckpt_path", tmp_path / "epoch=2.ckpt"]
    score = whole.trainer.callback_metrics["val_acc"]
    for command in ("validate", "test"):
        assert run(command, *told).trainer.callback_metrics["val_acc"] == score
    assert run("predict", *told).model.predicted == held_out


@pytest.mark.parametrize(
    ("sources", "names"),
    [("null", ["train"]), ("test_cli.thirds", ["0", "1", "2"]), ("{first: FIRST}", ["first"])],
)
def test_a_wrapped_datamodule_is_told_in_a_file(run, config, tmp_path, sources, names):
    sources = sources.replace("FIRST", str([*range(30)]))
    cli = run("fit", "--config", config(data=WRAPPED.replace("SOURCES", sources)))
    assert cli.datamodule.pools.names == names
    again = run("fit", "--config", tmp_path / "config.yaml")
    assert torch.equal(again.datamodule.selected_ids, cli.datamodule.selected_ids)


def test_the_example_runs(run):
    options = ("--trainer.max_epochs=3", "--trainer.enable_progress_bar=false")
    cli = run("fit", "--config", EXAMPLE, *options)
    assert cli.datamodule.pools.names == ["north", "south", "archive"]
    assert len(cli.datamodule.selection) == cli.datamodule.budget
