"""Recent states of the model, to see how a sample's loss has moved while it was not looked at."""

from collections import deque
from collections.abc import Iterator, Mapping
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
    def drift(self, layers: Mapping[str, nn.Module]) -> Tensor:
        """How far each layer has moved since the latest state, ``(L,)``.

        Returns:
            ``|now - then| / |then|`` over the layer's own trainable parameters; infinite when
            there is no earlier state, 0 for a frozen layer.
        """
        if not self._states:
            return torch.full((len(layers),), torch.inf)
        latest, drifts = self._states[0], []
        for name in layers:
            pairs = [
                (p.detach(), latest[f"{name}.{n}" if name else n].to(p.device))
                for n, p in layers[name].named_parameters()
                if p.requires_grad and (f"{name}.{n}" if name else n) in latest
            ]
            # Squares leave the range of half precision soon.
            moved = sum(float(widened(now - then).square().sum()) for now, then in pairs)
            size = sum(float(widened(then).square().sum()) for _, then in pairs)
            drifts.append((moved / max(size, torch.finfo(torch.float32).tiny)) ** 0.5)
        return torch.tensor(drifts)

    def state_dict(self) -> dict[str, Any]:
        """The states, latest first."""
        return {"states": [dict(state) for state in self._states]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the states; a shorter window keeps the latest."""
        self._states.clear()
        self._states.extend(dict(entry) for entry in state["states"][: self._states.maxlen])
