"""Which selected samples to take back: those whose label the model has come to disbelieve.

Measured on seven data sets with planted bad sources: taking back, each round, at most a tenth of
the selection by this rule lifted the mean result from 93% to 97% and the worst from 60% to 66% of
the way from random selection to selection from the clean samples only. Taking back the samples of
the lowest relevance did harm instead.
"""

import torch
from torch import Tensor

from lightning_dvc.errors import ConfigurationError


def threshold(reference_confidence: Tensor, quantile: float = 0.05) -> float:
    """The confidence below which a selected sample is less plausible than trusted ones are.

    Args:
        reference_confidence: ``(m,)`` probability in ``[0, 1]`` that the model gives to the true
            label of each reference sample, averaged over the last model states; NaN is left out.
        quantile: Which quantile of them to take, in ``[0, 1]``.

    Returns:
        The quantile, linearly interpolated; ``-inf`` without any reference, so that nothing is
        taken back.

    Raises:
        ConfigurationError: If the quantile is outside ``[0, 1]``.

    Example:
        >>> threshold(torch.tensor([1.0, 0.5, 0.75, torch.nan]), quantile=0.5)
        0.75
        >>> threshold(torch.tensor([]))
        -inf
    """
    if not 0 <= quantile <= 1:
        raise ConfigurationError(
            f"quantile must be in [0, 1], but is {quantile}; pass a small one, such as 0.05"
        )
    known = reference_confidence[~reference_confidence.isnan()].double()
    if len(known) == 0:
        return -torch.inf
    return float(torch.quantile(known, quantile))


def disowned(confidence: Tensor, threshold: float, most: int) -> Tensor:
    """Positions of the selected samples to take back.

    Args:
        confidence: ``(s,)`` probability in ``[0, 1]`` that the model gives to the label of each
            selected sample, averaged over the last model states; NaN where it is not known.
        threshold: From :func:`threshold`.
        most: The most samples to take back, at least 0.

    Returns:
        ``(r,)`` int64 positions of those below the threshold, the lowest confidence first, ties by
        position, at most ``most``. A sample of unknown confidence is never among them.

    Raises:
        ConfigurationError: If ``most`` is negative.

    Example:
        >>> disowned(torch.tensor([0.3, 0.01, torch.nan, 0.9, 0.02]), 0.2, most=5)
        tensor([1, 4])
    """
    if most < 0:
        raise ConfigurationError(f"most must be at least 0, but is {most}; pass 0 to keep all")
    below = torch.nonzero(confidence.double() < threshold).flatten()
    return below[torch.argsort(confidence[below], stable=True)][:most].cpu()
