"""How each type of layer is read: its gradients, and what it receives."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from typing_extensions import override

from lightning_dvc.capture.convolution import CONVOLUTIONS, Convolved
from lightning_dvc.capture.gradients import (
    LayerGradients,
    Materialised,
    OuterProducts,
)
from lightning_dvc.capture.scattered import Scattered


class LayerKind(ABC):
    """One type of layer."""

    def refusal(self, layer: Any) -> str | None:
        """Why this layer cannot be captured, or None if it can."""
        return None

    def can_be_projected(self, layer: Any) -> bool:
        """Whether a random projection of its gradients is cheaper than these are."""
        return True

    @abstractmethod
    def gradients(
        self, layer: Any, inputs: Sequence[Tensor], deltas: Sequence[Tensor], n: int
    ) -> LayerGradients:
        """Gradients of ``n`` samples' own losses.

        Args:
            layer: The layer.
            inputs: What it received, call by call, with the batch as the slowest axis.
            deltas: Gradient of the samples' losses with respect to its output, call by call.
            n: Samples in the batch.
        """

    @abstractmethod
    def received(self, layer: Any, x: Tensor, n: int) -> Tensor | None:
        """What the layer receives, averaged over positions, ``(n, d)``; None for token numbers."""


class _LinearKind(LayerKind):
    @override
    def gradients(
        self, layer: nn.Linear, inputs: Sequence[Tensor], deltas: Sequence[Tensor], n: int
    ) -> LayerGradients:
        a, d = (_joined([by_position(x, n) for x in calls]) for calls in (inputs, deltas))
        return OuterProducts(a, d, layer.bias is not None)

    @override
    def received(self, layer: nn.Linear, x: Tensor, n: int) -> Tensor:
        return averaged(x, n)


class _ConvolutionKind(LayerKind):
    @override
    def can_be_projected(self, layer: Any) -> bool:
        return bool(layer.groups == 1)

    @override
    def gradients(
        self, layer: Any, inputs: Sequence[Tensor], deltas: Sequence[Tensor], n: int
    ) -> LayerGradients:
        # Frames folded into the batch are further calls.
        frames = [frame for x in inputs for frame in _unfolded(x, n)]
        return Convolved(layer, frames, [frame for d in deltas for frame in _unfolded(d, n)])

    @override
    def received(self, layer: Any, x: Tensor, n: int) -> Tensor:
        return averaged(x.movedim(1, -1), n)


class _EmbeddingKind(LayerKind):
    @override
    def refusal(self, layer: nn.Embedding) -> str | None:
        if layer.max_norm is not None:
            return "max_norm rewrites its table in every forward pass"
        if layer.scale_grad_by_freq:
            return "scale_grad_by_freq makes a sample's gradient depend on its batch"
        return None

    @override
    def gradients(
        self, layer: nn.Embedding, inputs: Sequence[Tensor], deltas: Sequence[Tensor], n: int
    ) -> LayerGradients:
        tokens = _joined([x.reshape(n, -1) for x in inputs]).long()
        found = _joined([by_position(delta, n) for delta in deltas])
        if layer.padding_idx is not None:
            found = found.masked_fill((tokens == layer.padding_idx)[:, :, None], 0)
        return Scattered(tokens, found, layer.num_embeddings)

    @override
    def received(self, layer: nn.Embedding, x: Tensor, n: int) -> None:
        return None


class _NormKind(LayerKind):
    """Scale and shift after a normalisation, a full gradient of one column each."""

    @override
    def refusal(self, layer: Any) -> str | None:
        if isinstance(layer, _BatchNorm) and layer.running_mean is None:
            return "without running statistics it mixes the samples of a batch"
        return "it has no weight" if layer.weight is None else None

    @override
    def can_be_projected(self, layer: Any) -> bool:
        return False

    @override
    def gradients(
        self, layer: Any, inputs: Sequence[Tensor], deltas: Sequence[Tensor], n: int
    ) -> LayerGradients:
        parts = [
            self._formed(layer, widened(x), widened(delta), n)
            for x, delta in zip(inputs, deltas, strict=True)
        ]
        return Materialised(torch.stack(parts).sum(0))

    def _formed(self, layer: Any, x: Tensor, delta: Tensor, n: int) -> Tensor:
        columns = [self._by_parameter(layer, _normalised(layer, x) * delta, n)]
        if getattr(layer, "bias", None) is not None:
            columns.append(self._by_parameter(layer, delta, n))
        return torch.stack([column.sum(1) for column in columns], dim=2)

    def _by_parameter(self, layer: Any, x: Tensor, n: int) -> Tensor:
        """``(n, T, parameters)``."""
        if not isinstance(layer, nn.LayerNorm | nn.RMSNorm):
            x = x.movedim(1, -1)
        return x.reshape(n, -1, layer.weight.numel())

    @override
    def received(self, layer: Any, x: Tensor, n: int) -> Tensor:
        return self._by_parameter(layer, widened(x), n).mean(1)


def _normalised(layer: Any, x: Tensor) -> Tensor:
    """What scale and shift are applied to, in ``eval()``."""
    if isinstance(layer, nn.LayerNorm):
        return F.layer_norm(x, layer.normalized_shape, eps=layer.eps)
    if isinstance(layer, nn.RMSNorm):
        return F.rms_norm(x, list(layer.normalized_shape), eps=layer.eps)
    if isinstance(layer, nn.GroupNorm):
        return F.group_norm(x, layer.num_groups, eps=layer.eps)
    mean, variance = layer.running_mean.to(x), layer.running_var.to(x)
    return F.batch_norm(x, mean, variance, training=False, eps=layer.eps)


NORMS: Final = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, _BatchNorm)
"""Layers that are captured by name only: as many as the others, with a hundredth of the weights."""

_KINDS: Final[dict[type[nn.Module], LayerKind]] = {
    nn.Linear: _LinearKind(),
    **dict.fromkeys(CONVOLUTIONS, _ConvolutionKind()),
    nn.Embedding: _EmbeddingKind(),
    **dict.fromkeys(NORMS, _NormKind()),
}


def computes_otherwise(layer: nn.Module) -> bool:
    """Whether a subclass replaces the forward pass of the torch class that it is known as."""
    known = {cls.forward for cls in _KINDS if isinstance(layer, cls)}
    return type(layer).forward not in {*known, nn.SyncBatchNorm.forward}


def kind_of(layer: nn.Module) -> LayerKind | None:
    """How a layer is read; None for a type that cannot be."""
    # The projection inside nn.MultiheadAttention, whose forward is never called.
    if isinstance(layer, NonDynamicallyQuantizableLinear):
        return None
    return next((kind for cls, kind in _KINDS.items() if isinstance(layer, cls)), None)


def full_shape(layer: nn.Module) -> tuple[int, int]:
    """Shape of a full gradient of a layer that can be captured.

    Example:
        >>> full_shape(nn.Conv2d(3, 8, kernel_size=3))
        (8, 28)
    """
    weight: Any = layer.weight
    if isinstance(layer, NORMS):
        return weight.numel(), 1 + (getattr(layer, "bias", None) is not None)
    return len(weight), weight[0].numel() + (getattr(layer, "bias", None) is not None)


def by_position(x: Tensor, n: int) -> Tensor:
    """``(n, T, d)`` of ``(n, ..., d)`` or ``(n T, d)``, in single precision at least."""
    return widened(x).reshape(n, -1, x.shape[-1])


def averaged(x: Tensor, n: int) -> Tensor:
    """``(n, d)``: the mean over positions."""
    x = by_position(x, n)
    return x.squeeze(1) if x.shape[1] == 1 else x.mean(1)


def widened(x: Tensor) -> Tensor:
    """Half precision is too coarse to add up in."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def _unfolded(x: Tensor, n: int) -> tuple[Tensor, ...]:
    x = widened(x)
    return (x,) if len(x) == n else x.reshape(n, -1, *x.shape[1:]).unbind(1)


def _joined(calls: list[Tensor]) -> Tensor:
    """Positions of all calls; of one call without a copy."""
    return calls[0] if len(calls) == 1 else torch.cat(calls, dim=1)
