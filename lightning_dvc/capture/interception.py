"""Per-element losses of a ``training_step`` that only returns their mean.

While the step runs, a ``TorchFunctionMode`` computes every call of one of torch's loss functions a
second time with ``reduction="none"``; :mod:`lightning_dvc.capture.decomposition` finds out how
these made up the loss.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from typing_extensions import override

from lightning_dvc.capture.outcome import Kind, Outcome
from lightning_dvc.errors import UnevenError

_CLASS_LOSSES: Final = (F.cross_entropy, F.nll_loss)
_BINARY_LOSSES: Final = (F.binary_cross_entropy, F.binary_cross_entropy_with_logits)
_VALUE_LOSSES: Final = (
    F.mse_loss,
    F.l1_loss,
    F.smooth_l1_loss,
    F.huber_loss,
    F.gaussian_nll_loss,
)
_SIGNATURES: Final[dict[Callable[..., Any], inspect.Signature]] = {
    function: inspect.signature(function)
    for function in (*_CLASS_LOSSES, *_BINARY_LOSSES, *_VALUE_LOSSES)
}

INTERCEPTED: Final = tuple(function.__name__ for function in _SIGNATURES)
"""Names of the loss functions in ``torch.nn.functional`` that are understood."""


@dataclass(frozen=True)
class LossCall:
    """One call of a loss function.

    Attributes:
        function: The function, from ``torch.nn.functional``.
        arguments: Its arguments by name, defaults included.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        value: What it returned: a scalar, or the elements.
        elements: What it returns with ``reduction="none"``.
    """

    function: Callable[..., Any]
    arguments: dict[str, Any]
    reduction: str
    value: Tensor
    elements: Tensor

    @property
    def classifies(self) -> bool:
        """Whether the loss compares classes."""
        return self.function in _CLASS_LOSSES or self.function in _BINARY_LOSSES

    def kept(self) -> Tensor | None:
        """Mask of the elements whose class target is not ignored; None where none can be."""
        target = self.arguments["target"]
        if self.function not in _CLASS_LOSSES or target.is_floating_point():
            return None
        kept: Tensor = target != self.arguments["ignore_index"]
        return kept

    def rows(self, n: int) -> Tensor:
        """Element losses dealt out to samples.

        Args:
            n: Samples in the batch.

        Returns:
            ``(n, P)``; the sample is taken to be the slowest axis.

        Raises:
            UnevenError: If there is no whole number of elements per sample.
        """
        shape = tuple(self.elements.shape)
        if (shape[0] if shape else 1) % n:
            raise UnevenError(
                f"{self.function.__name__} was expected to return a multiple of {n} losses, one or "
                f"more for each sample of the batch along the first axis, but returned the shape "
                f"{shape}; keep the batch as the first axis, or pass objective=... that returns "
                "per-sample losses"
            )
        return self.elements.reshape(n, -1)


class LossInterception(TorchFunctionMode):
    """Notes the calls of torch's loss functions; the caller's code receives what it asked for.

    Calls without a gradient, such as those of a metric, are not noted. Of ``l1_loss``, torch 2.13
    does not hand ``weight`` on to any mode, so that it is neither seen nor applied here.

    Args:
        leaves: For a forward pass without a graph: every value begins a graph of its own, so that
            the coefficient with which it enters the loss can still be found.

    Example:
        >>> x = torch.zeros(2, 1, requires_grad=True)
        >>> with LossInterception() as seen:
        ...     loss = F.mse_loss(x, torch.tensor([[1.0], [3.0]]))
        >>> loss.item(), seen.calls[0].elements.flatten().tolist()
        (5.0, [1.0, 9.0])
    """

    def __init__(self, leaves: bool = False) -> None:
        super().__init__()
        self.calls: list[LossCall] = []
        self._leaves = leaves

    @override
    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func not in _SIGNATURES:
            return func(*args, **kwargs)
        bound = _SIGNATURES[func].bind(*args, **kwargs)
        bound.apply_defaults()
        arguments = dict(bound.arguments)
        reduction = _reduction(arguments)
        elements = func(**_elementwise(arguments))
        # The call itself knows how torch divides by class weights and ignored targets.
        value = elements if reduction == "none" else func(*args, **kwargs)
        if self._leaves:
            value = value.detach().requires_grad_()
        if not value.requires_grad:
            return value
        self.calls.append(LossCall(func, arguments, reduction, value, elements))
        # A copy, because `loss += other` would otherwise overwrite what was noted.
        return value.clone()


def _reduction(arguments: dict[str, Any]) -> str:
    size_average, reduce = arguments.get("size_average"), arguments.get("reduce")
    if size_average is None and reduce is None:
        return str(arguments["reduction"])
    # torch's deprecated pair of flags, each true when not given.
    if reduce is False:
        return "none"
    return "sum" if size_average is False else "mean"


def _elementwise(arguments: dict[str, Any]) -> dict[str, Any]:
    kept = {k: v for k, v in arguments.items() if k not in ("size_average", "reduce")}
    return {**kept, "reduction": "none"}


def describe(call: LossCall, losses: Tensor) -> Outcome:
    """Read outputs, targets and task from the arguments of a loss function.

    Args:
        call: The call.
        losses: ``(n,)`` the samples' losses.

    Returns:
        The outcome, with outputs and targets detached.

    Example:
        >>> x = torch.zeros(6, 5, requires_grad=True)  # two samples of three tokens
        >>> with LossInterception() as seen:
        ...     loss = F.cross_entropy(x, torch.arange(6) % 5)
        >>> describe(seen.calls[0], torch.ones(2)).outputs.shape
        torch.Size([2, 3, 5])
    """
    if call.function in _CLASS_LOSSES:
        return _describe_classes(call, losses)
    n, inputs = len(losses), call.arguments["input"].detach()
    if call.function in _BINARY_LOSSES:
        if call.function is F.binary_cross_entropy:
            inputs = torch.logit(inputs, eps=torch.finfo(inputs.dtype).eps)
        outputs, targets = inputs.reshape(n, -1), call.arguments["target"].detach().reshape(n, -1)
        kind: Kind = "binary" if outputs.shape[1] == 1 else "multilabel"
        return Outcome(losses, outputs, targets, kind)
    shape = call.elements.shape  # torch broadcasts inputs and targets of different shapes
    outputs, targets = (
        x.expand(shape).reshape(n, -1) for x in (inputs, call.arguments["target"].detach())
    )
    if call.function is F.gaussian_nll_loss:
        return Outcome(losses, outputs, targets, "gaussian", _variances(call).reshape(n, -1))
    return Outcome(losses, outputs, targets, "regression")


def _describe_classes(call: LossCall, losses: Tensor) -> Outcome:
    logits, targets = call.arguments["input"].detach(), call.arguments["target"].detach()
    n, axis = len(losses), min(1, logits.ndim - 1)
    classes = logits.shape[axis]
    outputs = logits.movedim(axis, -1).reshape(n, -1, classes)
    kept = call.kept()
    if kept is None:
        targets = targets.movedim(axis, -1).reshape(n, -1, classes)
    else:
        targets = torch.where(kept, targets, -1).reshape(n, -1)
    if outputs.shape[1] == 1:
        outputs, targets = outputs.squeeze(1), targets.squeeze(1)
    return Outcome(losses, outputs, targets, "multiclass")


def _variances(call: LossCall) -> Tensor:
    shape, variances = call.elements.shape, call.arguments["var"]
    if not isinstance(variances, Tensor):
        return torch.full_like(call.elements, variances).detach()
    if variances.ndim < len(shape):  # one variance for all dimensions, as torch reads it
        variances = variances.unsqueeze(-1)
    return variances.detach().expand(shape)
