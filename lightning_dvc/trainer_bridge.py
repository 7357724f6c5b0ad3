"""The only uses of Lightning's private interfaces.

Everything here was read in Lightning 2.6.6 and is covered by ``tests/test_trainer_bridge.py``,
which names the version when one of these changes.
"""

from contextlib import AbstractContextManager
from typing import Any

from lightning.pytorch import LightningModule, Trainer

from lightning_dvc.capture.guard import preserve_random_state


def renew_train_batches(trainer: Trainer) -> None:
    """Make the epoch that is about to begin follow the selection as it is now.

    Lightning fixes the number of batches, and in the first epoch also the order of the samples,
    when it sets its loader up, which is before ``on_train_epoch_start``. Setting up once more is
    what Lightning's own batch-size finder does.
    """
    with preserve_random_state():
        trainer.fit_loop._combined_loader = None
        trainer.fit_loop.setup_data()


def training_epoch(trainer: Any) -> int:
    """Number of the epoch that is trained or about to be, also right after a resume."""
    return int(trainer.fit_loop.epoch_progress.current.processed)


def is_overfitting(trainer: Any) -> bool:
    """Whether ``overfit_batches`` is set, with which Lightning replaces the sampler."""
    return bool(trainer.overfit_batches)


def is_fitting(trainer: Any) -> bool:
    """Whether this is ``Trainer.fit``, and not a validation or test by itself."""
    return bool(trainer.state.fn == "fit")


def is_trial_run(trainer: Any) -> bool:
    """Whether ``fast_dev_run`` is set."""
    return bool(trainer.fast_dev_run)


def datamodule_of(trainer: Any) -> Any:
    """The datamodule that the trainer was given, or None."""
    return trainer.datamodule


def steps_so_far(trainer: Trainer) -> int:
    """The x axis of Lightning's own training metrics."""
    return int(trainer.fit_loop.epoch_loop._batches_that_stepped)


def to_model(trainer: Trainer, module: LightningModule, batch: Any) -> Any:
    """Convert and move a batch as the training loop does, transfer hooks included."""
    batch = trainer.precision_plugin.convert_input(batch)
    batch = module._on_before_batch_transfer(batch, dataloader_idx=0)
    return trainer.strategy.batch_to_device(batch, dataloader_idx=0)


def forward_context(trainer: Trainer) -> AbstractContextManager[Any]:
    """The precision under which the training loop runs a forward pass, such as autocast."""
    return trainer.precision_plugin.forward_context()
