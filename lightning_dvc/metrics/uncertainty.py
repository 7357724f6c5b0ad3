"""Conditional uncertainty (eq 12): where does the model not know?"""

import math
from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

HIDDEN_WEIGHT: Final = 0.1
"""Weight ``lambda`` of the hidden layers' entropy beside that of the prediction."""


def activation_entropy(representations: Tensor) -> Tensor:
    """Entropy of a representation's normalised absolute activations.

    Args:
        representations: ``(n, d)`` representations after one layer.

    Returns:
        ``(n,)`` in ``[0, 1]``: entropy of ``|h| / sum |h|`` over ``log d``; 0 for ``d = 1`` and
        for a sample that excites nothing.

    Example:
        >>> activation_entropy(torch.tensor([[1.0, 1.0], [1.0, 0.0]]))
        tensor([1., 0.])
    """
    width = representations.shape[1]
    if width == 1:
        return representations.new_zeros(len(representations))
    sizes, tiny = representations.abs(), torch.finfo(representations.dtype).tiny
    shares = sizes / sizes.sum(1, keepdim=True).clamp(min=tiny)
    # Half as long as torch.special.entr; a share of 0 adds 0 * log(tiny).
    entropy = (shares * shares.clamp(min=tiny).log().neg()).sum(1)
    return entropy.clamp(min=0) / math.log(width)


def uncertainty(predictive: Tensor, representations: Sequence[Tensor]) -> Tensor:
    """Equation 12: entropy of the prediction plus ``lambda`` times the hidden layers' mean entropy.

    Args:
        predictive: ``(n,)`` uncertainty of the prediction: its entropy over ``log C`` for classes,
            the predicted variance for Gaussian regression, and :func:`spread` of the last hidden
            layer for plain regression.
        representations: Per layer, ``(n, d)``.

    Returns:
        ``(n,)``, at least 0.

    Example:
        >>> uncertainty(torch.tensor([0.5]), [torch.tensor([[1.0, 1.0]])])
        tensor([0.6000])
    """
    hidden = torch.stack([activation_entropy(h) for h in representations]).mean(0)
    return predictive + HIDDEN_WEIGHT * hidden


def spread(representations: Tensor) -> Tensor:
    """Standard deviation over the features of a representation.

    Args:
        representations: ``(n, d)``.

    Returns:
        ``(n,)``, at least 0.

    Example:
        >>> spread(torch.tensor([[1.0, 3.0]]))
        tensor([1.])
    """
    return representations.std(dim=1, correction=0)
