"""Training stability (eq 13): does a sample's loss stay put while the model moves?"""

import torch
from torch import Tensor


def stability(losses: Tensor) -> Tensor:
    """Equation 13: ``1 / (1 + variance of the sample's loss over the last W model states)``.

    Args:
        losses: ``(n, W)`` loss of each sample in each state, NaN where it is unknown.

    Returns:
        ``(n,)`` in ``(0, 1]``; 1 for a sample known in fewer than two states.

    Example:
        >>> stability(torch.tensor([[1.0, 1.0, torch.nan], [0.0, 2.0, torch.nan]]))
        tensor([1.0000, 0.5000])
    """
    known = ~losses.isnan()
    count = known.sum(1).clamp(min=1)
    values = losses.nan_to_num(nan=0.0)
    mean = values.sum(1) / count
    deviations = torch.where(known, values - mean[:, None], 0.0)
    return 1 / (1 + deviations.square().sum(1) / count)
