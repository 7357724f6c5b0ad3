"""Which samples the model disbelieves: those less plausible to it than held-out ones can be.

A wrong label is implausible to a model that has learnt something, but so is a right one on a hard
sample, and hard samples are worth the most. What tells them apart is where they come from: among
samples of a clean source, implausible ones are as rare as among the held-out samples, in a source
of wrong labels there are too many. So each source is tested for outliers against the held-out
samples (conformal p-values, Bates et al., 2023), with the false discoveries bounded as a share of
what is disbelieved (Benjamini and Hochberg, 1995). Where all is well, hardly anything is rejected.

Measured beside one threshold for all sources, a quantile of the held-out samples' plausibility:
docs/results.md.
"""

import torch
from torch import Tensor

from lightning_dvc.errors import ConfigurationError


def conformal_p_values(confidence: Tensor, reference: Tensor) -> Tensor:
    """How rare a confidence as low as a sample's is among reference samples.

    ``p = (1 + #{reference <= confidence}) / (m + 1)``, which for a sample like the reference is at
    most ``u`` with a probability of at most ``u`` (Bates et al., 2023, equation 3).

    Args:
        confidence: ``(n,)`` how plausible the model finds each sample's target, a probability or
            any number that grows with it; NaN where it is not known.
        reference: ``(m,)`` the same of reference samples; NaN is left out.

    Returns:
        ``(n,)`` float64 in ``(0, 1]``; 1 where the confidence is not known.

    Example:
        >>> conformal_p_values(torch.tensor([0.1, 0.5, torch.nan]), torch.tensor([0.2, 0.5, 0.9]))
        tensor([0.2500, 0.7500, 1.0000], dtype=torch.float64)
    """
    known = reference[~reference.isnan()].double().cpu().sort().values
    below = torch.searchsorted(known, confidence.double().cpu().contiguous(), right=True)
    p_values = (1 + below.double()) / (len(known) + 1)
    return p_values.masked_fill(confidence.cpu().isnan(), 1.0)


def disbelieved(confidence: Tensor, reference: Tensor, arms: Tensor, rate: float) -> Tensor:
    """Samples whose targets are too implausible for too many of their source.

    The procedure of Benjamini and Hochberg (1995) in each source by itself: of its ``n_k`` samples
    in ascending order of their p-values, the first ``i`` are rejected, with the largest ``i`` for
    which the ``i``-th p-value is at most ``rate * i / n_k``.

    Args:
        confidence: ``(n,)`` how plausible the model finds each sample's target, a probability or
            any number that grows with it; NaN where it is not known.
        reference: ``(m,)`` the same of reference samples, in the same model states; NaN is left
            out.
        arms: ``(n,)`` the source of each sample.
        rate: False discovery rate in ``[0, 1]``: of those disbelieved, the share that may be like
            the reference after all. 0 disbelieves nothing.

    Returns:
        ``(n,)`` bool; false where the confidence is not known, and everywhere without a reference.

    Raises:
        ConfigurationError: If the rate is outside ``[0, 1]``.

    Example:
        >>> reference = torch.linspace(0.02, 1, 50)
        >>> confidence = torch.tensor([0.01, 0.6, 0.7, 0.8] + [0.01, 0.01, 0.01, 0.9])
        >>> arms = torch.tensor([0] * 4 + [1] * 4)
        >>> disbelieved(confidence, reference, arms, rate=0.05).tolist()
        [False, False, False, False, True, True, True, False]
    """
    if not 0 <= rate <= 1:
        raise ConfigurationError(
            f"rate must be in [0, 1], but is {rate}; pass the share of false discoveries, as 0.2"
        )
    p_values, arms = conformal_p_values(confidence, reference), arms.cpu()
    rejected = torch.zeros(len(p_values), dtype=torch.bool)
    if bool(reference.isnan().all()):  # also of none
        return rejected
    for arm in arms.unique():
        own = torch.nonzero(arms == arm).flatten()
        ascending, order = p_values[own].sort()
        steps = torch.arange(1, len(own) + 1, dtype=torch.float64) / len(own)
        passing = torch.nonzero(ascending <= rate * steps).flatten()
        if len(passing):
            rejected[own[order[: int(passing[-1]) + 1]]] = True
    return rejected & ~confidence.cpu().isnan()


def least_believed(confidence: Tensor, among: Tensor, most: int) -> Tensor:
    """Positions of those of some samples that are the least plausible.

    Args:
        confidence: ``(s,)`` how plausible the model finds each sample's target, no NaN among them.
        among: ``(s,)`` bool, the samples in question.
        most: The most positions to return, at least 0.

    Returns:
        ``(r,)`` int64, the lowest confidence first, ties by position, at most ``most``.

    Raises:
        ConfigurationError: If ``most`` is negative.

    Example:
        >>> confidence = torch.tensor([0.3, 0.01, 0.9, 0.02])
        >>> least_believed(confidence, torch.tensor([True, False, True, True]), most=2)
        tensor([3, 0])
    """
    if most < 0:
        raise ConfigurationError(f"most must be at least 0, but is {most}; pass 0 for none")
    positions = torch.nonzero(among).flatten()
    return positions[torch.argsort(confidence[positions], stable=True)][:most].cpu()
