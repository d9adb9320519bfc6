"""A whole audit beside the same work done with captum and quantus.

Ten methods that both have, at the same number of rows, and the checks that quantus has a counterpart for. The peers are
used as their documentation does: methods explain all examples in one call with the library's own batching, and each
metric is called for each method.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import captum.attr as ca
import numpy as np
import quantus
import torch
from captum._utils.models.linear_model import SkLearnRidge
from torch import Tensor, nn

from benchmarks.measure import SAME, Case, relative
from benchmarks.subject import Subject
from nissl.attribution import GradCAM, method
from nissl.trust.audit import AuditResult, audit
from nissl.trust.faithfulness import RegionCurves

BUDGET = 128
METHODS = {
    "saliency": "saliency",
    "ixg": "ixg",
    "ig": "ig(steps=32)",
    "smoothgrad": "smoothgrad(samples=25)",
    "vargrad": "vargrad(samples=25)",
    "gradshap": "gradshap(samples=32)",
    "gradcam": "gradcam",
    "occlusion": "occlusion",
    "lime": "lime(n_samples=128)",
    "kernelshap": "kernelshap(n_samples=128)",
}
STEPS = 8
"""Of curves: quantus takes only numbers of steps that divide the number of pixels."""
CHECKS = [
    RegionCurves(steps=STEPS),
    "subsets",
    "completeness",
    "max_sensitivity",
    "randomisation",
    "logit",
    "invariance",
]
COMPARED = ("saliency", "ixg", "ig", "gradcam")
"""Methods without chance, whose scores must be the same."""

QUIET: dict[str, Any] = {"disable_warnings": True}
ZERO: dict[str, Any] = {"perturb_baseline": 0.0}


def explainers(s: Subject) -> dict[str, Callable[[nn.Module, Tensor, Tensor], Any]]:
    """The ten methods by captum."""
    window = next(w for w in range(s.side // 14, s.side) if (-(-max(s.side - w, 0) // w) + 1) ** 2 < BUDGET)
    cells = torch.arange(s.side) // (s.side // 8)
    patches = (cells[:, None] * (int(cells.max()) + 1) + cells).expand(1, 1, -1, -1)  # about as many as superpixels
    spread = 0.15 * float(s.x.max() - s.x.min())

    def grad_cam(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        maps = ca.LayerGradCam(model, model.get_submodule(s.layer)).attribute(x, y, relu_attributions=True)
        assert isinstance(maps, Tensor)
        return ca.LayerAttribution.interpolate(maps, (s.side, s.side), "bilinear")

    def noisy(kind: str) -> Callable[[nn.Module, Tensor, Tensor], Any]:
        return lambda m, x, y: ca.NoiseTunnel(ca.Saliency(m)).attribute(
            x, nt_type=kind, nt_samples=25, stdevs=spread, target=y, abs=kind == "smoothgrad"
        )

    shape = (s.x.shape[1], window, window)
    return {
        "saliency": lambda m, x, y: ca.Saliency(m).attribute(x, y),
        "ixg": lambda m, x, y: ca.InputXGradient(m).attribute(x, y),
        "ig": lambda m, x, y: ca.IntegratedGradients(m).attribute(x, 0, y, n_steps=32),
        "smoothgrad": noisy("smoothgrad"),
        "vargrad": noisy("vargrad"),
        "gradshap": lambda m, x, y: ca.GradientShap(m).attribute(
            x, x.min() + torch.rand(32, *x.shape[1:]) * (x.max() - x.min()), n_samples=32, target=y
        ),
        "gradcam": grad_cam,
        "occlusion": lambda m, x, y: ca.Occlusion(m).attribute(x, shape, shape, 0, y),
        # nissl's linear model; captum's default, a lasso, gives a random network only zeros, which quantus refuses
        "lime": lambda m, x, y: ca.Lime(m, SkLearnRidge(alpha=1.0)).attribute(
            x, 0, y, feature_mask=patches, n_samples=BUDGET
        ),
        "kernelshap": lambda m, x, y: ca.KernelShap(m).attribute(x, 0, y, feature_mask=patches, n_samples=BUDGET),
    }


def with_bias(module: nn.Module) -> nn.Module:
    """A copy whose first layer has a bias, zero where it had none: quantus' InputInvariance cannot do without."""
    found = copy.deepcopy(module)
    first = next(m for m in found.modules() if isinstance(m, (nn.Conv2d, nn.Linear)))
    if first.bias is None:
        first.bias = nn.Parameter(torch.zeros(len(first.weight)), requires_grad=False)
    return found


