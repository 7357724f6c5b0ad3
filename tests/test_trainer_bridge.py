"""If Lightning changes what the bridge leans on, these say so, with the version."""

import ast
import inspect
import re
from pathlib import Path

import lightning
import pytest
import torch
from helpers.problems import Net, good, trainer
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.callbacks import Callback, RichProgressBar, TQDMProgressBar
from lightning.pytorch.loops.fit_loop import _FitLoop
from torch.utils.data import DataLoader

from lightning_dvc import trainer_bridge

VERSION = f"Lightning {lightning.__version__}"

# What is private, or not documented, by its way from a Trainer.
PRIVATE = [
    "fit_loop._combined_loader",
    "fit_loop._data_fetcher",
    "fit_loop.setup_data",
    "fit_loop.restarting",
    "fit_loop.epoch_progress.current.processed",
    "fit_loop.epoch_progress.current.completed",
    "fit_loop.epoch_loop._batches_that_stepped",
    "fit_loop.epoch_loop._should_check_val_fx",
    "fit_loop.epoch_loop.restarting",
    "fit_loop.epoch_loop.restarted_on_train_batch_end",
    "fit_loop.epoch_loop.update_restart_stage",
    "fit_loop.epoch_loop.batch_progress.is_last_batch",
    "fit_loop.epoch_loop.batch_progress.current.processed",
    "fit_loop.epoch_loop.batch_progress.total.completed",
    "fit_loop.epoch_loop.batch_progress.increment_completed",
    "fit_loop.epoch_loop.val_loop.batch_progress.reset",
    "fit_loop.epoch_loop.val_loop.batch_progress.total.started",
    "precision_plugin.convert_input",
    "precision_plugin.forward_context",
    "strategy.batch_to_device",
    "state.fn",
    "overfit_batches",
    "fast_dev_run",
    "val_check_interval",
    "val_check_batch",
    "limit_train_batches",
    "check_val_every_n_epoch",
    "accumulate_grad_batches",
    "progress_bar_callback",
]


def test_lightning_still_has_what_the_bridge_uses():
    run = Trainer(logger=False, accelerator="cpu")
    missing = [path for path in PRIVATE if not has(run, path)]
    assert missing == [], f"{VERSION} has no longer what trainer_bridge.py uses"
    assert callable(Net()._on_before_batch_transfer), VERSION

    class Saving(LightningDataModule):
        def __init__(self, d=1):
            super().__init__()
            self.save_hyperparameters()

    assert (Saving()._log_hyperparams, Saving()._hparams_name) == (True, "kwargs"), VERSION
    lines = {"init_validation_tqdm", "train_progress_bar", "is_enabled", "total_train_batches"}
    assert lines <= set(dir(TQDMProgressBar)), f"{VERSION} has no longer what bars.py uses"
    lines = {"progress", "train_progress_bar_id", "is_enabled", "total_train_batches", "refresh"}
    assert lines <= set(dir(RichProgressBar())), f"{VERSION} has no longer what bars.py uses"


def test_all_private_names_of_the_bridge_are_looked_for():
    used = set(re.findall(r"\.(_[a-z]\w+)", Path(trainer_bridge.__file__).read_text("utf-8")))
    listed = {name for path in PRIVATE for name in path.split(".") if name.startswith("_")}
    # The first three are of modules, the last exists only where validation goes by time.
    others = {"_on_before_batch_transfer", "_log_hyperparams", "_hparams_name", "_last_val_time"}
    assert used <= listed | others


@pytest.mark.parametrize(
    "words",
    [
        "if self._combined_loader is not None and not self._should_reload_train_dl",
        "trainer.val_check_batch > self.max_batches",
        "trainer._last_val_time = trainer._train_start_time",
        "_parse_num_batches(stage, length, trainer.limit_train_batches)",
        'f"The number of training batches (',
    ],
)
def test_lightning_still_sets_its_loader_up_as_the_bridge_expects(words):
    assert words in inspect.getsource(_FitLoop.setup_data), f"{VERSION} sets up otherwise"


def has(thing, path):
    for name in path.split("."):
        if not hasattr(thing, name):
            return False
        thing = getattr(thing, name)
    return True


def test_a_missing_name_is_found():
    run = Trainer(logger=False, accelerator="cpu")
    assert not has(run, "fit_loop._no_such_thing")
    assert not has(run, "no_such_loop.epoch_loop")


