"""Weights of the metrics learnt from validation scores, by Bayesian optimisation (5.1)."""

import json
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor
from torch.quasirandom import SobolEngine

from lightning_dvc.errors import ConfigurationError, StateError, check_settings
from lightning_dvc.policy.weights import normalised
from lightning_dvc.randomness import stream
from lightning_dvc.records import METRICS
from lightning_dvc.timing import TimeShare

_LOGGER = logging.getLogger(__name__)

_COLUMNS: Final = (*METRICS, "progress", "score")
"""The numbers of an observation."""

_SIMPLEX_TOLERANCE: Final = 1e-6
_RAW_STARTS: Final = 256
"""Points at which the acquisition is evaluated to find good starts for its optimiser."""


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
        self._clock = TimeShare(max_share)
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
            return _spread(self.seed, "weights", number, 1)[0] if number else normalised(None)

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

        A round is observed once the next one begins, since of several scores in between the last
        counts; so the last round of a run is not among them.

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
