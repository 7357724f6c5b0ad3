"""The data value contribution: ranks of the six metrics, weighted and added up (eqs 5, 6, 10)."""

import torch
from torch import Tensor

from lightning_dvc.records import N_LAYER_METRICS


def rank_normalise(values: Tensor) -> Tensor:
    """Map each column to ``[0, 1]`` by rank, so that one weight means the same for every metric.

    Equal values get the mean of their ranks: telling them apart by sample id would favour whole
    sources, whose ids are consecutive.

    Args:
        values: ``(n, ...)`` numbers; every trailing position is ranked by itself. NaN is not known.

    Returns:
        Same shape: 0 for the lowest, 1 for the highest, 0.5 for a single one and where nothing is
        known, so that not to be known is neither for nor against a sample.

    Example:
        >>> rank_normalise(torch.tensor([3.0, 9.0, 3.0])).tolist()
        [0.25, 1.0, 0.25]
    """
    columns = (values[:, None] if values.ndim == 1 else values.flatten(1)).T
    return torch.stack([_scaled_ranks(column) for column in columns], dim=1).reshape(values.shape)


def _scaled_ranks(column: Tensor) -> Tensor:
    known = ~column.isnan()
    _, inverse, counts = torch.unique(column[known], return_inverse=True, return_counts=True)
    ranks = torch.full_like(column, 0.5)
    if len(inverse) > 1:
        mean_ranks = counts.cumsum(0) - counts + (counts - 1) / 2
        ranks[known] = (mean_ranks[inverse] / (len(inverse) - 1)).to(ranks)
    return ranks


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
