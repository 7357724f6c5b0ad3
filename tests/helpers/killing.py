"""Runs that are killed in the middle, at a moment that does not depend on time."""

import os
import signal
import traceback

import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch.utils.data import Dataset


class Events:
    """Notes what happens in this process, and kills it at one event.

    Args:
        fatal: Which event it is, from 1; 0 for none.
    """

    def __init__(self, fatal=0):
        self.fatal, self.noted = fatal, []
        self._process = os.getpid()

    def note(self, name):
        """One more event; those in a loader's workers do not count."""
        if os.getpid() != self._process:
            return
        self.noted.append(name)
        if len(self.noted) == self.fatal:
            os.kill(os.getpid(), signal.SIGKILL)


class Noted(Dataset):
    """A dataset of which every read is an event: most of them are for scoring."""

    def __init__(self, dataset, events):
        self.dataset, self.events = dataset, events

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        self.events.note("read")
        return self.dataset[index]


class Hooks(Callback):
    """Events between batches and in validation."""

    def __init__(self, events):
        self.events = events

    def on_train_batch_start(self, *args):
        self.events.note("batch begins")

    def on_train_batch_end(self, *args):
        self.events.note("batch ends")

    def on_validation_batch_end(self, *args):
        self.events.note("validating")

    def on_validation_end(self, *args):
        self.events.note("validated")

    def on_train_epoch_end(self, *args):
        self.events.note("epoch ends")


def savers(folder, every):
    """Checkpoints of every so many steps and of every epoch's end; all are kept."""
    return [
        ModelCheckpoint(folder, "{step}", save_top_k=-1, every_n_train_steps=every),
        ModelCheckpoint(folder, "{epoch}", save_top_k=-1),
    ]


def saved(folder):
    """All checkpoints, in the order in which they were written."""
    return sorted(folder.glob("*.ckpt"), key=lambda path: path.stat().st_mtime_ns)


def is_killed(run):
    """Call a function in a forked process, and tell whether that was killed.

    Raises:
        AssertionError: If the process ended otherwise than by itself or by being killed.
    """
    child = os.fork()
    if child == 0:
        try:
            run()
        except BaseException:  # nothing may return into the test
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    assert code in (0, -signal.SIGKILL), "the run failed, see what it printed"
    return code != 0


def plain(state):
    """A state as plain values, so that it can be compared; without times."""
    if isinstance(state, torch.Tensor):
        return state.dtype, state.shape, state.nan_to_num(nan=-1e9).tolist()
    if isinstance(state, dict):
        return {k: plain(v) for k, v in state.items() if k not in ("clock", "n_bytes")}
    return [plain(value) for value in state] if isinstance(state, list | tuple) else state
