"""What every benchmark is run on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import nissl
from nissl.attribution import Method
from nissl.runner import Runner
from nissl.runner.runner import tune_format
from nissl.sources import load_data, load_model


@dataclass(eq=False)
class Subject:
    """A classifier of images, examples and what is explained.

    Attributes
    ----------
    module : nn.Module
        In evaluation mode, weights frozen: the cheapest state for everybody.
    x : Tensor (n, channels, side, side)
    y : Tensor (n,)
        Classes to be explained.
    layer : str
        Where class activation maps are taken.
    batch : int
        Rows in a batch, for all contenders alike: what is fastest for all of them here.
    """

    module: nn.Module
    x: Tensor
    y: Tensor
    layer: str
    batch: int = 4

    def __post_init__(self) -> None:
        self.module.eval().requires_grad_(False)
        self.network = nissl.Network(self.module)
        """As users get it: in the memory format that is fastest on this machine, which is measured once a network."""
        tune_format(self.network, nissl.Pass(self.x[:8]))
        self.contiguous = nissl.Network(self.module)
        """In the memory format of the inputs and with norms apart, which is what the peers run in."""
        self.contiguous.memory_format = torch.contiguous_format
        self.contiguous.fold_norms = False

    @property
    def n(self) -> int:
        return len(self.x)

    @property
    def side(self) -> int:
        return int(self.x.shape[-1])

    @property
    def region(self) -> int:
        """Side of the square regions that checks remove: 7 × 7 of them."""
        return self.side // 7

    @property
    def x_numpy(self) -> np.ndarray:
        return self.x.numpy()

    @property
    def y_numpy(self) -> np.ndarray:
        return self.y.numpy()

    def some(self, examples: slice) -> Subject:
        """The same network on fewer examples."""
        return Subject(self.module, self.x[examples], self.y[examples], self.layer, self.batch)

    def scores(self, method: Method, network: nissl.Network | None = None) -> Tensor:
        """Scores of all examples by nissl, by default in the peers' memory format."""
        found = method.attribute(network or self.contiguous, self.x, self.y, runner=self.runner())
        return torch.from_numpy(found.to_numpy())

    def contenders(self, method: Method, peer: str, theirs: Callable[[], Any]) -> dict[str, Callable[[], Any]]:
        """A method of nissl, as users get it and in the peers' memory format, and the peer's."""
        return {
            "nissl": lambda: self.scores(method, self.network),
            "nissl, contiguous": lambda: self.scores(method, self.contiguous),
            peer: theirs,
        }

    def runner(self) -> Runner:
        """A runner that remembers nothing yet."""
        return Runner(batch_size=self.batch, progress=False)


def demo(n: int) -> Subject:
    """EfficientNet-Lite0, trained on ImageNet, and n labelled photographs; all from installed packages."""
    model = load_model("demo")
    data = load_data("demo", model)
    if n > len(data):
        raise SystemExit(f"the demo has {len(data)} photographs, {n} were asked for")
    inputs = data.inputs
    assert isinstance(inputs, Tensor)
    assert data.labels is not None
    return Subject(model.module, inputs[:n].contiguous(), data.labels[:n], layer="_blocks.15")
