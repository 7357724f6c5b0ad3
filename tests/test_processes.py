"""Small runs in two and three processes. Each runs apart, so that one that hangs is killed."""

import os
import re
import signal
import traceback
import warnings
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.multiprocessing as mp
from helpers.killing import plain
from helpers.problems import WIDTH, Net, good, repeated, trainer, wrong
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import Dataset

from lightning_dvc import (
    DVC,
    BayesianWeights,
    DVCCallback,
    DVCDataModule,
    FixedWeights,
    Random,
    trainer_bridge,
)

TIMEOUT = 240  # seconds; a run takes a few
TRIED = 30  # samples, see the test that names it


def apart(work):
    """Run in a child process, killed with its own children if it hangs."""
    context = mp.get_context("fork")
    here, there = context.Pipe(duplex=False)
    child = context.Process(target=_child, args=(work, there))
    child.start()
    there.close()
    try:
        assert here.poll(TIMEOUT), f"no end after {TIMEOUT} s"
        error = here.recv()
    finally:
        child.join(10)
        if child.is_alive():
            os.killpg(child.pid, signal.SIGKILL)
            child.join()
    assert error is None, error


def _child(work, there):
    os.setsid()
    # A build with CUDA, once any fit has run in a process, takes its forks for unable to use a GPU,
    # and Lightning then refuses even those that do not. Here a fit of an earlier test was that.
    torch.cuda._is_in_bad_fork = lambda: False
    # Of forking, and of a validation score that is not of all processes.
    warnings.filterwarnings("ignore", ".*fork.*", DeprecationWarning)
    warnings.filterwarnings("ignore", "The run ended with", UserWarning)
    # The callback that saved is not there to resume.
    warnings.filterwarnings("ignore", ".*callbacks used to create the checkpoint", UserWarning)
    warnings.filterwarnings("ignore", ".*sync_dist=True.*", UserWarning)
    try:
        work()
        there.send(None)
    except BaseException:  # the test tells it
        there.send(traceback.format_exc())


class Notes(Callback):
    """Writes down, for each process, what is selected in each epoch and what became of the run."""

    def __init__(self, folder, dvc):
        self.folder, self.dvc, self.ids = folder, dvc, []

    def on_train_epoch_end(self, trainer, pl_module):
        self.ids.append(trainer.datamodule.selected_ids.tolist())

    def on_train_end(self, trainer, pl_module):
        found = {
            "ids": self.ids,
            "scored": pl_module.scored,
            "seen": pl_module.seen,
            "model": [whole(parameter) for parameter in pl_module.parameters()],
            "rounds": (self.dvc.rounds_done, self.dvc.rounds_left_out),
            "weights": trainer.datamodule.selection.weights,
            "state": self.dvc.strategy.state_dict(),
        }
        torch.save(found, self.folder / f"{trainer.global_rank}.pt")


def whole(parameter):
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter.detach()


class Telling(DVCCallback):
    """Writes down what it raises, and lets all processes do so before one ends."""

    folder = None

    def setup(self, trainer, pl_module, stage):
        self._told(super().setup, trainer, pl_module, stage)

    def on_train_start(self, trainer, pl_module):
        self._told(super().on_train_start, trainer, pl_module)

    def on_train_epoch_start(self, trainer, pl_module):
        self._told(super().on_train_epoch_start, trainer, pl_module)

    def on_validation_end(self, trainer, pl_module):
        self._told(super().on_validation_end, trainer, pl_module)

    def _told(self, hook, trainer, *args):
        try:
            hook(trainer, *args)
        except Exception as error:
            text = f"{type(error).__name__}: {error}"
            (self.folder / f"{trainer.global_rank}.txt").write_text(text)
            torch.distributed.barrier()
            raise


class Counting(Net):
    """Counts samples that are scored."""

    scored = 0

    def training_step(self, batch, batch_idx):
        if not self.training:
            Counting.scored += len(batch[0])  # the guard puts an attribute of the object back
        return super().training_step(batch, batch_idx)


class Still(Counting):
    """Never moves, so that runs are alike whatever the number of processes."""

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


def make(sources=None, **settings):
    # Neither candidates nor reference samples nor the budget can be dealt out evenly.
    sources = sources or {"good": good(201), "wrong": wrong(103), "repeated": repeated(57)}
    settings = {"val": good(91, seed=50), "budget": 119, "batch_size": 16, "rounds": 3, **settings}
    return DVCDataModule(sources, **settings)


