"""Per-sample gradients of one layer, never formed where that can be avoided.

A layer whose output is ``W a + b`` at each of ``T`` positions has, for one sample, the weight
gradient ``sum_t delta_t [a_t; 1]^T``, with ``a_t`` the layer's input and ``delta_t`` the gradient
of the sample's own loss with respect to the output. Norms, inner products and means follow from
``a`` and ``delta`` alone (Goodfellow 2015, arXiv 1510.01799; for tokens and convolutions, Li et
al. 2022, arXiv 2110.05679). A layer used several times in one forward pass is the same sum with
more positions, so shared layers need no special case.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import override


class LayerGradients(ABC):
    """Gradients of ``n`` samples' own losses with respect to one layer's weight and bias.

    A full gradient is a ``(d_out, d_in)`` matrix, or ``(d_out, d_in + 1)`` with the bias as the
    last column.
    """

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def squared_norms(self) -> Tensor:
        """``(n,)`` squared Euclidean norms."""

    @abstractmethod
    def dot(self, full: Tensor) -> Tensor:
        """Inner product of each sample's gradient with a full gradient, ``(n,)``."""

    @abstractmethod
    def mixture(self, weights: Tensor) -> Tensor:
        """Full gradient ``sum_i weights_i g_i`` from ``(n,)`` weights."""

    @abstractmethod
    def rows(self, index: Tensor) -> "LayerGradients":
        """Gradients of some of the samples, by position or mask."""

    def products(self, reference: "LayerGradients", mixtures: Tensor) -> Tensor:
        """Inner products with mixtures of reference gradients.

        Args:
            reference: Gradients of ``m`` samples in the same layer.
            mixtures: ``(m, C)``; column ``c`` is the gradient ``sum_j mixtures_jc g_j``.

        Returns:
            ``(n, C)``.
        """
        columns = [self.dot(reference.mixture(mixtures[:, c])) for c in range(mixtures.shape[1])]
        return torch.stack(columns, dim=1)

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """What the gradients are made of, each ``(n, ...)``, for a cache; see :func:`restore`."""


class OuterProducts(LayerGradients):
    """Gradients kept as the factors ``a`` and ``delta``.

    Args:
        inputs: ``(n, T, d_in)`` what the layer received.
        deltas: ``(n, T, d_out)`` gradient of each sample's own loss with respect to its output.
        bias: Whether the layer has a bias that counts.

    Example:
        >>> g = OuterProducts(torch.ones(2, 1, 3), torch.ones(2, 1, 4), bias=True)
        >>> g.squared_norms().tolist()
        [16.0, 16.0]
    """

    def __init__(self, inputs: Tensor, deltas: Tensor, bias: bool) -> None:
        self.inputs = inputs
        self.deltas = deltas
        self.bias = bias

    def __len__(self) -> int:
        return len(self.inputs)

    @override
    def squared_norms(self) -> Tensor:
        if self.inputs.shape[1] == 1:
            inputs = self.inputs.squeeze(1).square().sum(1) + float(self.bias)
            return inputs * self.deltas.squeeze(1).square().sum(1)
        inputs = self.inputs @ self.inputs.transpose(1, 2) + float(self.bias)
        return (inputs * (self.deltas @ self.deltas.transpose(1, 2))).sum((1, 2))

    @override
    def dot(self, full: Tensor) -> Tensor:
        weight = full[:, : self.inputs.shape[2]]
        outputs = self.inputs @ weight.T
        if self.bias:
            outputs = outputs + full[:, -1]
        return (outputs * self.deltas).sum((1, 2))

    @override
    def mixture(self, weights: Tensor) -> Tensor:
        deltas = (self.deltas * weights.to(self.deltas)[:, None, None]).flatten(0, 1)
        full = deltas.T @ self.inputs.flatten(0, 1)
        return torch.cat([full, deltas.sum(0)[:, None]], dim=1) if self.bias else full

    @override
    def rows(self, index: Tensor) -> "OuterProducts":
        index = index.to(self.inputs.device)
        return OuterProducts(self.inputs[index], self.deltas[index], self.bias)

    @override
    def products(self, reference: LayerGradients, mixtures: Tensor) -> Tensor:
        # With T positions a Gram block costs T * T products per pair; full mixtures cost T.
        if isinstance(reference, OuterProducts) and self._positions == reference._positions == 1:
            return self._gram(reference) @ mixtures.to(self.inputs)
        return super().products(reference, mixtures)

    @property
    def _positions(self) -> int:
        return self.inputs.shape[1]

    def padded(self, positions: int) -> "OuterProducts":
        """The same with more positions, at which nothing happens."""
        missing = (0, 0, 0, positions - self._positions)
        return OuterProducts(F.pad(self.inputs, missing), F.pad(self.deltas, missing), self.bias)

    def formed(self) -> "Materialised":
        """The same, formed."""
        gradients = self.deltas.transpose(1, 2) @ self.inputs
        if self.bias:
            gradients = torch.cat([gradients, self.deltas.sum(1)[:, :, None]], dim=2)
        return Materialised(gradients)

    def _gram(self, other: "OuterProducts") -> Tensor:
        inputs = self.inputs.squeeze(1) @ other.inputs.squeeze(1).T + float(self.bias)
        return inputs * (self.deltas.squeeze(1) @ other.deltas.squeeze(1).T)

    @override
    def tensors(self) -> dict[str, Tensor]:
        return {"inputs": self.inputs, "deltas": self.deltas}


