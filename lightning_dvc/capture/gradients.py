"""Per-sample gradients of one layer, formed only where that is the cheapest way to use them.

A layer whose output is ``W a + b`` at each of ``T`` positions has, for one sample, the weight
gradient ``sum_t delta_t [a_t; 1]^T``, with ``a_t`` the layer's input and ``delta_t`` the gradient
of the sample's own loss with respect to the output. Norms, inner products and sums follow from
``a`` and ``delta`` alone (Goodfellow 2015, arXiv 1510.01799; for tokens and convolutions, Li et
al. 2022, arXiv 2110.05679). A layer used several times in one forward pass is the same sum with
more positions, so shared layers need no special case.

With one position nothing is ever formed. With several, :meth:`LayerGradients.parts` forms the
gradients of a few samples at a time, asks everything of them while they are in the processor's
cache, and lets them go: forming costs as much as one product with a full gradient does without.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Final, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import override

# Numbers formed at a time on a CPU, by each thread where there are several: 2 to 4 MiB of float32,
# so that what is formed stays in the cache. Measured with examples/bench: a convolutional network
# takes twice as long with 16 MiB; a transformer on two threads a third longer with half as many,
# whose products then run on one of them.
_PART: Final = 2**19
_PART_PER_THREAD: Final = 2**20
# On an accelerator, where the number of calls is what costs.
_PART_ON_DEVICE: Final = 2**26
# Of a Gram block, whose other side is formed anew for each part of this one.
_GRAM_PART: Final = 2**23


class LayerGradients(ABC):
    """Gradients of ``n`` samples' own losses with respect to one layer's weight and bias.

    A full gradient is a ``(d_out, d_in)`` matrix, or ``(d_out, d_in + 1)`` with the bias as the
    last column.
    """

    @abstractmethod
    def __len__(self) -> int: ...

    @property
    @abstractmethod
    def full_shape(self) -> tuple[int, int]:
        """Shape of a full gradient."""

    @property
    def numbers(self) -> int:
        """Numbers for each sample in :meth:`tensors`."""
        return sum(x[0].numel() for x in self.tensors().values()) if len(self) else 0

    @property
    @abstractmethod
    def like(self) -> Tensor:
        """A tensor of the dtype and on the device of the gradients."""

    @property
    @abstractmethod
    def form(self) -> str:
        """In a few words, how the gradients are kept and used."""

    @abstractmethod
    def squared_norms(self) -> Tensor:
        """``(n,)`` squared Euclidean norms."""

    @abstractmethod
    def dot(self, full: Tensor) -> Tensor:
        """Inner product of each sample's gradient with a full gradient, ``(n,)``."""

    @abstractmethod
    def accumulate(self, into: Tensor) -> None:
        """Add all ``n`` gradients to a full gradient, in place."""

    @abstractmethod
    def rows(self, index: Tensor | slice) -> "LayerGradients":
        """Gradients of some of the samples, by position or mask."""

    @abstractmethod
    def formed(self) -> "Materialised":
        """The same, formed."""

    @abstractmethod
    def projected(self, left: Tensor, right: Tensor) -> "LayerGradients":
        """``left^T g right`` of each gradient.

        Args:
            left: ``(d_out, k)``.
            right: ``(columns, l)``.
        """

    @abstractmethod
    def bound(self) -> Tensor:
        """``(n,)`` at least the squared norms: those of the positions, added up as lengths."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """What the gradients are made of, each ``(n, ...)``, for a cache; see :meth:`restored`."""

    def restored(self, tensors: dict[str, Tensor]) -> "LayerGradients":
        """Rebuild, for this layer, what :meth:`tensors` took apart."""
        return Materialised(tensors["gradients"])

    def parts(
        self, numbers: int | None = None, order: Tensor | None = None
    ) -> Iterator[tuple[slice | Tensor, "LayerGradients"]]:
        """Split the samples so that several questions to each part cost least.

        Args:
            numbers: How many numbers one part may form; as many as suit the device, when not given.
            order: ``(n,)`` a permutation, the order in which samples come; as they are, when not
                given.

        Yields:
            Which samples, and their gradients; together all samples.
        """
        numbers = suitable_part(self.like.device) if numbers is None else numbers
        size = max(1, numbers // max(1, self.full_shape[0] * self.full_shape[1]))
        for start in range(0, max(1, len(self)), size):  # one part of no samples, if there are none
            rows = slice(start, start + size) if order is None else order[start : start + size]
            yield rows, self.rows(rows).formed()

    def gram(self, other: "LayerGradients") -> Tensor:
        """Inner products with the gradients of other samples in the same layer.

        Args:
            other: Gradients of ``m`` samples.

        Returns:
            ``(n, m)``.
        """
        return gram_of_parts(self.parts, other.parts)

    def sum(self) -> Tensor:
        """The sum of all ``n`` gradients, a full gradient."""
        total = self.like.new_zeros(self.full_shape)
        self.accumulate(total)
        return total

    def weighted_sum(self, weights: Tensor) -> Tensor:
        """The sum of all gradients, each times its weight, a full gradient.

        Args:
            weights: ``(n,)``.
        """
        weights, total = weights.to(self.like), self.like.new_zeros(self.full_shape)
        for rows, part in self.parts():
            total += torch.tensordot(weights[rows], part.formed().gradients, 1)
        return total


class Positional(LayerGradients):
    """Gradients kept position by position."""

    deltas: Tensor
    """``(n, T, d)`` gradient of each sample's own loss with respect to the layer's output."""

    @abstractmethod
    def padded(self, positions: int) -> "Positional":
        """The same with more positions, at which nothing happens."""

    @override
    def weighted_sum(self, weights: Tensor) -> Tensor:
        weighted = self.deltas * weights.to(self.like)[:, None, None]
        return self.restored({**self.tensors(), "deltas": weighted}).sum()


class OuterProducts(Positional):
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

    @property
    def positions(self) -> int:
        """Positions ``T`` of a sample."""
        return self.inputs.shape[1]

    @property
    @override
    def full_shape(self) -> tuple[int, int]:
        return self.deltas.shape[2], self.inputs.shape[2] + self.bias

    @property
    @override
    def like(self) -> Tensor:
        return self.deltas

    @property
    @override
    def form(self) -> str:
        return "factors" if self.positions == 1 else "factors, formed in parts"

    @override
    def squared_norms(self) -> Tensor:
        if self.positions == 1:
            inputs = self.inputs.squeeze(1).square().sum(1) + float(self.bias)
            lengths: Tensor = inputs * self.deltas.squeeze(1).square().sum(1)
            return lengths
        d_out, d_in = self.deltas.shape[2], self.inputs.shape[2]
        if self.positions * (d_in + d_out) > d_in * d_out:
            return torch.cat([part.squared_norms() for _, part in self.parts()])
        inputs = self.inputs @ self.inputs.transpose(1, 2) + float(self.bias)
        return (inputs * (self.deltas @ self.deltas.transpose(1, 2))).sum((1, 2))

    @override
    def dot(self, full: Tensor) -> Tensor:
        outputs = self.inputs @ full[:, : self.inputs.shape[2]].T
        if self.bias:
            outputs = outputs + full[:, -1]
        return (outputs * self.deltas).sum((1, 2))

    @override
    def accumulate(self, into: Tensor) -> None:
        deltas, d_in = self.deltas.flatten(0, 1), self.inputs.shape[2]
        into[:, :d_in].addmm_(deltas.T, self.inputs.flatten(0, 1))
        if self.bias:
            into[:, -1] += deltas.sum(0)

    @override
    def rows(self, index: Tensor | slice) -> "OuterProducts":
        index = on_device(index, self.inputs)
        return OuterProducts(self.inputs[index], self.deltas[index], self.bias)

    @override
    def formed(self) -> "Materialised":
        gradients = self.deltas.transpose(1, 2) @ self.inputs
        if self.bias:
            gradients = torch.cat([gradients, self.deltas.sum(1)[:, :, None]], dim=2)
        return Materialised(gradients)

    @override
    def projected(self, left: Tensor, right: Tensor) -> "OuterProducts":
        left, right = left.to(self.deltas), right.to(self.inputs)
        inputs = self.inputs @ right[: self.inputs.shape[2]]
        if self.bias:
            inputs = inputs + right[-1]
        return OuterProducts(inputs, self.deltas @ left, bias=False)

    @override
    def bound(self) -> Tensor:
        inputs = self.inputs.square().sum(2) + float(self.bias)
        return (inputs * self.deltas.square().sum(2)).sqrt().sum(1).square()

    @override
    def parts(
        self, numbers: int | None = None, order: Tensor | None = None
    ) -> Iterator[tuple[slice | Tensor, LayerGradients]]:
        if self.positions == 1:
            yield whole(self, order)
        else:
            yield from super().parts(numbers, order)

    @override
    def tensors(self) -> dict[str, Tensor]:
        return {"inputs": self.inputs, "deltas": self.deltas}

    @override
    def restored(self, tensors: dict[str, Tensor]) -> "OuterProducts":
        return OuterProducts(tensors["inputs"], tensors["deltas"], self.bias)

    @override
    def padded(self, positions: int) -> "OuterProducts":
        missing = (0, 0, 0, positions - self.positions)
        return OuterProducts(F.pad(self.inputs, missing), F.pad(self.deltas, missing), self.bias)


class Materialised(LayerGradients):
    """Gradients formed.

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

    @property
    @override
    def full_shape(self) -> tuple[int, int]:
        return self.gradients.shape[1], self.gradients.shape[2]

    @property
    @override
    def like(self) -> Tensor:
        return self.gradients

    @property
    @override
    def form(self) -> str:
        return "formed"

    @override
    def squared_norms(self) -> Tensor:
        lengths: Tensor = torch.linalg.vector_norm(self.gradients.flatten(1), dim=1)
        return lengths.square()

    @override
    def dot(self, full: Tensor) -> Tensor:
        return self.gradients.flatten(1) @ full.flatten()

    @override
    def accumulate(self, into: Tensor) -> None:
        into += self.gradients.sum(0)

    @override
    def rows(self, index: Tensor | slice) -> "Materialised":
        return Materialised(self.gradients[on_device(index, self.gradients)])

    @override
    def formed(self) -> "Materialised":
        return self

    @override
    def projected(self, left: Tensor, right: Tensor) -> "Materialised":
        return Materialised(left.to(self.gradients).T @ self.gradients @ right.to(self.gradients))

    @override
    def bound(self) -> Tensor:
        return self.squared_norms()

    @override
    def tensors(self) -> dict[str, Tensor]:
        return {"gradients": self.gradients}


