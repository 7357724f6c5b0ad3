"""The only uses of Lightning's private interfaces.

Everything here was read in Lightning 2.6.6 and is covered by ``tests/test_trainer_bridge.py``,
which names the version when one of these changes.
"""

import sys
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy

from lightning_dvc.capture.guard import preserve_random_state
from lightning_dvc.loaders import LoaderSettings
from lightning_dvc.policy.plan import Run


def renew_train_batches(trainer: Any, n_batches: int) -> None:
    """Make the epoch that is about to begin follow the selection as it is now.

    Lightning fixes the number of batches, and in the first epoch also the order of the samples,
    when it sets its loader up, which is before ``on_train_epoch_start``. Setting up once more is
    what Lightning's own batch-size finder does.

    Args:
        trainer: Whose training loader has changed.
        n_batches: Batches of that loader now.
    """
    with preserve_random_state(), short_epochs(trainer, n_batches), warnings.catch_warnings():
        # Told of the full selection already, when Lightning set its loader up before training.
        warnings.filterwarnings("ignore", message="The number of training batches")
        validated = getattr(trainer, "_last_val_time", None)  # set anew, as if training began
        trainer.fit_loop._combined_loader = None
        trainer.fit_loop.setup_data()
        if validated is not None:
            trainer._last_val_time = validated


@contextmanager
def short_epochs(trainer: Any, n_batches: int) -> Iterator[None]:
    """Let Lightning set up an epoch that is shorter than its settings want.

    It refuses one of fewer batches than ``val_check_interval``, and one of which the share
    ``limit_train_batches`` is less than a batch. The first is validated at its end, and of the
    second one batch is trained on.

    Args:
        trainer: Its settings are as before afterwards.
        n_batches: Batches of the loader.
    """
    limit = trainer.limit_train_batches
    interval = getattr(trainer, "val_check_interval", None)  # there is none that is a time
    if isinstance(limit, float) and limit and not int(n_batches * limit):
        trainer.limit_train_batches = 1
    n_batches = int(min(n_batches, limit) if isinstance(limit, int) else n_batches * limit)
    within_epoch = trainer.check_val_every_n_epoch is not None
    if isinstance(interval, int) and within_epoch and interval > n_batches:
        trainer.val_check_interval = 1.0
    try:
        yield
    finally:
        trainer.limit_train_batches = limit
        if interval is not None:
            trainer.val_check_interval = interval


def run_of(trainer: Any, loading: LoaderSettings) -> Run:
    """What the trainer makes of a selection of some size, and where its run ends."""
    ends = (trainer.max_epochs, trainer.max_steps)
    epochs, steps = (None if end in (None, -1) else int(end) for end in ends)
    return Run(
        batch_size=loading.batch_size,
        drop_last=loading.drop_last,
        world_size=trainer.world_size,
        accumulate=trainer.accumulate_grad_batches,
        limit_batches=trainer.limit_train_batches,
        max_epochs=epochs,
        max_steps=steps,
    )


def training_epoch(trainer: Any) -> int:
    """Number of the epoch that is trained or about to be, also right after a resume."""
    epochs = trainer.fit_loop.epoch_progress.current
    # After a resume with max_steps, the epoch in which it was saved is counted as processed twice;
    # without, the other number lags behind until training starts.
    return int(epochs.processed if trainer.max_steps == -1 else epochs.completed)


def batches_done(trainer: Any) -> int:
    """Batches of that epoch that were trained on before the run was killed and resumed."""
    batches = trainer.fit_loop.epoch_loop.batch_progress
    if not trainer.fit_loop.restarting:
        return 0
    # All of them: there may be more than an epoch is to have.
    return sys.maxsize if batches.is_last_batch else int(batches.current.processed)


def finish_epoch(trainer: Any) -> None:
    """Go on after the last batch of an epoch, if that is where a resumed run was saved.

    Lightning would leave out the validation and the end of that epoch, and the start of the next.
    To be called before it looks at what it has loaded, which is when its loader is set up.
    """
    loop = trainer.fit_loop.epoch_loop
    batches = loop.batch_progress.total
    saved_in_hook = batches.completed == batches.processed - 1
    if loop.restarting and loop.batch_progress.is_last_batch and saved_in_hook:
        _go_on_with_validation(loop)


def validate_where_saved(trainer: Any) -> None:
    """Go on with a validation within an epoch, if a resumed run was saved just before it.

    Lightning would leave it out. To be called when training starts.
    """
    loop = trainer.fit_loop.epoch_loop
    saved_in_hook = loop.restarting and loop.restarted_on_train_batch_end
    if saved_in_hook and loop._should_check_val_fx(trainer.fit_loop._data_fetcher):
        _go_on_with_validation(loop)
        loop.update_restart_stage()


def _go_on_with_validation(loop: Any) -> None:
    """Change the counts to those of a run that was saved in the validation after a batch."""
    loop.batch_progress.increment_completed()
    validation = loop.val_loop.batch_progress
    validation.reset()
    validation.total.ready = validation.total.started = 1


def share_hyperparameters(source: LightningDataModule, target: LightningDataModule) -> None:
    """Log and save hyperparameters, or not, as another datamodule would."""
    # A name is there only once some were saved.
    for name in ("_log_hyperparams", "_hparams_name"):
        setattr(target, name, getattr(source, name, None))


def is_overfitting(trainer: Any) -> bool:
    """Whether ``overfit_batches`` is set, with which Lightning replaces the sampler."""
    return bool(trainer.overfit_batches)


def unfit_processes(trainer: Trainer) -> str | None:
    """Why the processes cannot share the work of selection, or None if they can."""
    strategy = trainer.strategy
    if isinstance(strategy, FSDPStrategy | DeepSpeedStrategy):
        return (
            f"{type(strategy).__name__} gives parts of a module's parameters to each process in a "
            "way that leaves no layer that can be looked at; use strategy='ddp', or "
            "ModelParallelStrategy with fully_shard in configure_model"
        )
    replicas = (trainer.distributed_sampler_kwargs or {}).get("num_replicas", 1)
    if replicas != trainer.world_size:
        return (
            f"{trainer.world_size} processes train on {replicas} parts of the data, so some of "
            "them share one, as under tensor parallelism, which selection does not know; set "
            "data_parallel_size of ModelParallelStrategy to the number of processes"
        )
    return None


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
