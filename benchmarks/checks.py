"""Checks of explanations beside quantus' and captum's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import captum.attr as ca
import captum.metrics as cm
import numpy as np
import quantus
import torch
import xarray as xr
from torch import Tensor

import nissl
from benchmarks.measure import SAME, Case, relative
from benchmarks.subject import Subject
from nissl.attribution import IntegratedGradients
from nissl.attribution.masking import features_of
from nissl.runner import make_questions
from nissl.trust.check import similarity
from nissl.trust.faithfulness import RegionCurves, Subsets, random_subsets
from nissl.trust.sanity import WeightRandomisation

STEPS = 8
"""Of the integrated gradients that are checked."""

PLAIN: dict[str, Any] = {"disable_warnings": True, "abs": False, "normalise": False, "perturb_baseline": 0.0}
"""Scores as they are, features replaced by 0."""


def checked_scores(s: Subject) -> xr.DataArray:
    """What all checks here are about: integrated gradients, the same for all contenders."""
    return IntegratedGradients(steps=STEPS).attribute(s.contiguous, s.x, s.y, runner=s.runner())


def by_position(scores: xr.DataArray) -> np.ndarray:
    """(n, 1, side, side): quantus spreads one value over the channels."""
    return scores.to_numpy().sum(1, keepdims=True)


def explain(model: Any, inputs: Any, targets: Any, **_: Any) -> np.ndarray:
    """The same integrated gradients by captum, in the form in which quantus asks for them."""
    x, y = torch.as_tensor(inputs).float(), torch.as_tensor(targets).long()
    found = ca.IntegratedGradients(model).attribute(x, torch.zeros_like(x), y, n_steps=STEPS, internal_batch_size=16)
    return found.detach().sum(1, keepdim=True).numpy()


def contenders(
    s: Subject, peer: str, ours: Callable[[nissl.Network], Any], theirs: Callable[[], Any]
) -> dict[str, Callable[[], Any]]:
    return {"nissl": lambda: ours(s.network), "nissl, contiguous": lambda: ours(s.contiguous), peer: theirs}


def deletion(s: Subject) -> Case:
    """Regions go one by one, most relevant first and least relevant first."""
    scores = checked_scores(s)
    n_regions = (s.side // s.region) ** 2
    check = RegionCurves(steps=n_regions, size=s.region, baseline="zero")

    def ours(network: nissl.Network) -> Any:
        return check.evaluate(network, s.x, scores, s.y, runner=s.runner())

    def theirs() -> dict[str, np.ndarray]:
        return {
            order: np.array(
                quantus.RegionPerturbation(patch_size=s.region, order=order, regions_evaluation=n_regions, **PLAIN)(
                    s.module, s.x_numpy, s.y_numpy, by_position(scores), softmax=False
                )
            )
            for order in ("morf", "lerf")
        }

    def differences() -> dict[str, tuple[float, float]]:
        mine, falls = ours(s.contiguous), theirs()
        most, least = (falls[order].mean(1) for order in ("morf", "lerf"))
        return {
            "mean fall, most relevant first": (relative(mine["flipping"], most), SAME),
            "gap to least relevant first": (relative(mine["flipping_gap"], most - least), SAME),
        }

    return Case(
        "insertion and deletion", "quantus", 0.5, contenders(s, "quantus", ours, theirs), differences, s.module,
        f"RegionPerturbation in both orders, {n_regions} regions of {s.region} × {s.region}, each step one region; "
        "with one baseline insertion is deletion of the least relevant read backwards",
    )  # fmt: skip


SAMPLES = 10


def infidelity_captum(s: Subject) -> Case:
    """The same random sets of regions, the same scaling."""
    scores = checked_scores(s)
    check = Subsets(samples=SAMPLES, size=s.region, baseline="zero")
    removed, labels = [], torch.zeros(0)
    for q in make_questions(s.contiguous, s.x, s.y):
        features = features_of(q, q.input, s.region)
        labels = features.labels
        removed.append(random_subsets(features, check.shares, SAMPLES, q.generator("subsets"))[:, labels])
    masks = torch.stack(removed).float().expand(-1, -1, s.x.shape[1], -1, -1)  # (example, set, channel, y, x)
    n_sets = masks.shape[1]
    attributions = torch.from_numpy(scores.to_numpy())

    def ours(network: nissl.Network) -> Any:
        return check.evaluate(network, s.x, scores, s.y, runner=s.runner())

    def theirs() -> Tensor:
        given = torch.zeros(s.n, dtype=torch.long)  # how many sets each example was given

        def perturb(x: Tensor) -> tuple[Tensor, Tensor]:
            times = len(x) // s.n
            at = (given[:, None] + torch.arange(times)).reshape(-1)
            which = torch.arange(s.n).repeat_interleave(times)
            given.add_(times)
            mask = masks[which, at]
            return mask, x * (1 - mask)

        return cm.infidelity(
            s.module, perturb, s.x, attributions, target=s.y, n_perturb_samples=n_sets,
            max_examples_per_batch=s.batch, normalize=True,
        )  # fmt: skip

    def differences() -> dict[str, tuple[float, float]]:
        with torch.no_grad():
            rows = torch.cat([x * (1 - m) for x, m in zip(s.x, masks, strict=True)])
            y = torch.cat([s.module(part) for part in rows.split(s.batch)]).reshape(s.n, n_sets, -1)
            of = s.y[:, None]
            fall = s.module(s.x).gather(1, of).double() - y.gather(2, of[..., None].expand(-1, n_sets, 1))[..., 0]
        # nissl's is a share of the mean squared fall
        return {"infidelity": (relative(ours(s.contiguous)["infidelity"], theirs() / fall.square().mean(1)), SAME)}

    return Case(
        "infidelity, same sets", "captum", 0.5, contenders(s, "captum", ours, theirs), differences, s.module,
        f"{n_sets} random sets of regions; nissl's time includes sensitivity-n from the same rows",
    )  # fmt: skip


def infidelity_quantus(s: Subject) -> Case:
    """As many rows as quantus' infidelity, which takes other sets: regions go row by row."""
    scores = checked_scores(s)
    n_regions = (s.side // s.region) ** 2
    check = Subsets(samples=SAMPLES, size=s.region, baseline="zero")
    metric = quantus.Infidelity(perturb_patch_sizes=[s.region], n_perturb_samples=1, **PLAIN)

    def ours(network: nissl.Network) -> Any:
        return check.evaluate(network, s.x, scores, s.y, runner=s.runner())

    def theirs() -> np.ndarray:
        return np.array(metric(s.module, s.x_numpy, s.y_numpy, by_position(scores)))

    def differences() -> dict[str, tuple[float, float]]:
        # quantus' own definition, put to nissl as Passes
        a, found = torch.from_numpy(by_position(scores)), []
        for i, q in enumerate(make_questions(s.contiguous, s.x, s.y)):
            features = features_of(q, q.input, s.region)
            gone = features.masks(torch.ones(features.n, features.n).tril().bool())
            rows = torch.where(gone, 0.0, q.input)
            parts = [s.contiguous.run(q.ask(part)).scalar for part in [q.input, *rows.split(s.batch)]]
            f = torch.cat([p for p in parts if p is not None])
            predicted = (a[i] * (q.input - rows)).flatten(1).sum(1)
            found.append(float(((f[0] - f[1:]) - predicted).square().mean()))
        return {"quantus' definition by Passes": (relative(found, theirs()), SAME)}

    return Case(
        "infidelity", "quantus", 0.5, contenders(s, "quantus", ours, theirs), differences, s.module,
        f"definitions differ: quantus removes {n_regions} regions row by row and repeats that n_perturb_samples "
        f"times without any randomness (here once), nissl {SAMPLES * len(check.shares)} random sets; times at about equal rows",
    )  # fmt: skip


def randomisation(s: Subject) -> Case:
    """All weights at once."""
    scores = checked_scores(s)
    method = IntegratedGradients(steps=STEPS)
    metric = quantus.MPRT(skip_layers=True, disable_warnings=True, abs=True, normalise=False)

    def ours(network: nissl.Network) -> Any:
        return WeightRandomisation().evaluate(network, s.x, scores, s.y, method=method, runner=s.runner())

    def theirs() -> dict[str, list[float]]:
        found = metric(s.module, s.x_numpy, s.y_numpy, by_position(scores), explain_func=explain)
        assert isinstance(found, dict)
        return found

    def differences() -> dict[str, tuple[float, float]]:
        expected = list(theirs().values())[-1]
        *_, (_, other) = metric_model(s).get_random_layer_generator(order="top_down", seed=42)
        again = method.attribute(nissl.Network(other), s.x, s.y, runner=s.runner())
        found = [
            similarity(*(torch.from_numpy(v.to_numpy().sum(0)).abs().reshape(-1) for v in (a, b)))
            for a, b in zip(scores, again, strict=True)
        ]
        shuffled = ours(s.contiguous)["randomisation_similarity"]
        assert np.isfinite(shuffled).all()
        return {"similarity on quantus' random network": (float(np.abs(np.subtract(found, expected)).max()), 0.01)}

    return Case(
        "parameter randomisation", "quantus", 0.5, contenders(s, "quantus", ours, theirs), differences, s.module,
        "definitions differ: nissl shuffles trained weights, quantus draws new ones; quantus explains the untouched "
        "network once more than needed",
    )  # fmt: skip


def metric_model(s: Subject) -> Any:
    """The network as quantus wraps it."""
    from quantus.helpers.utils import get_wrapped_model

    return get_wrapped_model(s.module, channel_first=True, softmax=False)