def every_metric():
    return DVC(FixedWeights(), drift_tolerance=10.0)


def fit(
    folder,
    net=Still,
    choose=every_metric,
    datamodule=make,
    more=(),
    dvc=None,
    ckpt_path=None,
    **settings,
):
    folder.mkdir()
    dvc = {"monitor": "val_acc", "score_batch_size": 16, "every_n_epochs": 1, **(dvc or {})}
    callback = Telling(choose(), **dvc)
    callback.folder = folder
    if "devices" in settings:
        settings = {"strategy": "ddp_fork", **settings}
    Counting.scored = 0
    callbacks = [*more, callback, Notes(folder, callback)]
    settings = {"accelerator": "cpu", "max_epochs": 4, **settings}  # few have several of another
    run = trainer(callbacks=callbacks, **settings)
    run.fit(net(), datamodule(), ckpt_path=ckpt_path)


def fit_apart(folder, **settings):
    """What each process noted."""
    apart(partial(fit, folder, **settings))
    return [torch.load(path) for path in sorted(folder.glob("*.pt"))]


# --- the same selection everywhere -------------------------------------------------------------


@pytest.mark.parametrize(
    ("choose", "devices", "strategy"),
    [
        (every_metric, 2, "ddp_fork"),
        pytest.param(every_metric, 3, "ddp_fork", marks=pytest.mark.slow),
        (Random, 2, "ddp_fork"),
        pytest.param(every_metric, 2, "ddp_spawn", marks=pytest.mark.slow),
    ],
)
def test_all_processes_select_what_one_selects(tmp_path, choose, devices, strategy):
    (alone,) = fit_apart(tmp_path / "one", choose=choose)
    together = fit_apart(tmp_path / "more", choose=choose, devices=devices, strategy=strategy)
    assert [len(ids) for ids in alone["ids"]] == [43, 81, 119, 119]
    # In every round, since the model stays as it is.
    assert [one["ids"] for one in together] == [alone["ids"]] * devices


def test_a_model_that_moves_alike_selects_alike(tmp_path):
    # Batches of 8 on two processes are the same steps as of 16 on one, up to rounding, as long as
    # the selection is a multiple of both.
    def multiples(batch_size):
        return make(budget=96, warmup=1 / 3, rounds=2, batch_size=batch_size)

    (alone,) = fit_apart(tmp_path / "one", net=Counting, datamodule=partial(multiples, 16))
    one, two = fit_apart(
        tmp_path / "two", net=Counting, datamodule=partial(multiples, 8), devices=2
    )
    assert one["ids"] == two["ids"]
    assert one["ids"][0] == alone["ids"][0]  # chosen before the first step
    last, other = set(one["ids"][-1]), set(alone["ids"][-1])
    assert len(last & other) >= 0.95 * len(other)


class Taught(Still):
    """Knows good samples before the run, so that it disbelieves wrong labels."""

    def __init__(self):
        super().__init__()
        batch, optimizer = good(200, seed=70).tensors, torch.optim.Adam(self.parameters(), 0.01)
        for _ in range(100):
            optimizer.zero_grad()
            self.training_step(batch, 0).backward()
            optimizer.step()


def test_disbelieved_candidates_are_left_out_by_the_process_that_has_them(tmp_path):
    def learnt(noted):
        return noted["state"]["bandit"]["sums"]

    (alone,) = fit_apart(tmp_path / "one", net=Taught, choose=DVC)
    together = fit_apart(tmp_path / "two", net=Taught, choose=DVC, devices=2)
    assert [one["ids"] for one in together] == [alone["ids"]] * 2
    for one in together:
        torch.testing.assert_close(learnt(one), learnt(alone))
    believing = partial(DVC, disbelief_rate=0.0)
    (other,) = fit_apart(tmp_path / "all", net=Taught, choose=believing)
    assert (learnt(other) - learnt(alone)).abs().max() > 0.01


