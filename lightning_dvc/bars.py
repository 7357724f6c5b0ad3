"""What Lightning's progress bars show while a round of selection runs."""

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar


@contextmanager
def telling(trainer: Trainer, text: str) -> Iterator[None]:
    """Show a text in the training bar, and afterwards what was there, with the new total.

    The total of batches is read anew, because a bar that is listed before the callback has read it
    before the round. Without a bar, or with one that is neither Lightning's TQDM nor its Rich bar,
    nothing happens.

    Args:
        trainer: An epoch of it is about to begin.
        text: What is going on.
    """
    bar = trainer.progress_bar_callback
    shown: AbstractContextManager[None] = nullcontext()
    if isinstance(bar, TQDMProgressBar) and bar.is_enabled:
        shown = _in_tqdm(bar, text)
    elif isinstance(bar, RichProgressBar) and bar.progress is not None:
        shown = _in_rich(bar, text)
    with shown:
        yield


@contextmanager
def _in_tqdm(bar: TQDMProgressBar, text: str) -> Iterator[None]:
    line = _open_line(bar)
    if line is None:  # the bar's own comes with the epoch
        extra = bar.init_train_tqdm()
        extra.leave = False
        extra.set_description(text)
        yield
        extra.close()
        return
    before = line.desc
    line.set_description(text)
    yield
    line.set_description_str(before, refresh=False)
    line.reset(bar.total_train_batches)  # also the time, of which the round took some


def _open_line(bar: TQDMProgressBar) -> Any:
    try:
        line = bar.train_progress_bar
    except TypeError:  # not made yet, in a class of somebody's own
        return None
    return None if line.disable else line  # closed, after an epoch whose line is to stay


@contextmanager
def _in_rich(bar: RichProgressBar, text: str) -> Iterator[None]:
    progress: Any = bar.progress
    line = bar.train_progress_bar_id
    if line is None:  # the bar's own line comes with its first epoch
        extra = progress.add_task(text, total=math.inf)
        yield
        # Not removed, because Lightning finds its lines by their place among all.
        progress.update(extra, visible=False)
        return
    before = bar.train_progress_bar.description
    progress.update(line, description=text)
    bar.refresh()
    yield
    progress.reset(line, total=bar.total_train_batches, description=before)
    bar.refresh()