class Materialised(LayerGradients):
    """Gradients formed, for layers with many positions and few weights (small convolutions).

    Args:
        gradients: ``(n, d_out, d_in)``, or ``(n, d_out, d_in + 1)`` with the bias.

    Example:
        >>> Materialised(torch.ones(2, 3, 4)).dot(torch.ones(3, 4)).tolist()
        [12.0, 12.0]
    """

    def __init__(self, gradients: Tensor) -> None:
        self.gradients = gradients

    def __len__(self) -> int:
        return len(self.gradients)

    @override
    def squared_norms(self) -> Tensor:
        return self.gradients.square().sum((1, 2))

    @override
    def dot(self, full: Tensor) -> Tensor:
        return self.gradients.flatten(1) @ full.flatten()

    @override
    def mixture(self, weights: Tensor) -> Tensor:
        return (weights.to(self.gradients) @ self.gradients.flatten(1)).view_as(self.gradients[0])

    @override
    def rows(self, index: Tensor) -> "Materialised":
        return Materialised(self.gradients[index.to(self.gradients.device)])

    @override
    def products(self, reference: LayerGradients, mixtures: Tensor) -> Tensor:
        if not isinstance(reference, Materialised):
            return super().products(reference, mixtures)
        mixed = mixtures.to(self.gradients).T @ reference.gradients.flatten(1)
        return self.gradients.flatten(1) @ mixed.T

    @override
    def tensors(self) -> dict[str, Tensor]:
        return {"gradients": self.gradients}


def layer_gradients(inputs: Tensor, deltas: Tensor, bias: bool) -> LayerGradients:
    """Keep the gradients of one layer in whichever form is smaller.

    Args:
        inputs: ``(n, T, d_in)``.
        deltas: ``(n, T, d_out)``.
        bias: Whether the layer has a bias.

    Returns:
        Factors, or formed gradients when these take less memory: ``d_out (d_in + 1)`` against
        ``T (d_in + d_out)`` numbers per sample.

    Example:
        >>> type(layer_gradients(torch.ones(2, 64, 9), torch.ones(2, 64, 4), True)).__name__
        'Materialised'
    """
    positions, d_in, d_out = *inputs.shape[1:], deltas.shape[2]
    factors = OuterProducts(inputs, deltas, bias)
    if positions == 1 or d_out * (d_in + bias) > positions * (d_in + d_out):
        return factors
    return factors.formed()


def restore(tensors: dict[str, Tensor], bias: bool) -> LayerGradients:
    """Rebuild what :meth:`LayerGradients.tensors` took apart.

    Args:
        tensors: Its result.
        bias: Whether the layer has a bias.
    """
    if "gradients" in tensors:
        return Materialised(tensors["gradients"])
    return OuterProducts(tensors["inputs"], tensors["deltas"], bias)


def concatenate(parts: Sequence[LayerGradients]) -> LayerGradients:
    """Join gradients of one layer from several batches.

    Args:
        parts: At least one, all of the same layer. Batches may differ in their number of positions,
            and so in their form.

    Example:
        >>> len(concatenate([Materialised(torch.ones(2, 1, 1)), Materialised(torch.ones(3, 1, 1))]))
        5
    """
    factors = [part for part in parts if isinstance(part, OuterProducts)]
    if len(factors) < len(parts):
        formed = [part.formed() if isinstance(part, OuterProducts) else part for part in parts]
        return Materialised(torch.cat([part.tensors()["gradients"] for part in formed]))
    longest = max(part.inputs.shape[1] for part in factors)
    padded = [part.padded(longest) for part in factors]
    inputs = torch.cat([part.inputs for part in padded])
    deltas = torch.cat([part.deltas for part in padded])
    return OuterProducts(inputs, deltas, factors[0].bias)
