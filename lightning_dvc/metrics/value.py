"""The data value contribution: ranks of the six metrics, weighted and added up (eqs 5, 6, 10)."""

import torch
from torch import Tensor

from lightning_dvc.records import N_LAYER_METRICS


def rank_normalise(values: Tensor) -> Tensor:
    """Map each column to ``[0, 1]`` by rank, so that one weight means the same for every metric.

    Equal values get the mean of their ranks: telling them apart by sample id would favour whole
    sources, whose ids are consecutive.

    Args:
        values: ``(n, ...)`` finite numbers; every trailing position is ranked by itself.

    Returns:
        Same shape: 0 for the lowest, 1 for the highest, 0.5 for a single sample.

    Example:
        >>> rank_normalise(torch.tensor([3.0, 9.0, 3.0])).tolist()
        [0.25, 1.0, 0.25]
    """
    n_samples = len(values)
    columns = (values[:, None] if values.ndim == 1 else values.flatten(1)).T
    ranks = torch.stack([_mean_ranks(column) for column in columns], dim=1)
    scaled = ranks / (n_samples - 1) if n_samples > 1 else ranks + 0.5
    return scaled.reshape(values.shape)


def _mean_ranks(column: Tensor) -> Tensor:
    _, inverse, counts = torch.unique(column, return_inverse=True, return_counts=True)
    below = counts.cumsum(0) - counts
    mean_rank: Tensor = below + (counts - 1) / 2
    return mean_rank[inverse]


def dvc_value(
    layer_ranks: Tensor, global_ranks: Tensor, weights: Tensor, layer_weights: Tensor
) -> Tensor:
    """Equation 5: ``sum_l alpha_l LVC_l + GVC``, with LVC of equation 6 and GVC of equation 10.

    Args:
        layer_ranks: ``(n, L, 3)`` ranks of quality, relevance and diversity in each layer.
        global_ranks: ``(n, 3)`` ranks of gradient impact, uncertainty and stability.
        weights: ``(6,)`` metric weights ``w``, on the simplex.
        layer_weights: ``(L,)`` layer weights ``alpha``, on the simplex.

    Returns:
        ``(n,)`` in ``[0, 1]``.

    Example:
        >>> equal = torch.full((6,), 1 / 6)
        >>> dvc_value(torch.ones(1, 2, 3), torch.zeros(1, 3), equal, torch.tensor([0.5, 0.5]))
        tensor([0.5000])
    """
    weights = weights.to(layer_ranks)
    layer_value = layer_ranks @ weights[:N_LAYER_METRICS]
    global_value = global_ranks @ weights[N_LAYER_METRICS:]
    return layer_value @ layer_weights.to(layer_ranks) + global_value
