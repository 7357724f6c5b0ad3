"""How to weigh the six metrics: fixed, or learnt from validation scores (5.1)."""

import json
import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, Protocol

import torch
from torch import Tensor
from torch.quasirandom import SobolEngine

from lightning_dvc.errors import ConfigurationError, StateError, check_settings
from lightning_dvc.randomness import stream
from lightning_dvc.records import METRICS

_LOGGER = logging.getLogger(__name__)

DEFAULT_WEIGHTS: Final = {
    "quality": 0.3,
    "relevance": 0.7,
    "diversity": 0.1,
    "gradient_impact": 0.3,
    "uncertainty": 1.0,
}
"""No others measured better by more than chance (docs/results.md)."""

_COLUMNS: Final = (*METRICS, "progress", "score")
"""The numbers of an observation."""

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


class BayesianWeights:
    """Weights by Bayesian optimisation of the validation score (5.1).

    The first answer is equal weights, the next ones are spread evenly over the simplex
    (Sobol), and once ``initial`` scores are known, each maximises the expected improvement under a
    Gaussian process of (weights, progress); see
    :func:`lightning_dvc.policy.surrogate.propose`. Where that is not possible (all scores are
    equal, or the fit fails), the answer is another Sobol point.

    What other runs observed can be used too, from the first answer on: see :meth:`save` and
    ``warm_start``. The level of the scores may differ between runs.

    Without a time limit, answers depend on the seed, the number of asks and the observations only,
    so that a resumed run gets the answers of the uninterrupted one. With a limit they depend on
    the clock as well: they can differ between repetitions, and between processes that each ask a
    policy of their own.

    Args:
        seed: Of all draws, at least 0.
        initial: Observations, of all runs, before the model is used, at least 2.
        max_observations: How many observations to keep, at least ``initial``. Those of this run
            are kept the longest, and of each run the most recent, since they are the closest in
            progress to what is asked next. An answer takes time that grows with their number;
            below a second at 64.
        max_share: Share of the wall time since the first ask that may be spent in the model, in
            ``(0, 1]``; None for no limit. Where another update as long as the last one would
            exceed it, the last answer of the model is given again (a repetition tells about
            noise), or what would be given without a model if there is none. The first update,
            whose cost is not known, is always made, and waited for afterwards. The import of
            BoTorch counts as time spent.
        warm_start: File of :meth:`save` of an earlier run.

    Raises:
        ConfigurationError: If an argument is out of its range.
        StateError: If ``warm_start`` is not a file of :meth:`save` of this version.

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

    def __init__(
        self,
        seed: int = 0,
        initial: int = 6,
        max_observations: int = 64,
        *,
        max_share: float | None = 0.1,
        warm_start: str | Path | None = None,
    ) -> None:
        fits = max_share is None or 0 < max_share <= 1
        check_settings(
            ("seed", seed, seed >= 0, "at least 0"),
            ("initial", initial, initial >= 2, "at least 2"),
            ("max_observations", max_observations, max_observations >= initial, "initial or more"),
            ("max_share", max_share, fits, "in (0, 1], or None"),
        )
        self.seed = seed
        self.initial = initial
        self.max_observations = max_observations
        self._asks = 0
        self._clock = _Clock(max_share)
        self._answer: list[float] | None = None  # the last one of the model
        # Plain numbers, because a tensor made during validation may be an inference tensor, which
        # cannot be trained on. One row as in _COLUMNS; this run is the last.
        self._runs: list[list[list[float]]] = [[]]
        if warm_start is not None:
            self._runs = [*_read(Path(warm_start)), []]
        self._drop()

    @property
    def figures(self) -> dict[str, float]:
        """Seconds spent in the model, updates left out to save time, and observations, so far."""
        return {
            "optimiser_seconds": self._clock.spent,
            "optimiser_left_out": float(self._clock.left_out),
            "optimiser_observations": float(sum(map(len, self._runs))),
        }

    def ask(self, progress: float) -> Tensor:
        """Weights to use next; see :meth:`WeightPolicy.ask`.

        Raises:
            ConfigurationError: If progress is outside ``[0, 1]``.
        """
        _check_progress(progress)
        self._clock.start()
        number = self._asks
        self._asks += 1
        # Callbacks run under no_grad or inference_mode, where nothing could be fitted.
        with torch.inference_mode(False), torch.enable_grad():
            proposal = self._proposal(number, progress)
            if proposal is not None:
                return proposal
            # From the measured default, on the border of the simplex, planted weights were found
            # less well: late asks 39% rather than 26% as far off as random ones (40 asks, 8 seeds).
            return _spread(self.seed, "weights", number, 1)[0] if number else _normalised(None)

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
        if not _on_simplex(numbers):
            raise ConfigurationError(
                f"expected {len(METRICS)} weights, at least 0, with the sum 1, but got {numbers}; "
                "pass the weights that ask returned"
            )
        if math.isfinite(score):
            self._runs[-1].append([*numbers, float(progress), float(score)])
            self._drop()

    def save(self, path: str | Path) -> None:
        """Write the observations of this run, and of those it started from, to a JSON file.

        Args:
            path: To pass as ``warm_start`` to another run; an existing file is replaced.

        Example:
            >>> import tempfile
            >>> policy = BayesianWeights()
            >>> policy.tell(policy.ask(progress=0.0), progress=0.0, score=0.7)
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     policy.save(f"{folder}/observations.json")
            ...     warm = BayesianWeights(warm_start=f"{folder}/observations.json")
            >>> warm.figures["optimiser_observations"]
            1.0
        """
        runs = [",\n".join(map(json.dumps, run)) for run in self._runs if run]
        listed = ",\n".join(f"[\n{rows}\n]" for rows in runs)
        text = f'{{"columns": {json.dumps(_COLUMNS)},\n"runs": [{listed}]}}\n'
        Path(path).write_text(text, encoding="utf-8")

    def state_dict(self) -> dict[str, Any]:
        """Everything that was learnt: observations of this run and of earlier ones, and times.

        Example:
            >>> BayesianWeights().state_dict()["observations"]
            []
        """
        *earlier, present = [[list(row) for row in run] for run in self._runs]
        return {
            "asks": self._asks,
            "observations": present,
            "earlier": earlier,
            "answer": self._answer,
            "clock": self._clock.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state; what ``warm_start`` held is replaced by it.

        Args:
            state: From :meth:`state_dict`.

        Raises:
            StateError: If a part is missing or an observation does not fit.

        Example:
            >>> BayesianWeights().load_state_dict(BayesianWeights(seed=1).state_dict())
        """
        missing = sorted(self.state_dict().keys() - state.keys())
        if missing:
            raise StateError(
                f"expected a state with {missing} too, but got {sorted(state)}; load the state of "
                "a BayesianWeights of this version"
            )
        self._runs = _checked([*state["earlier"], state["observations"]], "the state")
        self._drop()
        self._asks = state["asks"]
        self._answer = state["answer"]
        self._clock.load_state_dict(state["clock"])

    def _drop(self) -> None:
        """Drop what is too much: of the oldest run first, and there the oldest first."""
        surplus = max(sum(map(len, self._runs)) - self.max_observations, 0)
        for run in self._runs:
            n = min(surplus, len(run))
            del run[:n]
            surplus -= n
        self._runs = [*filter(None, self._runs[:-1]), self._runs[-1]]

    def _proposal(self, number: int, progress: float) -> Tensor | None:
        """The answer of the model, or None where there is no model."""
        if sum(map(len, self._runs)) < self.initial:
            return None
        if self._clock.allows_another():
            with self._clock.running():
                proposal = self._ask_model(number, progress)
            if proposal is not None:
                self._answer = proposal.tolist()
            return proposal
        _LOGGER.info("No new weights this time: the model would take more than its share of time")
        return None if self._answer is None else torch.tensor(self._answer, dtype=torch.float64)

    def _ask_model(self, number: int, progress: float) -> Tensor | None:
        # Imported late: only this policy needs BoTorch.
        from lightning_dvc.policy.surrogate import FitError, propose

        age = range(len(self._runs) - 1, -1, -1)
        rows = [[*row, ago] for ago, run in zip(age, self._runs, strict=True) for row in run]
        observed = torch.tensor(rows, dtype=torch.float64)
        weights, past, scores, ago = observed.split([len(METRICS), 1, 1, 1], dim=1)
        starts = _spread(self.seed, f"starts {number}", 0, _RAW_STARTS)
        word = int(stream(self.seed, "fit", number).integers(2**62))
        try:
            return propose(weights, past, scores, ago, progress, starts, word)
        except FitError as error:
            _LOGGER.info("Weights are drawn from the simplex this time: %s", error)
            return None