def with_peers(s: Subject, sanity_examples: int) -> dict[str, np.ndarray]:
    """The same work with captum and quantus; gives the scores."""
    few = slice(0, sanity_examples)
    pixels = s.side**2
    with torch.no_grad():
        n_classes = s.module(s.x[:1]).shape[1]
    biased = with_bias(s.module)
    scores = {}
    for name, explainer in explainers(s).items():

        def explain(model: Any, inputs: Any, targets: Any, explainer: Any = explainer, **_: Any) -> np.ndarray:
            x, y = torch.as_tensor(inputs).float(), torch.as_tensor(targets).long()
            return explainer(model, x, y).detach().sum(1, keepdim=True).numpy()

        a = scores[name] = explain(s.module, s.x_numpy, s.y_numpy)
        # curves: eight points down, most and least relevant first
        for order in (a, a.max(axis=(1, 2, 3), keepdims=True) - a):
            quantus.PixelFlipping(features_in_step=pixels // STEPS, perturb_baseline="mean", **QUIET)(
                s.module, s.x_numpy, s.y_numpy, order
            )
        # subsets: infidelity, and the correlation of sums with falls for random sets
        quantus.Infidelity(perturb_patch_sizes=[s.region], n_perturb_samples=1, **QUIET)(
            s.module, s.x_numpy, s.y_numpy, a
        )
        quantus.FaithfulnessCorrelation(nr_runs=60, subset_size=pixels // 2, return_aggregate=False, **QUIET)(
            s.module, s.x_numpy, s.y_numpy, a
        )
        if name == "ig":
            quantus.Completeness(**QUIET, **ZERO)(s.module, s.x_numpy, s.y_numpy, a)
        for metric in (
            quantus.MaxSensitivity(nr_samples=1, lower_bound=0.02, **QUIET),
            quantus.MPRT(skip_layers=True, **QUIET),
            quantus.RandomLogit(num_classes=n_classes, **QUIET),
        ):
            metric(s.module, s.x_numpy[few], s.y_numpy[few], a[few], explain_func=explain)
        quantus.InputInvariance(**QUIET)(biased, s.x_numpy[few], s.y_numpy[few], a[few], explain_func=explain)
    return scores


def with_nissl(s: Subject, sanity_examples: int) -> tuple[AuditResult, Any]:
    runner = s.runner()
    methods = {k: v if k != "gradcam" else f"gradcam(layer='{s.layer}')" for k, v in METHODS.items()}
    found = audit(
        s.network, s.x, s.y, methods=methods, checks=CHECKS, budget=BUDGET, sanity_examples=sanity_examples,
        runner=runner,
    )  # fmt: skip
    return found, runner


def whole_audit(s: Subject, sanity_examples: int) -> Case:
    kept: dict[str, Any] = {}

    def ours() -> None:
        kept["nissl"], kept["runner"] = with_nissl(s, sanity_examples)

    def theirs() -> None:
        kept["peers"] = with_peers(s, sanity_examples)

    def differences() -> dict[str, tuple[float, float]]:
        found = {}
        for name in COMPARED:  # in the peers' format: another order of sums moves gradients at kinks
            made = GradCAM(layer=s.layer) if name == "gradcam" else method(METHODS[name])
            a = made.attribute(s.contiguous, s.x, s.y, runner=s.runner()).to_numpy()
            found[name] = (relative(a.sum(1) if a.ndim == 4 else a, kept["peers"][name][:, 0]), SAME)
        return found

    def where_time_goes() -> dict[str, Any]:
        return {
            name: f"{c.forward} rows asked, {c.backward} with gradients, {c.reused} from memory, {c.seconds:.1f} s"
            for name, c in sorted(kept["runner"].costs.items(), key=lambda item: -item[1].seconds)
        }

    return Case(
        "whole audit", "captum + quantus", 0.4, {"nissl": ours, "captum + quantus": theirs}, differences, s.module,
        f"{len(METHODS)} methods, {len(CHECKS)} checks, {s.n} examples, {sanity_examples} of them for checks that run "
        "methods again; nissl also audits its two controls, random and edge",
        once=True, extra=where_time_goes,
    )  # fmt: skip
