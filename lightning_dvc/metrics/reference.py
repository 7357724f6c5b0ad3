"""What relevance and gradient impact compare with: mean reference gradients, by class."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Protocol

import torch
from torch import Tensor
from typing_extensions import override

from lightning_dvc.capture.gradients import (
    LayerGradients,
    OuterProducts,
    concatenate,
)

MIN_CLASS_SAMPLES: Final = 3
"""Of a class with fewer reference samples than this, the mean gradient is not known."""


class MeanGradient(Protocol):
    """The mean gradient of some reference samples in one layer."""

    norm: Tensor
    """Its length, a scalar."""

    def products(self, gradients: LayerGradients) -> Tensor:
        """Its inner product with each of ``n`` gradients, ``(n,)``."""


class _Formed(MeanGradient):
    """The sum of ``count`` gradients, divided where it is used rather than copied."""

    def __init__(self, total: Tensor, count: float = 1) -> None:
        self._total = total
        self._count = count
        self.norm = torch.linalg.vector_norm(total) / count

    @override
    def products(self, gradients: LayerGradients) -> Tensor:
        return gradients.dot(self._total) / self._count


class _Factored(MeanGradient):
    """Cheaper than formed where ``m (d_in + d_out) < d_in d_out``, of ``m`` samples."""

    def __init__(self, members: LayerGradients) -> None:
        self._members = members
        self.norm = members.gram(members).mean().clamp(min=0).sqrt()

    @override
    def products(self, gradients: LayerGradients) -> Tensor:
        return gradients.gram(self._members).mean(1)


@dataclass(frozen=True)
class MeanGradients:
    """Mean reference gradients of one layer, by class and overall.

    Attributes:
        overall: Mean gradient over all reference samples, a full gradient.
        means: That of each class with enough samples, and last the one over all.
        column: ``(C + 1,)`` which of the means a label uses, -1 where too little is known; the last
            entry is for no class.
    """

    overall: Tensor
    means: list[MeanGradient]
    column: Tensor

    def columns(self, labels: Tensor) -> Tensor:
        """Which of the means ``(n,)`` labels use, ``(n,)``; -1 where too little is known."""
        n_classes = len(self.column) - 1
        found = self.column[torch.where(labels < n_classes, labels, -1)]
        # Where the reference has no classes at all, all are compared with its overall mean.
        return torch.where((labels >= n_classes) & (n_classes > 0), -1, found)

    def products(self, gradients: LayerGradients, columns: Tensor) -> Tensor:
        """Inner product of each gradient with one of the means.

        Args:
            gradients: Gradients of ``n`` samples.
            columns: ``(n,)`` which mean, any where that is -1; cheapest where equal ones follow
                each other.

        Returns:
            ``(n,)``.
        """
        found = [self.means[number].products(own) for number, own in runs(gradients, columns)]
        return torch.cat(found) if found else gradients.like.new_zeros(0)

    def norms(self, columns: Tensor) -> Tensor:
        """Lengths of the means that samples are compared with.

        Args:
            columns: ``(n,)`` which mean.

        Returns:
            ``(n,)``, at least 0; NaN where the mean is -1.
        """
        lengths = torch.stack([mean.norm for mean in self.means])
        columns = columns.to(lengths.device)
        return lengths[columns].masked_fill(columns < 0, torch.nan)


class ReferenceGradients:
    """Takes in the reference gradients of one layer, batch by batch.

    Example:
        >>> from lightning_dvc.capture.gradients import Materialised
        >>> seen = ReferenceGradients()
        >>> seen.add(Materialised(torch.ones(4, 2, 2)), torch.tensor([0, 0, 0, 1]))
        >>> reference = seen.means()
        >>> reference.column.tolist(), reference.overall.sum().item()
        ([0, -1, 1], 4.0)
    """

    def __init__(self) -> None:
        # Of factors with one position the samples are kept; of others only the sums by label. A
        # layer's batches may differ in it, as those of sentences do: then all are summed up.
        self._factors: list[LayerGradients] = []
        self._sums: dict[int, Tensor] = {}
        self._labels = torch.empty(0, dtype=torch.int64)

    def add(self, gradients: LayerGradients, labels: Tensor) -> None:
        """Take in a batch.

        Args:
            gradients: Gradients of ``m`` reference samples, ``m >= 1``.
            labels: ``(m,)`` classes, -1 where there is none.
        """
        before, self._labels = self._labels, torch.cat([self._labels, labels])
        one_position = isinstance(gradients, OuterProducts) and gradients.positions == 1
        if one_position and not self._sums:
            self._factors.append(gradients)
            return
        if self._factors:
            self._sum_up(concatenate(self._factors), before)
            self._factors.clear()
        self._sum_up(gradients, labels)

    def _sum_up(self, gradients: LayerGradients, labels: Tensor) -> None:
        for rows, part in gradients.parts(order=labels.argsort(stable=True)):
            for label, own in runs(part, labels[rows]):
                if label not in self._sums:
                    self._sums[label] = own.sum()
                else:
                    own.accumulate(self._sums[label])

    def means(self) -> MeanGradients:
        """Means over everything taken in."""
        n, labels = len(self._labels), self._labels
        factors = concatenate(self._factors) if self._factors else None
        overall = (sum_of(list(self._sums.values())) if factors is None else factors.sum()) / n
        n_classes = max(int(labels.max()) + 1, 0)
        counts = torch.bincount(labels[labels >= 0], minlength=n_classes)
        means: list[MeanGradient] = []
        column = torch.full((n_classes + 1,), -1)
        for label in torch.nonzero(counts >= MIN_CLASS_SAMPLES).flatten().tolist():
            column[label] = len(means)
            count = int(counts[label])
            if factors is None:
                means.append(_Formed(self._sums[label], count))
            else:
                means.append(_cheaper(factors.rows(labels == label), count))
        column[-1] = len(means)
        return MeanGradients(overall, [*means, _Formed(overall)], column)

    def blended(self, other: "ReferenceGradients", counting_as: float) -> MeanGradients:
        """Means over these samples and those of another set, which weigh less.

        Args:
            other: The other set, at least one sample.
            counting_as: As how many of these samples the others count together, above 0.
        """
        sums: dict[int, Tensor] = {}
        counts: dict[int, float] = {}
        for part, weight in ((self, 1.0), (other, counting_as / len(other._labels))):
            for label, (total, count) in part._by_label().items():
                before = sums.get(label)
                scaled = total * weight
                sums[label] = scaled if before is None else before.add_(scaled)
                counts[label] = counts.get(label, 0.0) + weight * count
        overall = sum_of(list(sums.values())) / sum(counts.values())
        means: list[MeanGradient] = []
        column = torch.full((max(max(counts) + 1, 0) + 1,), -1)
        for label in sorted(counts):
            if label >= 0 and counts[label] >= MIN_CLASS_SAMPLES:
                column[label] = len(means)
                means.append(_Formed(sums[label], counts[label]))
        column[-1] = len(means)
        return MeanGradients(overall, [*means, _Formed(overall)], column)

    def _by_label(self) -> dict[int, tuple[Tensor, int]]:
        """The sum and the number of the gradients of each label."""
        if self._factors:
            self._sum_up(concatenate(self._factors), self._labels)
            self._factors.clear()
        labels, counts = torch.unique(self._labels, return_counts=True)
        pairs = zip(labels.tolist(), counts.tolist(), strict=True)
        return {label: (self._sums[label], count) for label, count in pairs}


def _cheaper(members: LayerGradients, count: int) -> MeanGradient:
    rows, columns = members.full_shape
    if count * (rows + columns) < rows * columns:
        return _Factored(members)
    return _Formed(members.sum(), count)


def runs(gradients: LayerGradients, groups: Tensor) -> Iterator[tuple[int, LayerGradients]]:
    """Gradients in runs of one group, as they stand, without copying any.

    Args:
        gradients: Gradients of ``n`` samples.
        groups: ``(n,)`` int64.

    Yields:
        A group and the gradients of the next samples, which are all of this group.
    """
    values, lengths = torch.unique_consecutive(groups, return_counts=True)
    start = 0
    for group, length in zip(values.tolist(), lengths.tolist(), strict=True):
        yield group, gradients.rows(slice(start, start + length))
        start += length


def sum_of(parts: list[Tensor]) -> Tensor:
    """The sum of some full gradients, without stacking them."""
    total = parts[0].clone()
    for part in parts[1:]:
        total += part
    return total
