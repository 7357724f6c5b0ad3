"""A recipe for six unequal sources out of one clean data set, so that the truth is known.

| source | what is wrong with it |
|---|---|
| clean | nothing |
| some_wrong_labels | 20% of the labels are replaced by another class |
| noisy_features | Gaussian noise of one standard deviation on every feature |
| skewed_classes | a third of the classes only, filled up by repetition |
| near_duplicates | 5% of the samples, repeated with noise of 0.05 standard deviations |
| many_wrong_labels | 50% of the labels are replaced by another class |
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

NOISE = 1.0
DUPLICATE_NOISE = 0.05
DISTINCT_SHARE = 0.05


@dataclass(frozen=True)
class Part:
    """The samples of one source.

    Attributes:
        features: ``(s, d)``.
        labels: ``(s,)`` classes.
        is_clean: ``(s,)`` true for the right label on untouched features that repeat no other
            sample of the source.
    """

    features: Tensor
    labels: Tensor
    is_clean: Tensor

    def dataset(self) -> TensorDataset:
        """Features and labels."""
        return TensorDataset(self.features, self.labels)


def make_sources(features: Tensor, labels: Tensor, n_classes: int, seed: int) -> dict[str, Part]:
    """Deal a clean data set out to six sources of equal size and spoil five of them.

    Args:
        features: ``(n, d)``, standardised: noise is added in units of 1.
        labels: ``(n,)`` classes in ``0 .. n_classes - 1``.
        n_classes: Number of classes.
        seed: Of everything that is drawn.

    Returns:
        Name to source, ``n // 6`` samples each.

    Example:
        >>> parts = make_sources(torch.randn(60, 2), torch.arange(60) % 3, 3, seed=0)
        >>> len(parts), int(parts["many_wrong_labels"].is_clean.sum())
        (6, 5)
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(features), generator=generator)
    size = len(features) // len(RECIPES)
    parts = {}
    for number, (name, spoil) in enumerate(RECIPES.items()):
        mine = order[number * size : (number + 1) * size]
        part = Part(features[mine], labels[mine], torch.ones(size, dtype=torch.bool))
        parts[name] = spoil(part, n_classes, generator)
    return parts


def _leave(part: Part, n_classes: int, generator: torch.Generator) -> Part:
    return part


def _wrong_labels(share: float) -> Callable[[Part, int, torch.Generator], Part]:
    def spoil(part: Part, n_classes: int, generator: torch.Generator) -> Part:
        n = len(part.labels)
        wrong = torch.randperm(n, generator=generator)[: round(share * n)]
        shift = torch.randint(1, n_classes, (len(wrong),), generator=generator)
        labels, is_clean = part.labels.clone(), part.is_clean.clone()
        labels[wrong] = (labels[wrong] + shift) % n_classes
        is_clean[wrong] = False
        return Part(part.features, labels, is_clean)

    return spoil


def _noise(part: Part, n_classes: int, generator: torch.Generator) -> Part:
    noise = NOISE * torch.randn(part.features.shape, generator=generator)
    return Part(part.features + noise, part.labels, torch.zeros_like(part.is_clean))


def _skew(part: Part, n_classes: int, generator: torch.Generator) -> Part:
    kept = torch.randperm(n_classes, generator=generator)[: max(1, n_classes // 3)]
    members = torch.nonzero(torch.isin(part.labels, kept)).flatten()
    return _repeat(part, members if len(members) else torch.arange(1), 0.0, generator)


def _near_duplicates(part: Part, n_classes: int, generator: torch.Generator) -> Part:
    distinct = max(1, round(DISTINCT_SHARE * len(part.labels)))
    return _repeat(part, torch.arange(distinct), DUPLICATE_NOISE, generator)


def _repeat(part: Part, members: Tensor, noise: float, generator: torch.Generator) -> Part:
    """Fill the source up with repetitions of some of its samples, in a random order."""
    n = len(part.labels)
    is_first = torch.arange(n) < len(members)
    chosen = members.repeat(-(-n // len(members)))[:n]
    features = part.features[chosen]
    features = features + noise * ~is_first[:, None] * torch.randn(
        features.shape, generator=generator
    )
    order = torch.randperm(n, generator=generator)
    return Part(features[order], part.labels[chosen][order], is_first[order])


RECIPES: dict[str, Callable[[Part, int, torch.Generator], Part]] = {
    "clean": _leave,
    "some_wrong_labels": _wrong_labels(0.2),
    "noisy_features": _noise,
    "skewed_classes": _skew,
    "near_duplicates": _near_duplicates,
    "many_wrong_labels": _wrong_labels(0.5),
}
