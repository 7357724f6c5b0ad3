"""What loggers are told of a round."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from lightning_dvc import trainer_bridge
from lightning_dvc.records import METRICS, Choice


def figures_of(choice: Choice, names: Sequence[str], counts: Tensor) -> dict[str, float]:
    """What a round did, in numbers.

    Args:
        choice: What it chose.
        names: Names of the ``K`` sources.
        counts: ``(K,)`` samples selected from each, this round's included.

    Returns:
        Name to number, NaN for what is not known: samples added and taken back, each source's share
        of the selection, the weight of each metric and its mean over what was added, and whatever
        the strategy tells.

    Example:
        >>> import torch
        >>> choice = Choice.unscored(torch.tensor([4, 2]))
        >>> figures_of(choice, ["bank", "web"], torch.tensor([3, 1]))["share/web"]
        0.25
    """
    total = max(int(counts.sum()), 1)
    figures = {"added": len(choice.add), "taken_back": len(choice.remove), **choice.figures}
    for name, count in zip(names, counts.tolist(), strict=True):
        figures[f"share/{name}"] = count / total
    for number, metric in enumerate(METRICS):
        figures[f"weight/{metric}"] = float(choice.weights[number])
        figures[f"metric/{metric}"] = float(choice.raw[:, number].nanmean())
    return figures


def tell(trainer: Any, figures: Mapping[str, float]) -> None:
    """Log what is known, each name after ``dvc/``, to all loggers, at the optimiser's step."""
    known = {f"dvc/{name}": float(x) for name, x in figures.items() if not math.isnan(x)}
    for logger in trainer.loggers:
        logger.log_metrics(known, step=trainer_bridge.steps_so_far(trainer))
