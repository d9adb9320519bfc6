"""Attribution methods beside captum's and zennit's."""

from __future__ import annotations

from typing import Any
from unittest import mock

import captum.attr as ca
import torch
from torch import Tensor

from benchmarks.measure import SAME, Case, relative
from benchmarks.subject import Subject
from nissl.attribution import GradCAM, IntegratedGradients, Occlusion, SmoothGrad
from nissl.runner import make_questions

STEPS = 32
SAMPLES = 25
NOISE = 0.15


def integrated_gradients(s: Subject) -> Case:
    ours = IntegratedGradients(steps=STEPS)
    explainer = ca.IntegratedGradients(s.module)

    def theirs() -> Tensor:
        found, _ = explainer.attribute(
            s.x, torch.zeros_like(s.x), s.y, n_steps=STEPS, internal_batch_size=s.batch, return_convergence_delta=True
        )
        return found

    return Case(
        "integrated gradients", "captum", 1.0, s.contenders(ours, "captum", theirs),
        lambda: {"scores": (relative(s.scores(ours), theirs()), SAME)}, s.module,
        f"{STEPS} Gauss-Legendre points, zero baseline; both also ask f(x) and f(baseline)",
    )  # fmt: skip


def smoothgrad(s: Subject) -> Case:
    ours = SmoothGrad(samples=SAMPLES, noise=NOISE)
    tunnel: Any = ca.NoiseTunnel(ca.Saliency(s.module))
    spread = [float(NOISE * (x.max() - x.min())) for x in s.x]  # float32, as nissl has it
    at_once = max(s.batch // s.n, 1)

    def theirs() -> Tensor:
        return tunnel.attribute(
            s.x, nt_type="smoothgrad", nt_samples=SAMPLES, nt_samples_batch_size=at_once,
            stdevs=sum(spread) / s.n, target=s.y,
        )  # fmt: skip

    def differences() -> dict[str, tuple[float, float]]:
        # captum draws its noise by torch.normal; here it is handed what nissl draws. Examples go one by one, so that both
        # form the same batches: at kinks, PyTorch's own gradients differ by as much as 1e-3 between batches of 5 and 16.
        found = []
        for i, std in enumerate(spread):
            one = s.some(slice(i, i + 1))
            (q,) = make_questions(one.contiguous, one.x, one.y)
            noise = torch.randn(SAMPLES, *one.x.shape[1:], generator=q.generator("noise"))
            left = iter(noise.split(s.batch))
            with mock.patch("torch.normal", lambda mean, std, left=left: mean + std * next(left)):
                same = tunnel.attribute(
                    one.x, nt_type="smoothgrad", nt_samples=SAMPLES, nt_samples_batch_size=s.batch, stdevs=std,
                    target=one.y,
                )  # fmt: skip
            found.append(relative(one.scores(ours), same))
        return {"scores, same noise": (max(found), SAME)}

    return Case(
        "SmoothGrad", "captum", 1.0, s.contenders(ours, "captum", theirs), differences, s.module,
        f"{SAMPLES} samples of the absolute gradient; captum takes one σ for all examples, here their mean",
    )  # fmt: skip


def grad_cam(s: Subject) -> Case:
    ours = GradCAM(layer=s.layer)
    explainer = ca.LayerGradCam(s.module, s.module.get_submodule(s.layer))

    def theirs() -> Tensor:
        maps = explainer.attribute(s.x, s.y, relu_attributions=True)
        assert isinstance(maps, Tensor)
        return ca.LayerAttribution.interpolate(maps, (s.side, s.side), "bilinear")[:, 0]

    return Case(
        "Grad-CAM", "captum", 1.0, s.contenders(ours, "captum", theirs),
        lambda: {"scores": (relative(s.scores(ours), theirs()), SAME)}, s.module,
        f"layer {s.layer}, enlarged to the input",
    )  # fmt: skip


def occlusion(s: Subject) -> Case:
    window = s.side // 14
    ours = Occlusion(window=window)
    explainer = ca.Occlusion(s.module)
    at_once = max(s.batch // s.n, 1)

    def theirs() -> Tensor:
        shape = (s.x.shape[1], window, window)
        return explainer.attribute(s.x, shape, shape, 0, s.y, perturbations_per_eval=at_once)

    def differences() -> dict[str, tuple[float, float]]:
        # nissl shares a window's fall among its positions, captum gives all of it to each of them
        shared = theirs()[:, 0] / window**2
        return {"scores": (relative(s.scores(ours), shared), SAME)}

    return Case(
        "occlusion", "captum", 1.0, s.contenders(ours, "captum", theirs), differences, s.module,
        f"windows of {window} × {window} without overlap",
    )  # fmt: skip