def test_all_processes_look_further_in_a_last_round(tmp_path):
    """Two thirds of too few candidates are wrong: enough good ones are found by looking on only."""

    def sources():
        return make({"wrong": wrong(401), "good": good(201)}, oversample=2.0)

    settings = {"net": Taught, "choose": partial(DVC, temperature=100.0), "datamodule": sources}
    (alone,) = fit_apart(tmp_path / "one", **settings)
    together = fit_apart(tmp_path / "two", devices=2, **settings)
    assert [one["ids"] for one in together] == [alone["ids"]] * 2
    before, after = map(set, alone["ids"][1:3])
    assert len(after - before) > 30
    assert min(after - before) >= 401


class Normed(Counting):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(16)

    def forward(self, x):
        return self.head(self.norm(self.body(x)).relu())


def remembered(noted):
    """What a process has learnt, as plain values; but for times, and for what its cache held."""
    state = {k: v for k, v in noted["state"].items() if k != "weights"}
    observer = {k: v for k, v in state.pop("observer").items() if k != "cache"}
    return plain([state, observer, noted["weights"]])


@pytest.mark.parametrize(
    ("net", "choose", "more"),
    [
        (Counting, lambda: DVC(BayesianWeights(initial=2, max_share=None)), {}),
        # Without a validation, the processes end an epoch with running means of their own.
        (Normed, lambda: DVC(refine=True), {"limit_val_batches": 0}),
    ],
)
def test_a_run_of_two_processes_is_resumed_in_the_middle_of_an_epoch(tmp_path, net, choose, more):
    # Saved at every second step, of 3, 5, 7 and 7 steps for each process.
    saver = ModelCheckpoint(
        tmp_path / "saved", filename="{step}", every_n_train_steps=2, save_top_k=-1
    )
    settings = {
        "net": net,
        "choose": choose,
        "datamodule": partial(make, batch_size=9),
        "devices": 2,
        **more,
    }
    whole = fit_apart(tmp_path / "whole", more=[saver], enable_checkpointing=True, **settings)
    assert remembered(whole[0]) == remembered(whole[1])
    for step in (2, 6, 14):
        path = tmp_path / "saved" / f"step={step}.ckpt"
        resumed = fit_apart(tmp_path / str(step), ckpt_path=path, **settings)
        for one, other in zip(whole, resumed, strict=True):
            assert one["ids"][-len(other["ids"]) :] == other["ids"]
            assert all(map(torch.equal, one["model"], other["model"])), step
            assert remembered(one) == remembered(other), step


class Noisy(Dataset):
    """Samples that are augmented otherwise in each process."""

    def __init__(self, n, seed=0):
        self.samples, self.generators = good(n, seed), {}

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        rank = torch.distributed.get_rank()
        generator = self.generators.setdefault(rank, torch.Generator().manual_seed(rank))
        x, y = self.samples[index]
        return x + torch.randn(WIDTH, generator=generator), y


def test_processes_that_see_samples_otherwise_choose_the_same(tmp_path):
    one, two = fit_apart(
        tmp_path / "two",
        net=Counting,
        choose=lambda: DVC(FixedWeights(), take_back=0.3, disown_rate=1.0),
        datamodule=lambda: make(
            {"a": Noisy(101), "b": Noisy(102, 7), "c": wrong(57)}, rounds=5, reference=Noisy(40, 9)
        ),
        devices=2,
        max_epochs=6,
    )
    assert one["ids"] == two["ids"]
    for learnt in ("counts", "sums"):
        assert torch.equal(one["state"]["bandit"][learnt], two["state"]["bandit"][learnt])
    assert set(one["ids"][1]) - set(one["ids"][-1])  # something was taken back


class Disagreeing(BayesianWeights):
    """Suggests other weights in each process."""

    def ask(self, *args):
        weights = super().ask(*args)
        return weights.roll(torch.distributed.get_rank())


def test_learnt_weights_are_those_of_the_first_process(tmp_path):
    one, two = fit_apart(
        tmp_path / "two", choose=lambda: DVC(Disagreeing(initial=2)), net=Counting, devices=2
    )
    assert one["ids"] == two["ids"]
    assert torch.equal(one["weights"].nan_to_num(), two["weights"].nan_to_num())
    observed = [each["state"]["weights"]["observations"] for each in (one, two)]
    assert observed[0] == observed[1]
    assert len(observed[0]) == 2


