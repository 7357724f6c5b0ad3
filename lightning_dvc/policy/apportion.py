"""Whole numbers in given proportions and between given bounds."""

import torch
from torch import Tensor

_LEAST_SHARE = 1e-200
_REMAINDER_DECIMALS = 9


def apportion(quota: int, shares: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
    """Divide a quota in proportion to shares, each part between its bounds.

    The parts are ``clamp(scale * shares, lower, upper)`` with the one scale at which they sum to
    the quota, so that what a full arm leaves goes to the others in proportion; then they are
    rounded by the largest remainder, ties to the lower position. Shares that vanish are equal and
    come after all others.

    Args:
        quota: What to divide.
        shares: ``(K,)`` proportions, at least 0 and finite.
        lower: ``(K,)`` int64, the least of each part, at least 0.
        upper: ``(K,)`` int64, the most of each part, at least ``lower``.

    Returns:
        ``(K,)`` int64 between the bounds, with the sum ``quota`` if the bounds allow it, else
        all at the bound in the way.

    Example:
        >>> zeros = torch.zeros(3, dtype=torch.int64)
        >>> apportion(10, torch.tensor([8, 1, 1]), zeros, torch.tensor([4, 9, 9])).tolist()
        [4, 3, 3]
    """
    if quota >= int(upper.sum()):
        return upper.clone()
    if quota <= int(lower.sum()):
        return lower.clone()
    # Neither a share of zero nor one of 1e-300 may need an infinite scale.
    shares = shares.to(torch.float64).clamp(min=_LEAST_SHARE)
    parts = _scaled(_scale(quota, shares, lower, upper), shares, lower, upper)[0]
    whole = parts.floor().to(torch.int64)
    # Rounded, so that a tie is a tie whatever the last bits of the shares are.
    remainders = ((parts - whole) * 10**_REMAINDER_DECIMALS).round()
    remainders[whole >= upper] = -1
    most = torch.argsort(remainders, descending=True, stable=True)
    whole[most[: quota - int(whole.sum())]] += 1
    return whole


def _scaled(scales: Tensor, shares: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
    """Parts ``(s, K)`` at each of ``s`` scales."""
    return torch.clamp(scales[:, None] * shares, lower.double(), upper.double())


def _scale(quota: int, shares: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
    """The scale ``(1,)`` at which the parts sum to the quota.

    The sum is piecewise linear in the scale and bends where a part meets a bound: find the piece,
    then interpolate.
    """
    bends = torch.cat([lower / shares, upper / shares]).sort().values
    sums = _scaled(bends, shares, lower, upper).sum(1)
    # The last bend sums to more than the quota; the first to lower.sum(), the least there is.
    right = torch.searchsorted(sums, float(quota), right=True).clamp(1, len(sums) - 1)
    run, rise = bends[right] - bends[right - 1], sums[right] - sums[right - 1]
    scale = bends[right - 1] + run * (quota - sums[right - 1]) / rise
    return scale.reshape(1)
