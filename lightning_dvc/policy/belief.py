"""Which samples the model disbelieves: those less plausible to it than held-out ones can be.

A wrong label is implausible to a model that has learnt something, but so is a right one on a hard
sample, and hard samples are worth the most. What tells them apart is where they come from: among
samples of a clean source, implausible ones are as rare as among the held-out samples, in a source
of wrong labels there are too many. So each source is tested for outliers against the held-out
samples (conformal p-values, Bates et al., 2023), with the false discoveries bounded as a share of
what is disbelieved (Benjamini and Hochberg, 1995). Where all is well, hardly anything is rejected.

A model finds samples plausible that it has been trained on, wrong ones, too. So samples in training
are tested beside held-out ones and beside such as are in training as well, from the sources that
passed the test with what had not been.

Measured beside one threshold for all sources, a quantile of the held-out samples' plausibility:
docs/tried.md.
"""

from typing import Final

import torch
from torch import Tensor

from lightning_dvc.distinct import distinct_rows
from lightning_dvc.errors import ConfigurationError

_ENOUGH: Final = 20
_NEXT_TO_NONE: Final = 0.02


def conformal_p_values(confidence: Tensor, reference: Tensor) -> Tensor:
    """How rare a confidence as low as a sample's is among reference samples.

    ``p = (1 + #{reference <= confidence}) / (m + 1)``, which for a sample like the reference is at
    most ``u`` with a probability of at most ``u`` (Bates et al., 2023, equation 3). Compared are
    means over model states, later ones being surer of everything: of the sample over those that saw
    it, of the reference over the same and those from before the sample was first seen. These make
    the comparison easier on a new sample, which was chosen because it was hard.

    Args:
        confidence: ``(n, S)`` how plausible each of ``S`` model states, the latest first, finds a
            sample's target, a probability or any number that grows with it; NaN where it is not
            known.
        reference: ``(m, S)`` the same of reference samples.

    Returns:
        ``(n,)`` float64 in ``(0, 1]``; NaN where no state saw the sample, or none of those compared
        saw the reference.

    Example:
        >>> reference = torch.tensor([[0.2, 0.1], [0.5, 0.3], [0.9, 0.4]])
        >>> confidence = torch.tensor([[0.1, 0.5], [torch.nan, 0.3], [torch.nan, torch.nan]])
        >>> conformal_p_values(confidence, reference)
        tensor([0.5000, 0.7500,    nan], dtype=torch.float64)
    """
    confidence, reference = confidence.cpu(), reference.cpu()
    own, seen = confidence.nanmean(1), ~confidence.isnan()
    before_first = seen.flip(1).cumsum(1).flip(1) == 0
    compared = seen | before_first
    p_values = torch.full((len(confidence),), torch.nan, dtype=torch.float64)
    for rows in _alike(compared):
        others = reference[:, compared[rows[0]]].nanmean(1)
        others = others[~others.isnan()].sort().values
        if len(others):
            below = torch.searchsorted(others, own[rows], right=True)
            p_values[rows] = (1 + below.double()) / (len(others) + 1)
    return p_values.masked_fill(own.isnan(), torch.nan)


def _alike(rows: Tensor) -> tuple[Tensor, ...]:
    """Positions of equal rows of ``(n, S)`` bool, a tensor for each row that there is."""
    _, number = distinct_rows(rows)
    groups: tuple[Tensor, ...] = number.argsort(stable=True).split(number.bincount().tolist())
    return groups


def disbelieved(p_values: Tensor, arms: Tensor, rate: float) -> Tensor:
    """Samples whose targets are too implausible for too many of their source.

    The procedure of Benjamini and Hochberg (1995) in each source by itself: of its ``n_k`` samples
    in ascending order of their p-values, the first ``i`` are rejected, with the largest ``i`` for
    which the ``i``-th p-value is at most ``rate * i / n_k``.

    Args:
        p_values: ``(n,)`` from :func:`conformal_p_values`; what is NaN is no test.
        arms: ``(n,)`` the source of each sample.
        rate: False discovery rate in ``[0, 1]``: of those disbelieved, the share that may be like
            the reference after all. 0 disbelieves nothing.

    Returns:
        ``(n,)`` bool.

    Raises:
        ConfigurationError: If the rate is outside ``[0, 1]``.

    Example:
        >>> p_values = torch.tensor([0.02, 0.6, 0.7, 0.8] + [0.02, 0.02, 0.02, 0.9])
        >>> arms = torch.tensor([0] * 4 + [1] * 4)
        >>> disbelieved(p_values, arms, rate=0.05).tolist()
        [False, False, False, False, True, True, True, False]
    """
    if not 0 <= rate <= 1:
        raise ConfigurationError(
            f"rate must be in [0, 1], but is {rate}; pass the share of false discoveries, as 0.2"
        )
    rejected = torch.zeros(len(p_values), dtype=torch.bool)
    known = ~p_values.isnan()
    for arm in arms.unique():
        own = torch.nonzero(known & (arms == arm)).flatten()
        ascending, order = p_values[own].sort()
        steps = torch.arange(1, len(own) + 1, dtype=torch.float64) / len(own)
        passing = torch.nonzero(ascending <= rate * steps).flatten()
        if len(passing):
            rejected[own[order[: int(passing[-1]) + 1]]] = True
    return rejected


