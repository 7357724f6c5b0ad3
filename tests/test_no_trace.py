"""With the callback but without selection, training is what it would be without the callback."""

import copy
import random
from collections import deque

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.problems import WIDTH, Net, good, repeated, trainer, wrong
from lightning.pytorch.callbacks import Callback
from torch import nn
from torch.utils.data import Dataset

from lightning_dvc import DVC, DVCCallback, DVCDataModule, Random

pytestmark = [
    pytest.mark.filterwarnings("ignore:The run ended with:UserWarning"),
    # Python 3.12 warns about fork in a process with threads, which torch always has.
    pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning"),
]


class Dropping(Net):
    """Dropout and BatchNorm, the usual victims, and noise of the other two random streams."""

    def __init__(self):
        super().__init__()
        self.norm, self.drop = nn.BatchNorm1d(16), nn.Dropout(0.3)

    def forward(self, x):
        if self.training:
            x = x + random.random() * np.random.random()  # noqa: NPY002 - the stream guarded
        return self.head(self.drop(self.norm(self.body(x)).relu()))

    def validation_step(self, batch, batch_idx):
        self.log("val_acc", (self(batch[0]).argmax(1) == batch[1]).float().mean())


class Steps(Callback):
    """Notes everything after every step: the loss, the state of the model, the random streams."""

    def __init__(self):
        self.noted = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.noted.append(
            {
                "batch": batch[0].clone(),
                "loss": outputs["loss"].detach().clone(),
                **{name: value.clone() for name, value in pl_module.state_dict().items()},
                **streams(),
            }
        )


def streams():
    own = np.random.get_state()  # noqa: NPY002 - the stream guarded
    on_gpu = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return {
        **{f"gpu {number}": state for number, state in enumerate(on_gpu)},
        "torch": torch.get_rng_state(),
        "numpy": torch.from_numpy(own[1].astype(np.int64)),
        "numpy position": torch.tensor(own[2]),
        "random": torch.tensor([word % 2**31 for word in random.getstate()[1]]),
    }


