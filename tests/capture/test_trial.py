import pytest
import torch
import torch.nn.functional as F
from helpers.files import n_open_files
from helpers.problems import CLASSES, WIDTH, Net, good, labelled
from torch import nn
from torch.utils.data import Dataset, default_collate

from lightning_dvc.capture.guard import undisturbed
from lightning_dvc.capture.objective import resolve_objective
from lightning_dvc.capture.probe import Probe
from lightning_dvc.capture.snapshots import Snapshots
from lightning_dvc.capture.trial import Trial, try_out

SIZE = 32
workers = pytest.mark.parametrize("num_workers", [0, 2])
pytestmark = pytest.mark.filterwarnings(
    "ignore:This DataLoader will create:UserWarning", "ignore:.*fork:DeprecationWarning"
)


class Augmented(Dataset):
    """Each sample is another each time; some have a label that no model takes."""

    def __init__(self, bad):
        self.x, self.y = labelled(SIZE, seed=0)
        self.y[bad] = 99

    def __getitem__(self, index):
        return self.x[index] + torch.randn(WIDTH), self.y[index]


class Dealing(Net):
    """Its first layer gets halves of samples, dealt out to the wrong ones."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(WIDTH // 2, 16), nn.Linear(16, CLASSES)

    def forward(self, x):
        halves = x.unflatten(1, (2, -1)).transpose(0, 1)
        hidden = self.body(halves.reshape(len(x), 2, -1)).reshape(2, len(x), -1)
        return self.head(hidden.relu().mean(0))


class Noisy(Net):
    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]) + torch.randn(len(batch[0]), CLASSES), batch[1])


def tried(net, dataset, num_workers=0, collate=default_collate):
    return tried_by(Probe(net, resolve_objective(net), collate, num_workers=num_workers), dataset)


def tried_by(probe, dataset):
    with undisturbed(probe.module):
        found = try_out(probe, dataset, torch.arange(SIZE))
    assert probe.bad == []
    return found


@workers
@pytest.mark.parametrize("bad", [[], [5], list(range(9))])
def test_layers_are_told_by_the_same_samples_though_others_come_each_time(bad, num_workers):
    found = tried(Dealing(), Augmented(bad), num_workers)
    assert (found.mixed, found.random) == (["body"], [])
    found = tried(Net(), Augmented(bad), num_workers)
    assert (found.mixed, found.random) == ([], [])
    assert tried(Noisy(), Augmented(bad), num_workers).random == ["body", "head"]


class Wide(Dataset):
    """Samples of many tensors."""

    def __getitem__(self, index):
        return {"row": [torch.full((WIDTH,), index + n / 20) for n in range(20)], "y": index % 3}


class OfWide(Net):
    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(sum(batch["row"])), batch["y"])


@workers
def test_samples_of_many_tensors_keep_no_file_open(monkeypatch, num_workers):
    """A process may often have 1024, and waits for ever for a worker that wants more."""
    most, look, before = [], Probe.look, n_open_files()

    def counting(self, *args, **settings):
        most.append(n_open_files())
        return look(self, *args, **settings)

    monkeypatch.setattr(Probe, "look", counting)
    found = tried(OfWide(), Wide(), num_workers)
    assert (found.mixed, found.random) == ([], [])
    assert max(most) < before + 60


# --- losses dealt out to the wrong samples -----------------------------------------------------


class Views(Net):
    """Sees each sample twice; what a loss gets has the views first, or the samples."""

    def __init__(self, samples_first):
        super().__init__()
        self.samples_first = samples_first

    def training_step(self, batch, batch_idx):
        x, y = batch
        views = torch.stack([self(x), self(1.05 * x)], dim=int(self.samples_first))
        labels = torch.stack([y, y], dim=int(self.samples_first))
        return F.cross_entropy(views.flatten(0, 1), labels.flatten())


class OnePass(Net):
    """Passes both views at once, so that activations are dealt out wrongly, too."""

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self(torch.cat([x, 1.05 * x])), torch.cat([y, y]))


class Steps(Net):
    """A label at each point in time, time first."""

    def training_step(self, batch, batch_idx):
        x, y = batch
        outputs = torch.stack([self(x + step) for step in range(3)])
        return F.cross_entropy(outputs.flatten(0, 1), y.repeat(3))


def test_losses_that_keep_samples_apart_are_not_suspected():
    assert tried(Views(samples_first=True), Augmented([])) == Trial()


@pytest.mark.parametrize("net", [Views(samples_first=False), OnePass(), Steps()])
def test_losses_dealt_out_to_the_wrong_samples_are_found(net):
    found = tried(net, Augmented([]))
    assert found.mixes_losses
    assert not found.sorts
    assert found.mixed == (["body", "head"] if isinstance(net, OnePass) else [])


class Rounded(Net):
    """Losses are alike but for what rounding makes of places."""

    def __init__(self):
        super().__init__()
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def training_step(self, batch, batch_idx):
        x, y = batch
        by_place = 1e-3 * torch.linspace(0, 1, len(x))[:, None]
        return F.cross_entropy(self(x) + by_place * F.one_hot(y, CLASSES), y)


class HardestHalf(Net):
    """Learns from the samples of the greatest losses, which tie at first."""

    def __init__(self):
        super().__init__()
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def training_step(self, batch, batch_idx):
        losses = F.cross_entropy(self(batch[0]), batch[1], reduction="none")
        return losses.topk(len(losses) // 2).values.mean()


@pytest.mark.parametrize("net", [Rounded(), HardestHalf()])
def test_losses_that_are_nearly_alike_are_not_suspected(net):
    assert tried(net, Augmented([])) == Trial()


def test_losses_alike_before_any_training_are_not_suspected():
    net = Net()
    nn.init.zeros_(net.head.weight)
    nn.init.zeros_(net.head.bias)
    assert tried(net, Augmented([])) == Trial()


# --- what collate functions do -----------------------------------------------------------------


def sorting(samples):
    """Ties keep their order, so that not even the same samples always make the same batch."""
    return default_collate(sorted(samples, key=lambda sample: sample[1]))


def test_a_collate_function_that_sorts_is_found():
    found = tried(Net(), Augmented([]), collate=sorting)
    assert (found.mixes_losses, found.sorts) == (True, True)


def mixing_up(samples):
    x, y = default_collate(samples)
    y = F.one_hot(y, CLASSES).float()
    order = torch.randperm(len(x))
    return 0.7 * x + 0.3 * x[order], 0.7 * y + 0.3 * y[order]


def blurring(samples):
    x, y = default_collate(samples)
    return x + torch.randn_like(x), y


@pytest.mark.parametrize("collate", [mixing_up, blurring])
def test_a_random_collate_function_is_not_taken_for_mixing(collate):
    found = tried(Net(), Augmented([]), collate=collate)
    assert (found.mixed, found.random, found.mixes_losses) == ([], ["body", "head"], False)


def without_none(samples):
    return default_collate([sample for sample in samples if sample is not None])


class Gaps(Augmented):
    """Some samples are missing."""

    def __getitem__(self, index):
        return None if index in (0, 5, 6, 20) else super().__getitem__(index)


def test_a_collate_function_that_leaves_samples_out_is_not_taken_for_mixing():
    assert tried(Net(), Gaps([]), collate=without_none) == Trial()


class Fussy(Net):
    """Compares the samples of a batch with each other, and raises for one of them."""

    def training_step(self, batch, batch_idx):
        x, y = batch
        if bool((y == 99).any()):
            raise ValueError("no such class")
        share = torch.bincount(y, minlength=CLASSES)[y] / len(y)
        losses = F.cross_entropy(self(x), y, reduction="none")
        return (losses / share).mean()


@pytest.mark.parametrize("bad", [[], [5], [3, 20, 31]])
@pytest.mark.parametrize("fits", [None, 8])
def test_mates_that_change_are_not_taken_for_places(bad, fits):
    net = Fussy()
    probe = Probe(net, resolve_objective(net), default_collate, fits=fits)
    assert tried_by(probe, Augmented(bad)) == Trial()


@pytest.mark.parametrize("noise", [0.07, 0.1, 0.15])
def test_a_little_chance_is_not_taken_for_places(noise):
    class Blurred(Net):
        def training_step(self, batch, batch_idx):
            x, y = batch
            return F.cross_entropy(self(x + noise * torch.randn_like(x)), y)

    for seed in range(12):
        found = tried(Blurred(seed=seed), good(SIZE, seed))
        assert (found.mixed, found.mixes_losses) == ([], False)


# --- what steps do -----------------------------------------------------------------------------


class Counting(Net):
    """Weighs classes by how often it has seen them."""

    def __init__(self):
        super().__init__()
        self.register_buffer("seen_classes", torch.ones(CLASSES))

    def training_step(self, batch, batch_idx):
        x, y = batch
        self.seen_classes += torch.bincount(y, minlength=CLASSES)
        return F.cross_entropy(self(x), y, weight=10 / self.seen_classes, reduction="sum")


class InPlace(Net):
    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self(x.sub_(1).div_(2)), y)


class Popping(Net):
    def training_step(self, batch, batch_idx):
        y = batch.pop("y")
        return F.cross_entropy(self(batch["x"]), y)


@pytest.mark.parametrize("net", [Counting(), InPlace()])
def test_what_a_step_changes_is_not_taken_for_chance(net):
    assert tried(net, Augmented([])) == Trial()


def test_a_step_may_take_parts_out_of_its_batch():
    def named(samples):
        return dict(zip("xy", default_collate(samples), strict=True))

    assert tried(Popping(), Augmented([]), collate=named) == Trial()


class Adversarial(Net):
    """Trains on samples moved where the loss grows."""

    def training_step(self, batch, batch_idx):
        x, y = batch
        x = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(F.cross_entropy(self(x), y), x)
        return F.cross_entropy(self(x.detach() + 0.1 * slope.sign()), y)


@pytest.mark.parametrize("on_bad_sample", ["set_aside", "raise"])
@pytest.mark.parametrize(("net", "takes"), [(Adversarial(), True), (Net(), False)])
def test_a_step_that_takes_gradients_is_given_a_graph(net, takes, on_bad_sample):
    probe = Probe(net, resolve_objective(net), default_collate, on_bad_sample=on_bad_sample)
    dataset = good(SIZE)
    assert tried_by(probe, dataset) == Trial()
    assert probe.takes_gradients is takes
    snapshots = Snapshots(window=1)
    snapshots.push(net)
    with undisturbed(net):
        ids = torch.arange(SIZE)
        found = probe.capture_all(dataset, ids)
        (again,) = probe.capture(dataset, ids, snapshots)
    torch.testing.assert_close(found.losses, again.losses[:, :1])
    torch.testing.assert_close(again.losses[:, 0], again.losses[:, 1])
    assert not found.confidence.requires_grad
