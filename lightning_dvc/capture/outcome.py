"""What a batch looked like through a model: per-sample losses, outputs, targets, in one record."""

import math
from dataclasses import dataclass
from typing import Final, Literal

import torch
from torch import Tensor

from lightning_dvc.errors import ObjectiveError

Kind = Literal["multiclass", "binary", "multilabel", "regression", "gaussian", "unknown"]
"""The task that outputs and targets belong to."""

_CLASSES: Final = ("multiclass", "binary", "multilabel")


@dataclass(frozen=True)
class Outcome:
    """Losses and outputs of a batch of ``n`` samples.

    Attributes:
        losses: ``(n,)`` each sample's own loss, differentiable with respect to the forward pass.
        outputs: By kind, None if unknown. multiclass: ``(n, C)`` logits or log-probabilities, or
            ``(n, P, C)`` where every sample has ``P`` positions (tokens, pixels). binary:
            ``(n, 1)`` logits. multilabel: ``(n, C)`` logits. regression, gaussian: ``(n, d)``
            predictions.
        targets: By kind, None if unknown. multiclass: ``(n,)`` or ``(n, P)`` class indices,
            negative where there is none, or probabilities in the shape of the outputs. Otherwise
            the shape of the outputs; for binary and multilabel in ``[0, 1]``, true above 0.5.
        kind: The task.
        variances: ``(n, d)`` predicted variances, for gaussian only.

    Raises:
        ObjectiveError: If a kind other than unknown lacks its outputs, targets or variances.

    Example:
        >>> outputs, targets = torch.zeros(2, 4), torch.tensor([3, -1])
        >>> outcome = Outcome(torch.ones(2), outputs, targets, "multiclass")
        >>> outcome.labels(), outcome.entropy(), outcome.confidence()
        (tensor([ 3, -1]), tensor([1., 1.]), tensor([0.2500, 1.0000]))
    """

    losses: Tensor
    outputs: Tensor | None = None
    targets: Tensor | None = None
    kind: Kind = "unknown"
    variances: Tensor | None = None

    def __post_init__(self) -> None:
        needed = {"outputs": self.outputs, "targets": self.targets}
        if self.kind == "gaussian":
            needed["variances"] = self.variances
        missing = [name for name, value in needed.items() if value is None]
        if missing and self.kind != "unknown":
            raise ObjectiveError(
                f'an Outcome of kind "{self.kind}" needs {list(needed)}, but {missing} came as '
                'None; give them, or set kind="unknown"'
            )

    def __len__(self) -> int:
        return len(self.losses)

    def labels(self) -> Tensor:
        """The class of each sample.

        Returns:
            ``(n,)`` int64: the target class for multiclass (the likeliest of soft targets) and
            binary (1 above 0.5); -1 where there is none, that is for the other kinds, for ignored
            targets and for samples with several positions.

        Example:
            >>> Outcome(torch.ones(2), torch.ones(2, 1), torch.ones(2, 1), "binary").labels()
            tensor([1, 1])
        """
        if self.kind == "binary":
            return (self._true() > 0.5).long().squeeze(1)
        if self.kind == "multiclass":
            classes = self._class_targets()
            if classes.ndim == 1:
                return classes
        return torch.full((len(self),), -1, device=self.losses.device)

    def entropy(self) -> Tensor | None:
        """How undecided the prediction is.

        Returns:
            ``(n,)`` in ``[0, 1]`` for classes: entropy over ``log C`` (binary: over ``log 2``;
            multilabel: mean over the labels of the binary entropy; several positions: mean over
            those with a target). For gaussian, at least 0: mean predicted variance. None for
            regression and unknown, where the outputs do not tell.

        Example:
            >>> Outcome(torch.ones(1), torch.zeros(1, 3), torch.ones(1, 3), "multilabel").entropy()
            tensor([1.])
        """
        if self.kind == "gaussian":
            return _working(self.variances).reshape(len(self), -1).mean(1)
        if self.kind not in _CLASSES:
            return None
        if self.kind == "multiclass":
            shares = _working(self.outputs).softmax(-1)
            entropy: Tensor = torch.special.entr(shares).sum(-1) / _log_classes(shares.shape[-1])
            if entropy.ndim == 1:
                return entropy.clamp(0, 1)
            return _kept_mean(entropy, self._class_targets() >= 0, empty=0.0).clamp(0, 1)
        shares = torch.sigmoid(self._logits())
        bits: Tensor = torch.special.entr(shares) + torch.special.entr(1 - shares)
        return (bits / math.log(2)).mean(1).clamp(0, 1)

    def confidence(self) -> Tensor:
        """How plausible the model finds each sample's target; larger is more plausible.

        Returns:
            ``(n,)``. In ``[0, 1]`` for classes: probability of the true class (multilabel: of the
            true value, mean over the labels; several positions: mean over those with a target),
            and 1 for a sample without a target, which no prediction contradicts. Otherwise
            the negative loss, any number.

        Example:
            >>> Outcome(torch.tensor([0.5])).confidence()
            tensor([-0.5000])
        """
        if self.kind not in _CLASSES:
            return -self.losses.detach()
        if self.kind != "multiclass":
            sign = torch.where(self._true() > 0.5, 1, -1)
            return torch.sigmoid(sign * self._logits()).mean(1)
        classes = self._class_targets()
        shares = _working(self.outputs).softmax(-1)
        true = shares.gather(-1, classes.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        if true.ndim == 1:
            return torch.where(classes >= 0, true, 1.0)
        return _kept_mean(true, classes >= 0, empty=1.0)

    def _logits(self) -> Tensor:
        return _working(self.outputs).reshape(len(self), -1)

    def _true(self) -> Tensor:
        return _working(self.targets).reshape(len(self), -1)

    def _class_targets(self) -> Tensor:
        assert self.targets is not None
        targets = self.targets.detach()
        if targets.is_floating_point():
            return targets.argmax(-1)
        return targets.long().clamp(min=-1)


def infer_kind(outputs: Tensor | None, targets: Tensor | None) -> Kind:
    """Guess the task from the shapes and types of what a user's function returned.

    Args:
        outputs: ``(n, ...)`` or None.
        targets: ``(n, ...)`` or None.

    Returns:
        multiclass for integer targets with one axis less than the outputs; binary for integer or
        bool targets, all 0 or 1, with one output per sample; multilabel for the same with several
        outputs; regression for other targets in the shape of the outputs; else unknown. gaussian
        cannot be told: return an :class:`Outcome` for it, and for float targets that are classes.

    Example:
        >>> infer_kind(torch.zeros(2, 3), torch.tensor([0, 2]))
        'multiclass'
    """
    if outputs is None or targets is None:
        return "unknown"
    whole = not (targets.is_floating_point() or targets.is_complex())
    if whole and outputs.ndim > 1 and outputs.shape[-1] > 1 and targets.shape == outputs.shape[:-1]:
        return "multiclass"
    if targets.numel() != outputs.numel():
        return "unknown"
    if whole and bool(((targets == 0) | (targets == 1)).all()):
        return "binary" if outputs.numel() == len(outputs) else "multilabel"
    return "regression"


def _working(values: Tensor | None) -> Tensor:
    """The values without their graph, in single precision at least."""
    assert values is not None
    values = values.detach()
    return values if values.dtype == torch.float64 else values.float()


def _log_classes(classes: int) -> float:
    # One class has entropy 0 whatever it is divided by.
    return math.log(classes) if classes > 1 else 1.0


def _kept_mean(values: Tensor, kept: Tensor, empty: float) -> Tensor:
    """Mean of ``(n, P)`` values over the positions kept; ``empty`` where none is."""
    count = kept.sum(1)
    total = torch.where(kept, values, 0.0).sum(1)
    return torch.where(count > 0, total / count.clamp(min=1), empty)