class Augmented(Dataset):
    """Samples that come out otherwise each time, by all three streams."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        x, y = self.dataset[index]
        shift = random.random() + np.random.random()  # noqa: NPY002 - the stream guarded
        return x + shift + torch.randn(WIDTH), y


class AddsNothing(Random):
    """A strategy that draws, and adds nothing."""

    def choose(self, this):
        choice = super().choose(this)
        return type(choice).unscored(choice.add[:0])


class LooksOnly(DVC):
    """The default strategy, whose choice is thrown away."""

    def choose(self, this):
        choice = super().choose(this)
        return type(choice).unscored(choice.add[:0])


def sources(augmented=False):
    plain = {"good": good(60), "wrong": wrong(40), "repeated": repeated(40)}
    return {name: Augmented(data) if augmented else data for name, data in plain.items()}


def fit(datamodule, callback, make=Dropping):
    torch.manual_seed(7)
    random.seed(7)
    np.random.seed(7)  # noqa: NPY002 - the stream guarded
    steps, net = Steps(), make()
    callbacks = [steps, *([callback] if callback else [])]
    trainer(callbacks=callbacks, max_epochs=4).fit(net, datamodule)
    steps.noted.append({**net.state_dict(), **streams()})
    return steps.noted


def assert_same(left, right):
    assert len(left) == len(right)
    for number, (one, other) in enumerate(zip(left, right, strict=True)):
        assert one.keys() == other.keys()
        different = [name for name in one if not torch.equal(one[name], other[name])]
        assert different == [], f"after step {number}"


def compare(strategy, adopted=False, warmup=0.5, augmented=False, net=Dropping, **settings):
    """Train with the callback, and without it on the very same samples."""
    given, val = sources(augmented), good(40, seed=50)
    settings = {"batch_size": 8, **settings}
    datamodule = DVCDataModule(given, val, budget=90, warmup=warmup, rounds=3, **settings)
    datamodule.setup("fit")  # draws the warm-up
    alone = DVCDataModule.from_selection(datamodule.selection, given, val, **settings)
    if adopted:
        datamodule = DVCDataModule.from_selection(datamodule.selection, given, val, **settings)
    callback = DVCCallback(strategy, monitor="val_acc")
    watched = fit(datamodule, callback, net)
    assert_same(watched, fit(alone, None, net))
    assert len(watched) > 4
    return callback


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("augmented", [False, True])
@pytest.mark.parametrize("adopted", [False, True])
def test_a_full_or_adopted_selection_leaves_no_trace(adopted, augmented, num_workers):
    callback = compare(
        DVC(), adopted=adopted, warmup=1.0, augmented=augmented, num_workers=num_workers
    )
    assert callback.rounds_done == 0


@pytest.mark.parametrize(
    ("strategy", "num_workers"), [(AddsNothing, 0), (LooksOnly, 0), (LooksOnly, 2)]
)
def test_looking_without_adding_leaves_no_trace(strategy, num_workers):
    callback = compare(strategy(), num_workers=num_workers)
    assert callback.rounds_done == 3


class SpectralNorm(Dropping):
    """Changes a weight whenever that is read in training mode."""

    def __init__(self):
        super().__init__()
        nn.utils.parametrizations.spectral_norm(self.head)


class Momentum(Dropping):
    """Moves parameters in its step: a slow copy of a layer, and weights that are kept to norm 1."""

    def __init__(self):
        super().__init__()
        self.slow = copy.deepcopy(self.body).requires_grad_(False)

    def training_step(self, batch, batch_idx):
        with torch.no_grad():
            self.slow.weight.data.mul_(0.9).add_(self.body.weight, alpha=0.1)
            self.slow.bias.data = self.slow.bias * 0.9 + self.body.bias * 0.1
            self.head.weight.copy_(F.normalize(self.head.weight, dim=1))
        distance = F.mse_loss(self.body(batch[0]), self.slow(batch[0]))
        return super().training_step(batch, batch_idx) + 0.1 * distance


class Scheduled(Dropping):
    """Schedules its learning rate itself, after a warm-up by hand."""

    def training_step(self, batch, batch_idx):
        if self.trainer.global_step < 3:
            self.optimizers().param_groups[0]["lr"] *= 1.1
        else:
            self.lr_schedulers().step()
        return super().training_step(batch, batch_idx)

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        # By the number of its steps, which is not put back with the learning rate.
        return [optimizer], [torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)]


class Meter:
    def __init__(self):
        self.sum, self.count, self.recent = 0.0, 0, deque(maxlen=3)

    def update(self, value):
        self.sum, self.count = self.sum + value, self.count + 1
        self.recent.append(value)


class Counting(Dropping):
    """Its loss depends on counts and means that its step keeps, in all ways but in buffers."""

    def __init__(self):
        super().__init__()
        self.array, self.by_name = np.ones(3), {"array": np.ones(3), "tensor": torch.ones(3)}
        self.meter = Meter()

    def training_step(self, batch, batch_idx):
        counts = torch.bincount(batch[1], minlength=3)
        for array in (self.array, self.by_name["array"]):
            array += counts.cpu().numpy()
        self.by_name["tensor"] += counts.cpu()
        self.meter.update(batch[0].mean().item())
        scale = self.array + self.by_name["array"] + self.by_name["tensor"].numpy()
        scale = float(scale @ [1, 2, 3]) + self.meter.sum / self.meter.count
        return super().training_step(batch, batch_idx) * (1 + 1 / scale + sum(self.meter.recent))


class OwnStreams(Dropping):
    """Its loss depends on random streams of its own."""

    def __init__(self):
        super().__init__()
        self.streams = [torch.Generator().manual_seed(0), np.random.default_rng(0)]
        self.others = [np.random.RandomState(0), random.Random(0)]

    def training_step(self, batch, batch_idx):
        scale = float(torch.rand(1, generator=self.streams[0]))
        scale += sum(stream.random() for stream in (self.streams[1], self.others[1]))
        scale += self.others[0].random_sample()
        return super().training_step(batch, batch_idx) * (1 + scale / 100)


@pytest.mark.filterwarnings("ignore:The gradients of a sample:UserWarning")  # are others each time
@pytest.mark.parametrize("net", [SpectralNorm, Momentum, Scheduled, Counting, OwnStreams])
def test_what_a_step_changes_leaves_no_trace(net):
    assert compare(LooksOnly(), net=net).rounds_done == 3


def test_looking_at_augmented_samples_leaves_no_trace():
    # In this process: workers go on with random streams of their own, which is not prevented.
    assert compare(LooksOnly(), augmented=True).rounds_done == 3


def test_what_is_selected_of_augmented_samples_does_not_depend_on_the_streams():
    def selected(seed):
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002 - the stream that must not matter
        torch.manual_seed(seed)
        module = DVCDataModule(sources(augmented=True), budget=60, rounds=1, seed=3)
        # Without a step of training, which does depend on them.
        run = trainer(callbacks=[DVCCallback(DVC())], max_epochs=1, limit_train_batches=1)
        run.fit(Net(), module)
        return module.selected_ids.tolist()

    assert selected(1) == selected(2)
