import pytest
from lightning.pytorch.cli import LightningCLI

from lightning_dvc import DVC, FixedWeights

CONFIG = """
seed_everything: 0
trainer:
  accelerator: cpu
  max_epochs: 3
  logger: false
  enable_checkpointing: false
  enable_progress_bar: false
  enable_model_summary: false
  callbacks:
    - class_path: lightning_dvc.DVCCallback
      init_args:
        monitor: val_acc
        strategy:
          class_path: lightning_dvc.DVC
          init_args:
            take_back: 0.05
            weights:
              class_path: lightning_dvc.FixedWeights
              init_args: {weights: {relevance: 1.0, uncertainty: 3.0}}
model:
  class_path: helpers.problems.Net
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
    val: {class_path: helpers.problems.Planted, init_args: {n: 30, seed: 9}}
    budget: 40
    batch_size: 16
"""


# Lightning's command line uses what a newer jsonargparse deprecates.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_run_is_told_in_a_file(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["train"])
    file = tmp_path / "config.yaml"
    file.write_text(CONFIG)
    cli = LightningCLI(
        subclass_mode_model=True,
        subclass_mode_data=True,
        save_config_callback=None,
        args=["fit", "--config", str(file)],
    )
    selection = cli.datamodule.selection
    assert cli.datamodule.pools.sizes == [100, 80]
    assert len(selection) == 40
    assert selection.shares()["bounded"] <= 0.25
    strategy = next(c for c in cli.trainer.callbacks if hasattr(c, "strategy")).strategy
    assert isinstance(strategy, DVC)
    assert isinstance(strategy.weights, FixedWeights)
    assert strategy.take_back == 0.05
    assert strategy.weights.ask(0.0)[4] == 0.75
