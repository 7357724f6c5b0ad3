import pytest
import torch
import torch.nn.functional as F
from helpers.files import n_open_files
from helpers.problems import CLASSES, WIDTH, Net, labelled
from torch import nn
from torch.utils.data import Dataset, default_collate

from lightning_dvc.capture.guard import undisturbed
from lightning_dvc.capture.objective import resolve_objective
from lightning_dvc.capture.probe import Probe
from lightning_dvc.capture.trial import try_out

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


def tried(net, dataset, num_workers=0):
    probe = Probe(net, resolve_objective(net), default_collate, num_workers=num_workers)
    with undisturbed(net):
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
