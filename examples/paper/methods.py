"""The methods of the paper's Table 1, and how each is run.

All select in rounds while the model trains, as DVC does, but for Data Shapley: a model is trained
on a random warm-up for as many steps as the others' run takes, and then everything is selected in
one round. That, and how many candidates a round looks at, is for each method what did best on
held-out training rows (see docs/tried.md).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from lightning_dvc import (
    DVC,
    CoreSet,
    DataEfficient,
    DataShapley,
    FixedWeights,
    GradientMatching,
    Influence,
    MetaLearning,
    Random,
    Uncertainty,
)
from lightning_dvc.records import METRICS
from lightning_dvc.strategies.base import Strategy

EVERYTHING = 1e6
"""Candidates for each sample to add, so many that all free ones are candidates."""


@dataclass(frozen=True)
class Method:
    """A way of selecting.

    Attributes:
        strategy: Makes the strategy.
        datamodule: Arguments of ``DVCDataModule``.
        trained_first: Whether it selects once, after training on the warm-up.
    """

    strategy: Callable[[], Strategy]
    datamodule: Mapping[str, Any] = field(default_factory=dict)
    trained_first: bool = False


def _once(strategy: Callable[[], Strategy], warmup: float) -> Method:
    settings = {"warmup": warmup, "rounds": 1, "oversample": EVERYTHING}
    return Method(strategy, settings, trained_first=True)


METHODS: dict[str, Method] = {
    "random": Method(Random),
    "uncertainty": Method(Uncertainty),
    "core_set": Method(CoreSet),
    "gradient_matching": Method(GradientMatching),
    "data_shapley": _once(DataShapley, 0.1),
    "influence": Method(Influence),
    "meta_learning": Method(MetaLearning),
    "data_efficient": Method(DataEfficient),
    "dvc": Method(DVC),
}

REFERENCES = ("validation", "clean", "full", "full_long")
"""Trained from scratch on the validation set; on truly clean samples; on the whole pool; and on the
whole pool for four times as many steps, since it takes longer to be learnt."""

WITHOUT_BUDGET = ("validation", "full", "full_long")
"""References that are the same whatever the budget; they are run with a budget of 1."""


def _weighing(*names: str) -> Method:
    weights = {name: float(name in names) for name in METRICS}
    return Method(lambda: DVC(FixedWeights(weights)))


PARTS: dict[str, Method] = {
    "defaults": METHODS["dvc"],
    "all_six": _weighing(*METRICS),
    **{f"no_{left}": _weighing(*(name for name in METRICS if name != left)) for left in METRICS},
    "layer_only": _weighing("quality", "relevance", "diversity"),
    "global_only": _weighing("gradient_impact", "uncertainty", "stability"),
    "minimal": _weighing("quality", "relevance"),
}
"""The rows of the paper's Table 2, of equal weights as there, and the library's defaults."""
