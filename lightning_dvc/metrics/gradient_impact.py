"""Gradient impact (eq 11): how far does a sample push the whole network the way it is going?"""

from collections.abc import Sequence

import torch
from torch import Tensor


def gradient_impact(products: Tensor, momentum: Sequence[Tensor]) -> Tensor:
    """Equation 11: ``<g(x), m> / |m|`` over all layers, magnitude times alignment.

    Args:
        products: ``(n, L)`` inner product of each sample's gradient in each layer with ``m`` there.
        momentum: Per layer, a full gradient ``(d_out, d_in)`` or ``(d_out, d_in + 1)``: the moving
            average ``m`` of the mean training gradient.

    Returns:
        ``(n,)``, of the gradient's unit; 0 while ``m`` vanishes.

    Example:
        >>> gradient_impact(torch.tensor([[6.0]]), [torch.tensor([[2.0, 0.0]])])
        tensor([3.])
    """
    length = torch.stack([full.square().sum() for full in momentum]).sum().sqrt()
    total = products.sum(1)
    return torch.where(length > 0, total / length, torch.zeros_like(total))
