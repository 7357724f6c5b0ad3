"""How many samples a round may add, in all and from each source."""

import math
from collections.abc import Sequence
from numbers import Integral

import torch
from torch import Tensor

from lightning_dvc.errors import ConfigurationError, is_number
from lightning_dvc.policy.apportion import apportion

_ROUNDING = 1e-9


def resolve_budget(budget: int | float, n_samples: int) -> int:
    """Turn the user's budget into a number of samples.

    Args:
        budget: A fraction of all samples in ``(0, 1]`` if a float, a count if an int.
        n_samples: Samples in all sources together.

    Returns:
        The most samples that are ever selected at the same time, at least 1.

    Raises:
        ConfigurationError: If the budget is not above 0, or above what the sources hold.

    Example:
        >>> resolve_budget(0.2, 1000), resolve_budget(150, 1000)
        (200, 150)
    """
    if not (is_number(budget) and math.isfinite(budget)):
        raise ConfigurationError(
            f"budget must be a fraction of all samples (a float in (0, 1]) or a count (an int), "
            f"but is {budget!r}; pass 0.2 for a fifth, or 1000 for a thousand samples"
        )
    is_count = isinstance(budget, Integral)
    count = int(budget) if is_count else round(float(budget) * n_samples)
    most: float = n_samples if is_count else 1.0
    if not 0 < budget <= most:
        raise ConfigurationError(
            f"budget must be above 0 and at most {most} ({n_samples} samples in the sources), but "
            f"is {budget!r}; pass a float in (0, 1] for a fraction or an int for a count"
        )
    return max(1, count)


def warm_up_counts(
    budget: int, share: float, stock: Tensor, shares: Sequence[tuple[float, float]]
) -> Tensor:
    """Divide the unscored warm-up equally over the sources.

    Args:
        budget: Samples that may be selected.
        share: Part of the budget to start with, in ``(0, 1]``; every source gives at least one
            sample if the budget and its largest share allow.
        stock: ``(K,)`` samples of each source.
        shares: Least and largest share of the selection for each source.

    Returns:
        ``(K,)`` samples to draw from each source.

    Example:
        >>> warm_up_counts(100, 0.05, torch.tensor([50, 50]), [(0.0, 1.0), (0.8, 1.0)]).tolist()
        [1, 4]
    """
    quota = min(budget, max(math.ceil(share * budget - _ROUNDING), len(stock)))
    none = torch.zeros_like(stock)
    lower, upper = arm_bounds(none, quota, shares)
    return divide(quota, torch.ones(len(stock)), stock, lower, upper)


def divide(quota: int, shares: Tensor, stock: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
    """Divide a quota over the sources in proportion to shares.

    Args:
        quota: Samples to divide.
        shares: ``(K,)`` proportions, at least 0.
        stock: ``(K,)`` samples left in each source.
        lower: ``(K,)`` the least from each source while it has stock; where the quota is less than
            all of these, it is divided in proportion to them.
        upper: ``(K,)`` the most from each source.

    Returns:
        ``(K,)`` int64, with the sum ``quota`` if stock and upper bounds allow it.

    Example:
        >>> stock, none = torch.tensor([9, 1]), torch.tensor([0, 0])
        >>> divide(6, torch.ones(2), stock, none, stock).tolist()
        [5, 1]
    """
    upper = torch.minimum(upper, stock)
    lower = torch.minimum(lower, upper)
    if quota < int(lower.sum()):
        return apportion(quota, lower.double(), torch.zeros_like(lower), lower)
    return apportion(quota, shares, lower, upper)


def round_quota(budget: int, n_selected: int, number: int, n_rounds: int) -> int:
    """Samples that a round may add, so that what is left is spread evenly over the rounds to come.

    Args:
        budget: Samples that may be selected.
        n_selected: Samples selected at present.
        number: The round, from 1.
        n_rounds: The last round.

    Example:
        >>> round_quota(100, 10, number=1, n_rounds=3), round_quota(100, 40, 2, 3)
        (30, 30)
    """
    return math.ceil((budget - n_selected) / max(n_rounds - number + 1, 1))


def arm_bounds(
    counts: Tensor, total: int, shares: Sequence[tuple[float, float]]
) -> tuple[Tensor, Tensor]:
    """The least and the most that each source may add to keep its share.

    Args:
        counts: ``(K,)`` samples selected from each source at present.
        total: Samples selected once the round is over.
        shares: Least and largest share of the selection for each source.

    Returns:
        ``(K,)`` least and ``(K,)`` most, int64.

    Example:
        >>> arm_bounds(torch.tensor([4, 1]), 10, [(0.0, 0.5), (0.3, 1.0)])
        (tensor([0, 2]), tensor([1, 9]))
    """
    least = torch.tensor([math.ceil(low * total - _ROUNDING) for low, _ in shares])
    most = torch.tensor([math.floor(high * total + _ROUNDING) for _, high in shares])
    # Where no whole number lies between the shares, the larger share is the one to keep.
    least = torch.minimum(least, most)
    return (least - counts).clamp(min=0), (most - counts).clamp(min=0)


def bounds_by_yield(
    usable: Tensor, drawn: Tensor, unseen: Tensor, bounds: tuple[Tensor, Tensor], wanted: int
) -> tuple[Tensor, Tensor]:
    """Bounds of how many more candidates to draw from each source, after what the first ones gave.

    Of each source no more than are likely usable of those not drawn, while these are enough in all;
    else at least as many, so that the rest is divided over what is left. So little is spent on a
    source that only repeats itself.

    Args:
        usable: ``(K,)`` candidates that could be selected, of those drawn.
        drawn: ``(K,)`` candidates drawn so far.
        unseen: ``(K,)`` samples not drawn.
        bounds: ``(K,)`` the least and ``(K,)`` the most to draw in any case.
        wanted: Candidates to draw in all.

    Returns:
        ``(K,)`` least and ``(K,)`` most, int64, each at most ``unseen``.

    Example:
        >>> usable, drawn, unseen = (torch.tensor(n) for n in ([9, 0], [10, 10], [60, 60]))
        >>> any_number = (torch.tensor([0, 0]), torch.tensor([99, 99]))
        >>> bounds_by_yield(usable, drawn, unseen, any_number, wanted=40)
        (tensor([0, 0]), tensor([50,  5]))
        >>> bounds_by_yield(usable, drawn, unseen, any_number, wanted=80)
        (tensor([50,  5]), tensor([60, 60]))
    """
    floor, ceiling = (torch.minimum(bound, unseen) for bound in bounds)
    # Laplace's rule of succession: of a source without candidates nothing is known.
    likely = -(-(usable + 1) * unseen // (drawn + 2))  # rounded up, and exact
    likely = likely.maximum(floor).minimum(ceiling)
    return (floor, likely) if int(likely.sum()) >= wanted else (likely, ceiling)
