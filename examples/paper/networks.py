"""Networks for images of 3 x 32 x 32, given flat: pairs of one that selects and one to be trained.

The paper's are residual (He et al., 2016, arXiv 1512.03385), of 8 and of 18 layers with weights;
here as is usual for such images, with stride 1 in the first convolution, and a convolution of size
1 beside a block that changes the shape.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from examples.classifier import Classifier


class Convolutional(Classifier):
    """Convolutions, each followed by a ReLU.

    Args:
        channels: Of the stages, each of which halves the image.
        depth: Convolutions in a stage.
        n_classes: Number of classes.
    """

    def __init__(self, channels: Sequence[int], depth: int, n_classes: int) -> None:
        super().__init__([1, n_classes])
        layers: list[nn.Module] = [nn.Unflatten(1, (3, 32, 32))]
        width = 3
        for stage in channels:
            for number in range(depth):
                stride = 2 if number == 0 else 1
                layers += [nn.Conv2d(width, stage, 3, stride, 1), nn.ReLU()]
                width = stage
        self.net = nn.Sequential(
            *layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * width, n_classes)
        )


class Residual(Classifier):
    """Blocks of convolutions, each added to what it was given.

    Args:
        channels: Of the stages, each of which but the first halves the image.
        depth: Blocks of two convolutions in a stage.
        n_classes: Number of classes.
    """

    def __init__(self, channels: Sequence[int], depth: int, n_classes: int) -> None:
        super().__init__([1, n_classes])
        width = channels[0]
        layers: list[nn.Module] = [nn.Unflatten(1, (3, 32, 32)), *_normed(3, width, 3, 1)]
        layers.append(nn.ReLU())
        for number, stage in enumerate(channels):
            for place in range(depth):
                layers.append(_Block(width, stage, 2 if number and not place else 1))
                width = stage
        layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, n_classes)]
        self.net = nn.Sequential(*layers)


class _Block(nn.Module):
    def __init__(self, d_in: int, d_out: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *_normed(d_in, d_out, 3, stride), nn.ReLU(), *_normed(d_out, d_out, 3, 1)
        )
        alike = d_in == d_out and stride == 1
        self.beside = nn.Identity() if alike else nn.Sequential(*_normed(d_in, d_out, 1, stride))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.beside(x))


def _normed(d_in: int, d_out: int, size: int, stride: int) -> tuple[nn.Module, nn.Module]:
    convolution = nn.Conv2d(d_in, d_out, size, stride, size // 2, bias=False)
    # The layout in which GPUs convolve the fastest; outputs take it on from the weights.
    weight = convolution.weight.detach().contiguous(memory_format=torch.channels_last)
    convolution.weight = nn.Parameter(weight)
    return convolution, nn.BatchNorm2d(d_out)


def small_proxy(n_classes: int) -> Convolutional:
    """Selects for :func:`small`, on a processor."""
    return Convolutional((16, 32), 1, n_classes)


def small(n_classes: int) -> Convolutional:
    """Takes minutes to train on a processor."""
    return Convolutional((32, 64, 128), 2, n_classes)


def resnet8(n_classes: int) -> Residual:
    """The paper's proxy: 78 thousand parameters."""
    return Residual((16, 32, 64), 1, n_classes)


def resnet18(n_classes: int) -> Residual:
    """The network that the paper trains: 11 million parameters."""
    return Residual((64, 128, 256, 512), 2, n_classes)
