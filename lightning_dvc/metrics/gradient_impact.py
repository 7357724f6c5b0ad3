"""Gradient impact (eq 11): how far does a step on a sample take the whole network the right way?

The plainest reading of equation 11 takes the moving average of the mean training gradient for the
right way. Once the model has learnt what is selected, that is hardly more than noise: among six
equal weights it lost 0.4 points. What counts here is the mean gradient of reference samples with
the sample's own label, as for relevance, so that samples lead that are hard and right. That gains
0.4 points (Table 2 in docs/results.md); without classes it was not found to gain (docs/tried.md).
"""

import torch
from torch import Tensor


def gradient_impact(products: Tensor, lengths: Tensor) -> Tensor:
    """Equation 11: ``<g(x), m> / |m|`` over all layers, magnitude times alignment.

    ``m`` is the mean gradient of the reference samples of the label of ``x``. Within a class the
    metric is proportional, to first order, to how far a step on ``x`` lowers their loss.

    Args:
        products: ``(n, L)`` inner product of each sample's gradient in each layer with ``m`` there;
            NaN where ``m`` is not known.
        lengths: ``(n, L)`` Euclidean norm of ``m`` in each layer.

    Returns:
        ``(n,)``, of the gradient's unit; 0 where ``m`` vanishes, NaN where it is not known.

    Example:
        >>> gradient_impact(torch.tensor([[6.0, 2.0]]), torch.tensor([[4.0, 3.0]]))
        tensor([1.6000])
    """
    length = torch.linalg.vector_norm(lengths, dim=1)
    return torch.where(length == 0, 0.0, products.sum(1) / length)
