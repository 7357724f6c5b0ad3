"""How well the six metric weights are learnt, on a made-up response whose best weights are known.

Run ``python -m examples.weights``. The validation score rises with training, falls with the squared
distance of the weights from the best ones, and is noisy. The table has the median over seeds of
the simple regret: how far the best weights asked for are below the best there are, without noise.
Beside it, the same of the mean of the last five, since what is asked for is trained with.

Random search and the package's optimiser are compared with another acquisition function: LogEI over
what the model expects of the best weights so far. With the default settings this takes about
half an hour on one core; ``--seeds 4`` shows the gist in five minutes.
"""

import argparse
import math
from collections.abc import Callable
from statistics import mean, median
from typing import Final
from unittest.mock import patch

import numpy as np
import torch
from botorch.acquisition.analytic import LogExpectedImprovement
from botorch.models import SingleTaskGP
from torch import Tensor

from lightning_dvc import BayesianWeights
from lightning_dvc.policy import surrogate
from lightning_dvc.policy.weights import WeightPolicy

BEST: Final = torch.tensor([0.05, 0.35, 0.1, 0.1, 0.35, 0.05], dtype=torch.float64)
NOISES: Final = (0.005, 0.02, 0.05)
"""Standard deviations of the scores; weights drawn at random spread them by 0.04."""
LATE: Final = 5

Search = Callable[[int, int, float], list[float]]


def regret(weights: Tensor) -> float:
    """How far the noise-free response to ``(6,)`` weights is below the greatest one.

    Example:
        >>> regret(BEST)
        0.0
    """
    return 0.3 * float(((weights - BEST) ** 2).sum())


def response(weights: Tensor, progress: float, noise: float, generator: torch.Generator) -> float:
    """A validation score: a rising trend, less the regret, and noise."""
    trend = 0.4 * (1 - math.exp(-4 * progress))
    drawn = noise * torch.randn((), generator=generator).item()
    return 0.5 + trend - regret(weights) + drawn


def play(policy: WeightPolicy, seed: int, asks: int, noise: float) -> list[float]:
    """Regrets of the weights that a policy asks for in one training."""
    generator = torch.Generator().manual_seed(seed)
    regrets = []
    for progress in (number / asks for number in range(asks)):
        weights = policy.ask(progress)
        policy.tell(weights, progress, response(weights, progress, noise, generator))
        regrets.append(regret(weights))
    return regrets


def at_random(seed: int, asks: int, noise: float) -> list[float]:
    """Weights drawn evenly from the simplex; noise does not matter to them."""
    drawn = np.random.default_rng(seed).dirichlet([1] * len(BEST), size=asks)
    return [regret(weights) for weights in torch.from_numpy(drawn)]


def package(seed: int, asks: int, noise: float) -> list[float]:
    """The optimiser of the package."""
    return play(BayesianWeights(seed, max_share=None), seed, asks, noise)


def log_ei(seed: int, asks: int, noise: float) -> list[float]:
    """The same, with another acquisition function."""
    with patch.object(surrogate, "acquisition", _log_ei):
        return package(seed, asks, noise)


def _log_ei(model: SingleTaskGP, now: Tensor, seed: int) -> LogExpectedImprovement:
    with torch.no_grad():
        return LogExpectedImprovement(model, best_f=model.posterior(now).mean.max())


SEARCHES: Final[dict[str, Search]] = {"random": at_random, "package": package, "LogEI": log_ei}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--asks", type=int, default=30)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{'noise':8}{'search':10}{'simple regret':>15}{f'mean of last {LATE}':>18}")
    for noise in NOISES:
        for name, search in SEARCHES.items():
            runs = [search(seed, arguments.asks, noise) for seed in range(arguments.seeds)]
            simple, late = median(map(min, runs)), median(mean(run[-LATE:]) for run in runs)
            print(f"{noise:<8}{name:10}{simple:15.4f}{late:18.4f}", flush=True)


if __name__ == "__main__":
    main()
