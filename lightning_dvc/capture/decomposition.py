"""How the calls of loss functions made up a loss, and so what each sample's own part of it is.

Autograd tells with which coefficient each call entered the loss that a step returned. Sample
``i``'s own loss is then

    L_i = sum over calls of  coefficient * (the call's element losses of sample i).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_dvc.capture.interception import LossCall


@dataclass(frozen=True)
class Term:
    """One call's part of the loss.

    Attributes:
        position: Which of the step's calls it was.
        call: The call.
        coefficient: Derivative of the loss with respect to the call's value, in its shape.
    """

    position: int
    call: LossCall
    coefficient: Tensor

    @property
    def value(self) -> Tensor:
        """What the term adds to the loss, a scalar."""
        return (self.coefficient * self.call.value).detach().sum()

    def per_sample(self, n: int, divided: bool) -> Tensor:
        """What the term adds to each sample's own loss.

        A mean counts each sample's mean over its positions that have a target. So class weights
        act as with ``reduction="none"``, and neither they nor ignored targets are divided by a
        figure of the batch, which would make a sample's loss depend on its batch mates.

        Args:
            n: Samples in the batch.
            divided: Whether the step divides a sum over the batch by its size; see
                :meth:`seems_divided`. A mean is.

        Returns:
            ``(n,)``.

        Raises:
            UnevenError: If the elements cannot be dealt out to ``n`` samples.
        """
        rows = self.call.rows(n)
        if self.call.reduction == "mean":
            kept = self.call.kept()
            if kept is None:
                return self.coefficient * rows.mean(1)
            return self.coefficient * rows.sum(1) / kept.reshape(n, -1).sum(1).clamp(min=1)
        if self.call.reduction == "sum":
            shares = self.coefficient * rows.sum(1)
        else:
            shares = (self.coefficient.reshape(n, -1) * rows).sum(1)
        return shares * n if divided else shares

    def seems_divided(self, n: int) -> bool:
        """Whether the coefficients of a sum over the batch are nearer to ``1 / n`` than to 1.

        One batch tells no more about ``loss.sum() / n`` against ``loss.sum()``, in which a sample
        counts the same in a batch of any size.

        Args:
            n: Samples in the batch.

        Returns:
            The comparison by ratio, for the mean of the coefficients that are not 0.
        """
        sizes = self.coefficient.detach().abs()
        typical = sizes.sum() / (sizes > 0).sum().clamp(min=1)
        return bool(typical.square() * n <= 1)


def terms_of(loss: Tensor, calls: Sequence[LossCall]) -> list[Term]:
    """Find with which coefficients calls entered a loss.

    Args:
        loss: The scalar that was computed from the calls' values.
        calls: The calls.

    Returns:
        The calls that entered it. Coefficients keep their graph, for they may depend on the
        forward pass, as in a focal loss.

    Example:
        >>> import torch.nn.functional as F
        >>> from lightning_dvc.capture.interception import LossInterception
        >>> x = torch.zeros(2, 1, requires_grad=True)
        >>> with LossInterception() as seen:
        ...     loss = 3 * F.mse_loss(x, torch.ones(2, 1))
        >>> terms_of(loss, seen.calls)[0].coefficient.item()
        3.0
    """
    values = [call.value for call in calls]
    if not values:
        return []
    found = torch.autograd.grad(loss, values, create_graph=True, allow_unused=True)
    return [
        Term(position, call, coefficient)
        for position, (call, coefficient) in enumerate(zip(calls, found, strict=True))
        if coefficient is not None
    ]


def main_call(terms: Sequence[Term]) -> LossCall:
    """The call whose outputs and targets stand for the step.

    Args:
        terms: At least one.

    Returns:
        Of the calls that compare classes, or of all if none does, the one that adds most to the
        loss in absolute value.
    """
    if len(terms) == 1:  # the common case, without waiting for the device
        return terms[0].call
    return max(terms, key=lambda term: (term.call.classifies, term.value.abs().item())).call
