"""The baselines, and a mark that runs a test on each."""

import pytest

from lightning_dvc import (
    CoreSet,
    DataEfficient,
    DataShapley,
    GradientMatching,
    Influence,
    MetaLearning,
    Uncertainty,
)

BASELINES = [
    Uncertainty,
    CoreSet,
    GradientMatching,
    DataShapley,
    Influence,
    MetaLearning,
    DataEfficient,
]
every = pytest.mark.parametrize("baseline", BASELINES, ids=lambda kind: kind.__name__)
