"""Which layers are captured, and the hooks that capture them.

Forward hooks note each layer's input and output; the gradient of the per-sample losses with
respect to the outputs comes from one ``torch.autograd.grad``. No gradient with respect to a
parameter is ever computed, and no ``.grad`` is touched.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_dvc.capture.gradients import LayerGradients, layer_gradients
from lightning_dvc.errors import CaptureError

# A first layer's input is pooled to at most this many positions per axis before it is compared
# between samples: enough to tell near-repeats from neighbours, small for large images.
_FINGERPRINT_SIDE: Final = 8


def _linear_positions(layer: nn.Module, x: Tensor, n: int) -> Tensor:
    return x.reshape(n, -1, x.shape[-1])


def _linear_outputs(delta: Tensor, n: int) -> Tensor:
    return delta.reshape(n, -1, delta.shape[-1])


def _conv2d_positions(layer: nn.Module, x: Tensor, n: int) -> Tensor:
    assert isinstance(layer, nn.Conv2d)
    if layer.padding_mode == "zeros" and not isinstance(layer.padding, str):
        padded, padding = x, layer.padding
    else:
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        padded = F.pad(x, layer._reversed_padding_repeated_twice, mode=mode)
        padding = (0, 0)
    patches = F.unfold(padded, layer.kernel_size, layer.dilation, padding, layer.stride)
    return patches.transpose(1, 2).reshape(n, -1, patches.shape[1])


def _conv2d_outputs(delta: Tensor, n: int) -> Tensor:
    return delta.flatten(2).transpose(1, 2).reshape(n, -1, delta.shape[1])


@dataclass(frozen=True)
class _Kind:
    """How one type of layer is read: its input as positions, its output gradient as positions."""

    positions: Callable[[nn.Module, Tensor, int], Tensor]
    outputs: Callable[[Tensor, int], Tensor]


_KINDS: Final[dict[type[nn.Module], _Kind]] = {
    nn.Linear: _Kind(_linear_positions, _linear_outputs),
    nn.Conv2d: _Kind(_conv2d_positions, _conv2d_outputs),
}


def _kind_of(layer: nn.Module) -> _Kind | None:
    if isinstance(layer, nn.Conv2d) and layer.groups > 1:
        return None
    return next((kind for cls, kind in _KINDS.items() if isinstance(layer, cls)), None)


def find_layers(module: nn.Module, names: Sequence[str] | None = None) -> dict[str, nn.Module]:
    """Find the layers to capture.

    Args:
        module: The model.
        names: Names as in ``module.named_modules()``. Every ``Linear`` and ``Conv2d`` with a
            trainable weight, when not given; a named layer may be frozen.

    Returns:
        Name to layer, in the order of definition.

    Raises:
        CaptureError: If a named layer does not exist or cannot be captured, or none is found.

    Example:
        >>> list(find_layers(nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))))
        ['0', '2']
    """
    modules = dict(module.named_modules())
    if names is not None:
        return {name: _named_layer(modules, name) for name in names}
    found, grouped = {}, []
    for name, layer in modules.items():
        weight = getattr(layer, "weight", None)
        if not (isinstance(weight, Tensor) and weight.requires_grad):
            continue
        if _kind_of(layer) is not None:
            found[name] = layer
        elif isinstance(layer, nn.Conv2d):
            grouped.append(name)
    if grouped and found:
        warnings.warn(
            f"convolutions with groups are not captured and do not count: {grouped}", stacklevel=2
        )
    if not found:
        raise CaptureError(
            f"{type(module).__name__} has no trainable Linear or Conv2d layer to capture (with "
            "groups=1); name the layers with layers=[...] if they are frozen, or train a model "
            "that has some"
        )
    return found


def _named_layer(modules: dict[str, nn.Module], name: str) -> nn.Module:
    layer = modules.get(name)
    if layer is None:
        known = [key for key, value in modules.items() if _kind_of(value) is not None]
        raise CaptureError(f"layer {name!r} does not exist; layers that can be captured: {known}")
    if _kind_of(layer) is None:
        raise CaptureError(
            f"layer {name!r} is a {type(layer).__name__}, which cannot be captured; name Linear "
            "layers or Conv2d layers with groups=1"
        )
    return layer


@dataclass
class _Calls:
    """What one layer received and returned in one forward pass, call by call."""

    inputs: list[Tensor]
    outputs: list[Tensor]


class LayerCapture:
    """Notes inputs and outputs of layers while a forward pass runs.

    Args:
        layers: Name to layer, from :func:`find_layers`.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
        >>> capture = LayerCapture(find_layers(net))
        >>> with capture.recording():
        ...     losses = net(torch.ones(4, 2)).square().squeeze(1)
        >>> [len(g) for g in capture.gradients(losses)]
        [4, 4]
    """

    def __init__(self, layers: dict[str, nn.Module]) -> None:
        self._layers = layers
        self._calls: dict[str, _Calls] = {}

    @property
    def reached(self) -> list[str]:
        """Names of the layers in the order in which the last forward pass reached them."""
        return list(self._calls)

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record inside the block; hooks are gone afterwards, also after an exception."""
        self._calls = {}
        handles = [
            layer.register_forward_hook(self._hook(name), with_kwargs=True)
            for name, layer in self._layers.items()
        ]
        try:
            yield
        finally:
            # Removed before any gradient is taken: activation checkpointing would fire them again.
            for handle in handles:
                handle.remove()

    def _hook(self, name: str) -> Callable[..., Tensor]:
        def note(
            _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor
        ) -> Tensor:
            received = args[0] if args else kwargs["input"]
            if not out.requires_grad:  # every layer so far is frozen
                out = out.detach().requires_grad_(torch.is_grad_enabled())
            calls = self._calls.setdefault(name, _Calls([], []))
            calls.inputs.append(received.detach())
            calls.outputs.append(out)
            # A copy goes on, so that an in-place activation cannot overwrite what was noted.
            return out.clone()

        return note

    def gradients(self, losses: Tensor) -> list[LayerGradients]:
        """Per-sample gradients of each layer reached.

        Args:
            losses: ``(n,)`` each sample's own loss, from the recorded forward pass.

        Returns:
            One entry per layer, in the order of :attr:`reached`.
        """
        outputs = [output for calls in self._calls.values() for output in calls.outputs]
        deltas = iter(torch.autograd.grad(losses.sum(), outputs, allow_unused=True))
        n = len(losses)
        found = []
        for name, calls in self._calls.items():
            layer, kind = self._layers[name], _kind_of(self._layers[name])
            assert kind is not None
            inputs = [_upcast(kind.positions(layer, x, n)) for x in calls.inputs]
            outs = []
            for output in calls.outputs:
                delta = next(deltas)
                delta = torch.zeros_like(output) if delta is None else delta
                outs.append(_upcast(kind.outputs(delta, n)))
            bias = getattr(layer, "bias", None) is not None
            found.append(layer_gradients(torch.cat(inputs, 1), torch.cat(outs, 1), bias))
        return found

    def representations(self, n: int) -> list[Tensor]:
        """The representation after each layer: what the next captured layer receives.

        The last layer's is its own output. Positions are averaged.

        Args:
            n: Samples in the recorded batch.

        Returns:
            One ``(n, d)`` tensor per layer, in the order of :attr:`reached`.
        """
        calls = list(self._calls.values())
        following = [call.inputs[0] for call in calls[1:]] + [calls[-1].outputs[-1].detach()]
        layers = [self._layers[name] for name in self._calls]
        owners = layers[1:] + layers[-1:]
        return [_pool(x, layer, n) for x, layer in zip(following, owners, strict=True)]

    def fingerprints(self, n: int) -> Tensor:
        """What the first captured layer receives, pooled to a bounded size, ``(n, d)``.

        Images are averaged to at most 8 x 8 positions, sequences to 8.

        For a model that starts with a captured layer these are the features themselves, so they do
        not change while the model trains.
        """
        name, calls = next(iter(self._calls.items()))
        x = _upcast(calls.inputs[0])
        if isinstance(self._layers[name], nn.Conv2d):
            height, width = (min(_FINGERPRINT_SIDE, size) for size in x.shape[-2:])
            x = F.adaptive_avg_pool2d(x, (height, width)).flatten(1)
            return x.reshape(n, -1, x.shape[-1]).mean(1)
        x = x.reshape(n, -1, x.shape[-1])
        if x.shape[1] == 1:
            return x.squeeze(1)
        # Always as many, so that batches of sequences of other lengths can be compared.
        return F.adaptive_avg_pool1d(x.transpose(1, 2), _FINGERPRINT_SIDE).flatten(1)


def _pool(x: Tensor, layer: nn.Module, n: int) -> Tensor:
    x = _upcast(x)
    if isinstance(layer, nn.Conv2d):
        x = x.mean((2, 3))
    return x.reshape(n, -1, x.shape[-1]).mean(1)


def _upcast(x: Tensor) -> Tensor:
    return x if x.dtype in (torch.float32, torch.float64) else x.float()
