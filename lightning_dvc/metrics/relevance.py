"""Relevance (eq 8): does a sample's gradient point where good samples of its class point?

The plainest reading of equation 8 takes the cosine with the mean gradient of a mini-batch. The mean
gradient of reference samples with the sample's own label tells wrong labels from right ones much
better (area under the ROC curve 0.95 to 0.97 on the last layer against 0.6 to 0.8, MNIST and
Fashion-MNIST), so that is what is used wherever there are classes.
"""

import torch
from torch import Tensor


def relevance(products: Tensor, squared_norms: Tensor, lengths: Tensor) -> Tensor:
    """Equation 8, by class: the cosine with the mean reference gradient of the sample's label.

    Args:
        products: ``(n, L)`` inner product of each sample's gradient in each layer with the mean
            there; any other shape will do that all three have.
        squared_norms: ``(n, L)`` squared norms of the samples' gradients.
        lengths: ``(n, L)`` norms of the means, NaN where a class has too few reference samples.

    Returns:
        ``(n, L)`` in ``[-1, 1]``; 0 where either gradient vanishes, NaN where the mean is unknown.

    Example:
        >>> relevance(torch.tensor([3.0, 0.0]), torch.tensor([9.0, 0.0]), torch.tensor([2.0, 2.0]))
        tensor([0.5000, 0.0000])
    """
    scale = squared_norms.clamp(min=0).sqrt() * lengths
    return torch.where(scale == 0, 0.0, products / scale).clamp(-1, 1)
