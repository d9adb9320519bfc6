"""Sparse autoencoders: what they compute, that training finds planted features, files of several kinds."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from nissl.concepts import SAE, explained_variance, train_sae
from nissl.errors import InputError
from nissl.studies.snmf import matched, planted


def weights(d=6, k=9, seed=0):
    g = torch.Generator().manual_seed(seed)
    return {
        "W_enc": torch.randn(d, k, generator=g), "W_dec": torch.randn(k, d, generator=g),
        "b_enc": torch.randn(k, generator=g), "b_dec": torch.randn(d, generator=g),
    }  # fmt: skip


def test_features_are_those_of_the_definitions():
    w, x = weights(), torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(1))
    p = (x - w["b_dec"]) @ w["W_enc"] + w["b_enc"]
    relu = SAE(**w)
    assert torch.allclose(relu.encode(x), p.clamp(min=0))
    assert torch.allclose(relu(x), p.clamp(min=0) @ w["W_dec"] + w["b_dec"], atol=1e-5)
    assert torch.allclose(SAE(**w, centred=False).encode(x), (x @ w["W_enc"] + w["b_enc"]).clamp(min=0))
    top = SAE(**w, kind="topk", active=3).encode(x).detach()
    assert ((top > 0).sum(-1) <= 3).all()
    for row, kept in zip(p.reshape(-1, 9), top.reshape(-1, 9), strict=True):
        largest = set(row.argsort(descending=True)[:3].tolist())
        assert all(float(kept[j]) == pytest.approx(max(float(row[j]), 0) if j in largest else 0) for j in range(9))
    t = torch.linspace(0, 2, 9)
    jump = SAE(**w, kind="jumprelu", threshold=t, centred=True)
    assert torch.allclose(jump.encode(x), torch.where(p > t, p, 0.0).clamp(min=0))
    # published ones do not take the decoder's bias off
    p = x @ w["W_enc"] + w["b_enc"]
    assert torch.allclose(SAE(**w, kind="jumprelu", threshold=t).encode(x), torch.where(p > t, p, 0.0).clamp(min=0))
    assert torch.equal(relu.directions, w["W_dec"])
    # both ends of a dictionary are differentiable
    y = x.clone().requires_grad_()
    relu(y).sum().backward()
    assert y.grad.abs().sum() > 0


def test_training_finds_planted_features():
    a, z, _ = planted(0)
    sae = train_sae(a, 10, active=4, steps=500, batch=128, lr=3e-3, progress=False)
    assert matched(z, sae.directions.numpy()).mean() > 0.9
    assert torch.allclose(sae.directions.norm(dim=1), torch.ones(10), atol=1e-5)
    assert ((sae.encode(torch.from_numpy(a)) > 0).sum(1) <= 4).all()
    assert explained_variance(a, sae(torch.from_numpy(a))) > 0.7
    assert not any(p.requires_grad for p in sae.parameters())


def test_the_price_makes_relu_features_sparse_and_scale_does_not_matter():
    a, _, _ = planted(0, n=400, d=100, size=6)
    few = {"kind": "relu", "steps": 150, "batch": 128, "progress": False}
    active, variance = [], []
    for price in (0.01, 0.3):
        sae = train_sae(a, 10, l1=price, **few)
        active.append(float((sae.encode(torch.from_numpy(a)) > 0).sum(1).float().mean()))
        variance.append(explained_variance(a, sae(torch.from_numpy(a))))
    assert active[1] < active[0]
    assert variance[1] < variance[0]
    large = train_sae(1000 * a, 10, l1=0.3, **few)
    assert explained_variance(1000 * a, large(torch.from_numpy(1000 * a))) == pytest.approx(variance[1], abs=1e-3)


def test_the_same_seed_trains_the_same(tmp_path):
    a, _, _ = planted(0, n=200, d=100, size=6)
    few = {"steps": 20, "active": 2, "progress": False}
    one, same, other = (train_sae(a, 8, seed=s, **few) for s in (3, 3, 4))
    assert torch.equal(one.W_dec, same.W_dec)
    assert not torch.equal(one.W_dec, other.W_dec)
    kept = np.memmap(tmp_path / "a.bin", np.float32, "w+", shape=a.shape)
    kept[:] = a
    assert torch.allclose(train_sae(kept, 8, seed=3, **few).W_dec, one.W_dec)


def test_dead_features_come_back_to_life():
    # a feature whose bias keeps it silent for good, but for the auxiliary loss
    from nissl.concepts.sae import _auxiliary

    a, _, _ = planted(0, n=200, d=100, size=6)
    sae = train_sae(a, 6, active=2, steps=30, progress=False).requires_grad_(True)
    with torch.no_grad():
        sae.b_enc[2] = -0.5
    x = torch.from_numpy(a)
    p = sae.before(x)
    dead = torch.tensor([False, False, True, False, False, False])
    _auxiliary(sae, p, x - sae(x), dead).backward()
    assert float(sae.b_enc.grad[2]) != 0
    touched = sae.W_enc.grad.abs().sum(0) > 0
    assert not (touched & ~dead).any()
    assert float(_auxiliary(sae, p, x - sae(x), ~dead & dead)) == 0


@pytest.mark.parametrize(
    "more", [{}, {"kind": "topk", "active": 4}, {"kind": "jumprelu", "threshold": torch.ones(9)}, {"centred": False}]
)
def test_files_bring_back_the_same(tmp_path, more):
    sae, x = SAE(**weights(), **more), torch.randn(7, 6, generator=torch.Generator().manual_seed(1))
    sae.save(tmp_path / "sae.safetensors")
    again = SAE.load(tmp_path / "sae.safetensors", width=6)
    assert torch.equal(again.encode(x), sae.encode(x))
    assert torch.equal(again(x), sae(x))
    assert [f.name for f in tmp_path.iterdir()] == ["sae.safetensors"]


def test_files_of_others_are_read(tmp_path):
    w, x = weights(), torch.randn(7, 6, generator=torch.Generator().manual_seed(1))
    expected = SAE(**w).encode(x)
    turned = {"encoder.weight": w["W_enc"].T.contiguous(), "encoder.bias": w["b_enc"]}
    files = {
        "saelens": {**w},
        "eleuther": {**turned, "W_dec": w["W_dec"], "b_dec": w["b_dec"]},
        "dictionary_learning": {**turned, "decoder.weight": w["W_dec"].T.contiguous(), "bias": w["b_dec"]},
    }
    for name, tensors in files.items():
        save_file(tensors, tmp_path / name)
        assert torch.allclose(SAE.load(tmp_path / name).encode(x), expected, atol=1e-6), name
    assert SAE.load(tmp_path / "eleuther", kind="topk", active=2).active == 2
    save_file({**w, "threshold": torch.ones(9)}, tmp_path / "jump")
    assert SAE.load(tmp_path / "jump").kind == "jumprelu"


def test_files_that_do_not_fit_are_refused(tmp_path):
    SAE(**weights()).save(tmp_path / "sae")
    with pytest.raises(InputError, match="6 units wide, the site has 64"):
        SAE.load(tmp_path / "sae", width=64)
    save_file({"layer.weight": torch.ones(2, 3)}, tmp_path / "other")
    with pytest.raises(InputError, match=r"no W_enc or encoder.weight, it has layer.weight \(2, 3\)"):
        SAE.load(tmp_path / "other")
    (tmp_path / "broken").write_bytes(b"no tensors")
    with pytest.raises(InputError, match="cannot be read as safetensors"):
        SAE.load(tmp_path / "broken")
    with pytest.raises(InputError, match="cannot be read"):
        SAE.load(tmp_path / "absent")
    save_file({"W_enc": torch.ones(6, 9), "W_dec": torch.ones(8, 6)}, tmp_path / "odd")
    with pytest.raises(InputError, match=r"got \(6, 9\) and \(8, 6\)"):
        SAE.load(tmp_path / "odd")
    with pytest.raises(InputError, match="needs active="):
        SAE.load(tmp_path / "sae", kind="topk")


def test_bad_parameters_are_refused():
    w = weights()
    for more, says in (
        ({"kind": "gated"}, "kind must be one of"),
        ({"kind": "topk", "active": 10}, "cannot be chosen from 9"),
        ({"kind": "jumprelu"}, "needs threshold="),
        ({"kind": "jumprelu", "threshold": torch.ones(3)}, "threshold must have 9 entries"),
    ):
        with pytest.raises(InputError, match=says):
            SAE(**w, **more)
    with pytest.raises(InputError, match="NaN or infinity"):
        SAE(w["W_enc"], w["W_dec"] * torch.nan)
    sae = SAE(**w)
    with pytest.raises(InputError, match="6 units wide, activations of 5"):
        sae.encode(torch.ones(2, 5))
    with pytest.raises(InputError, match="has 9 features, 6 were given"):
        sae.decode(torch.ones(2, 6))
    for a, settings, says in (
        (np.ones((5, 3)), {}, "do not vary"),
        (np.full((5, 3), np.nan), {}, "NaN"),
        (np.ones(5), {}, "must be a matrix"),
        (np.eye(5), {"steps": 0}, "steps"),
        (np.eye(5), {"lr": 0.0}, "lr must be"),
        (np.eye(5), {"active": 9}, "cannot be chosen"),
    ):
        with pytest.raises(InputError, match=says):
            train_sae(a, 4, **settings)
