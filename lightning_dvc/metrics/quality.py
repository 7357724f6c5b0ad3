"""Quality (eq 7): does a sample excite a layer about as strongly as samples usually do?"""

from typing import Final

import torch
from torch import Tensor

# The median absolute deviation of a normal distribution is its standard deviation / 1.4826.
_MAD_TO_STD: Final = 1.4826


def activation_score(norms: Tensor, median: float, mad: float) -> Tensor:
    """Equation 7: ``s = sigmoid((|h| - median) / scale)``.

    Args:
        norms: ``(n,)`` Euclidean norms of the representations ``h`` of one layer.
        median: Median norm of a reference set.
        mad: Median absolute deviation of those norms, at least 0; ``scale = 1.4826 mad``.

    Returns:
        ``(n,)`` in ``[0, 1]``; near 0.5 is a normal activation.

    Example:
        >>> activation_score(torch.tensor([2.0, 9.0]), median=2.0, mad=1.0)
        tensor([0.5000, 0.9912])
    """
    scale = max(_MAD_TO_STD * mad, torch.finfo(torch.float32).tiny)
    return torch.sigmoid((norms - median) / scale)


def quality(representations: Tensor, median: float, mad: float) -> Tensor:
    """How normal a sample's activation is: ``1 - |2 s - 1|`` with ``s`` of equation 7.

    The paper calls values of ``s`` near 0.5 normal and extreme ones problematic, so the distance
    from 0.5 is turned into a value that grows with quality.

    Args:
        representations: ``(n, d)`` representations after one layer.
        median: Median norm of a reference set.
        mad: Median absolute deviation of those norms.

    Returns:
        ``(n,)`` in ``[0, 1]``, 1 for a norm equal to the median.

    Example:
        >>> quality(torch.tensor([[2.0], [9.0]]), median=2.0, mad=1.0)
        tensor([1.0000, 0.0176])
    """
    score = activation_score(torch.linalg.vector_norm(representations, dim=1), median, mad)
    return 1 - (2 * score - 1).abs()
