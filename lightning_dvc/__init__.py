"""Select, while a model trains, which samples of several unequal sources are worth training on."""

from lightning_dvc.callback import DVCCallback
from lightning_dvc.datamodule import DVCDataModule
from lightning_dvc.policy.weights import BayesianWeights, FixedWeights
from lightning_dvc.pools import Source
from lightning_dvc.selection import Selection
from lightning_dvc.splitting import split_by
from lightning_dvc.strategies.dvc import DVC
from lightning_dvc.strategies.random import Random
from lightning_dvc.version import __version__

__all__ = [
    "DVC",
    "BayesianWeights",
    "DVCCallback",
    "DVCDataModule",
    "FixedWeights",
    "Random",
    "Selection",
    "Source",
    "__version__",
    "split_by",
]