def like_reference(p_values: Tensor, arms: Tensor, rejected: Tensor, n_arms: int) -> Tensor:
    """Sources of which next to none are disbelieved: less than 2% of at least 20 samples.

    Args:
        p_values: ``(n,)`` from :func:`conformal_p_values`; what is NaN does not count.
        arms: ``(n,)`` the source of each sample, in ``0 .. K - 1``.
        rejected: ``(n,)`` bool, from :func:`disbelieved`.
        n_arms: Number of sources ``K``.

    Returns:
        ``(K,)`` bool.

    Example:
        >>> arms = torch.tensor([0] * 30 + [1] * 30 + [2] * 3)
        >>> p_values = torch.where(arms == 1, 0.01, 0.7)
        >>> like_reference(p_values, arms, p_values < 0.1, n_arms=3).tolist()
        [True, False, False]
    """
    known = ~p_values.isnan()
    counts = torch.bincount(arms[known], minlength=n_arms)
    n_rejected = torch.bincount(arms[known & rejected], minlength=n_arms)
    return (counts >= _ENOUGH) & (n_rejected < _NEXT_TO_NONE * counts)


def peer_p_values(confidence: Tensor, peers: Tensor) -> Tensor:
    """How rare a confidence as low as a sample's is among others that a model is trained on, too.

    As :func:`conformal_p_values`, but compared over just the states that saw the sample, and with
    the peers that all of these saw: what a model makes of a sample changes as it is trained on it.

    Args:
        confidence: ``(n, S)`` how plausible each of ``S`` model states finds a sample's target; NaN
            where it is not known.
        peers: ``(m, S)`` the same of its peers.

    Returns:
        ``(n,)`` float64 in ``(0, 1]``; NaN where no state saw the sample, or all those that did saw
        fewer than 20 peers.

    Example:
        >>> peers = torch.linspace(0.5, 0.9, 24)[:, None].repeat(1, 2)
        >>> peers[:4, 1] = torch.nan
        >>> confidence = torch.tensor([[0.1, torch.nan], [0.1, 0.1], [torch.nan, torch.nan]])
        >>> peer_p_values(confidence, peers)
        tensor([0.0400, 0.0476,    nan], dtype=torch.float64)
    """
    confidence, peers = confidence.cpu(), peers.cpu()
    p_values = torch.full((len(confidence),), torch.nan, dtype=torch.float64)
    seen = ~confidence.isnan()
    for rows in _alike(seen):
        states = seen[rows[0]]
        others = peers[:, states]
        others = others[~others.isnan().any(1)]
        if states.any() and len(others) >= _ENOUGH:
            p_values[rows] = conformal_p_values(confidence[rows][:, states], others)
    return p_values


def least_believed(p_values: Tensor, confidence: Tensor, among: Tensor, most: int) -> Tensor:
    """Positions of those of some samples that are the least plausible.

    Args:
        p_values: ``(n,)`` from :func:`conformal_p_values`.
        confidence: ``(n, S)`` what they were made of; its means decide between equal ones.
        among: ``(n,)`` bool, the samples in question, no NaN among their p-values.
        most: The most positions to return, at least 0.

    Returns:
        ``(k,)`` int64, the least plausible first, ties by position, at most ``most``.

    Raises:
        ConfigurationError: If ``most`` is negative.

    Example:
        >>> p_values = torch.tensor([0.02, 0.02, 0.3, 0.02])
        >>> confidence = torch.tensor([[0.3], [0.01], [0.9], [0.02]])
        >>> least_believed(p_values, confidence, torch.tensor([True, False, True, True]), most=2)
        tensor([3, 0])
    """
    if most < 0:
        raise ConfigurationError(f"most must be at least 0, but is {most}; pass 0 for none")
    positions = torch.nonzero(among).flatten()
    for key in (confidence.double().nanmean(1), p_values):
        positions = positions[torch.argsort(key[positions], stable=True)]
    return positions[:most]
