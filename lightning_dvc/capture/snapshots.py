"""Recent states of the model, to see how a sample's loss has moved while it was not looked at."""

import math
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Set
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_dvc.capture.kinds import widened


def _moving_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Everything of a model that training moves: trainable parameters and floating buffers."""
    tensors: dict[str, Tensor] = {n: p for n, p in module.named_parameters() if p.requires_grad}
    tensors.update({n: b for n, b in module.named_buffers() if b.is_floating_point()})
    return tensors


class Snapshots:
    """The last ``window`` states of a model.

    Args:
        window: How many states to keep, at least 0. Each costs a copy of the trainable parameters.

    Example:
        >>> net = nn.Linear(1, 1, bias=False)
        >>> snapshots = Snapshots(window=2)
        >>> snapshots.push(net)
        >>> _ = net.weight.data.zero_()
        >>> with snapshots.applied(net, 0):
        ...     inside = net.weight.abs().sum().item()
        >>> inside > 0, net.weight.item()
        (True, 0.0)
    """

    def __init__(self, window: int) -> None:
        self._states: deque[dict[str, Tensor]] = deque(maxlen=window)

    def __len__(self) -> int:
        return len(self._states)

    @torch.no_grad()
    def push(self, module: nn.Module) -> None:
        """Remember the present state; the oldest one is forgotten when there are too many."""
        if self._states.maxlen == 0:
            return
        self._states.appendleft({n: t.clone() for n, t in _moving_tensors(module).items()})

    @contextmanager
    def applied(self, module: nn.Module, age: int) -> Iterator[None]:
        """Give the model an earlier state inside the block.

        Args:
            module: The model that was pushed.
            age: 0 is the latest state, ``len(self) - 1`` the oldest.
        """
        # All there are, since what moved then may be frozen now.
        present = dict(module.named_parameters()) | dict(module.named_buffers())
        moved = {name: present[name] for name in self._states[age]}
        data = {name: tensor.data for name, tensor in moved.items()}
        try:
            for name, state in self._states[age].items():
                moved[name].data = state.to(moved[name].device)
            yield
        finally:
            for name, tensor in moved.items():
                tensor.data = data[name]

    @torch.no_grad()
    def drift(self, module: nn.Module, layers: Iterable[str]) -> Tensor:
        """How far each layer, and all else of the model, has moved since the latest state.

        Args:
            module: The model that was pushed.
            layers: Names of ``L`` of its layers.

        Returns:
            ``(L + 1,)``, ``|now - then| / |then|`` over the parameters of a layer that are or were
            trainable, 0 where there are none, and at the end over those of no such layer. Infinite
            where there is no earlier state.
        """
        # A parameter that is tied to another has one name in a state.
        name_of = {id(parameter): name for name, parameter in module.named_parameters()}
        own = [{name_of[id(p)] for p in module.get_submodule(n).parameters()} for n in layers]
        if not self._states:
            return torch.full((len(own) + 1,), torch.inf)
        now, then = dict(module.named_parameters()), self._states[0]
        moving = {
            name for name, parameter in now.items() if parameter.requires_grad or name in then
        }
        others = moving.difference(*own)
        return torch.tensor([_moved(now, then, names & moving) for names in [*own, others]])

    def state_dict(self) -> dict[str, Any]:
        """The states, latest first."""
        return {"states": [dict(state) for state in self._states]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the states; a shorter window keeps the latest."""
        self._states.clear()
        self._states.extend(dict(entry) for entry in state["states"][: self._states.maxlen])


def _moved(now: Mapping[str, Tensor], then: Mapping[str, Tensor], names: Set[str]) -> float:
    if not names <= then.keys():  # some are trained since only
        return math.inf
    pairs = [(now[name].detach(), then[name].to(now[name].device)) for name in sorted(names)]
    # Squares leave the range of half precision soon.
    moved = sum(float(widened(a - b).square().sum()) for a, b in pairs)
    size = sum(float(widened(b).square().sum()) for _, b in pairs)
    return float((moved / max(size, torch.finfo(torch.float32).tiny)) ** 0.5)