# What the package takes from torch itself.
OF_TORCH = {"_base", "_version", "_buffers", "_reversed_padding_repeated_twice", "_BatchNorm"}
OF_TORCH |= {"_get_fsdp_state", "_fsdp_param_group", "_fsdp_param_groups"}

# Lightning's, not private by their names, but not documented either.
LOOPS = {"fit_loop", "epoch_loop", "val_loop", "epoch_progress", "batch_progress"}
LOOPS |= {"precision_plugin", "batch_to_device", "distributed_sampler_kwargs"}


def private_names(source):
    """Names with an underscore that code defines, and those that it asks something for."""
    defined, used = set(), set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            defined.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            defined.add(node.id)
        elif isinstance(node, ast.Attribute):
            own = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
            stores = own and isinstance(node.ctx, ast.Store)
            (defined if stores else used).add(node.attr)
        elif isinstance(node, ast.ImportFrom):
            used.update(alias.name for alias in node.names)
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("getattr", "setattr"):
            used.update(arg.value for arg in node.args[1:2] if isinstance(arg, ast.Constant))
    return (
        {name for name in names if name.startswith("_") and not name.startswith("__")}
        for names in (defined, used)
    )


def test_only_the_bridge_uses_what_is_private():
    package = Path(trainer_bridge.__file__).parent
    files = {path: path.read_text(encoding="utf-8") for path in package.rglob("*.py")}
    found = {path.name: private_names(source) for path, source in files.items()}
    found = {name: tuple(pair) for name, pair in found.items()}
    own = set().union(*(defined for defined, _ in found.values()))
    users = {name: used - own - OF_TORCH for name, (_, used) in found.items()}
    assert {name for name, used in users.items() if used} == {"trainer_bridge.py"}, users
    loops = re.compile(rf"\.({'|'.join(sorted(LOOPS))})\b")
    assert [path.name for path in files if loops.search(files[path])] == ["trainer_bridge.py"]


@pytest.mark.parametrize(
    "line",
    [
        "wrapped._log_hyperparams",
        "self._hparams_name",
        "x.y._results.reset()",
        "getattr(run, '_evaluation_loop', None)",
        "setattr(data, '_hparams', {})",
        "from lightning.pytorch.loops.fit_loop import _FitLoop",
        "del run._last",
    ],
)
def test_whatever_is_private_and_not_of_the_package_is_found(line):
    source = f"def f(self, x, y, run, data, wrapped):\n    self._own = x\n    y._own\n    {line}"
    defined, used = private_names(source)
    assert defined == {"_own"}
    assert len(used - defined) == 1


class Growing(Callback):
    """Puts another dataset behind the loader at the start of every epoch."""

    def __init__(self):
        self.epochs, self.steps, self.state_is_kept = [], [], []

    def on_train_epoch_start(self, trainer, pl_module):
        dataset = trainer.train_dataloader.dataset
        dataset.tensors = good(16 * (2 + trainer.current_epoch)).tensors
        before = torch.get_rng_state()
        n_batches = len(trainer.train_dataloader)
        trainer_bridge.renew_train_batches(trainer, n_batches)
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


class Changing(Callback):
    """Notes how Lightning has set an epoch of four batches up, by the settings of the trainer."""

    def on_train_epoch_start(self, trainer, pl_module):
        trainer_bridge.renew_train_batches(trainer, len(trainer.train_dataloader))
        self.found = (trainer.num_training_batches, trainer.val_check_batch)


@pytest.mark.parametrize(
    ("limit", "interval", "batches"),
    [
        (1.0, 1.0, (4, 4)),
        (1.0, 3, (4, 3)),
        (1.0, 5, (4, 4)),
        (0.2, 1.0, (1, 1)),
        (0.2, 3, (1, 1)),
        (0.5, 0.5, (2, 1)),
        (3, 4, (3, 3)),
        (9, 4, (4, 4)),
    ],
)
def test_an_epoch_may_be_shorter_than_the_settings_want(limit, interval, batches):
    changing, loader = Changing(), DataLoader(good(64), batch_size=16)
    run = trainer(callbacks=[changing], max_epochs=1)
    run.limit_train_batches, run.val_check_interval = limit, interval
    # For Lightning's own look at the loader, before the callback's.
    with trainer_bridge.short_epochs(run, 4):
        run.fit(Net(), loader, DataLoader(good(16)))
    assert changing.found == batches, VERSION
    assert (run.limit_train_batches, run.val_check_interval) == (limit, interval)
