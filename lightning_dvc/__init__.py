"""Select, while a model trains, which samples of several unequal sources are worth training on."""

from lightning_dvc.callback import DVCCallback
from lightning_dvc.datamodule import DVCDataModule
from lightning_dvc.policy.bayesian import BayesianWeights
from lightning_dvc.policy.weights import FixedWeights
from lightning_dvc.pools import Source
from lightning_dvc.selection import Selection
from lightning_dvc.splitting import split_by
from lightning_dvc.strategies.core_set import CoreSet
from lightning_dvc.strategies.data_efficient import DataEfficient
from lightning_dvc.strategies.data_shapley import DataShapley
from lightning_dvc.strategies.dvc import DVC
from lightning_dvc.strategies.gradient_matching import GradientMatching
from lightning_dvc.strategies.influence import Influence
from lightning_dvc.strategies.meta_learning import MetaLearning
from lightning_dvc.strategies.random import Random
from lightning_dvc.strategies.uncertainty import Uncertainty
from lightning_dvc.version import __version__

__all__ = [
    "DVC",
    "BayesianWeights",
    "CoreSet",
    "DVCCallback",
    "DVCDataModule",
    "DataEfficient",
    "DataShapley",
    "FixedWeights",
    "GradientMatching",
    "Influence",
    "MetaLearning",
    "Random",
    "Selection",
    "Source",
    "Uncertainty",
    "__version__",
    "split_by",
]