def concatenate(parts: Sequence[LayerGradients]) -> LayerGradients:
    """Join gradients of one layer from several batches.

    Args:
        parts: At least one, all of the same layer. Batches may differ in their number of positions.

    Example:
        >>> len(concatenate([Materialised(torch.ones(2, 1, 1)), Materialised(torch.ones(3, 1, 1))]))
        5
    """
    factors = [part for part in parts if isinstance(part, Positional)]
    if len(factors) < len(parts):
        return Materialised(torch.cat([part.formed().gradients for part in parts]))
    longest = max(part.deltas.shape[1] for part in factors)
    padded = [part.padded(longest).tensors() for part in factors]
    joined = {name: torch.cat([tensors[name] for tensors in padded]) for name in padded[0]}
    return factors[0].restored(joined)


def _block(mine: LayerGradients, theirs: LayerGradients) -> Tensor:
    """Gram block of two parts."""
    if isinstance(mine, OuterProducts) and isinstance(theirs, OuterProducts):
        inputs = mine.inputs.squeeze(1) @ theirs.inputs.squeeze(1).T + float(mine.bias)
        return inputs * (mine.deltas.squeeze(1) @ theirs.deltas.squeeze(1).T)
    return mine.formed().gradients.flatten(1) @ theirs.formed().gradients.flatten(1).T


_Split: TypeAlias = Callable[[int], Iterable[tuple[slice | Tensor, LayerGradients]]]


def gram_of_parts(mine: _Split, theirs: _Split) -> Tensor:
    """Inner products ``(n, m)`` of two sets of gradients, by ways to split them into parts."""
    columns = [
        torch.cat([_block(one, other) for _, one in mine(_GRAM_PART)])
        for _, other in theirs(_GRAM_PART)
    ]
    return torch.cat(columns, dim=1)


def suitable_part(device: torch.device) -> int:
    """How many numbers to form at a time on a device."""
    if device.type != "cpu":
        return _PART_ON_DEVICE
    threads = torch.get_num_threads()
    return _PART if threads == 1 else threads * _PART_PER_THREAD


def whole(gradients: LayerGradients, order: Tensor | None) -> tuple[slice | Tensor, LayerGradients]:
    """The one part of gradients that need not be formed; see :meth:`LayerGradients.parts`."""
    if order is None:
        return slice(0, len(gradients)), gradients
    return order, gradients.rows(order)


def on_device(index: Tensor | slice, like: Tensor) -> Tensor | slice:
    """An index on the device of a tensor."""
    return index if isinstance(index, slice) else index.to(like.device)
