"""An existing project, as it was: a datamodule over data from three hospitals, and a training run.

Run ``python -m examples.existing_before``. Its successor, ``examples/existing_after.py``, selects.
"""

import torch
from lightning.pytorch import LightningDataModule, Trainer, seed_everything
from lightning.pytorch.utilities.types import EVAL_DATALOADERS, TRAIN_DATALOADERS
from sklearn.datasets import load_breast_cancer
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from examples.classifier import Classifier

N_TEST, N_VAL = 150, 100
HOSPITALS = ("north", "south", "archive")


class Records(TensorDataset):
    """Measurements and diagnoses, and which hospital each came from."""

    def __init__(self, x: Tensor, y: Tensor, hospital: list[str]) -> None:
        super().__init__(x, y)
        self.hospital = hospital


class Hospitals(LightningDataModule):
    """Breast cancer data of three hospitals; the archive got most of its diagnoses wrong."""

    def setup(self, stage: str) -> None:
        """Standardise and split the data."""
        data = load_breast_cancer()
        x = torch.tensor(data.data, dtype=torch.float32)
        y = torch.tensor(data.target)
        order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
        x, y = ((x - x.mean(0)) / x.std(0))[order], y[order]
        self.test = TensorDataset(x[:N_TEST], y[:N_TEST])
        self.val = TensorDataset(x[N_TEST:][:N_VAL], y[N_TEST:][:N_VAL])
        x, y = x[N_TEST + N_VAL :], y[N_TEST + N_VAL :]
        hospital = [HOSPITALS[i % 3] for i in range(len(y))]
        self.train = Records(x, self._as_recorded(y), hospital)

    def _as_recorded(self, y: Tensor) -> Tensor:
        archived = torch.arange(len(y)) % 3 == 2
        wrong = torch.rand(len(y), generator=torch.Generator().manual_seed(1)) < 0.6
        return torch.where(archived & wrong, 1 - y, y)

    def train_dataloader(self) -> TRAIN_DATALOADERS:
        """Shuffled batches of 16."""
        return DataLoader(self.train, batch_size=16, shuffle=True)

    def val_dataloader(self) -> EVAL_DATALOADERS:
        """The validation set."""
        return DataLoader(self.val, batch_size=100)

    def test_dataloader(self) -> EVAL_DATALOADERS:
        """The test set."""
        return DataLoader(self.test, batch_size=150)


def main() -> None:
    """Train on everything and test."""
    seed_everything(0, verbose=False)
    datamodule = Hospitals()
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=40,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    model = Classifier([30, 32, 2])
    trainer.fit(model, datamodule)
    trainer.test(model, datamodule)


if __name__ == "__main__":
    main()
