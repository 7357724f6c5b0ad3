"""Diversity (eq 9): how empty is the neighbourhood of a sample among those already selected?"""

from torch import Tensor

from lightning_dvc.memory.density import Density


def diversity(representations: Tensor, selected: Density) -> Tensor:
    """Equation 9: minus the log of a Gaussian kernel density under the selected set.

    Args:
        representations: ``(n, d)`` representations after one layer.
        selected: Density of the selected samples' representations after the same layer.

    Returns:
        ``(n,)``, at least 0; larger is farther from everything selected.

    Example:
        >>> import torch
        >>> from lightning_dvc.memory.density import ExactDensity
        >>> diversity(torch.tensor([[0.0], [2.0]]), ExactDensity(torch.zeros(1, 1), 1.0))
        tensor([-0., 2.])
    """
    return -selected.log_density(representations)
