"""Gradient matching: samples whose weighted gradients add up to that of held-out samples.

Killamsetty et al., "GRAD-MATCH", ICML 2021: orthogonal matching pursuit, class by class, on the
gradients of the last layer.
"""

import numpy as np
import torch
from scipy.linalg import solve_triangular
from scipy.optimize import nnls
from torch import Tensor

from lightning_dvc.capture.gradients import concatenate
from lightning_dvc.errors import check_settings
from lightning_dvc.strategies.base import Round
from lightning_dvc.strategies.baseline import (
    Baseline,
    blocks,
    by_turns,
    last_layer,
    look,
    look_at_reference,
    places,
)

_LARGEST_BLOCK = 4096
_EXHAUSTED = 1e-6


class GradientMatching(Baseline):
    """Takes, class by class, the candidates that together match the reference's mean gradient.

    The reference are the held-out samples of the class, or selected ones where none are held out;
    of a class without any, its own candidates. Every class gets its share of the candidates. The
    method would also weigh the chosen samples in training; here each counts alike.

    Args:
        ridge: Weight of the squared weights in the fit, relative to the mean squared length of a
            gradient; at least 0.

    Raises:
        ConfigurationError: If ``ridge`` is out of its range.

    Example:
        >>> from lightning_dvc import DVCCallback
        >>> callback = DVCCallback(GradientMatching())
    """

    def __init__(self, ridge: float = 0.05) -> None:
        check_settings(("ridge", ridge, ridge >= 0, "at least 0"))
        self.ridge = ridge

    def values(self, this: Round, candidates: Tensor, quota: int) -> tuple[Tensor, Tensor]:
        """The order of choice, all classes together; see :func:`places`."""
        classes, wanted = look_at_reference(this, last_layer, gradients=True)
        ids, labels, kept = look(this, candidates, last_layer, gradients=True)
        targets, atoms = concatenate(wanted), concatenate(kept)
        chosen: list[Tensor] = []
        for members, count in blocks(labels, quota, _LARGEST_BLOCK):
            own = atoms.rows(members)
            like = classes == labels[members[0]]
            target = targets.rows(like) if bool(like.any()) else own
            gram = own.gram(own).double().cpu().numpy()
            products = own.dot(target.sum() / len(target)).double().cpu().numpy()
            chosen.append(members[match(gram, products, count, self.ridge)])
        return ids, places(by_turns(chosen), len(ids))


def match(gram: np.ndarray, products: np.ndarray, k: int, ridge: float) -> Tensor:
    """Choose atoms whose combination with weights of at least 0 is near a target.

    Orthogonal matching pursuit, repeated on what is left once the atoms chosen leave nothing more
    to match: after each, the weights of all its atoms are fitted again with none below 0
    (``scipy.optimize.nnls``), and atoms without a weight come last.

    Args:
        gram: ``(n, n)`` inner products of the atoms.
        products: ``(n,)`` their inner products with the target.
        k: How many to choose, at most ``n``.
        ridge: As for :class:`GradientMatching`.

    Returns:
        ``(k,)`` positions in the order of choice.

    Example:
        >>> gram = np.array([[1.0, 0.0, 0.9], [0.0, 1.0, 0.1], [0.9, 0.1, 1.0]])
        >>> match(gram, np.array([2.0, 1.0, 1.9]), k=2, ridge=0.0).tolist()
        [0, 1]
    """
    gram = gram + ridge * gram.diagonal().mean() * np.eye(len(gram))
    chosen: list[int] = []
    last: list[int] = []
    left = np.ones(len(gram), dtype=bool)
    while len(chosen) < k and left.any():
        picked, factor = _pursue(gram, products, k - len(chosen), left)
        if not picked:
            break
        left[picked] = False
        projected = solve_triangular(factor, products[picked], lower=True)
        weights, _ = nnls(factor.T, projected)
        chosen += [atom for atom, weight in zip(picked, weights, strict=True) if weight > 0]
        last += [atom for atom, weight in zip(picked, weights, strict=True) if weight <= 0]
    rest = np.flatnonzero(left)
    rest = rest[np.argsort(-products[rest], kind="stable")]
    return torch.tensor([*chosen, *last, *rest.tolist()][:k], dtype=torch.int64)


def _pursue(
    gram: np.ndarray, products: np.ndarray, k: int, free: np.ndarray
) -> tuple[list[int], np.ndarray]:
    """Orthogonal matching pursuit among free atoms, and the Cholesky factor of its Gram matrix."""
    free, residual = free.copy(), products.copy()
    factor = np.zeros((k, k))
    picked: list[int] = []
    while len(picked) < k:
        best = int(np.where(free, residual, -np.inf).argmax())
        if not free[best] or residual[best] <= _EXHAUSTED * abs(products).max():
            break
        free[best] = False
        size, row = len(picked), gram[picked, best]
        if picked:  # SciPy before 1.14 solves no empty system
            row = solve_triangular(factor[:size, :size], row, lower=True)
        square = gram[best, best] - row @ row
        if square <= _EXHAUSTED * gram[best, best]:  # a combination of the others
            continue
        factor[size, :size], factor[size, size] = row, np.sqrt(square)
        picked.append(best)
        own = factor[: size + 1, : size + 1]
        half = solve_triangular(own, products[picked], lower=True)
        weights = solve_triangular(own.T, half)
        residual = products - weights @ gram[picked]
    return picked, factor[: len(picked), : len(picked)]
