"""Three models of common kinds, each a plain LightningModule, and samples for them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor, nn

CLASSES = 10


class Model(LightningModule):
    """A network trained with cross-entropy and Adam."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Cross-entropy of a batch."""
        x, y = batch
        return F.cross_entropy(self.net(x), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam."""
        return torch.optim.Adam(self.parameters())


class _Residual(nn.Module):
    def __init__(self, d_in: int, d_out: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(d_in, d_out, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(d_out),
            nn.ReLU(inplace=True),
            nn.Conv2d(d_out, d_out, 3, padding=1, bias=False),
            nn.BatchNorm2d(d_out),
        )
        self.shortcut = (
            nn.Identity() if d_in == d_out else nn.Conv2d(d_in, d_out, 1, stride, bias=False)
        )

    def forward(self, x: Tensor) -> Tensor:
        added: Tensor = self.body(x) + self.shortcut(x)
        return F.relu(added)


class _Block(nn.Module):
    """A pre-norm encoder block, written with linear layers as most model libraries do."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, tokens, width = x.shape
        split = self.qkv(self.norm_1(x)).view(n, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(*split)
        x = x + self.out(mixed.transpose(1, 2).reshape(n, tokens, width))
        added: Tensor = x + self.down(F.gelu(self.up(self.norm_2(x))))
        return added


class _Encoder(nn.Module):
    def __init__(self, width: int = 256, depth: int = 4, heads: int = 4) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(_Block(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.norm(self.blocks(x)).mean(1))
        return logits


def mlp() -> nn.Module:
    """784-512-512-10."""
    return nn.Sequential(
        nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, CLASSES)
    )


def resnet8() -> nn.Module:
    """Three stages of one residual block, of 16, 32 and 64 channels."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(inplace=True),
        _Residual(16, 16, 1),
        _Residual(16, 32, 2),
        _Residual(32, 64, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, CLASSES),
    )


@dataclass(frozen=True)
class Case:
    """A model, the shape of a sample, and how many of them make a batch."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    batch_size: int

    def samples(self, n: int, seed: int) -> tuple[Tensor, Tensor]:
        """Random features ``(n, *shape)`` and labels ``(n,)``."""
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(n, *self.shape, generator=generator)
        return x, torch.randint(CLASSES, (n,), generator=generator)


CASES = {
    "mlp": Case(mlp, (784,), 512),
    "cnn": Case(resnet8, (3, 32, 32), 256),
    "transformer": Case(_Encoder, (64, 256), 128),
}
