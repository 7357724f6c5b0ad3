"""Per-sample gradients of embeddings: a few rows of a large table each."""

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import override

from lightning_dvc.capture.gradients import (
    LayerGradients,
    Materialised,
    OuterProducts,
    Positional,
    gram_of_parts,
    on_device,
    suitable_part,
    whole,
)


class Scattered(Positional):
    """Gradients of an embedding: the rows of its table that a sample looks up, and no others.

    Args:
        tokens: ``(n, T)`` int64 rows of the table, each at least 0.
        deltas: ``(n, T, d)`` gradient of each sample's own loss with respect to what was looked up,
            0 where it does not count.
        n_tokens: Rows of the table, ``V``.

    A full gradient is ``(V, d)``.

    Example:
        >>> g = Scattered(torch.tensor([[0, 2, 2]]), torch.ones(1, 3, 1), n_tokens=3)
        >>> g.squared_norms(), g.sum().tolist()
        (tensor([5.]), [[1.0], [0.0], [2.0]])
    """

    def __init__(self, tokens: Tensor, deltas: Tensor, n_tokens: int) -> None:
        self.tokens = tokens
        self.deltas = deltas
        self.n_tokens = n_tokens

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    @override
    def full_shape(self) -> tuple[int, int]:
        return self.n_tokens, self.deltas.shape[2]

    @property
    @override
    def like(self) -> Tensor:
        return self.deltas

    @property
    @override
    def form(self) -> str:
        return "scattered over tokens"

    @override
    def squared_norms(self) -> Tensor:
        found = []
        size = max(1, suitable_part(self.like.device) // max(1, self.tokens.shape[1] ** 2))
        for start in range(0, max(1, len(self)), size):
            rows = slice(start, start + size)
            tokens, deltas = self.tokens[rows], self.deltas[rows]
            same = tokens[:, :, None] == tokens[:, None, :]
            found.append((same * (deltas @ deltas.transpose(1, 2))).sum((1, 2)))
        return torch.cat(found)

    @override
    def dot(self, full: Tensor) -> Tensor:
        return (F.embedding(self.tokens, full) * self.deltas).sum((1, 2))

    @override
    def accumulate(self, into: Tensor) -> None:
        into.index_add_(0, self.tokens.flatten(), self.deltas.flatten(0, 1))

    @override
    def rows(self, index: Tensor | slice) -> "Scattered":
        index = on_device(index, self.deltas)
        return Scattered(self.tokens[index], self.deltas[index], self.n_tokens)

    @override
    def formed(self) -> Materialised:
        full = self.deltas.new_zeros(len(self), *self.full_shape)
        where = self.tokens[:, :, None].expand_as(self.deltas)
        return Materialised(full.scatter_add_(1, where, self.deltas))

    @override
    def projected(self, left: Tensor, right: Tensor) -> OuterProducts:
        looked_up = F.embedding(self.tokens, left.to(self.deltas))
        return OuterProducts(self.deltas @ right.to(self.deltas), looked_up, bias=False)

    @override
    def bound(self) -> Tensor:
        return self.deltas.square().sum(2).sqrt().sum(1).square()

    @override
    def parts(
        self, numbers: int | None = None, order: Tensor | None = None
    ) -> Iterator[tuple[slice | Tensor, LayerGradients]]:
        yield whole(self, order)

    @override
    def gram(self, other: LayerGradients) -> Tensor:
        assert isinstance(other, Scattered)
        # Formed over the tokens that occur here, which are few of a large table.
        both = torch.cat([self.tokens.flatten(), other.tokens.flatten()])
        known, place = torch.unique(both, return_inverse=True)
        mine, theirs = place.split([self.tokens.numel(), other.tokens.numel()])
        left = Scattered(mine.view_as(self.tokens), self.deltas, len(known))
        right = Scattered(theirs.view_as(other.tokens), other.deltas, len(known))
        formed = [partial(LayerGradients.parts, gradients) for gradients in (left, right)]
        return gram_of_parts(*formed)

    @override
    def tensors(self) -> dict[str, Tensor]:
        return {"tokens": self.tokens, "deltas": self.deltas}

    @override
    def restored(self, tensors: dict[str, Tensor]) -> "Scattered":
        return Scattered(tensors["tokens"], tensors["deltas"], self.n_tokens)

    @override
    def padded(self, positions: int) -> "Scattered":
        missing = positions - self.tokens.shape[1]
        tokens = F.pad(self.tokens, (0, missing))
        return Scattered(tokens, F.pad(self.deltas, (0, 0, 0, missing)), self.n_tokens)
