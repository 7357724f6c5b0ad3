"""Gradient impact (eq 11): how far does a sample push the whole network the way it is going?"""

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_dvc.capture.gradients import LayerGradients


def gradient_impact(gradients: Sequence[LayerGradients], momentum: Sequence[Tensor]) -> Tensor:
    """Equation 11: ``<g(x), m> / |m|`` over all layers, magnitude times alignment.

    Args:
        gradients: Per layer, the gradients of ``n`` samples.
        momentum: Per layer, a full gradient ``(d_out, d_in)`` or ``(d_out, d_in + 1)``: the moving
            average ``m`` of the mean training gradient.

    Returns:
        ``(n,)``, of the gradient's unit; 0 while ``m`` vanishes.

    Example:
        >>> from lightning_dvc.capture.gradients import Materialised
        >>> g = Materialised(torch.tensor([[[3.0, 4.0]]]))
        >>> gradient_impact([g], [torch.tensor([[2.0, 0.0]])])
        tensor([3.])
    """
    pairs = list(zip(gradients, momentum, strict=True))
    products = torch.stack([layer.dot(full) for layer, full in pairs]).sum(0)
    length = torch.stack([full.square().sum() for full in momentum]).sum().sqrt()
    return products / length if length > 0 else torch.zeros_like(products)
