"""The existing project of ``examples/existing_before.py``, selecting its training data.

Run ``python -m examples.existing_after``. Two lines of ``main`` differ, and the last is new; the
datamodule and the module are imported as they were.
"""

from lightning.pytorch import Trainer, seed_everything

from examples.classifier import Classifier
from examples.existing_before import Hospitals
from lightning_dvc import DVCCallback, DVCDataModule


def main() -> None:
    """Train on half of the data, selected, and test."""
    seed_everything(0, verbose=False)
    datamodule = DVCDataModule.wrap(Hospitals(), sources="hospital", budget=0.5)  # wrapped
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=40,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        callbacks=[DVCCallback()],  # new
    )
    model = Classifier([30, 32, 2])
    trainer.fit(model, datamodule)
    trainer.test(model, datamodule)
    print("share of the selection:", datamodule.selection.shares())


if __name__ == "__main__":
    main()