class _Clock:
    """Seconds spent in the model, held to a share of the wall time since the start.

    Attributes:
        spent: Seconds spent so far.
        left_out: How many times another update was not allowed.
    """

    def __init__(self, max_share: float | None) -> None:
        self.max_share = max_share
        self.spent = 0.0
        self.left_out = 0
        self._last = 0.0  # seconds of the last update; not known before the first
        self._earlier = 0.0  # wall time of earlier processes
        self._since: float | None = None

    def start(self) -> None:
        if self._since is None:
            self._since = time.perf_counter()

    def allows_another(self) -> bool:
        if self.max_share is None or self.spent + self._last <= self.max_share * self._elapsed():
            return True
        self.left_out += 1
        return False

    @contextmanager
    def running(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._last = time.perf_counter() - start
        self.spent += self._last

    def state_dict(self) -> dict[str, Any]:
        return {
            "spent": self.spent,
            "left_out": self.left_out,
            "last": self._last,
            "elapsed": self._elapsed(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.spent = state["spent"]
        self.left_out = state["left_out"]
        self._last = state["last"]
        self._earlier = state["elapsed"]
        # Runs on from here, so that the time between saving and loading does not count.
        self._since = time.perf_counter() if self._earlier > 0 else None

    def _elapsed(self) -> float:
        running = 0.0 if self._since is None else time.perf_counter() - self._since
        return self._earlier + running


def trusted(weights: Tensor, held_out: float) -> Tensor:
    """Let what is measured against the reference count as much as that is to be trusted.

    That is relevance and gradient impact.

    Measured without any held-out samples (10% of MNIST, Fashion-MNIST and Adult, one seed): between
    random and clean-only selection 47%, 64% and 110% of the way with relevance, and 91%, 88% and
    124% without; with 50 held-out samples, which are half of the reference, half of the weight
    makes no difference.

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


def _on_simplex(numbers: Sequence[float]) -> bool:
    fits = len(numbers) == len(METRICS) and all(w >= 0 for w in numbers)
    return fits and abs(sum(numbers) - 1) <= _SIMPLEX_TOLERANCE


def _checked(runs: list[list[list[float]]], origin: str) -> list[list[list[float]]]:
    """A copy of runs of observations, refused where one is none."""
    for row in (row for run in runs for row in run):
        fits = len(row) == len(_COLUMNS) and math.isfinite(row[-1])
        if not fits or not _on_simplex(row[:-2]) or not 0 <= row[-2] <= 1:
            raise StateError(
                f"expected observations of {len(_COLUMNS)} numbers (weights on the simplex, "
                f"progress in [0, 1], finite score), but {origin} holds {row}; load what a "
                "BayesianWeights of this version saved"
            )
    return [[list(row) for row in run] for run in runs]


def _read(path: Path) -> list[list[list[float]]]:
    """The runs in a file of :meth:`BayesianWeights.save`."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StateError(
            f"expected a file of BayesianWeights.save, but {path} cannot be read ({error}); pass "
            "another warm_start"
        ) from error
    columns = content.get("columns") if isinstance(content, dict) else None
    if columns != list(_COLUMNS) or not isinstance(content.get("runs"), list):
        raise StateError(
            f"expected observations with the columns {list(_COLUMNS)}, but {path} has {columns}; "
            "pass as warm_start a file that BayesianWeights.save of this version wrote"
        )
    return _checked(content["runs"], str(path))


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
