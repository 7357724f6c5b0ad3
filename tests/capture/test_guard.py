import copy
import random
from collections import Counter, OrderedDict, defaultdict, deque

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import Accuracy, ConfusionMatrix, F1Score, MeanMetric, MetricCollection
from torchmetrics.classification import BinaryAUROC

from lightning_dvc.capture import guard
from lightning_dvc.capture.guard import preserve_random_state, undisturbed, unheard, unmoved


class Disturber(LightningModule):
    """A training step that changes everything that it can reach."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5))
        self.head = nn.Linear(8, 3)
        self.register_buffer("queue", torch.zeros(3))
        self.register_buffer("hidden", torch.ones(3))
        self.register_buffer("nothing", None)
        self.register_buffer("momentum", torch.zeros(3), persistent=False)
        self.register_buffer("graph", torch.eye(3).to_sparse())
        self.accuracy = Accuracy("multiclass", num_classes=3)
        self.mean = MeanMetric()
        self.curve = BinaryAUROC(thresholds=None)
        self.collection = MetricCollection(
            [F1Score("multiclass", num_classes=3), ConfusionMatrix("multiclass", num_classes=3)]
        )
        self.steps, self.average, self.best = 0, 0.5, None
        self.kept, self.by_name, self.seen = [torch.ones(2)], {"a": [1]}, {1}
        self.recent, self.counts = deque([1, 2], maxlen=2), Counter(a=2)
        self.grouped = defaultdict(list, {"x": [0]})
        self.ordered = OrderedDict(b=1, a=2)
        self.running = torch.zeros(2)
        self.rebound = torch.zeros(2)

    def training_step(self, batch, batch_idx=0):
        x, y = batch
        self.accuracy(self.head(self.body(x)), y)
        self.queue += 1
        self.hidden.data.mul_(2)
        self.momentum = torch.ones(5)
        self.nothing = torch.ones(1)
        self.graph.mul_(2)
        self.register_buffer("late", torch.ones(1))
        self.steps, self.best, self.fresh = self.steps + 1, 0.1, "new"
        vars(self).pop("average", None)
        self.kept.append(x)
        self.kept[0] = None
        self.by_name["a"].append(2)
        self.by_name["b"] = self.by_name
        self.seen.add(2)
        self.recent.append(3)
        self.counts["a"] += 1
        self.grouped["y"].append(1)
        self.ordered.move_to_end("b")
        self.running += 1
        self.rebound = self.rebound + 1
        self.body.calls = 1
        noise = torch.randn(1) * np.random.rand() * random.random()  # noqa: NPY002 - the stream guarded
        z = self.head(self.body(x))
        self.mean(z.mean())
        self.curve.update(z[:, 0].sigmoid().detach(), (y == 0).long())
        self.collection(z, y)
        self.log("loss", noise)
        self.log_dict({"loss": noise})
        return F.cross_entropy(z, y)


def tensors_equal(left, right):
    return torch.equal(left.to_dense(), right.to_dense())


def same(left, right):
    """Deep equality of what a module keeps, tensors by value and containers by type and order."""
    if isinstance(left, torch.Tensor):
        return isinstance(right, torch.Tensor) and tensors_equal(left, right)
    if type(left) is not type(right):
        return False
    if isinstance(left, dict):
        return list(left) == list(right) and all(same(left[k], right[k]) for k in left)
    if isinstance(left, list | tuple | deque):
        return len(left) == len(right) and all(map(same, left, right))
    if isinstance(left, int | float | str | set | None):
        return left == right
    return True


def everything(module):
    """What each part of a module keeps, without copying."""
    return {
        name: {key: value for key, value in vars(part).items() if not callable(value)}
        for name, part in module.named_modules()
    }


def random_state():
    numpy_state = np.random.get_state()  # noqa: NPY002 - the stream guarded
    return [torch.get_rng_state(), numpy_state[1].tolist(), numpy_state[2], random.getstate()]


def make_batch(n=6):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, 4, generator=generator)
    return x, torch.randint(3, (n,), generator=generator)


def identities(module):
    return {
        (name, key): id(value)
        for name, values in everything(module).items()
        for key, value in values.items()
        if isinstance(value, torch.Tensor | list | dict | set | deque)
    }


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("used_before", [False, True])
def test_nothing_is_left_behind(fails, used_before):
    module = Disturber()
    if used_before:  # metric states are filled, collections grouped, caches set
        with undisturbed(module):
            module.training_step(make_batch())
        module.collection(module.head(torch.randn(5, 8)), torch.tensor([0, 1, 2, 0, 1]))
        module.accuracy.update(torch.eye(3), torch.tensor([0, 1, 1]))
        module.curve.update(torch.rand(4), torch.tensor([0, 1, 1, 0]))
    module.head.weight.grad = torch.ones(3, 8)
    before, identity, stream = copy.deepcopy(everything(module)), identities(module), random_state()
    try:
        with undisturbed(module):
            module.training_step(make_batch())
            module.training_step(make_batch())
            assert not same(before, everything(module))
            if fails:
                raise KeyError("from inside")
    except KeyError:
        assert fails
    after = everything(module)
    for name, values in before.items():
        assert values.keys() == after[name].keys(), name
        for key, value in values.items():
            assert same(value, after[name][key]), (name, key)
    assert identities(module) == identity
    assert same(stream, random_state())
    assert torch.equal(module.head.weight.grad, torch.ones(3, 8))
    assert module.body[0].weight.grad is None
    assert "log" not in vars(module)
    assert "log_dict" not in vars(module)


def test_metrics_compute_the_same_afterwards():
    module = Disturber()
    z, y = torch.eye(3), torch.tensor([0, 1, 1])
    module.accuracy.update(z, y)
    module.collection.update(z, y)
    with undisturbed(module):
        module.training_step(make_batch())
    assert module.accuracy.update_count == 1
    assert module.accuracy.compute() == pytest.approx(2 / 3)
    assert module.collection.compute()["MulticlassConfusionMatrix"].sum() == 3


def test_flags_are_restored_one_by_one():
    module = Disturber()
    module.body[1].eval()
    flags = [part.training for part in module.modules()]
    with undisturbed(module):
        assert not any(part.training for part in module.modules())
        torch.testing.assert_close(*(module.body(make_batch()[0]) for _ in range(2)))
    assert [part.training for part in module.modules()] == flags
    assert len(set(flags)) == 2


def test_gradients_are_enabled_inside_and_as_before_outside():
    module = Disturber()
    with torch.no_grad():
        with undisturbed(module):
            assert module.training_step(make_batch()).requires_grad
        assert not torch.is_grad_enabled()


def test_nested_modules_and_own_stand_ins_for_log():
    module = Disturber()
    module.child = Disturber()
    kept = []
    module.__dict__["log"] = lambda *args: kept.append(args)
    own = module.log
    with undisturbed(module):
        module.child.training_step(make_batch())
        module.log("loss", 1)
    assert module.log is own
    assert kept == []
    assert "log" not in vars(module.child)


def test_guards_can_be_nested():
    module = Disturber()
    with undisturbed(module):
        with undisturbed(module):
            module.training_step(make_batch())
        module.log("still", 0.0)
        assert module.steps == 0
        assert not module.training
    assert module.training


def test_containers_that_refuse_writing_are_left_alone():
    class Constant(dict):
        def clear(self):
            raise TypeError("constant")

    module = Disturber()
    module.settings = Constant(a=1)
    with undisturbed(module):
        pass
    assert module.settings == {"a": 1}


def test_containers_may_contain_themselves():
    module = Disturber()
    ring = [1]
    ring.append(ring)
    module.ring = ring
    with undisturbed(module):
        module.ring.clear()
    assert module.ring is ring
    assert ring[0] == 1
    assert ring[1] is ring


def test_large_metric_states_are_copied():
    module = nn.Sequential(ConfusionMatrix("multiclass", num_classes=1100))
    with undisturbed(module):
        module[0].confmat += 1
    assert module[0].confmat.numel() > 2**20
    assert module[0].confmat.sum() == 0


def test_large_tensors_kept_as_attributes_are_not_copied(monkeypatch):
    module = Disturber()
    module.data_set = torch.zeros(2**20 + 1)
    own = module.data_set
    copied = []
    clone = torch.Tensor.clone
    monkeypatch.setattr(
        torch.Tensor, "clone", lambda self: copied.append(self.numel()) or clone(self)
    )
    with undisturbed(module):
        module.data_set = None
    assert module.data_set is own
    assert copied
    assert max(copied) < 2**20


def test_tensors_made_in_inference_mode_are_kept():
    module = Disturber()
    with torch.inference_mode():
        module.queue, module.running = torch.ones(3), torch.ones(2)
        module.graph = torch.eye(3).to_sparse()
    before = identities(module)
    with undisturbed(module), torch.inference_mode():
        module.queue += 1
        module.running += 1
        module.graph.mul_(2)
    assert identities(module) == before
    assert module.queue.tolist() == [1, 1, 1]
    assert module.running.tolist() == [1, 1]
    assert torch.equal(module.graph.to_dense(), torch.eye(3))


class Scripted(nn.Module):
    """Its forward pass changes one buffer in place, and puts another in the place of a second."""

    def __init__(self):
        super().__init__()
        self.register_buffer("count", torch.zeros(1))
        self.register_buffer("last", torch.zeros(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.count += 1
        self.last = x.detach()
        return x


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # still in use
def test_torchscript_is_left_as_it_was():
    module = nn.Sequential(torch.jit.script(Scripted()), torch.jit.script(nn.BatchNorm1d(2)))
    with undisturbed(module):
        module(torch.ones(3, 2))
        assert not module[1].training
    assert module[0].count.tolist() == [0]
    assert module[0].last.tolist() == [0, 0]
    assert module[1].training
    module(torch.ones(3, 2))
    assert module[0].count.tolist() == [1]
    assert module[1].num_batches_tracked == 1


def test_parameters_that_moved_are_put_back_and_named():
    module = Disturber()
    tied = module.tied = nn.Linear(4, 8)
    tied.weight = module.body[0].weight
    before = copy.deepcopy(module.state_dict())
    kept = {name: p.data_ptr() for name, p in module.named_parameters()}
    try:
        with unmoved(module) as moved:
            tied.weight.data.add_(1)
            module.head.bias.data = torch.ones(3)
            with torch.no_grad():
                module.body[1].weight.mul_(2)
            raise KeyError
    except KeyError:
        pass
    assert moved == {"body.0.weight", "head.bias", "body.1.weight"}
    assert all(tensors_equal(x, before[name]) for name, x in module.state_dict().items())
    assert {name: p.data_ptr() for name, p in module.named_parameters()} == kept


def test_only_the_named_parameters_are_put_back():
    module = Disturber()
    with unmoved(module, {"head.bias"}) as moved:
        module.head.bias.data.fill_(7)
        module.head.weight.data.fill_(7)
    assert moved == {"head.bias"}
    assert not (module.head.bias == 7).any()
    assert (module.head.weight == 7).all()


def test_of_a_large_model_only_named_parameters_are_copied(monkeypatch):
    module = Disturber()
    n_numbers = sum(parameter.numel() for parameter in module.parameters())
    for largest, expected in ((n_numbers, {"head.bias"}), (n_numbers - 1, set())):
        monkeypatch.setattr(guard, "_LARGEST_MODEL", largest)
        with unmoved(module) as moved:
            module.head.bias.data.add_(7)
        assert moved == expected
    with unmoved(module, {"head.bias"}) as moved:
        module.head.bias.data.add_(7)
    assert moved == {"head.bias"}


def test_parameters_without_values_are_left_alone():
    module = nn.Sequential(nn.LazyLinear(2), nn.Linear(2, 2, device="meta"))
    module.append(nn.LazyBatchNorm1d())
    with undisturbed(module), unmoved(module) as moved:
        pass
    assert moved == set()


@given(
    draws=st.lists(
        st.sampled_from(["torch", "numpy", "random", "seed torch", "seed numpy"]), max_size=6
    ),
    fails=st.booleans(),
)
def test_random_streams_go_on_as_if_nothing_had_been_drawn(draws, fails):
    moves = {
        "torch": lambda: torch.rand(3),
        "numpy": lambda: np.random.standard_normal(),  # noqa: NPY002 - the stream guarded
        "random": lambda: random.gauss(0, 1),
        "seed torch": lambda: torch.manual_seed(5),
        "seed numpy": lambda: np.random.seed(5),  # noqa: NPY002 - the stream guarded
    }
    before = random_state()
    try:
        with preserve_random_state():
            for draw in draws:
                moves[draw]()
            if fails:
                raise KeyError
    except KeyError:
        assert fails
    assert same(before, random_state())


class Peeking(Disturber):
    """Runs its own step on other data before each batch, guarded or not at all."""

    def __init__(self, peek):
        super().__init__()
        self.peek, self.losses = peek, []

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1, momentum=0.9)

    def training_step(self, batch, batch_idx=0):
        z = self.head(self.body(batch[0]))
        self.accuracy(z, batch[1])
        loss = F.cross_entropy(z, batch[1])
        self.log("loss", loss, on_epoch=True)
        self.log("accuracy", self.accuracy, on_epoch=True)
        self.losses.append(loss.item())
        return loss

    def on_train_batch_start(self, batch, batch_idx):
        if self.peek:
            with undisturbed(self):
                loss = Disturber.training_step(self, make_batch(11))
                torch.autograd.grad(loss, self.head.weight)


def quiet_trainer(**settings):
    return Trainer(
        accelerator="cpu",
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )


@pytest.mark.filterwarnings("ignore")  # Lightning's advice on workers and logging intervals
def test_training_is_bit_identical_with_and_without_looking(tmp_path):
    x, y = make_batch(24)
    found = []
    for peek in (False, True):
        module = Peeking(peek)
        torch.manual_seed(3)
        trainer = quiet_trainer(max_epochs=2, logger=False, default_root_dir=tmp_path)
        trainer.fit(module, DataLoader(TensorDataset(x, y), batch_size=6, shuffle=True))
        logged = {key: value.item() for key, value in trainer.callback_metrics.items()}
        found.append((module.losses, logged, module.body[1].running_mean.tolist()))
    assert len(found[0][0]) == 8
    assert found[0] == found[1]


class Shouting(Peeking):
    """Tells its logger of each step, in both ways, and asks for its kind, folder and more."""

    def training_step(self, batch, batch_idx=0):
        assert isinstance(self.logger, CSVLogger)
        assert self.logger.log_dir == self.logger.experiment.log_dir == self.trainer.log_dir
        assert self.logger.scale() == self.logger.experiment.scale() == 2
        for logger in self.loggers:
            logger.log_metrics({"direct": 1.0}, step=self.told)
            logger.experiment.log_metrics({"experiment": 1.0}, step=self.told)
        self.told += 1
        return super().training_step(batch, batch_idx)

    def on_train_batch_start(self, batch, batch_idx):
        with unheard(self.trainer), undisturbed(self):
            self.training_step(make_batch(11))


@pytest.mark.filterwarnings("ignore")  # Lightning's advice on workers and logging intervals
def test_loggers_are_told_nothing(tmp_path):
    module, logger = Shouting(peek=False), CSVLogger(tmp_path)
    module.told = 0
    trainer = quiet_trainer(max_epochs=1, logger=logger)
    taken = []
    logger.scale = logger.experiment.scale = lambda: 2
    logger.log_metrics = lambda metrics, step=None: taken.append((step, next(iter(metrics))))
    logger.experiment.log_metrics = lambda metrics, step=None: taken.append(
        (step, next(iter(metrics)))
    )
    trainer.fit(module, DataLoader(TensorDataset(*make_batch(24)), batch_size=6))
    told = [(step, name) for step, name in taken if name in ("direct", "experiment")]
    assert told == [(step, name) for step in range(4) for name in ("direct", "experiment")]
    assert trainer.loggers == [logger]


class Tracker:
    """An experiment that is written to in ways of its own."""

    def __init__(self):
        self.taken = []

    def track(self, value):
        self.taken.append(value)

    def __setitem__(self, key, value):
        self.taken.append(value)

    def __getitem__(self, key):
        return key


def test_what_writes_in_a_way_of_its_own_is_told_nothing(tmp_path):
    logger, tracker = CSVLogger(tmp_path), Tracker()
    logger._experiment = tracker
    trainer = quiet_trainer(logger=logger)
    with unheard(trainer):
        experiment = trainer.logger.experiment
        experiment.track(1)
        experiment["key"] = 2
        assert experiment["key"] == "key"
        assert isinstance(experiment, Tracker)
    assert tracker.taken == []
    assert trainer.logger.experiment is tracker
