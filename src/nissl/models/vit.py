"""A small vision transformer, and one that is trained on Fashion-MNIST and ships with nissl.

``python -m nissl.models.vit FOLDER`` trains it again from the files of Fashion-MNIST.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from nissl.arguments import at_least
from nissl.errors import InputError
from nissl.seeds import seeded
from nissl.sources.fashion import fashion_mnist

WEIGHTS = Path(__file__).with_name("fashion_vit.safetensors")
FASHION_MEAN, FASHION_STD = 0.286, 0.353
"""Of the training pictures in [0, 1]."""


class Block(nn.Module):
    """Pre-norm attention and feed-forward part, each added to the residual stream."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.act, self.fc2 = nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width)

    def forward(self, x: Float[Tensor, "n tokens width"]) -> Float[Tensor, "n tokens width"]:
        """The residual stream behind the block."""
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(self.norm1(x)).chunk(3, -1))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.fc2(self.act(self.fc1(self.norm2(x))))


class VisionTransformer(nn.Module):
    """A vision transformer with a class token.

    Parameters
    ----------
    size, patch : int
        Side of the pictures and of a patch, in pixels; `patch` divides `size`.
    channels, classes : int
    width, depth, heads, hidden : int
        Units of the residual stream, blocks, attention heads, units of the hidden layer of a block.

    References
    ----------
    Dosovitskiy et al.: An image is worth 16x16 words (2021).
    """

    def __init__(
        self, size: int = 28, patch: int = 4, channels: int = 1, classes: int = 10, width: int = 64, depth: int = 4,
        heads: int = 4, hidden: int = 128,
    ) -> None:  # fmt: skip
        super().__init__()
        for name, value in (("patch", patch), ("depth", depth), ("heads", heads)):
            at_least(name, value, 1)
        if size % patch or width % heads:
            raise InputError(f"patch={patch} must divide size={size}, and heads={heads} width={width}")
        self.patches = nn.Conv2d(channels, width, patch, stride=patch)
        self.class_token = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.positions = nn.Parameter(0.02 * torch.randn(1, (size // patch) ** 2 + 1, width))
        self.blocks = nn.ModuleList(Block(width, heads, hidden) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, x: Float[Tensor, "n channels y x"]) -> Float[Tensor, "n classes"]:
        """Logits."""
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        h = torch.cat([self.class_token.expand(len(x), -1, -1), tokens], 1) + self.positions
        for block in self.blocks:
            h = block(h)
        return self.head(self.norm(h[:, 0]))


def fashion_vit() -> VisionTransformer:
    """The transformer that ships with nissl, trained on Fashion-MNIST; takes what `fashion_input` gives."""
    module = VisionTransformer()
    module.load_state_dict(load_file(WEIGHTS))
    return module.eval()


def fashion_input(images: np.ndarray) -> Float[Tensor, "n 1 y x"]:
    """Pictures (uint8, n × 28 × 28) as the network takes them."""
    images = np.asarray(images)
    if images.dtype != np.uint8 or images.ndim != 3:
        raise InputError(f"images must be uint8 (n, 28, 28), got {images.dtype} of shape {images.shape}")
    return (torch.from_numpy(images[:, None].astype(np.float32)) / 255 - FASHION_MEAN) / FASHION_STD


def train(
    images: np.ndarray, labels: np.ndarray, epochs: int = 16, batch: int = 128, rate: float = 2e-3, seed: int = 0,
    progress: bool = True,
) -> VisionTransformer:  # fmt: skip
    """Train the transformer: AdamW, one cycle of the rate, pictures mirrored and moved by up to two pixels.

    Parameters
    ----------
    images : array of uint8 (n, 28, 28)
    labels : array of int (n,)
    epochs, batch : int
    rate : float
        Largest learning rate.
    seed : int
    progress : bool, default True
        One line an epoch, on stderr.
    """
    at_least("epochs", epochs, 1)
    console = Console(stderr=True, quiet=not progress)
    generator = torch.Generator().manual_seed(seed)
    with seeded(seed):
        module = VisionTransformer()
    x, y = fashion_input(images), torch.from_numpy(np.asarray(labels))
    optimiser = torch.optim.AdamW(module.parameters(), rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, total_steps=epochs * -(-len(x) // batch))
    for epoch in range(epochs):
        total = 0.0
        for rows in torch.randperm(len(x), generator=generator).split(batch):
            shown = x[rows]
            mirrored = torch.rand(len(rows), generator=generator) < 0.5
            shown = torch.where(mirrored[:, None, None, None], shown.flip(-1), shown)
            dy, dx = torch.randint(-2, 3, (2,), generator=generator).tolist()
            loss = F.cross_entropy(module(shown.roll((dy, dx), (2, 3))), y[rows], label_smoothing=0.05)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
            schedule.step()
            total += loss.item() * len(rows)
        console.print(f"epoch {epoch + 1} of {epochs}: loss {total / len(x):.3f}")
    return module.eval()


def accuracy(module: nn.Module, images: np.ndarray, labels: np.ndarray, batch: int = 500) -> float:
    """Share of pictures that are classified right."""
    with torch.no_grad():
        found = torch.cat([module(x).argmax(1) for x in fashion_input(images).split(batch)])
    return float((found.numpy() == np.asarray(labels)).mean())


if __name__ == "__main__":
    where = sys.argv[1] if len(sys.argv) > 1 else None
    trained = train(*fashion_mnist("train", where))
    print(f"accuracy on unseen pictures: {accuracy(trained, *fashion_mnist('test', where)):.4f}")
    save_file({k: v.contiguous() for k, v in trained.state_dict().items()}, WEIGHTS)
