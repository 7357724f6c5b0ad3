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


def tqdm_lines():
    """What the lines say that are shown, from above."""
    lines = sorted(tqdm._instances, key=lambda line: abs(line.pos))
    return [line.desc.removesuffix(": ") for line in lines]


# The line of training before each round: named by the bar if that is listed first.
NAMED = [["Epoch 0"], ["Epoch 1"], ["Epoch 2"]]


@pytest.mark.parametrize(
    ("first", "leave", "training"),
    [
        (True, True, NAMED),
        (True, False, NAMED),
        (False, True, [["Training"], [], []]),
        (False, False, [["Training"], ["Epoch 0"], ["Epoch 1"]]),
    ],
)
def test_tqdm_tells_of_the_round_in_a_line_of_its_own(first, leave, training):
    bar = TQDMProgressBar(leave=leave)
    strategy = Noting(tqdm_lines)
    watching = Watching(tqdm_lines, lambda: bar.train_progress_bar.total)
    fit(bar, first, strategy, watching)
    assert strategy.texts == [[*line, own] for line, own in zip(training, SELECTING, strict=True)]
    assert watching.seen == [([f"Epoch {n}"], total) for n, total in enumerate(TOTALS)]


@pytest.mark.parametrize(
    ("first", "training"),
    [
        (True, [["Epoch 0/3"], ["Epoch 1/3"], ["Epoch 2/3"]]),
        (False, [[], ["Epoch 0/3"], ["Epoch 1/3"]]),
    ],
)
@pytest.mark.parametrize("leave", [True, False])
def test_rich_tells_of_the_round_in_a_line_of_its_own(first, training, leave):
    pytest.importorskip("rich")
    bar = RichProgressBar(leave=leave)

    def lines():
        return [task.description.strip() for task in bar.progress.tasks if task.visible]

    strategy = Noting(lines)
    watching = Watching(lines, lambda: bar.train_progress_bar.total)
    fit(bar, first, strategy, watching)
    assert strategy.texts == [[*line, own] for line, own in zip(training, SELECTING, strict=True)]
    assert watching.seen == [([f"Epoch {n}/3"], total) for n, total in enumerate(TOTALS)]


@pytest.mark.parametrize("kind", [TQDMProgressBar, RichProgressBar])
def test_the_time_of_the_line_of_training_does_not_count_the_round(kind):
    begun, bar = [], kind()

    class Slow(Random):
        def choose(self, this):
            chosen = super().choose(this)
            begun.append(line().start_t if kind is TQDMProgressBar else line().start_time)
            return chosen

    class After(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            start = line().start_t if kind is TQDMProgressBar else line().start_time
            if trainer.current_epoch < 3:
                assert start > begun[-1]

    def line():
        return bar.train_progress_bar

    fit(bar, True, Slow(), After())
    assert len(begun) == 3


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
            texts.append(tqdm_lines()[-1])
            return super().choose(this)

    fit(bar, False, Refining(refine=True), max_epochs=5)
    assert texts[2:] == [
        "Selecting (round 3/3)",
        "Selecting (round 4)",
        "Selecting (round 5)",
    ]


@pytest.mark.parametrize("kind", [TQDMProgressBar, RichProgressBar])
def test_an_error_in_a_round_is_what_is_seen_and_the_line_goes(kind):
    class Broken(Random):
        def choose(self, this):
            raise RuntimeError("broken")

    bar = kind()
    with pytest.raises(RuntimeError, match="broken"):
        fit(bar, False, Broken())
    left = tqdm_lines()
    if kind is RichProgressBar:
        left = [task.description for task in bar.progress.tasks if task.visible]
    assert not any("Selecting" in text for text in left)
