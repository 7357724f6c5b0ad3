"""If Lightning changes what the bridge leans on, these say so, with the version."""

import inspect

import lightning
import pytest
import torch
from helpers.problems import Net, good, trainer
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loops.fit_loop import _FitLoop
from torch.utils.data import DataLoader

from lightning_dvc import trainer_bridge

VERSION = f"Lightning {lightning.__version__}"


def test_lightning_still_has_what_the_bridge_uses():
    run = Trainer(logger=False, accelerator="cpu")
    loop = run.fit_loop
    assert hasattr(loop, "_combined_loader"), VERSION
    assert hasattr(loop.epoch_loop, "_batches_that_stepped"), VERSION
    assert hasattr(loop.epoch_progress.current, "processed"), VERSION
    assert "_combined_loader is not None" in inspect.getsource(_FitLoop.setup_data), VERSION
    for name in ("convert_input", "forward_context"):
        assert callable(getattr(run.precision_plugin, name)), VERSION
    assert callable(Net()._on_before_batch_transfer), VERSION
    assert hasattr(run, "overfit_batches"), VERSION
    assert hasattr(run, "fast_dev_run"), VERSION


class Growing(Callback):
    """Puts another dataset behind the loader at the start of every epoch."""

    def __init__(self):
        self.epochs, self.steps, self.state_is_kept = [], [], []

    def on_train_epoch_start(self, trainer, pl_module):
        dataset = trainer.train_dataloader.dataset
        dataset.tensors = good(16 * (2 + trainer.current_epoch)).tensors
        before = torch.get_rng_state()
        trainer_bridge.renew_train_batches(trainer)
        self.state_is_kept.append(torch.equal(before, torch.get_rng_state()))
        self.epochs.append(trainer_bridge.training_epoch(trainer))
        self.steps.append(trainer_bridge.steps_so_far(trainer))


def test_renewed_batches_count_in_the_epoch_that_begins():
    net, growing = Net(), Growing()
    loader = DataLoader(good(16), batch_size=16, shuffle=True)
    trainer(callbacks=[growing], max_epochs=3, limit_val_batches=0).fit(net, loader)
    assert [sum(sizes) for sizes in net.seen.values()] == [32, 48, 64], VERSION
    assert growing.epochs == [0, 1, 2], VERSION
    assert growing.steps == [0, 2, 5], VERSION
    assert growing.state_is_kept == [True] * 3


@pytest.mark.parametrize("precision", ["32-true", "64-true", "bf16-mixed"])
def test_batches_are_converted_as_in_training(precision):
    seen = []

    class Looking(Net):
        def forward(self, x):
            out = super().forward(x)
            seen.append((x.dtype, out.dtype))
            return out

    class Look(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            batch = next(iter(DataLoader(good(16), batch_size=16)))
            batch = trainer_bridge.to_model(trainer, pl_module, batch)
            with trainer_bridge.forward_context(trainer):
                pl_module(batch[0])

    run = trainer(callbacks=[Look()], max_epochs=1, precision=precision, limit_val_batches=0)
    run.fit(Looking(), DataLoader(good(16), batch_size=16))
    assert seen[0] == seen[1]
