"""What Lightning's progress bars show during a round and after it, in small real fits."""

import pytest
from helpers.problems import Net, good, trainer, wrong
from lightning.pytorch.callbacks import Callback, ProgressBar, RichProgressBar, TQDMProgressBar
from tqdm import tqdm

from lightning_dvc import DVC, DVCCallback, DVCDataModule, Random

TOTALS = [3, 6, 8, 8]
SELECTING = ["Selecting (round 1/3)", "Selecting (round 2/3)", "Selecting (round 3/3)"]


class Noting(Random):
    """Chooses at random, and notes what the bar shows meanwhile."""

    refines = False

    def __init__(self, shown):
        self.shown, self.texts = shown, []

    def choose(self, this):
        self.texts.append(self.shown())
        return super().choose(this)


class Watching(Callback):
    """Notes what the bar shows at the first batch of each epoch, and its total."""

    def __init__(self, shown, total):
        self.shown, self.total, self.seen = shown, total, []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == 0:
            self.seen.append((self.shown(), self.total()))


def fit(bar, first, strategy, *others, **settings):
    """Fit with a bar that is listed before the callback, or after it."""
    callback = DVCCallback(strategy)
    both = [bar, callback] if first else [callback, bar]
    datamodule = DVCDataModule(
        {"good": good(), "wrong": wrong()}, good(40, seed=50), budget=120, batch_size=16, rounds=3
    )
    settings = {"callbacks": [*both, *others], "enable_progress_bar": True, **settings}
    trainer(**settings).fit(Net(), datamodule)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("leave", [True, False])
def test_tqdm_tells_of_the_round_and_counts_the_batches_of_the_epoch(first, leave):
    bar = TQDMProgressBar(leave=leave)

    def shown():
        return [line.desc.removesuffix(": ") for line in sorted(tqdm._instances, key=id)]

    strategy = Noting(shown)
    watching = Watching(shown, lambda: bar.train_progress_bar.total)
    fit(bar, first, strategy, watching)
    assert strategy.texts == [[line] for line in SELECTING]
    assert watching.seen == [([f"Epoch {n}"], total) for n, total in enumerate(TOTALS)]


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("leave", [True, False])
def test_rich_tells_of_the_round_and_counts_the_batches_of_the_epoch(first, leave):
    pytest.importorskip("rich")
    bar = RichProgressBar(leave=leave)

    def lines():
        return [task.description.strip() for task in bar.progress.tasks if task.visible]

    strategy = Noting(lambda: [line for line in lines() if line.startswith("Selecting")])
    watching = Watching(lines, lambda: bar.train_progress_bar.total)
    fit(bar, first, strategy, watching)
    assert strategy.texts == [[line] for line in SELECTING]
    assert watching.seen == [([f"Epoch {n}/3"], total) for n, total in enumerate(TOTALS)]


class Own(ProgressBar):
    """Somebody's bar, with nothing in it but what it has to have."""

    def disable(self):
        self.enabled = False

    def enable(self):
        self.enabled = True


class Late(TQDMProgressBar):
    """Makes its line only when the first epoch begins."""

    def on_train_start(self, *args):
        return

    def on_train_epoch_start(self, *args):
        self.train_progress_bar = self.init_train_tqdm()
        super().on_train_epoch_start(*args)


@pytest.mark.parametrize("bar", [Own, Late, lambda: TQDMProgressBar(refresh_rate=0)])
def test_bars_that_have_no_line_to_write_in_are_left_alone(bar):
    strategy = Noting(lambda: None)
    fit(bar(), False, strategy, num_sanity_val_steps=0)
    assert len(strategy.texts) == 3


def test_a_round_that_only_refines_has_no_last_one():
    bar, texts = TQDMProgressBar(), []

    class Refining(DVC):
        def choose(self, this):
            texts.append(bar.train_progress_bar.desc)
            return super().choose(this)

    fit(bar, False, Refining(refine=True), max_epochs=5)
    assert texts[2:] == [
        "Selecting (round 3/3): ",
        "Selecting (round 4): ",
        "Selecting (round 5): ",
    ]


def test_after_an_error_in_a_round_the_error_is_what_is_seen():
    class Broken(Random):
        def choose(self, this):
            raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        fit(TQDMProgressBar(), False, Broken())
