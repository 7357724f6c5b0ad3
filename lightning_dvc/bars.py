"""What Lightning's progress bars show while a round of selection runs."""

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar


@contextmanager
def telling(trainer: Trainer, text: str) -> Iterator[None]:
    """Show a text in a line of its own, beside that of training, until the round is over.

    Afterwards, the line of training has the total of batches as it is then, because a bar that is
    listed before the callback has read it before the round. Without a bar, or with one that is
    neither Lightning's TQDM nor its Rich bar, nothing happens.

    Args:
        trainer: An epoch of it is about to begin.
        text: What is going on.
    """
    bar = trainer.progress_bar_callback
    shown: AbstractContextManager[None] = nullcontext()
    if isinstance(bar, TQDMProgressBar) and bar.is_enabled:
        shown = _in_tqdm(bar, text)
    elif isinstance(bar, RichProgressBar) and bar.is_enabled and bar.progress is not None:
        shown = _in_rich(bar, text)
    with shown:
        yield


@contextmanager
def _in_tqdm(bar: TQDMProgressBar, text: str) -> Iterator[None]:
    line = bar.init_validation_tqdm()  # below the line of training, and gone when it is closed
    line.set_description(text)
    try:
        yield
    finally:
        line.close()
    training = _open_line(bar)
    if training is not None:
        training.reset(bar.total_train_batches)  # also the time, of which the round took some


def _open_line(bar: TQDMProgressBar) -> Any:
    try:
        line = bar.train_progress_bar
    except TypeError:  # not made yet, in a class of somebody's own
        return None
    return None if line.disable else line  # closed, after an epoch whose line is to stay


@contextmanager
def _in_rich(bar: RichProgressBar, text: str) -> Iterator[None]:
    progress: Any = bar.progress
    line = progress.add_task(text, total=math.inf)
    try:
        yield
    finally:
        # Not removed, because Lightning finds its lines by their place among all.
        progress.update(line, visible=False)
    if bar.train_progress_bar_id is not None:
        progress.reset(bar.train_progress_bar_id, total=bar.total_train_batches)
    bar.refresh()
