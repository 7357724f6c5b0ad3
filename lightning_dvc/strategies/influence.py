"""Influence functions: whose gradient lowers the loss of held-out samples, curvature included.

Koh and Liang, "Understanding black-box predictions via influence functions", ICML 2017. The
curvature is the empirical Fisher information of selected samples with a damping; its inverse is
applied exactly, in the space those samples' gradients span, through their Gram matrix.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_dvc.capture.gradients import LayerGradients, concatenate
from lightning_dvc.capture.probe import Captured
from lightning_dvc.errors import check_settings
from lightning_dvc.strategies.base import Round
from lightning_dvc.strategies.baseline import Baseline, dots, look, mean_reference_gradient


class Influence(Baseline):
    """Takes the candidates that would lower the loss of the reference most, to first order.

    The reference are held-out samples, or selected ones where none are held out. All captured
    layers count.

    Args:
        damping: What is added to the eigenvalues of the Fisher information, relative to the mean
            squared length of a gradient, over the number of samples it is estimated from; above 0.
        fisher_size: How many selected samples it is estimated from, at least 1. Their gradients are
            kept in memory.

    Raises:
        ConfigurationError: If a number is out of its range.

    Example:
        >>> from lightning_dvc import DVCCallback
        >>> callback = DVCCallback(Influence())
    """

    def __init__(self, damping: float = 1.0, fisher_size: int = 500) -> None:
        check_settings(
            ("damping", damping, damping > 0, "greater than 0"),
            ("fisher_size", fisher_size, fisher_size >= 1, "at least 1"),
        )
        self.damping = damping
        self.fisher_size = fisher_size

    def values(self, this: Round, candidates: Tensor, quota: int) -> tuple[Tensor, Tensor]:
        """Product of each candidate's gradient with the conditioned gradient of the reference."""
        wanted = mean_reference_gradient(this)
        selected = this.some(this.selected, self.fisher_size, "fisher")
        _, _, kept = look(this, selected, _all_layers, gradients=True)
        known = [concatenate(list(layer)) for layer in zip(*kept, strict=True)]
        direction = conditioned(wanted, known, self.damping)
        ids, _, products = look(this, candidates, lambda x: dots(x, direction), gradients=True)
        return ids, torch.cat(products)


def _all_layers(captured: Captured) -> list[LayerGradients]:
    return captured.gradients


def conditioned(
    wanted: Sequence[Tensor], known: Sequence[LayerGradients], damping: float
) -> list[Tensor]:
    r"""A full gradient times the inverse of a damped empirical Fisher information.

    .. math:: \left(\frac{1}{m} \sum_i g_i g_i^T + \lambda I\right)^{-1} v
        = \frac{1}{\lambda} \left(v - \sum_i c_i g_i\right), \qquad
        c = (K + m \lambda I)^{-1} (\langle g_i, v \rangle)_i,

    with the Gram matrix ``K`` of the ``m`` gradients (Woodbury), and
    ``lambda = damping * mean(|g_i|^2) / m``.

    Args:
        wanted: Per layer, the full gradient ``v``.
        known: Per layer, the ``m`` gradients ``g_i``, the same samples in each.
        damping: Above 0.

    Returns:
        Per layer, a full gradient; ``wanted`` where all ``g_i`` vanish.
    """
    gram = torch.stack([layer.gram(layer).double() for layer in known]).sum(0)
    products = torch.stack(
        [layer.dot(full).double() for layer, full in zip(known, wanted, strict=True)]
    ).sum(0)
    ridge = damping * gram.diagonal().mean()
    if float(ridge) == 0.0:
        return list(wanted)
    shares = torch.linalg.solve(gram + ridge * torch.eye(len(gram)).to(gram), products)
    scale = len(gram) / ridge
    return [
        ((full - layer.weighted_sum(shares)) * scale).to(full)
        for layer, full in zip(known, wanted, strict=True)
    ]
