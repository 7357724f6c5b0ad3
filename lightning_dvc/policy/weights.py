"""How to weigh the six metrics: what a policy is, and the fixed one."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final, Protocol

import torch
from torch import Tensor

from lightning_dvc.errors import ConfigurationError
from lightning_dvc.records import METRICS

DEFAULT_WEIGHTS: Final = {"quality": 0.3, "relevance": 0.7, "diversity": 0.1, "uncertainty": 1.0}
"""No others measured better on more than a part of the data sets (docs/results.md)."""


class WeightPolicy(Protocol):
    """What weighs the metrics of a round, and learns from the validation scores that follow.

    Attributes:
        learns_from_score: Whether it needs the validation score.
        measures: The metrics that can have a weight above 0; the others need not be measured.

    Example:
        >>> policy: WeightPolicy = FixedWeights()
        >>> policy.tell(policy.ask(progress=0.0), progress=0.0, score=0.7)
    """

    learns_from_score: bool
    measures: frozenset[str]

    @property
    def figures(self) -> dict[str, float]:
        """What to log each round: name to number."""
        ...

    def ask(self, progress: float) -> Tensor:
        """Weights to use next.

        Args:
            progress: Share of the training that is done, in ``[0, 1]``.

        Returns:
            ``(6,)`` float64 on the CPU, in the order of ``METRICS``, at least 0, with the sum 1.
        """
        ...

    def tell(self, weights: Tensor, progress: float, score: float) -> None:
        """Learn which validation score followed.

        Args:
            weights: ``(6,)`` weights that were in use.
            progress: Share of the training that was done, in ``[0, 1]``.
            score: The validation score, the greater the better.
        """
        ...

    def state_dict(self) -> dict[str, Any]:
        """What was learnt, as plain Python values."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state."""
        ...


class FixedWeights:
    """The same weights in every round.

    Args:
        weights: Numbers of at least 0, scaled to the sum 1: a mapping from ``"quality"``,
            ``"relevance"``, ``"diversity"``, ``"gradient_impact"``, ``"uncertainty"`` and
            ``"stability"``, 0 for what is not in it, or all six in this order. None: equal ones.

    Raises:
        ConfigurationError: If weights are negative, not finite, all zero, of the wrong number, or
            of unknown metrics.

    Example:
        >>> FixedWeights({"relevance": 3, "quality": 1}).ask(progress=0.5).tolist()
        [0.25, 0.75, 0.0, 0.0, 0.0, 0.0]
    """

    learns_from_score = False

    def __init__(self, weights: Mapping[str, float] | Sequence[float] | None = None) -> None:
        self._weights = normalised(weights)
        self.measures = frozenset(
            name for name, weight in zip(METRICS, self._weights.tolist(), strict=True) if weight > 0
        )

    @property
    def figures(self) -> dict[str, float]:
        """Nothing to log."""
        return {}

    def ask(self, progress: float) -> Tensor:
        """The fixed weights; see :meth:`WeightPolicy.ask`."""
        return self._weights.clone()

    def tell(self, weights: Tensor, progress: float, score: float) -> None:
        """Nothing is learnt."""

    def state_dict(self) -> dict[str, Any]:
        """Nothing: the weights are a setting."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Nothing to load."""


def trusted(weights: Tensor, held_out: float) -> Tensor:
    """Let what is measured against the reference count as much as that is to be trusted.

    That is relevance and gradient impact. Measured for relevance alone, without any held-out
    samples (10% of MNIST, Fashion-MNIST and Adult, one seed): between random and clean-only
    selection 47%, 64% and 110% of the way with relevance, and 91%, 88% and 124% without; with 50
    held-out samples, which are half of the reference, half of the weight makes no difference.

    Args:
        weights: ``(6,)`` on the simplex, in the order of ``METRICS``.
        held_out: Share of held-out samples in the reference, in ``[0, 1]``.

    Returns:
        ``(6,)`` on the simplex; the weights as they are if nothing else has one.

    Example:
        >>> trusted(torch.tensor([0.0, 0.5, 0.0, 0.0, 0.5, 0.0]), held_out=0.0).tolist()
        [0.0, 0.0, 0.0, 0.0, 1.0, 0.0]
    """
    scaled = weights.clone()
    for metric in ("relevance", "gradient_impact"):
        scaled[METRICS.index(metric)] *= held_out
    total = scaled.sum()
    return scaled / total if total > 0 else weights


def normalised(weights: Mapping[str, float] | Sequence[float] | None) -> Tensor:
    """Weights on the simplex; see :class:`FixedWeights`."""
    if weights is None:
        weights = [1.0] * len(METRICS)
    if isinstance(weights, Mapping):
        unknown = sorted(set(weights) - set(METRICS))
        if unknown:
            raise ConfigurationError(
                f"expected weights of metrics among {METRICS}, but got {unknown}; rename or remove"
            )
        weights = [weights.get(metric, 0.0) for metric in METRICS]
    numbers = [float(weight) for weight in weights]
    fits = len(numbers) == len(METRICS) and all(0 <= w < math.inf for w in numbers)
    if not fits or not 0 < sum(numbers) < math.inf:
        raise ConfigurationError(
            f"expected {len(METRICS)} finite weights, at least 0 and not all 0, in the order "
            f"{METRICS}, but got {numbers}; pass as many numbers, or a mapping by metric"
        )
    tensor = torch.tensor(numbers, dtype=torch.float64)
    return tensor / tensor.sum()
