"""How to weigh the six metrics: fixed, or learnt from validation scores (5.1)."""

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any, Final, Protocol

import torch
from torch import Tensor
from torch.quasirandom import SobolEngine

from lightning_dvc.errors import ConfigurationError, StateError
from lightning_dvc.randomness import stream
from lightning_dvc.records import METRICS

_LOGGER = logging.getLogger(__name__)

DEFAULT_WEIGHTS: Final = {"quality": 0.3, "relevance": 1.0, "diversity": 0.1, "uncertainty": 1.0}
"""Weights that measured best on six data sets: ``python -m examples.ablation``."""

_SIMPLEX_TOLERANCE: Final = 1e-6
_RAW_STARTS: Final = 256
"""Points at which the acquisition is evaluated to find good starts for its optimiser."""


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
        weights: Six numbers in the order of ``METRICS``, or a mapping from metric to number, 0 for
            a metric that is not in it; at least 0, and scaled to the sum 1. None: equal weights.

    Raises:
        ConfigurationError: If weights are negative, not finite, all zero, of the wrong number, or
            of unknown metrics.

    Example:
        >>> FixedWeights({"relevance": 3, "quality": 1}).ask(progress=0.5).tolist()
        [0.25, 0.75, 0.0, 0.0, 0.0, 0.0]
    """

    learns_from_score = False

    def __init__(self, weights: Mapping[str, float] | Sequence[float] | None = None) -> None:
        self._weights = _normalised(weights)
        self.measures = frozenset(
            name for name, weight in zip(METRICS, self._weights.tolist(), strict=True) if weight > 0
        )

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


class BayesianWeights:
    """Weights by Bayesian optimisation of the validation score (5.1).

    The first answer is equal weights, the next ones are spread evenly over the simplex
    (Sobol), and once ``initial`` scores are known, each maximises the expected improvement under a
    Gaussian process of (weights, progress); see
    :func:`lightning_dvc.policy.surrogate.propose`. Where that is not possible (all scores are
    equal, or the fit fails), the answer is another Sobol point.

    Answers depend on the seed, the number of asks and the observations only, so that a resumed run
    gets the answers of the uninterrupted one.

    Args:
        seed: Of all draws, at least 0.
        initial: Observations before the model is used, at least 2.
        max_observations: How many observations to keep, at least ``initial``: the most recent,
            since they are the closest in progress to what is asked next. An answer takes time that
            grows with their number; about a second at 64.

    Raises:
        ConfigurationError: If an argument is out of its range.

    Example:
        >>> policy = BayesianWeights(seed=1)
        >>> equal = policy.ask(progress=0.0)
        >>> [round(weight, 4) for weight in equal.tolist()]
        [0.1667, 0.1667, 0.1667, 0.1667, 0.1667, 0.1667]
        >>> policy.tell(equal, progress=0.0, score=0.7)
        >>> round(policy.ask(progress=0.1).sum().item(), 9)
        1.0
    """

    learns_from_score = True
    measures = frozenset(METRICS)

    def __init__(self, seed: int = 0, initial: int = 6, max_observations: int = 64) -> None:
        if not (seed >= 0 and 2 <= initial <= max_observations):
            raise ConfigurationError(
                "expected seed >= 0 and 2 <= initial <= max_observations, but got "
                f"seed={seed}, initial={initial} and max_observations={max_observations}; change "
                "the one that is out of range"
            )
        self.seed = seed
        self.initial = initial
        self.max_observations = max_observations
        self._asks = 0
        # Plain numbers, because a tensor made during validation may be an inference tensor, which
        # cannot be trained on. One row: six weights, progress, score.
        self._observations: list[list[float]] = []

    def ask(self, progress: float) -> Tensor:
        """Weights to use next; see :meth:`WeightPolicy.ask`.

        Raises:
            ConfigurationError: If progress is outside ``[0, 1]``.
        """
        _check_progress(progress)
        number = self._asks
        self._asks += 1
        proposal = self._proposal(number, progress)
        if proposal is not None:
            return proposal
        if number == 0:
            # From the measured default, on the border of the simplex, planted weights were found
            # less well: late asks 39% rather than 26% as far off as random ones (40 asks, 8 seeds).
            return _normalised(None)
        return _spread(self.seed, "weights", number, 1)[0]

    def tell(self, weights: Tensor, progress: float, score: float) -> None:
        """Remember the score that followed; see :meth:`WeightPolicy.tell`.

        A score that is not finite is not remembered: it tells that training diverged, not how
        much worse these weights are, and one such number would spoil the model of all others.

        Raises:
            ConfigurationError: If the weights are not on the simplex or progress is outside
                ``[0, 1]``.
        """
        _check_progress(progress)
        numbers = [float(weight) for weight in weights.flatten()]
        fits = len(numbers) == len(METRICS) and all(w >= 0 for w in numbers)
        if not fits or abs(sum(numbers) - 1) > _SIMPLEX_TOLERANCE:
            raise ConfigurationError(
                f"expected {len(METRICS)} weights, at least 0, with the sum 1, but got {numbers}; "
                "pass the weights that ask returned"
            )
        if math.isfinite(score):
            self._observations.append([*numbers, float(progress), float(score)])
            del self._observations[: -self.max_observations]

    def state_dict(self) -> dict[str, Any]:
        """Number of asks, and observations: six weights, progress and score each.

        Example:
            >>> BayesianWeights().state_dict()
            {'asks': 0, 'observations': []}
        """
        return {"asks": self._asks, "observations": [list(row) for row in self._observations]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state, of this run or of an earlier one.

        Args:
            state: From :meth:`state_dict`.

        Raises:
            StateError: If an observation does not have six weights, progress and score.

        Example:
            >>> BayesianWeights().load_state_dict({"asks": 3, "observations": []})
        """
        width = len(METRICS) + 2
        if any(len(row) != width for row in state["observations"]):
            raise StateError(
                f"expected observations of {width} numbers (weights, progress, score), but got "
                f"{state['observations']}; load the state of a BayesianWeights of this version"
            )
        self._asks = state["asks"]
        self._observations = [list(row) for row in state["observations"]][-self.max_observations :]

    def _proposal(self, number: int, progress: float) -> Tensor | None:
        """The answer of the model, or None where there is no model."""
        if len(self._observations) < self.initial:
            return None
        # Imported late: BoTorch takes seconds to import, and only this policy needs it.
        from lightning_dvc.policy.surrogate import FitError, propose

        # Callbacks run under no_grad or inference_mode, where nothing could be fitted.
        with torch.inference_mode(False), torch.enable_grad():
            observed = torch.tensor(self._observations, dtype=torch.float64)
            weights, past, scores = observed[:, :-2], observed[:, -2:-1], observed[:, -1:]
            starts = _spread(self.seed, f"starts {number}", 0, _RAW_STARTS)
            word = int(stream(self.seed, "fit", number).integers(2**62))
            try:
                return propose(weights, past, scores, progress, starts, word)
            except FitError as error:
                _LOGGER.info("Weights are drawn from the simplex this time: %s", error)
                return None


def _normalised(weights: Mapping[str, float] | Sequence[float] | None) -> Tensor:
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


def _check_progress(progress: float) -> None:
    if not 0 <= progress <= 1:
        raise ConfigurationError(
            f"progress must be in [0, 1], but is {progress}; pass the share of training done"
        )


def _spread(seed: int, purpose: str, skip: int, n: int) -> Tensor:
    """Points ``(n, 6)`` of a scrambled Sobol sequence, uniform on the simplex.

    The gaps between sorted uniform numbers are uniform on the simplex.
    """
    word = int(stream(seed, purpose).integers(2**62))
    engine = SobolEngine(len(METRICS) - 1, scramble=True, seed=word)
    engine.fast_forward(skip)
    cuts = engine.draw(n, dtype=torch.float64).sort(dim=1).values
    edges = torch.zeros(n, 1, dtype=torch.float64)
    return torch.cat([edges, cuts, edges + 1], dim=1).diff(dim=1)
