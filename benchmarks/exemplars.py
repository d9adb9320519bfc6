"""Exemplars of all units of EfficientNet-Lite0: memory for N and 4 N images, time for a thousand.

    python -m benchmarks.exemplars --images 200

Each run is a process of its own. Images are crops of the demo's photographs, drawn when they are asked for. There is no peer:
what is claimed is that memory does not depend on the number of images.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.measure import ROOT, held
from nissl.concepts.exemplars import find_exemplars
from nissl.network import Network


class Crops(torch.utils.data.Dataset):
    """Random crops of some images, enlarged to their size again; number i is the same whenever it is asked for."""

    def __init__(self, images: Tensor, n: int) -> None:
        self.images, self.n = images, n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: int) -> Tensor:
        if not 0 <= i < self.n:
            raise IndexError(i)
        g = torch.Generator().manual_seed(i)
        image = self.images[int(torch.randint(len(self.images), (), generator=g))]
        side = image.shape[-1]
        size = int(torch.randint(side // 2, side + 1, (), generator=g))
        top, left = (int(torch.randint(side - size + 1, (), generator=g)) for _ in range(2))
        crop = image[None, :, top : top + size, left : left + size]
        return F.interpolate(crop, size=(side, side), mode="bilinear")[0]


def one(n: int) -> dict[str, Any]:
    """One run in this process."""
    from nissl.sources import load_data, load_model

    torch.set_num_threads(1)
    loaded = load_model("demo")
    images = load_data("demo", loaded).inputs
    assert isinstance(images, Tensor)
    network = Network(loaded.module)
    sites = [s.address for s in network.sites(inputs=images[:1]) if s.role == "conv"]
    before, started, cpu = held(), time.perf_counter(), time.process_time()
    found = find_exemplars(network, Crops(images, n), sites, batch=4, progress=False)
    return {
        "images": n,
        "sites": len(sites),
        "units": len(found),
        "fires": int(found.fires.sum()),
        "MB before": before,
        "MB": held(),
        "seconds": time.perf_counter() - started,
        "cpu seconds": time.process_time() - cpu,
    }


def main() -> None:
    """Run both sizes and print what they took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=200, help="N; the second run has four times as many")
    parser.add_argument("--one", type=int, help="only one run of this size, as JSON")
    given = parser.parse_args()
    if given.one is not None:
        print(json.dumps(one(given.one)))
        return
    rows = []
    for n in (given.images, 4 * given.images):
        command = [sys.executable, "-m", "benchmarks.exemplars", "--one", str(n)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        print(json.dumps(rows[-1]))
    small, large = rows
    print(f"memory for 4 N over that for N: {large['MB'] / small['MB']:.3f}")
    print(
        f"a thousand images: {1000 * (large['seconds'] - small['seconds']) / (large['images'] - small['images']):.0f} s"
    )


if __name__ == "__main__":
    main()