@pytest.mark.parametrize(("devices", "budget", "warmup"), [(2, 1, 1.0), (3, 2, 0.5)])
def test_fewer_samples_than_processes(tmp_path, devices, budget, warmup):
    together = fit_apart(
        tmp_path / "more",
        datamodule=lambda: make({"good": good(31)}, budget=budget, warmup=warmup, rounds=2),
        devices=devices,
        max_epochs=3,
    )
    for one in together:
        assert one["ids"] == together[0]["ids"]
        assert len(one["ids"][-1]) == budget
        assert [sum(sizes) for sizes in one["seen"].values()] == [1, 1, 1]


class PlantedTime(Callback):
    """Selection seems to have taken all the time, to the first process."""

    def on_train_start(self, trainer, pl_module):
        if trainer.is_global_zero:
            callback = next(c for c in trainer.callbacks if isinstance(c, DVCCallback))
            callback.watch.seconds["planted"] = 1e9


def test_processes_leave_out_the_same_rounds(tmp_path):
    together = fit_apart(
        tmp_path / "two",
        choose=Random,  # which takes hardly any time
        dvc={"max_overhead": 0.45},
        more=[PlantedTime()],
        devices=2,
    )
    assert [one["rounds"] for one in together] == [(2, 1), (2, 1)]


def test_processes_share_the_work_of_scoring(tmp_path):
    settings = {
        "choose": lambda: DVC(
            reference_size=16, reservoir_size=16, review_size=1, cache_bytes=0, stability_window=0
        ),
        "datamodule": lambda: make(oversample=6, rounds=2),
    }
    (alone,) = fit_apart(tmp_path / "one", **settings)
    together = fit_apart(tmp_path / "two", devices=2, **settings)
    # What each looks at by itself: the trial of 31, three times, and two of each of its batches
    # once more; in each round 16 of the selection and 16 of the reference; a sample of the
    # selection that is reviewed, which only one of them does.
    own = 3 * 31 + 2 * 2 + 2 * (16 + 16)
    shared = [one["scored"] - own for one in together]
    assert abs(shared[0] - shared[1]) <= 2 * 16
    assert alone["scored"] - own == pytest.approx(sum(shared), abs=16)


# --- what fails on one process -----------------------------------------------------------------


class Torn(Dataset):
    """Cannot be read any more in the second process, after some samples."""

    def __init__(self, readable):
        self.samples, self.left = good(201), readable

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        self.left -= 1
        if self.left < 0 and torch.distributed.get_rank() == 1:
            raise OSError("the disk is gone")
        return self.samples[index]


class LateDisk(Torn):
    """Cannot be read in the second process at first."""

    def __getitem__(self, index):
        self.left -= 1
        if self.left >= 0 and torch.distributed.get_rank() == 1:
            raise OSError("the disk is not there yet")
        return self.samples[index]


class Rolled(Still):
    """A layer that gets the samples in another order than the loss."""

    def forward(self, x):
        return self.head(self.body(x.roll(1, 0)).roll(-1, 0).relu())


@pytest.mark.filterwarnings("ignore:the gradients of a sample:UserWarning")
def test_processes_leave_out_the_same_layers(tmp_path):
    one, two = fit_apart(
        tmp_path / "two",
        net=Rolled,
        # As many as are tried out before training; all of them are of this source.
        datamodule=lambda: make({"late": LateDisk(TRIED)}, budget=60, warmup=0.5, rounds=1),
        devices=2,
        max_epochs=1,
    )
    assert one["ids"] == two["ids"]
    layers = [len(each["state"]["observer"]["norms"]) for each in (one, two)]
    assert layers == [1, 1]


class SilentLater(Counting):
    """The second process logs nothing any more."""

    def validation_step(self, batch, batch_idx):
        if self.trainer.sanity_checking or self.global_rank == 0:
            super().validation_step(batch, batch_idx)


def test_a_score_that_one_process_lacks_stops_all(tmp_path):
    said = r"ConfigurationError: DVCCallback\(monitor='val_acc'\) expects"
    with pytest.raises(AssertionError, match=said):
        fit_apart(tmp_path / "two", net=SilentLater, devices=2)
    told, own = (tmp_path / "two" / f"{rank}.txt" for rank in (0, 1))
    assert re.match(said, own.read_text())
    assert re.match(f"ProcessError: .* failed on process 1 \\({said}", told.read_text())


class Breaking(DVC):
    """Fails in the second process before the second round has begun."""

    def choose(self, this):
        if this.number == 2 and this.group.rank == 1:
            raise ZeroDivisionError("no such share")
        return super().choose(this)


