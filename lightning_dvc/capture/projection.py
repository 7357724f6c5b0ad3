"""Factored random projection of gradients that are too large to be kept in full.

``P^T g Q`` with independent normal ``P`` and ``Q`` keeps inner products of gradients on average
(Johnson and Lindenstrauss, 1984; factored as in LoGra, Choe et al. 2024, arXiv 2405.13954). Of a
sum of outer products it is the sum of the outer products of ``P^T delta`` and ``Q^T [a; 1]``: a
projected gradient is a smaller gradient of the same kind, and nothing after this knows of it.
"""

import math
import zlib
from collections.abc import Mapping
from typing import Final

import torch
from torch import Tensor, nn

from lightning_dvc.capture.gradients import LayerGradients
from lightning_dvc.capture.kinds import full_shape, kind_of
from lightning_dvc.randomness import torch_stream

WIDTH: Final = 256
"""Rows and columns that are left. The cosine of two gradients of rank 1 that share one factor and
are at a right angle in the other, which is 0, comes out with a standard deviation of
``1 / sqrt(WIDTH)``, 6%."""


class Projection:
    """Projects the gradients of one layer.

    Args:
        full_shape: ``(d_out, columns)`` of a full gradient.
        name: Name of the layer; the same name, shape and width make the same projection.
        width: Rows and columns that are left, at least 1; a side that has no more stays.

    Example:
        >>> from lightning_dvc.capture.gradients import OuterProducts
        >>> g = OuterProducts(torch.ones(2, 1, 1000), torch.ones(2, 1, 10), bias=True)
        >>> Projection(g.full_shape, "head")(g).full_shape
        (10, 256)
    """

    def __init__(self, full_shape: tuple[int, int], name: str, width: int = WIDTH) -> None:
        purpose = zlib.crc32(name.encode())
        self._left, self._right = (
            _side(size, width, purpose, number) for number, size in enumerate(full_shape)
        )

    def __call__(self, gradients: LayerGradients) -> LayerGradients:
        """Project the gradients of ``n`` samples."""
        return gradients.projected(self._left, self._right)


def plan_projections(layers: Mapping[str, nn.Module], exact_numbers: int) -> dict[str, Projection]:
    """Decide which layers' gradients are projected, from their shapes alone.

    Args:
        layers: Name to layer, from :func:`lightning_dvc.capture.layers.find_layers`.
        exact_numbers: Most numbers in the full gradients of all layers together. The largest
            layers are projected until the others fit.

    Returns:
        Name to projection, of the layers that are projected.

    Example:
        >>> layers = {"body": nn.Linear(1000, 1000), "head": nn.Linear(1000, 10)}
        >>> list(plan_projections(layers, exact_numbers=100_000))
        ['body']
    """
    shapes = {name: full_shape(layer) for name, layer in layers.items()}
    total = sum(rows * columns for rows, columns in shapes.values())
    projected = {}
    for name in sorted(shapes, key=lambda name: shapes[name][0] * shapes[name][1], reverse=True):
        kind = kind_of(layers[name])
        if total <= exact_numbers:
            break
        if kind is not None and kind.can_be_projected(layers[name]) and max(shapes[name]) > WIDTH:
            total -= shapes[name][0] * shapes[name][1]
            projected[name] = Projection(shapes[name], name)
    return projected


def _side(size: int, width: int, purpose: int, number: int) -> Tensor:
    if size <= width:
        return torch.eye(size)
    generator = torch_stream(purpose, "projection", number)
    return torch.randn(size, width, generator=generator) / math.sqrt(width)
