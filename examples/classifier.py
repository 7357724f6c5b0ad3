"""A plain LightningModule, as anybody would write it: nothing in it knows about selection."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy


class Classifier(LightningModule):
    """A multilayer perceptron.

    Args:
        widths: Width of the input, of the hidden layers and of the output.
        learning_rate: Of Adam.
    """

    def __init__(self, widths: Sequence[int], learning_rate: float = 1e-3) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for d_in, d_out in pairwise(widths):
            layers += [nn.Linear(d_in, d_out), nn.ReLU()]
        self.net = nn.Sequential(*layers[:-1])
        self.learning_rate = learning_rate
        self.accuracy = MulticlassAccuracy(widths[-1], average="micro")

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(n, C)`` of features ``(n, d)``."""
        logits: Tensor = self.net(x)
        return logits

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Cross-entropy of a batch."""
        x, y = batch
        return F.cross_entropy(self(x), y)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Log the validation accuracy."""
        x, y = batch
        self.accuracy(self(x), y)
        self.log("val_acc", self.accuracy)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Log the test accuracy."""
        x, y = batch
        self.accuracy(self(x), y)
        self.log("test_acc", self.accuracy)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam."""
        return torch.optim.Adam(self.parameters(), lr=self.learning_rate)
