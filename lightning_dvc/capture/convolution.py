"""Per-sample gradients of convolutions of one, two or three dimensions."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from lightning_dvc.capture.gradients import (
    LayerGradients,
    Materialised,
    OuterProducts,
    on_device,
    suitable_part,
)
from lightning_dvc.errors import CaptureError

Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d
CONVOLUTIONS: Final = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_CONVOLVE: Final[dict[int, Callable[..., Tensor]]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def padded_input(layer: Convolution, x: Tensor) -> Tensor:
    """What the kernel slides over: the input with the layer's own padding around it."""
    if layer.padding_mode == "zeros" and not isinstance(layer.padding, str):
        # What the forward pass reads, also where somebody has changed it since.
        return F.pad(x, [size for size in reversed(layer.padding) for _ in range(2)])
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    return F.pad(x, layer._reversed_padding_repeated_twice, mode=mode)


def patches(layer: Convolution, padded: Tensor, positions: Sequence[int]) -> Tensor:
    """Patches that the kernel sees, ``(n, groups, d_in, T)``.

    Args:
        layer: The convolution.
        padded: ``(n, channels, *image)`` from :func:`padded_input`.
        positions: Size of the output along each axis, of product ``T``.

    Raises:
        CaptureError: If an output of that size does not come from this input.
    """
    geometry = zip(padded.shape[2:], layer.kernel_size, layer.dilation, layer.stride, strict=True)
    expected = [(size - step * (k - 1) - 1) // move + 1 for size, k, step, move in geometry]
    if list(positions) != expected:
        raise CaptureError(
            f"a {type(layer).__name__} that would return {expected} positions returned "
            f"{list(positions)}, so its forward pass is not the usual one; name other layers with "
            "layers=[...]"
        )
    axes = range(2, padded.ndim)
    stride, size = padded.stride(), list(layer.kernel_size)
    kernel = [stride[a] * step for a, step in zip(axes, layer.dilation, strict=True)]
    moves = [stride[a] * step for a, step in zip(axes, layer.stride, strict=True)]
    # Overlapping windows without a copy; the reshape makes the only one.
    windows = padded.as_strided(
        (*padded.shape[:2], *size, *positions),
        (stride[0], stride[1], *kernel, *moves),
        padded.storage_offset(),
    )
    seen = layer.weight[0].numel()
    return windows.reshape(len(padded), layer.groups, seen, math.prod(positions))


class Convolved(LayerGradients):
    """Gradients of a convolution, formed part by part, since unfolded inputs are far larger.

    Args:
        layer: The convolution.
        inputs: For each call in the forward pass, ``(n, channels, *image)`` what it received.
        deltas: For each call, ``(n, d_out, *positions)`` gradient of each sample's own loss with
            respect to its output.

    A full gradient is ``(d_out, channels / groups * kernel)``, one column more with a bias.

    Example:
        >>> layer = nn.Conv1d(1, 1, kernel_size=2)
        >>> g = Convolved(layer, [torch.ones(4, 1, 3)], [torch.ones(4, 1, 2)])
        >>> g.formed().gradients[0]
        tensor([[2., 2., 2.]])
    """

    def __init__(
        self, layer: Convolution, inputs: Sequence[Tensor], deltas: Sequence[Tensor]
    ) -> None:
        self._layer = layer
        self._inputs = list(inputs)
        self._deltas = list(deltas)

    def __len__(self) -> int:
        return len(self._deltas[0])

    @property
    @override
    def full_shape(self) -> tuple[int, int]:
        weight = self._layer.weight
        return len(weight), weight[0].numel() + (self._layer.bias is not None)

    @property
    @override
    def numbers(self) -> int:
        return self.full_shape[0] * self.full_shape[1]

    @property
    @override
    def like(self) -> Tensor:
        return self._deltas[0]

    @property
    @override
    def form(self) -> str:
        return "patches, formed in parts"

    @override
    def parts(
        self, numbers: int | None = None, order: Tensor | None = None
    ) -> Iterator[tuple[slice | Tensor, LayerGradients]]:
        patch, positions = self.full_shape[1] * self._layer.groups, self.like.shape[2:].numel()
        # What is unfolded has to stay in the cache as well.
        unfolded = patch * positions // max(1, self.full_shape[0] * self.full_shape[1])
        numbers = suitable_part(self.like.device) if numbers is None else numbers
        yield from super().parts(numbers // max(1, unfolded // 4), order)

    @override
    def squared_norms(self) -> Tensor:
        return torch.cat([part.squared_norms() for _, part in self.parts()])

    @override
    def dot(self, full: Tensor) -> Tensor:
        return torch.cat([part.dot(full) for _, part in self.parts()])

    @override
    def accumulate(self, into: Tensor) -> None:
        for _, part in self.parts():
            part.accumulate(into)

    @override
    def rows(self, index: Tensor | slice) -> "Convolved":
        index = on_device(index, self._deltas[0])
        inputs, deltas = ([x[index] for x in xs] for xs in (self._inputs, self._deltas))
        return Convolved(self._layer, inputs, deltas)

    @override
    def formed(self) -> Materialised:
        calls = [self._form(x, d) for x, d in zip(self._inputs, self._deltas, strict=True)]
        return Materialised(torch.stack(calls).sum(0) if len(calls) > 1 else calls[0])

    def _form(self, x: Tensor, delta: Tensor) -> Tensor:
        layer, n = self._layer, len(x)
        seen = patches(layer, padded_input(layer, x), delta.shape[2:])
        d_out, d_in = len(layer.weight), layer.weight[0].numel()
        own = delta.reshape(n, layer.groups, d_out // layer.groups, seen.shape[3])
        full = (own @ seen.transpose(2, 3)).reshape(n, d_out, d_in)
        if layer.bias is None:
            return full
        return torch.cat([full, delta.flatten(2).sum(2)[:, :, None]], dim=2)

    @override
    def bound(self) -> Tensor:
        lengths = []
        for x, delta in zip(self._inputs, self._deltas, strict=True):
            # No patch is longer than the image, of which it may repeat a pixel in the padding.
            image = torch.linalg.vector_norm(x.flatten(1), dim=1)
            patch = image * math.sqrt(math.prod(self._layer.kernel_size)) + 1
            lengths.append(patch * delta.square().sum(1).sqrt().flatten(1).sum(1))
        return torch.stack(lengths).sum(0).square()

    @override
    def tensors(self) -> dict[str, Tensor]:
        return {"gradients": torch.cat([part.formed().gradients for _, part in self.parts()])}

    @override
    def projected(self, left: Tensor, right: Tensor) -> OuterProducts:
        """As any other, for a convolution without groups; inputs are never unfolded."""
        layer, inputs, deltas = self._layer, [], []
        convolve = _CONVOLVE[len(layer.kernel_size)]
        for x, delta in zip(self._inputs, self._deltas, strict=True):
            right, left = right.to(x), left.to(delta)
            d_in = layer.weight[0].numel()
            kernel = right[:d_in].T.reshape(-1, *layer.weight.shape[1:])
            bias = None if layer.bias is None else right[-1]
            seen = convolve(padded_input(layer, x), kernel, bias, layer.stride, 0, layer.dilation)
            inputs.append(seen.flatten(2).transpose(1, 2))
            deltas.append(delta.flatten(2).transpose(1, 2) @ left)
        return OuterProducts(torch.cat(inputs, 1), torch.cat(deltas, 1), bias=False)
