"""Sparse autoencoders: trained on activations, or handed over as safetensors."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from nissl.arguments import as_path, at_least, is_number
from nissl.errors import InputError
from nissl.runner.runner import progress_bar

KINDS = ("topk", "relu", "jumprelu")

_NAMES: dict[str, tuple[tuple[str, bool], ...]] = {
    # ours and SAELens; then the names of EleutherAI's and of the dictionary_learning library. True: turned.
    "W_enc": (("W_enc", False), ("encoder.weight", True)),
    "b_enc": (("b_enc", False), ("encoder.bias", False)),
    "W_dec": (("W_dec", False), ("decoder.weight", True)),
    "b_dec": (("b_dec", False), ("bias", False), ("decoder.bias", False)),
}


class SAE(nn.Module):
    """Sparse autoencoder: x ≈ f(x) W_dec + b_dec, with few features f(x) ≥ 0 of x.

    Parameters
    ----------
    W_enc : Tensor (d, k)
    W_dec : Tensor (k, d)
    b_enc : Tensor (k,), optional
    b_dec : Tensor (d,), optional
    kind : {"topk", "relu", "jumprelu"}, default "relu"
        Features are relu(p) with p = (x − b_dec) W_enc + b_enc; the `active` largest of them; or p where it exceeds the
        feature's threshold.
    active : int, optional
        For ``topk``: features of a token.
    threshold : Tensor (k,), optional
        For ``jumprelu``.
    centred : bool, optional
        Whether b_dec is taken off before encoding; by default it is, except for ``jumprelu``.

    Raises
    ------
    InputError
        Shapes that do not fit each other, or a parameter that the kind needs is missing.

    References
    ----------
    Bricken et al. (2023). Towards monosemanticity. Transformer Circuits Thread.
    Gao et al. (2024). Scaling and evaluating sparse autoencoders. (TopK and its auxiliary loss.)
    Rajamanoharan et al. (2024). Jumping ahead: improving reconstruction fidelity with JumpReLU sparse autoencoders.
    """

    def __init__(
        self,
        W_enc: Tensor,
        W_dec: Tensor,
        b_enc: Tensor | None = None,
        b_dec: Tensor | None = None,
        *,
        kind: str = "relu",
        active: int | None = None,
        threshold: Tensor | None = None,
        centred: bool | None = None,
    ) -> None:
        super().__init__()
        if W_dec.ndim != 2 or tuple(W_enc.shape) != tuple(W_dec.shape)[::-1]:
            raise InputError(
                f"W_enc must be (d, k) and W_dec (k, d); got {tuple(W_enc.shape)} and {tuple(W_dec.shape)}"
            )
        k, d = W_dec.shape
        b_enc = torch.zeros(k) if b_enc is None else b_enc
        b_dec = torch.zeros(d) if b_dec is None else b_dec
        if kind not in KINDS:
            raise InputError(f"kind must be one of {', '.join(KINDS)}; got {kind!r}")
        if kind == "topk":
            if active is None:
                raise InputError("a topk SAE needs active=, the number of features that a token may have")
            at_least("active", active, 1)
            if active > k:
                raise InputError(f"active={active} features cannot be chosen from {k}")
        if kind == "jumprelu" and threshold is None:
            raise InputError("a jumprelu SAE needs threshold=, one number for each feature")
        parts = (("b_enc", b_enc, k), ("b_dec", b_dec, d), ("threshold", threshold, k))
        for name, value, size in parts:
            if value is not None and tuple(value.shape) != (size,):
                raise InputError(f"{name} must have {size} entries, got shape {tuple(value.shape)}")
        for name, value in (("W_enc", W_enc), ("W_dec", W_dec), *((n, v) for n, v, _ in parts if v is not None)):
            if not bool(torch.isfinite(value).all()):
                raise InputError(f"{name} holds NaN or infinity")
        self.W_enc, self.W_dec = nn.Parameter(W_enc.float().clone()), nn.Parameter(W_dec.float().clone())
        self.b_enc, self.b_dec = nn.Parameter(b_enc.float().clone()), nn.Parameter(b_dec.float().clone())
        self.threshold: Tensor | None
        self.register_buffer("threshold", None if threshold is None else threshold.detach().float().clone())
        self.kind, self.active = kind, active
        self.centred = kind != "jumprelu" if centred is None else centred

    def extra_repr(self) -> str:
        """Kind and sizes."""
        return f"{self.kind}, d={self.W_dec.shape[1]}, features={len(self.W_dec)}, active={self.active}"

    @property
    def directions(self) -> Tensor:
        """The features (k, d): what one unit of each adds to the activation."""
        return self.W_dec.detach()

    def encode(self, x: Tensor) -> Tensor:
        """Features (..., k) ≥ 0 of activations (..., d)."""
        return self.activate(self.before(x))

    def activate(self, p: Tensor) -> Tensor:
        """The nonlinearity: features from what `before` gives."""
        if self.kind == "jumprelu":
            assert self.threshold is not None
            return p.relu() * (p > self.threshold)
        if self.kind == "topk":
            assert self.active is not None
            top = p.relu().topk(self.active, dim=-1)
            return torch.zeros_like(p).scatter(-1, top.indices, top.values)
        return p.relu()

    def before(self, x: Tensor) -> Tensor:
        """Features before the nonlinearity, (..., k)."""
        if x.shape[-1] != len(self.b_dec):
            raise InputError(f"this SAE is {len(self.b_dec)} units wide, activations of {x.shape[-1]} were given")
        x = x.to(self.W_enc)
        return (x - self.b_dec if self.centred else x) @ self.W_enc + self.b_enc

    def decode(self, features: Tensor) -> Tensor:
        """Activations (..., d) from features (..., k)."""
        if features.shape[-1] != len(self.W_dec):
            raise InputError(f"this SAE has {len(self.W_dec)} features, {features.shape[-1]} were given")
        return features.to(self.W_dec) @ self.W_dec + self.b_dec

    def forward(self, x: Tensor) -> Tensor:
        """The reconstruction of activations (..., d)."""
        return self.decode(self.encode(x))

    # ---------------------------------------------------------------- on disk

    def save(self, file: str | Path) -> None:
        """Write to a safetensors file; it is moved into place when it is complete."""
        from safetensors.torch import save_file

        file = as_path("file", file)
        tensors = {k: v.detach().contiguous() for k, v in self.state_dict().items()}
        about = {"kind": self.kind, "active": str(self.active or ""), "centred": str(int(self.centred))}
        handle, part = tempfile.mkstemp(prefix=".part-", dir=file.parent)
        os.close(handle)
        try:
            save_file(tensors, part, about)
            os.replace(part, file)
        except BaseException:
            Path(part).unlink(missing_ok=True)
            raise

    @classmethod
    def load(
        cls,
        file: str | Path,
        width: int | None = None,
        *,
        kind: str | None = None,
        active: int | None = None,
        centred: bool | None = None,
    ) -> SAE:
        """Read an SAE from safetensors.

        Parameters
        ----------
        file : path
            With ``W_enc`` (d, k), ``W_dec`` (k, d), ``b_enc``, ``b_dec`` and, for jumprelu, ``threshold``, as `save` and
            SAELens write them; or ``encoder.weight`` (k, d), ``encoder.bias`` with ``W_dec`` or ``decoder.weight`` (d, k).
        width : int, optional
            Units of the site that it is meant for; another width is refused.
        kind, active, centred : optional
            Where the file does not say; see `SAE`. By default jumprelu if there is a threshold, else relu.

        Raises
        ------
        InputError
            The file cannot be read, lacks a matrix, or has another width.
        """
        from safetensors import SafetensorError, safe_open

        file = as_path("file", file)
        try:
            with safe_open(file, "pt") as opened:
                about = opened.metadata() or {}
                held = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (no mapping)
        except (OSError, SafetensorError) as error:
            raise InputError(f"{file} cannot be read as safetensors: {error}") from error
        found: dict[str, Tensor] = {}
        for name, candidates in _NAMES.items():
            for candidate, turned in candidates:
                if candidate in held:
                    found[name] = held[candidate].T if turned else held[candidate]
                    break
        shapes = ", ".join(f"{k} {tuple(v.shape)}" for k, v in held.items())
        for name in ("W_enc", "W_dec"):
            if name not in found:
                wanted = " or ".join(n for n, _ in _NAMES[name])
                raise InputError(f"{file} is no SAE that nissl knows: it has no {wanted}, it has {shapes}")
        if width is not None and found["W_dec"].shape[-1] != width:
            raise InputError(
                f"the SAE in {file} is {found['W_dec'].shape[-1]} units wide, the site has {width}; was it trained on "
                "another layer, role or model?"
            )
        threshold = held.get("threshold")
        kind = kind or about.get("kind") or ("relu" if threshold is None else "jumprelu")
        active = active or (int(about["active"]) if about.get("active") else None)
        if centred is None and "centred" in about:
            centred = about["centred"] == "1"
        return cls(**found, kind=kind, active=active, threshold=threshold, centred=centred)


def train_sae(
    activations: Any,
    n_features: int,
    *,
    kind: Literal["topk", "relu"] = "topk",
    active: int = 8,
    l1: float = 0.01,
    steps: int = 2000,
    batch: int = 512,
    lr: float = 1e-3,
    seed: int = 0,
    progress: bool = True,
) -> SAE:
    """Train a sparse autoencoder on activations.

    Parameters
    ----------
    activations : Tensor, ndarray or numpy.memmap (n, d)
    n_features : int
    kind : {"topk", "relu"}, default "topk"
        The `active` largest features of a token are kept; or all positive ones, at the price of `l1`.
    active : int, default 8
    l1 : float, default 0.01
        For ``relu``: price of the sum of features times the length of their directions, with activations in units of
        their root mean square length.
    steps, batch, lr, seed : optional
        Adam; the rate falls linearly over the last fifth.
    progress : bool, default True

    Returns
    -------
    SAE
        Directions of length 1; in evaluation mode.

    Notes
    -----
    The encoder starts as the transpose of the decoder. Directions are brought back to length 1 after each step. Features of
    a topk SAE that were not used for 200 steps learn to reconstruct what is left of the error (auxiliary loss).

    References
    ----------
    Gao et al. (2024). Scaling and evaluating sparse autoencoders.
    """
    a = activations.detach() if isinstance(activations, Tensor) else np.asarray(activations)
    if a.ndim != 2 or 0 in a.shape:
        raise InputError(f"activations must be a matrix (n, d), got shape {tuple(a.shape)}")
    for name, value in (("n_features", n_features), ("active", active), ("steps", steps), ("batch", batch)):
        at_least(name, value, 1)
    at_least("seed", seed, 0)
    for name, value in (("l1", l1), ("lr", lr)):
        if not (is_number(value) and value > 0):
            raise InputError(f"{name} must be a number above 0, got {value!r}")
    if kind not in ("topk", "relu"):
        raise InputError(f"kind must be 'topk' or 'relu' to be trained, got {kind!r}")
    n, d = a.shape
    generator = torch.Generator().manual_seed(seed)

    def rows(index: Tensor) -> Tensor:
        part = a[index] if isinstance(a, Tensor) else torch.from_numpy(np.array(a[index.numpy()], dtype=np.float32))
        return part.float()

    sample = rows(torch.randperm(n, generator=generator)[:8192])
    if not bool(torch.isfinite(sample).all()):
        raise InputError("activations hold NaN or infinity")
    centre = sample.mean(0)
    scale = (sample - centre).square().sum(1).mean().sqrt()
    if not float(scale) > 0:
        raise InputError("the activations do not vary")
    directions = torch.randn(n_features, d, generator=generator)
    directions = directions / directions.norm(dim=1, keepdim=True)
    # trained on activations of length about 1; brought to their own scale at the end
    sae = SAE(
        directions.T, directions, None, centre / scale, kind=kind, active=active if kind == "topk" else None
    )  # fmt: skip
    optimizer = torch.optim.Adam(sae.parameters(), lr)
    fall = max(1, steps // 5)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (steps - step) / fall))
    unused = torch.zeros(n_features)
    with progress_bar(progress, steps, "training SAE") as step_done:
        for _ in range(steps):
            x = rows(torch.randint(n, (min(batch, n),), generator=generator)) / scale
            p = sae.before(x)
            f = sae.activate(p)
            error = x - sae.decode(f)
            loss = error.square().sum(1).mean()
            unused = torch.where((f > 0).any(0), 0.0, unused + 1)
            if kind == "relu":
                loss = loss + l1 * (f * sae.W_dec.norm(dim=1)).sum(1).mean()
            else:
                loss = loss + _auxiliary(sae, p, error, unused > 200) / 32
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            with torch.no_grad():
                sae.W_dec.div_(sae.W_dec.norm(dim=1, keepdim=True).clamp(min=1e-12))
            step_done()
    optimizer.zero_grad()
    with torch.no_grad():
        sae.b_enc.mul_(scale)
        sae.b_dec.mul_(scale)
    return sae.eval().requires_grad_(False)


def _auxiliary(sae: SAE, p: Tensor, error: Tensor, dead: Tensor) -> Tensor:
    """Error of reconstructing the error by dead features."""
    n_dead = int(dead.sum())
    if not n_dead:
        return error.new_zeros(())
    assert sae.active is not None
    top = p[:, dead].topk(min(n_dead, 4 * sae.active), dim=-1)
    f = torch.zeros(len(p), n_dead).scatter(-1, top.indices, top.values.relu())
    return (error.detach() - f @ sae.W_dec[dead]).square().sum(1).mean()


def explained_variance(activations: Any, reconstruction: Any) -> float:
    """1 − squared error / squared distance from the mean, over all entries."""
    a, r = (
        torch.as_tensor(np.asarray(v) if not isinstance(v, Tensor) else v).double()
        for v in (activations, reconstruction)
    )
    return float(1 - (a - r).square().sum() / (a - a.mean(0)).square().sum())
