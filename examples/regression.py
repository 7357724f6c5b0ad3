"""A regression: the diabetes data of scikit-learn, a third of whose targets come from a bad source.

Run ``python -m examples.regression``. There are no classes here, so relevance and gradient impact
compare a sample's gradient with the mean over all held-out samples, and uncertainty is the spread
of the last hidden layer.
"""

from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, seed_everything
from sklearn.datasets import load_diabetes
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset, TensorDataset

from examples.compare import quiet, quiet_trainer
from lightning_dvc import DVCCallback, DVCDataModule

N_TEST, N_VAL, BUDGET, STEPS = 100, 60, 100, 600


class Regressor(LightningModule):
    """A multilayer perceptron with one output, trained on the squared error."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(10, 64), nn.ReLU(), nn.Linear(64, 1))

    def loss(self, batch: Any) -> Tensor:
        """Mean squared error of a batch."""
        x, y = batch
        return F.mse_loss(self.net(x).squeeze(1), y)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Mean squared error."""
        return self.loss(batch)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Log the validation error."""
        self.log("val_mse", self.loss(batch))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Log the test error."""
        self.log("test_mse", self.loss(batch))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam, with some decay, for the data set is small."""
        return torch.optim.AdamW(self.parameters(), lr=3e-3, weight_decay=0.1)


def load(seed: int) -> tuple[dict[str, TensorDataset], TensorDataset, TensorDataset]:
    """Three sources of 94 patients each, validation and test set, all standardised."""
    data = load_diabetes()
    x = torch.tensor(data.data, dtype=torch.float32)
    y = torch.tensor(data.target, dtype=torch.float32)
    x, y = (x - x.mean(0)) / x.std(0), (y - y.mean()) / y.std()
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(y), generator=generator)
    test, val, rest = order[:N_TEST], order[N_TEST : N_TEST + N_VAL], order[N_TEST + N_VAL :]
    one, two, three = rest[: 94 * 3].reshape(3, 94)
    shuffled = y[three][torch.randperm(94, generator=generator)]
    sources = {
        "clinic": TensorDataset(x[one], y[one]),
        "noisy_lab": TensorDataset(x[two], y[two] + torch.randn(94, generator=generator)),
        "mixed_up": TensorDataset(x[three], shuffled),
    }
    return sources, TensorDataset(x[val], y[val]), TensorDataset(x[test], y[test])


def test_error(data: DVCDataModule | Dataset[Any], test: TensorDataset, seed: int) -> float:
    """Mean squared error on the test set after training from scratch."""
    seed_everything(seed, verbose=False)
    model, run = Regressor(), quiet_trainer(max_steps=STEPS)
    loader = data if isinstance(data, DVCDataModule) else DataLoader(data, 16, shuffle=True)
    run.fit(model, loader)
    (found,) = run.test(model, DataLoader(test, batch_size=100), verbose=False)
    return float(found["test_mse"])


def main() -> None:
    """Print the test error of a random selection, of DVC's, and of the good source alone."""
    quiet()
    rows, shares = [], []
    for seed in range(5):
        sources, val, test = load(seed)
        datamodule = DVCDataModule(sources, val, budget=BUDGET, batch_size=16, seed=seed)
        seed_everything(seed, verbose=False)
        callback = DVCCallback(monitor="val_mse", mode="min")
        quiet_trainer(max_epochs=40, callbacks=[callback]).fit(Regressor(), datamodule)
        shares.append(datamodule.selection.shares(sources))
        again = DVCDataModule.from_selection(
            datamodule.selection, sources, batch_size=16, seed=seed
        )
        generator = torch.Generator().manual_seed(seed)
        anything = torch.randperm(94 * 3, generator=generator)[:BUDGET].tolist()
        pool: Dataset[Any] = ConcatDataset(list(sources.values()))
        rows.append(
            (
                test_error(Subset(pool, anything), test, seed),
                test_error(again, test, seed),
                test_error(sources["clinic"], test, seed),
            )
        )
    names = ("random selection", "DVC", "the good source")
    print(f"{BUDGET} of {94 * 3} samples; mean squared error on the test set, 5 seeds (1 = mean):")
    for name, errors in zip(names, zip(*rows, strict=True), strict=True):
        print(f"  {name:18s} {sum(errors) / len(errors):.3f}")
    print("share of the budget:")
    for name in shares[0]:
        print(f"  {name:18s} {sum(share[name] for share in shares) / len(shares):.1%}")


if __name__ == "__main__":
    main()
