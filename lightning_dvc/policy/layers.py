"""How much each captured layer counts: the ``alpha`` of equation 5."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final, Literal

import torch
from torch import Tensor

from lightning_dvc.errors import ConfigurationError

LayerWeighting = Literal["equal", "depth", "learned"]
_WAYS: Final = ("equal", "depth", "learned")
_SHARPNESS: Final = 10.0
"""A layer whose values tell samples apart by 0.1 better (area under the curve) counts e times."""


class LayerWeights:
    """Weights of the layers: given, by depth, or learnt from what is taken back.

    Learnt weights are ``alpha_l`` proportional to ``exp(10 A_l)``. ``A_l`` is the share of pairs of
    a sample that was taken back and one that was kept at that time in which layer ``l`` valued the
    kept one higher when they were chosen (the area under the ROC curve), over all rounds so far.

    Args:
        how: ``"equal"``, ``"depth"`` (proportional to 1, 2, ... from the first layer on),
            ``"learned"``, or one number of at least 0 per layer.

    Raises:
        ConfigurationError: If it is none of these.

    Example:
        >>> LayerWeights("depth").alpha(3).tolist()
        [0.16666666666666666, 0.3333333333333333, 0.5]
        >>> weights = LayerWeights("learned")
        >>> weights.note(torch.tensor([3, 8]), torch.tensor([[0.5, 0.2], [0.1, 0.6]]))
        >>> weights.judge(torch.tensor([8]))
        >>> weights.alpha(2)[0] > 0.99
        tensor(True)
    """

    def __init__(self, how: LayerWeighting | Sequence[float] = "equal") -> None:
        if isinstance(how, str):
            fits = how in _WAYS
        else:
            fits = all(0 <= a < math.inf for a in how) and sum(how) > 0
        if not fits:
            raise ConfigurationError(
                f"layer_weights must be one of {_WAYS}, or numbers of at least 0 that are not all "
                f"0, but is {how!r}; give one number per captured layer, or leave it out"
            )
        self.how = how
        self._ids = torch.empty(0, dtype=torch.int64)
        self._values = torch.empty(0, 0)
        # Pairs in which each layer was right, and pairs in all.
        self._right = torch.empty(0, dtype=torch.float64)
        self._pairs = 0

    @property
    def learns(self) -> bool:
        """Whether they are learnt."""
        return self.how == "learned"

    def alpha(self, n_layers: int) -> Tensor:
        """Weights ``(L,)`` float64 on the simplex.

        Raises:
            ConfigurationError: If another number of weights was given.
        """
        if self.how == "depth":
            alpha = torch.arange(1, n_layers + 1, dtype=torch.float64)
        elif isinstance(self.how, str):
            alpha = torch.ones(n_layers, dtype=torch.float64)
            if self._pairs:
                alpha = torch.exp(_SHARPNESS * self._right / self._pairs)
        else:
            alpha = torch.tensor(self.how, dtype=torch.float64)
        if len(alpha) != n_layers:
            raise ConfigurationError(
                f"layer_weights must hold one number for each of the {n_layers} captured layers, "
                f"but holds {len(alpha)}; give as many, or name layers=[...]"
            )
        return alpha / alpha.sum()

    def note(self, ids: Tensor, values: Tensor) -> None:
        """Remember how samples were valued when they were chosen.

        Args:
            ids: ``(n,)`` ids, none of them noted before.
            values: ``(n, L)`` each layer's part of their value.
        """
        self._ids = torch.cat([self._ids, ids])
        self._values = values if not len(self._values) else torch.cat([self._values, values])

    def keep(self, ids: Tensor) -> None:
        """Forget all but ``(n,)`` ids: the others were neither taken back nor kept."""
        kept = torch.isin(self._ids, ids)
        self._ids, self._values = self._ids[kept], self._values[kept]

    def judge(self, removed: Tensor) -> None:
        """Learn from what a round takes back, and forget it.

        Args:
            removed: ``(r,)`` ids; those that were never noted teach nothing.
        """
        bad = torch.isin(self._ids, removed)
        if bool(bad.any()) and not bool(bad.all()):
            worse, better = (self._values[rows].double().T.contiguous() for rows in (bad, ~bad))
            pairs = zip(worse, better, strict=True)
            right = torch.stack([_pairs_in_order(*layer) for layer in pairs])
            self._right = right if not self._pairs else self._right + right
            self._pairs += int(bad.sum()) * int((~bad).sum())
        self._ids, self._values = self._ids[~bad], self._values[~bad]

    def state_dict(self) -> dict[str, Any]:
        """What was learnt, and what is remembered of the selected samples."""
        return {
            "ids": self._ids,
            "values": self._values,
            "right": self._right,
            "pairs": self._pairs,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state."""
        self._ids, self._values = state["ids"], state["values"]
        self._right, self._pairs = state["right"], state["pairs"]


def _pairs_in_order(lower: Tensor, upper: Tensor) -> Tensor:
    """How many pairs of a number of each have the lower one below; ties count half."""
    ordered = upper.sort().values
    above = len(ordered) - torch.searchsorted(ordered, lower, right=True)
    equal = len(ordered) - torch.searchsorted(ordered, lower) - above
    return (above + 0.5 * equal).sum().double()