@pytest.mark.parametrize(
    ("choose", "readable", "said"),
    [
        (DVC, 0, "BadSampleError: sample .* the disk is gone"),  # in the trial
        (DVC, 60, "BadSampleError: sample .* the disk is gone"),  # while candidates are scored
        (Breaking, 10**6, "ZeroDivisionError: no such share"),
    ],
)
def test_what_fails_on_one_process_stops_all(tmp_path, choose, readable, said):
    sources = {"torn": Torn(readable), "wrong": wrong(103)}
    with pytest.raises(AssertionError, match=said):
        fit_apart(
            tmp_path / "two",
            choose=choose,
            datamodule=lambda: make(sources),
            dvc={"on_bad_sample": "raise"},
            devices=2,
        )
    told, own = (tmp_path / "two" / f"{rank}.txt" for rank in (0, 1))
    assert re.match(said, own.read_text())
    assert re.match(f"ProcessError: .* failed on process 1 \\({said}", told.read_text())


# --- sharded parameters ------------------------------------------------------------------------


class Sharded(Still):
    """FSDP2: every layer by itself, and what is left."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(self.body, nn.ReLU(), self.head)
        self.body = self.head = None

    def forward(self, x):
        return self.net(x)

    def configure_model(self):
        if self.device_mesh is not None:
            for part in (self.net[0], self.net):
                fully_shard(part, mesh=self.device_mesh["data_parallel"])


class ShardedMoving(Sharded):
    configure_optimizers = Net.configure_optimizers


class LooksOnly(DVC):
    def choose(self, this):
        choice = super().choose(this)
        return type(choice).unscored(choice.add[:0])


class NoChoice(Random):
    def choose(self, this):
        return type(super().choose(this)).unscored(torch.empty(0, dtype=torch.int64))


def in_each_process(work, port, n=2):
    """Run in processes that were started from outside, as Lightning's FSDP2 wants it."""

    def ranked(rank):
        os.environ |= {"LOCAL_RANK": str(rank), "NODE_RANK": "0", "WORLD_SIZE": str(n)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        work()

    context = mp.get_context("fork")
    children = [context.Process(target=ranked, args=(rank,)) for rank in range(n)]
    for child in children:
        child.start()
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0] * n


def fit_sharded(folder, port, parallel=(2, 1), **settings):
    folder.mkdir()

    def work():
        # Each its own folder, to be made in fit().
        strategy = ModelParallelStrategy(*parallel)
        fit(folder / os.environ["LOCAL_RANK"], strategy=strategy, devices=2, **settings)

    apart(partial(in_each_process, work, port))
    return [torch.load(path) for path in sorted(folder.glob("*/*.pt"))]


def test_sharded_parameters_are_scored_as_whole_ones(tmp_path, unused_port):
    (alone,) = fit_apart(tmp_path / "one")
    together = fit_sharded(tmp_path / "two", unused_port, net=Sharded)
    assert [one["ids"] for one in together] == [alone["ids"]] * 2


def test_training_of_sharded_parameters_is_left_alone(tmp_path, unused_port):
    def run(name, choose):
        settings = {"choose": choose, "net": ShardedMoving, "max_epochs": 3}
        more = {"datamodule": lambda: make(warmup=0.5), "num_sanity_val_steps": 0}
        return fit_sharded(tmp_path / name, unused_port, **settings, **more)[0]["model"]

    looked, blind = run("looked", LooksOnly), run("blind", NoChoice)
    assert all(torch.equal(one, other) for one, other in zip(looked, blind, strict=True))


def test_parallel_parts_of_a_layer_are_refused(tmp_path, unused_port):
    with pytest.raises(AssertionError):
        fit_sharded(tmp_path / "two", unused_port, parallel=(1, 2), net=Sharded)
    told = [path.read_text() for path in (tmp_path / "two").glob("*/*.txt")]
    assert len(told) == 2
    assert all("set data_parallel_size of ModelParallelStrategy" in text for text in told)


@pytest.mark.parametrize("kind", [FSDPStrategy, DeepSpeedStrategy])
def test_parameters_that_are_dealt_out_otherwise_are_refused(kind):
    run = SimpleNamespace(strategy=kind.__new__(kind), world_size=2)
    assert "leaves no layer" in trainer_bridge.unfit_processes(run)
