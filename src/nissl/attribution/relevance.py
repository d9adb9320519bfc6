"""Scores from changed backward passes: guided back-propagation, deconvolution, DeepLIFT, layer-wise relevance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from nissl.attribution.base import Method
from nissl.attribution.masking import Baseline, baseline_of, check_baseline
from nissl.errors import InputError
from nissl.network import AttnLRP, Deconvolution, Guided, LRPRules, RelP, Rescale, Rules
from nissl.runner import CHUNK, Asking, Explained, Question, explained


@dataclass(frozen=True, eq=False)
class GuidedBackprop(Method):
    """Gradient in which every ReLU lets through only what is positive, of positive inputs.

    Notes
    -----
    For networks with ReLUs; others raise RuleError. Close to an image filter: it hardly depends on the upper layers
    (Adebayo et al. 2018), which the checks of trust show.

    References
    ----------
    Springenberg, Dosovitskiy, Brox, Riedmiller: Striving for simplicity: the all convolutional net (2015).
    """

    name: ClassVar[str] = "guided"
    title: ClassVar[str] = "Guided back-propagation"
    paper: ClassVar[str] = "Springenberg et al. 2015"
    differentiates: ClassVar[bool] = True

    def explain(self, q: Question) -> Asking[Explained]:
        """See `Method.explain`."""
        answer = yield q.ask(gradient=True, rules=Guided())
        return explained(q, answer.gradients[q.site][0])


@dataclass(frozen=True, eq=False)
class DeconvNet(Method):
    """Gradient in which every ReLU lets through only what is positive, whatever its input was.

    Notes
    -----
    For networks with ReLUs; others raise RuleError.

    References
    ----------
    Zeiler, Fergus: Visualizing and understanding convolutional networks (2014).
    """

    name: ClassVar[str] = "deconv"
    title: ClassVar[str] = "Deconvolution"
    paper: ClassVar[str] = "Zeiler & Fergus 2014"
    differentiates: ClassVar[bool] = True

    def explain(self, q: Question) -> Asking[Explained]:
        """See `Method.explain`."""
        answer = yield q.ask(gradient=True, rules=Deconvolution())
        return explained(q, answer.gradients[q.site][0])


@dataclass(frozen=True, eq=False)
class DeepLIFT(Method):
    """Difference to a baseline times multipliers: finite differences of every nonlinearity, chained (rescale rule).

    Parameters
    ----------
    baseline : str, number or Tensor (n_baselines, ...), default "zero"
        Of several rows the mean score is taken (DeepSHAP).

    Notes
    -----
    Complete: scores sum to f(x) - f(baseline) in one pass, for scalars that are linear in the network's output; a
    softmax in the target is differentiated plainly and leaves a ``completeness_gap``. Softmax and layer norms inside
    the network, and products as in the gates of an LSTM, keep that promise too (see `nissl.network.Rescale`).
    What there is no rule for raises RuleError: whole LSTMs in one fused call, or ``nn.MultiheadAttention``, which moves
    rows out of the first dimension.

    References
    ----------
    Shrikumar, Greenside, Kundaje: Learning important features through propagating activation differences (2017).
    Lundberg, Lee: A unified approach to interpreting model predictions (2017).
    """

    baseline: Baseline = "zero"

    name: ClassVar[str] = "deeplift"
    title: ClassVar[str] = "DeepLIFT (rescale)"
    paper: ClassVar[str] = "Shrikumar et al. 2017"
    differentiates: ClassVar[bool] = True
    complete: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_baseline(self.baseline)

    def explain(self, q: Question) -> Asking[Explained]:
        """See `Method.explain`."""
        x = yield from q.value()
        baselines = yield from baseline_of(self.baseline, q, x)
        total, promised = torch.zeros_like(x), 0.0
        for b in baselines.split(CHUNK // 2):
            pairs = torch.stack([x.expand_as(b), b], 1).flatten(0, 1)
            answer = yield q.ask(pairs, gradient=True, rules=Rescale())
            total += (answer.gradients[q.site][0::2] * (x - b)).sum(0)
            promised += float((answer.scalar[0::2] - answer.scalar[1::2]).double().sum())
        scores, promised = total / len(baselines), promised / len(baselines)
        return explained(q, scores[0], completeness_gap=gap(scores, promised))


@dataclass(frozen=True, eq=False)
class LRP(Method):
    """Layer-wise relevance propagation: the scalar is handed back layer by layer, nothing made and nothing lost.

    Parameters
    ----------
    composite : str, default "epsilon_plus"
        Which rule each kind of layer follows; all are described at `nissl.network.LRPRules`. ``attnlrp`` and ``relp``
        are for transformers (`nissl.network.AttnLRP`, `nissl.network.RelP`) and take no further parameters.
    epsilon : float, default 1e-6
        Keeps denominators from zero; larger values absorb weak relevance.
    gamma : float, default 0.25
        How much the gamma composites favour contributions of the output's own sign.
    low, high : float or sequence or tensor with one number a channel, optional
        Smallest and largest value that the first layer can receive, for composites with ``_box``. By default those of
        each example, widened to hold zero: right where inputs are normalised before they reach the network, to be given
        where the network normalises them itself.
    merging : {"zennit", "exact"}, default "zennit"
        How a batch norm is merged with the layer before it: with zennit's numbers, or without its division by
        sqrt(1 + eps) that moves the output by 5e-6 (torch's eps) to 5e-4 (eps 1e-3) a layer.

    Notes
    -----
    Composites with a rule of their own for the first layer (``_flat``, ``_wsquare``, ``_box``) are taken at the input;
    at inner sites and for token ids choose another. ``conservation_gap`` is |Σ scores - scalar| / |scalar|: relevance
    that biases took, or that a rule does not conserve.

    References
    ----------
    Bach, Binder, Montavon, Klauschen, Müller, Samek: On pixel-wise explanations (2015). Montavon, Binder, Lapuschkin,
    Samek, Müller: Layer-wise relevance propagation: an overview (2019). Achtibat et al.: AttnLRP (2024).
    """

    composite: str = "epsilon_plus"
    epsilon: float = 1e-6
    gamma: float = 0.25
    low: Any = None
    high: Any = None
    merging: str = "zennit"

    name: ClassVar[str] = "lrp"
    title: ClassVar[str] = "Layer-wise relevance propagation"
    paper: ClassVar[str] = "Bach et al. 2015"
    differentiates: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if (self.low is None) != (self.high is None):
            raise InputError("low and high are the two ends of one box: give both or neither")
        if self.composite in ("attnlrp", "relp"):
            if (self.epsilon, self.gamma, self.low) != (1e-6, 0.25, None):
                raise InputError(f"{self.composite} takes no epsilon, gamma, low or high")
        else:
            rules = self.rules(torch.tensor([-1.0, 1.0]))
            if self.low is not None:  # as plain numbers: they are kept in the record of a run
                object.__setattr__(self, "low", rules.low)  # pyright: ignore[reportAttributeAccessIssue]
                object.__setattr__(self, "high", rules.high)  # pyright: ignore[reportAttributeAccessIssue]

    def rules(self, x: Tensor) -> Rules:
        """The backward rules for an example x."""
        if self.composite in ("attnlrp", "relp"):
            return AttnLRP() if self.composite == "attnlrp" else RelP()
        low, high = self.low, self.high
        if str(self.composite).endswith("_box") and low is None:
            low, high = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
            if low == high:
                raise InputError("an input that is zero everywhere has no range to make a box of: give low= and high=")
        return LRPRules(
            self.composite, gamma=self.gamma, epsilon=self.epsilon, low=low, high=high, merging=self.merging
        )

    def explain(self, q: Question) -> Asking[Explained]:
        """See `Method.explain`."""
        x = yield from q.value()
        rules = self.rules(x)
        answer = yield q.ask(gradient=True, rules=rules)
        g = answer.gradients[q.site]
        scores = g if rules.relevance_at_input else x * g
        return explained(q, scores[0], conservation_gap=gap(scores, float(answer.scalar)))


def gap(scores: Tensor, promised: float) -> float:
    """What is missing between the sum of the scores and what they should sum to, as a share of it."""
    return abs(float(scores.double().sum()) - promised) / max(abs(promised), 1e-12)
