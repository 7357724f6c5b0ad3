"""Every type of layer against a loop of ``torch.autograd.grad`` over single samples."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from examples.bench.measure import Figure
from lightning_dvc.capture.gradients import LayerGradients
from lightning_dvc.capture.layers import LayerCapture, find_layers

_N = 6
_LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(7, 5), (7,)),
    "linear_tokens": (lambda: nn.Linear(7, 5), (4, 3, 7)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, 2, 1, dilation=2, groups=2), (4, 11)),
    "conv2d": (lambda: nn.Conv2d(3, 4, 3, (1, 2), 1), (3, 8, 9)),
    "conv2d_depthwise": (lambda: nn.Conv2d(4, 4, 3, padding="same", groups=4), (4, 7, 7)),
    "conv3d": (
        lambda: nn.Conv3d(2, 3, 2, dilation=2, padding_mode="circular", padding=1),
        (2, 5, 6, 4),
    ),
    "embedding": (lambda: nn.Embedding(9, 4, padding_idx=0), ()),
    "layer_norm": (lambda: nn.LayerNorm(6), (5, 6)),
    "rms_norm": (lambda: nn.RMSNorm(6), (5, 6)),
    "group_norm": (lambda: nn.GroupNorm(2, 6), (6, 4, 4)),
    "batch_norm": (lambda: nn.BatchNorm2d(3), (3, 5, 5)),
}


def figures() -> Iterator[Figure]:
    """Largest error of norms, products and Gram blocks, relative to the largest of them."""
    for number, (name, (make, shape)) in enumerate(_LAYERS.items()):
        torch.manual_seed(number)
        layer = make().double().eval()
        x = torch.randn(_N, *shape, dtype=torch.float64)
        if isinstance(layer, nn.Embedding):
            x = torch.randint(layer.num_embeddings, (_N, 7))
        yield Figure(f"exactness_{name}", error(layer, x), "relative", at_most=1e-10)


def error(layer: nn.Module, x: Tensor) -> float:
    """Largest relative error on a batch ``(n, ...)`` whose loss is nonlinear in every output."""
    capture = LayerCapture(find_layers(layer, [""]))
    with capture.recording():
        losses = _losses(layer(x))
    (found,) = capture.gradients(losses)
    true = torch.stack([_alone(layer, x[i : i + 1]) for i in range(len(x))])
    return max(_relative(a, b) for a, b in _questions(found, true))


def _losses(output: Tensor) -> Tensor:
    return output.flatten(1).sin().cumsum(1).square().mean(1)


def _alone(layer: nn.Module, x: Tensor) -> Tensor:
    grads = torch.autograd.grad(_losses(layer(x)).sum(), list(layer.parameters()))
    rows = len(grads[0]) if grads[0].ndim > 1 else grads[0].numel()
    return torch.cat([grad.reshape(rows, -1) for grad in grads], dim=1)


def _questions(found: LayerGradients, true: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    flat = true.flatten(1)
    yield found.squared_norms(), flat.square().sum(1)
    yield found.dot(true.mean(0)), flat @ flat.mean(0)
    yield found.gram(found), flat @ flat.T
    yield found.sum(), true.sum(0)


def _relative(found: Tensor, true: Tensor) -> float:
    return float((found - true).abs().max() / true.abs().max())
