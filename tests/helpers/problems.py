"""Small problems with known answers, and the plainest module that can learn them."""

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.utils.data import Dataset, TensorDataset

WIDTH, CLASSES = 8, 3
ACCELERATOR = "cpu"
"""Where the small runs train; ``pytest --accelerator gpu`` sets it."""


class Net(LightningModule):
    """A multilayer perceptron that notes on how many samples each epoch trained it."""

    def __init__(self, d_out=CLASSES, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.body = nn.Linear(WIDTH, 16)
        self.head = nn.Linear(16, d_out)
        self.seen = {}

    def forward(self, x):
        return self.head(self.body(x).relu())

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.seen.setdefault(self.current_epoch, []).append(len(batch[0]))

    def validation_step(self, batch, batch_idx):
        self.log("val_acc", (self(batch[0]).argmax(1) == batch[1]).float().mean())

    test_step = validation_step

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-2)


def generator(seed):
    return torch.Generator().manual_seed(seed)


def labelled(n, seed):
    """Classes told apart by a random direction each; about 97% can be learnt."""
    centres = 2.5 * torch.randn(CLASSES, WIDTH, generator=generator(12345))
    y = torch.randint(CLASSES, (n,), generator=generator(seed))
    return centres[y] + torch.randn(n, WIDTH, generator=generator(seed + 1)), y


def good(n=200, seed=0):
    return TensorDataset(*labelled(n, seed))


def wrong(n=200, seed=10):
    """Every label is wrong."""
    x, y = labelled(n, seed)
    return TensorDataset(x, (y + 1) % CLASSES)


def repeated(n=200, seed=20, distinct=4):
    """The same few samples over and over."""
    x, y = labelled(distinct, seed)
    index = torch.arange(n) % distinct
    return TensorDataset(x[index], y[index])


class Faulty(Dataset):
    """Good samples, some of which cannot be used.

    Args:
        faults: Index to ``"raises"``, ``"nan"`` (a feature) or ``"inf"``.
    """

    def __init__(self, faults, n=40, seed=30):
        self.x, self.y = labelled(n, seed)
        self.faults = faults

    def __len__(self):
        return len(self.y)

    def __getitem__(self, index):
        fault = self.faults.get(int(index))
        if fault == "raises":
            raise OSError(f"page {index} is torn")
        x = self.x[index]
        return (x * float(fault) if fault else x), self.y[index]


def trainer(**settings):
    return Trainer(
        **{
            "accelerator": ACCELERATOR,
            "devices": 1,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "max_epochs": 4,
            "log_every_n_steps": 1,
            **settings,
        }
    )


class Planted(Dataset):
    """Good samples, made from plain settings as in a configuration file."""

    def __init__(self, n: int = 100, seed: int = 0):
        self.x, self.y = labelled(n, seed)

    def __len__(self):
        return len(self.y)

    def __getitem__(self, index):
        return self.x[index], self.y[index]
