"""What relevance and gradient impact compare with: mean reference gradients, by class."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

import torch
from torch import Tensor
from typing_extensions import override

from lightning_dvc.capture.gradients import (
    LayerGradients,
    Materialised,
    OuterProducts,
    concatenate,
)

MIN_CLASS_SAMPLES: Final = 3
"""Of a class with fewer reference samples than this, the mean gradient is not known."""


class Means(Protocol):
    """The mean gradients of ``M`` groups of reference samples in one layer."""

    norms: Tensor
    """``(M,)`` their lengths."""

    def products(self, gradients: LayerGradients, columns: Tensor) -> Tensor:
        """Inner product of each gradient with one of the means.

        Args:
            gradients: Gradients of ``n`` samples.
            columns: ``(n,)`` which mean, any where that is -1.

        Returns:
            ``(n,)``.
        """


class FormedMeans(Means):
    """Means as full gradients.

    Args:
        full: ``(M, d_out, columns)``.
    """

    def __init__(self, full: Tensor) -> None:
        self._full = full
        self.norms = torch.linalg.vector_norm(full.flatten(1), dim=1)

    @override
    def products(self, gradients: LayerGradients, columns: Tensor) -> Tensor:
        many = _n_runs(columns) >= len(self._full) > 1
        if isinstance(gradients, Materialised) and many:
            # All with all in one call, where there would be as many calls as means.
            every = gradients.gradients.flatten(1) @ self._full.flatten(1).T
            wanted = columns.clamp(min=0).to(every.device)
            products: Tensor = every.gather(1, wanted[:, None]).squeeze(1)
            return products
        found = [gradients.like.new_zeros(0)]
        found += [own.dot(self._full[number]) for number, own in runs(gradients, columns)]
        return torch.cat(found)


class FactoredMeans(Means):
    """Means of factors with one position, formed only where that is cheaper.

    Args:
        members: Of each group its samples, or their mean as a full gradient.
    """

    def __init__(self, members: Sequence[LayerGradients | Tensor]) -> None:
        self._members = members
        self.norms = torch.stack([_length(own) for own in members])

    @override
    def products(self, gradients: LayerGradients, columns: Tensor) -> Tensor:
        order = columns.argsort(stable=True)
        if _n_runs(columns) > _n_runs(columns[order]):
            # Factors are small beside what they are multiplied with: sorted, for fewer products.
            ordered = self.products(gradients.rows(order), columns[order])
            return ordered[order.argsort().to(ordered.device)]
        found = [gradients.like.new_zeros(0)]
        for number, own in runs(gradients, columns):
            mean = self._members[number]
            found.append(own.dot(mean) if isinstance(mean, Tensor) else own.gram(mean).mean(1))
        return torch.cat(found)


def _length(mean: LayerGradients | Tensor) -> Tensor:
    if isinstance(mean, Tensor):
        return mean.square().sum().sqrt()
    return mean.gram(mean).mean().clamp(min=0).sqrt()


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
    means: Means
    column: Tensor

    def columns(self, labels: Tensor) -> Tensor:
        """Which of the means ``(n,)`` labels use, ``(n,)``; -1 where too little is known."""
        n_classes = len(self.column) - 1
        found = self.column[torch.where(labels < n_classes, labels, -1)]
        # Where the reference has no classes at all, all are compared with its overall mean.
        return torch.where((labels >= n_classes) & (n_classes > 0), -1, found)

    def products(self, gradients: LayerGradients, columns: Tensor) -> Tensor:
        """As :meth:`Means.products`; cheapest where equal columns follow each other."""
        return self.means.products(gradients, columns)

    def norms(self, columns: Tensor) -> Tensor:
        """Lengths of the means that samples are compared with.

        Args:
            columns: ``(n,)`` which mean.

        Returns:
            ``(n,)``, at least 0; NaN where the mean is -1.
        """
        lengths = self.means.norms
        columns = columns.to(lengths.device)
        return lengths[columns].masked_fill(columns < 0, torch.nan)


class ReferenceGradients:
    """Takes in the reference gradients of one layer, batch by batch.

    Once asked for its means, it is empty again: of many classes the sums are large.

    Args:
        most_classes: Of so many classes at most sums are kept, each as large as the layer: of those
            in the first batches, and of the larger ones there. The samples of others count among
            all only. Layers of one position, whose samples are kept, know all classes. At least 0.

    Example:
        >>> from lightning_dvc.capture.gradients import Materialised
        >>> seen = ReferenceGradients()
        >>> seen.add(Materialised(torch.ones(4, 2, 2)), torch.tensor([0, 0, 0, 1]))
        >>> reference = seen.means()
        >>> reference.column.tolist(), reference.overall.sum().item()
        ([0, -1, 1], 4.0)
    """

    def __init__(self, most_classes: int = sys.maxsize) -> None:
        self._most_classes = most_classes
        # Of factors with one position the samples are kept; of others only the sums by label. A
        # layer's batches may differ in it, as those of sentences do: then all are summed up.
        self._factors: list[LayerGradients] = []
        self._labels: list[Tensor] = []
        self._sums: dict[int, tuple[Tensor, float]] = {}

    def add(self, gradients: LayerGradients, labels: Tensor) -> None:
        """Take in a batch.

        Args:
            gradients: Gradients of ``m`` reference samples, ``m >= 1``.
            labels: ``(m,)`` classes, -1 where there is none.
        """
        one_position = isinstance(gradients, OuterProducts) and gradients.positions == 1
        if one_position and not self._sums:
            self._factors.append(gradients)
            self._labels.append(labels)
        else:
            self._sum_up_factors()
            self._sum_up(gradients, labels)

    def _sum_up_factors(self) -> None:
        if self._factors:
            self._sum_up(*self._let_go_factors())

    def _sum_up(self, gradients: LayerGradients, labels: Tensor) -> None:
        labels = self._without_classes_too_many(labels)
        for rows, part in gradients.parts(order=labels.argsort(stable=True)):
            for label, own in runs(part, labels[rows]):
                total, count = self._sums.get(label) or (own.like.new_zeros(own.full_shape), 0)
                own.accumulate(total)
                self._sums[label] = total, count + len(own)

    def _without_classes_too_many(self, labels: Tensor) -> Tensor:
        """Labels, -1 for classes of which no sum is to be kept."""
        found, counts = torch.unique(labels, return_counts=True)
        known = torch.isin(found, torch.tensor([-1, *self._sums]))
        room = self._most_classes - sum(label >= 0 for label in self._sums)
        fresh = found[~known][counts[~known].argsort(descending=True, stable=True)]
        return labels.masked_fill(torch.isin(labels, fresh[room:]), -1)

    def means(self) -> MeanGradients:
        """Means over everything taken in."""
        if not self._factors:
            return _formed_means(self._let_go())
        factors, labels = self._let_go_factors()
        overall = factors.sum() / len(labels)
        members: list[LayerGradients | Tensor] = []
        column = torch.full((max(int(labels.max()) + 1, 0) + 1,), -1)
        counts = torch.bincount(labels[labels >= 0])
        for label in torch.nonzero(counts >= MIN_CLASS_SAMPLES).flatten().tolist():
            column[label] = len(members)
            members.append(_cheaper(factors.rows(labels == label)))
        column[-1] = len(members)
        return MeanGradients(overall, FactoredMeans([*members, overall]), column)

    def blended(self, other: "ReferenceGradients", counting_as: float) -> MeanGradients:
        """Means over these samples and those of another set, which weigh less.

        Args:
            other: The other set, at least one sample.
            counting_as: As how many of these samples the others count together, above 0.
        """
        both, others = self._let_go(), other._let_go()
        weight = counting_as / sum(count for _, count in others.values())
        for label, (total, count) in others.items():
            before, known = both.get(label) or (torch.zeros_like(total), 0)
            both[label] = before.add_(total, alpha=weight), known + weight * count
        return _formed_means(both)

    def _let_go_factors(self) -> tuple[LayerGradients, Tensor]:
        found = concatenate(self._factors), torch.cat(self._labels)
        self._factors, self._labels = [], []
        return found

    def _let_go(self) -> dict[int, tuple[Tensor, float]]:
        """The sum and the number of the gradients of each label."""
        self._sum_up_factors()
        sums, self._sums = self._sums, {}
        return sums


def _formed_means(by_label: Mapping[int, tuple[Tensor, float]]) -> MeanGradients:
    """Means of sums: by label, the sum and the number of its gradients."""
    known = sorted(
        label for label, (_, n) in by_label.items() if label >= 0 and n >= MIN_CLASS_SAMPLES
    )
    column = torch.full((max(max(by_label) + 1, 0) + 1,), -1)
    column[[*known, -1]] = torch.arange(len(known) + 1)
    total = sum_of([total for total, _ in by_label.values()])
    full = torch.stack([*(by_label[label][0] for label in known), total])
    counts = [*(by_label[label][1] for label in known), sum(n for _, n in by_label.values())]
    full /= full.new_tensor(counts)[:, None, None]
    return MeanGradients(full[-1], FormedMeans(full), column)


def _cheaper(members: LayerGradients) -> LayerGradients | Tensor:
    rows, columns = members.full_shape
    if len(members) * (rows + columns) < rows * columns:
        return members
    return members.sum() / len(members)


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


def _n_runs(groups: Tensor) -> int:
    return 1 + int((groups[1:] != groups[:-1]).sum())


def sum_of(parts: list[Tensor]) -> Tensor:
    """The sum of some full gradients, without stacking them."""
    total = parts[0].clone()
    for part in parts[1:]:
        total += part
    return total
