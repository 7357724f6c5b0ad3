"""Meta-learning: the weights that a step of learning to reweight would give.

Ren et al., "Learning to reweight examples for robust deep learning", ICML 2018: the weight of a
sample is the positive part of how fast the loss of held-out samples falls as the sample's own
weight grows from 0, which is the product of the two gradients.
"""

import torch
from torch import Tensor

from lightning_dvc.randomness import torch_stream
from lightning_dvc.strategies.base import Round
from lightning_dvc.strategies.baseline import Baseline, dots, look, mean_reference_gradient


class MetaLearning(Baseline):
    """Takes the candidates of the greatest weight, and those of weight 0 at random after them.

    The reference are held-out samples, or selected ones where none are held out. All captured
    layers count.

    Example:
        >>> from lightning_dvc import DVCCallback
        >>> callback = DVCCallback(MetaLearning())
    """

    def values(self, this: Round, candidates: Tensor, quota: int) -> tuple[Tensor, Tensor]:
        """Positive part of the product with the reference's gradient; below 0 without one."""
        wanted = mean_reference_gradient(this)
        ids, _, kept = look(this, candidates, lambda x: dots(x, wanted), gradients=True)
        products = torch.cat(kept)
        noise = torch.rand(len(ids), generator=torch_stream(this.seed, "meta", this.number))
        return ids, torch.where(products > 0, products, noise.double() - 1)
