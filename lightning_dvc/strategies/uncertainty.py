"""Uncertainty sampling: what the model is least sure of.

Lewis and Gale, "A sequential algorithm for training text classifiers", SIGIR 1994; Settles, "Active
learning literature survey", 2009. No label of a candidate is used.
"""

import torch
from torch import Tensor

from lightning_dvc.capture.probe import Captured
from lightning_dvc.errors import ConfigurationError
from lightning_dvc.strategies.base import Round
from lightning_dvc.strategies.baseline import Baseline, look


class Uncertainty(Baseline):
    """Takes the candidates whose prediction has the greatest entropy, or predicted variance.

    Raises:
        ConfigurationError: In the first round, where predictions tell no uncertainty, as those of a
            regression without a variance.

    Example:
        >>> from lightning_dvc import DVCCallback
        >>> callback = DVCCallback(Uncertainty())
    """

    def values(self, this: Round, candidates: Tensor, quota: int) -> tuple[Tensor, Tensor]:
        """Entropy of each prediction over that of a uniform one, in ``[0, 1]``; or its variance."""
        ids, _, kept = look(this, candidates, _predictive)
        values = torch.cat(kept)
        if bool(values.isnan().any()):
            raise ConfigurationError(
                "expected class probabilities or a predicted variance to tell uncertainty by, but "
                "the model's outputs have neither; use another strategy, such as CoreSet()"
            )
        return ids, values


def _predictive(captured: Captured) -> Tensor:
    return captured.predictive.double().cpu()
