"""Activation maximisation: pictures that excite a unit, by ascent with jitter, total variation and a bias to the centre."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from nissl.arguments import at_least, flag, instance, is_number, is_whole, items
from nissl.errors import GradientError, InputError
from nissl.network import Network, Pass, Target
from nissl.network.target import as_target, class_logit, probability
from nissl.runner import Runner
from nissl.runner.runner import progress_bar


@dataclass(frozen=True)
class Phase:
    """Some iterations with the same settings.

    Parameters
    ----------
    steps : int
    objective : {"logit", "probability"}, default "logit"
        What is raised: the target itself, or its softmax probability, which also lowers rival classes.
    scale : float, default 1.0
        The canvas is enlarged so many times before the phase; crops of the network's input size are drawn from it.
    margin : int, default 0
        So many pixels at each side of the crop do not move. For an input of 227 pixels; it is scaled to others.
    window : float, default 0.3
        Standard deviation of a crop's offset, as a share of the room that it has; it is drawn around the middle.
    weight : (float, float), default (0.4, 2.0)
        Of the total variation, from start to end. Smaller is smoother. For grey levels 0 to 255.
    step : (float, float), default (1.0, 1.0)
        Mean change of a pixel, in grey levels, from start to end.
    """

    steps: int
    objective: str = "logit"
    scale: float = 1.0
    margin: int = 0
    window: float = 0.3
    weight: tuple[float, float] = (0.4, 2.0)
    step: tuple[float, float] = (1.0, 1.0)

    def __post_init__(self) -> None:
        at_least("steps", self.steps, 1)
        at_least("margin", self.margin, 0)
        if self.objective not in ("logit", "probability"):
            raise InputError(f"objective must be 'logit' or 'probability', got {self.objective!r}")
        if not (is_number(self.scale) and self.scale >= 1):
            raise InputError(f"scale must be a number of at least 1, got {self.scale!r}")
        if not (is_number(self.window) and self.window >= 0):
            raise InputError(f"window must be a number of at least 0, got {self.window!r}")
        for name in ("weight", "step"):
            value = getattr(self, name)
            if not (isinstance(value, tuple) and len(value) == 2 and all(is_number(v) and v > 0 for v in value)):
                raise InputError(f"{name} is (start, end), both above 0; got {value!r}")


MEAN = (
    Phase(190, weight=(0.4, 0.4)),
    Phase(150, scale=1.2, weight=(0.01, 2.0)),
    Phase(20, margin=50, window=0.2, weight=(0.1, 2.0), step=(2.0, 2.0)),
    Phase(10, weight=(0.4, 2.0), step=(2.0, 2.0)),
)
"""Phases of Nguyen et al. from the mean of some images."""
CBR = (
    Phase(190, "probability", weight=(0.001, 0.05), step=(11.0, 11.0)),
    Phase(150, "probability", scale=1.2, weight=(0.01, 0.08), step=(6.0, 6.0)),
    Phase(150, scale=1.2, weight=(0.01, 2.0)),
    Phase(30, margin=50, window=0.1, weight=(0.1, 2.0), step=(3.0, 3.0)),
    Phase(10, weight=(0.01, 2.0), step=(6.0, 3.0)),
)
"""Their phases from noise, biased to the centre."""


def denoise(
    images: Float[Tensor, "n c h w"], weight: float, iterations: int = 100, tolerance: float = 1e-3
) -> Float[Tensor, "n c h w"]:
    """Total variation denoising by split Bregman iterations, each channel by itself and all of them at once.

    Parameters
    ----------
    images : Tensor
        In grey levels, 0 to 255.
    weight : float
        Smaller is smoother.
    iterations : int, default 100
    tolerance : float, default 1e-3
        An image is done when its root mean square change falls below it.

    Notes
    -----
    With λ = 2 weight, the gradient ∇u split off as d, and b what the splitting is short of, each iteration sets u to
    (λ Σ of the four neighbours + λ div(b - d) + weight f) / (weight + 4 λ), on one colour of a chessboard after the other; then
    with t = ∇u + b and s = |t|: d = λ s t / (λ s + 1), b = t - d. This shrinkage is that of scikit-image, softer than that
    of total variation proper, and the weights of the phases are meant for it. So is its frame of fixed pixels around the image: the
    second row and column above and left of it, the last ones below and right.

    References
    ----------
    Goldstein & Osher (2009). The split Bregman method for L1-regularized problems. SIAM J. Imaging Sciences 2, 323-343.
    """
    lam, norm = 2 * weight, weight + 8 * weight
    h, w = images.shape[-2:]
    f = images.flatten(0, 1)
    u = F.pad(f[:, None], (0, 1, 0, 1), mode="replicate")
    u = F.pad(u, (1, 0, 1, 0), mode="reflect")[:, 0].clone()
    dx, dy, bx, by = (torch.zeros(len(f), h + 1, w + 1, dtype=f.dtype, device=f.device) for _ in range(4))
    board = (torch.arange(h)[:, None] + torch.arange(w)).to(f.device) % 2 == 0
    for _ in range(iterations):
        inner = u[:, 1:-1, 1:-1]
        before = inner.clone()
        ux, uy = u[:, 1:-1, 2:] - before, u[:, 2:, 1:-1] - before
        # entries of d and b have one row and column of zeros before the image
        split = (dx - bx)[:, 1:, :-1] - (dx - bx)[:, 1:, 1:] + (dy - by)[:, :-1, 1:] - (dy - by)[:, 1:, 1:]
        fixed = (lam * split + weight * f) / norm
        for colour in (board, ~board):
            around = u[:, 1:-1, 2:] + u[:, 1:-1, :-2] + u[:, 2:, 1:-1] + u[:, :-2, 1:-1]
            inner.copy_(torch.where(colour, fixed + lam / norm * around, inner))
        tx, ty = ux + bx[:, 1:, 1:], uy + by[:, 1:, 1:]
        s = lam * (tx.square() + ty.square()).sqrt()
        share = s / (s + 1)
        dx[:, 1:, 1:], dy[:, 1:, 1:] = share * tx, share * ty
        bx[:, 1:, 1:], by[:, 1:, 1:] = tx - share * tx, ty - share * ty
        if float((inner - before).square().mean((1, 2)).sqrt().max()) < tolerance:
            break
    return u[:, 1:-1, 1:-1].reshape(images.shape)


@dataclass(frozen=True, eq=False)
class Synthesis:
    """Pictures that excite a unit.

    Attributes
    ----------
    images : Tensor (n, channels, height, width)
        As the network takes them, of the size of the canvas: larger than its input where a phase enlarged it.
    inputs : Tensor (n, channels, height, width)
        Brought to the size of the network's input.
    activations : Tensor (n, 2)
        Of the target, before (the start) and after (`inputs`).
    trace : Tensor (steps, n)
        Of the target on each step's crop.
    """

    images: Tensor
    inputs: Tensor
    activations: Tensor
    trace: Tensor


class ActivationMaximisation:
    """Ascent from given pictures to ones that excite a target more.

    Parameters
    ----------
    phases : sequence of Phase, default MEAN
        `MEAN` from the mean of images, `CBR` from noise.
    mean, std : float or sequence of float, default 0, 1
        What the network takes is (pixel / 255 - mean) / std, one number for all channels or one a channel.
    tv : bool, default True
        Denoise after each step.
    seed : int, default 0
        Of the crops.
    progress : bool, default True

    References
    ----------
    Nguyen, Yosinski & Clune (2016). Multifaceted feature visualization: uncovering the different types of features learned by each
    neuron in deep neural networks.
    """

    def __init__(
        self, phases: Sequence[Phase] = MEAN, *, mean: Any = 0.0, std: Any = 1.0, tv: bool = True, seed: int = 0,
        progress: bool = True,
    ) -> None:  # fmt: skip
        self.phases = items("phases", phases)
        if not self.phases:
            raise InputError("at least one phase is needed")
        for phase in self.phases:
            instance("phases", phase, Phase)
        self.mean, self.std = (torch.as_tensor(v, dtype=torch.float32).reshape(-1, 1, 1) for v in (mean, std))
        if not bool((self.std > 0).all()):
            raise InputError(f"std must be above 0, got {std!r}")
        flag("tv", tv)
        at_least("seed", seed, 0)
        self.tv, self.seed, self.progress = tv, seed, progress

    def run(self, network: Network, target: Any, start: Tensor, runner: Runner | None = None) -> Synthesis:
        """Raise a target from some pictures on, all of them at once.

        Parameters
        ----------
        network : Network
        target : int, Target or callable
            A class, or any scalar; probability needs a class.
        start : Tensor (n, channels, height, width)
            As the network takes them.

        Raises
        ------
        GradientError
            The network has no gradients, or the target's is zero at a picture (a dead unit, say).
        """
        instance("network", network, Network)
        if not isinstance(start, Tensor) or start.ndim != 4 or not len(start):
            raise InputError("start must be a tensor (n, channels, height, width)")
        if not bool(torch.isfinite(start).all()):
            raise InputError("start holds NaN or infinity")
        if not network.differentiable:
            raise GradientError(f"{network.name} has no gradients, which activation maximisation needs")
        logit = class_logit(target) if is_whole(target) else as_target(target)
        if any(p.objective == "probability" for p in self.phases) and not is_whole(target):
            raise InputError("phases that raise a probability need a class as target; use MEAN or phases of the logit")
        runner = runner or Runner(memory=0, progress=False, tune=False)
        generator = torch.Generator().manual_seed(self.seed)
        n, size = len(start), tuple(start.shape[-2:])
        canvas = ((start.float() * self.std + self.mean) * 255).clamp(0, 255)
        before = self._ask(runner, network, start.float(), logit)[0]
        trace = []
        with progress_bar(self.progress, sum(p.steps for p in self.phases), "maximising") as done:
            for phase in self.phases:
                if phase.scale > 1:
                    larger = [max(s, round(s_ * phase.scale)) for s, s_ in zip(size, canvas.shape[-2:], strict=True)]
                    canvas = F.interpolate(canvas, size=larger, mode="bicubic").clamp(0, 255)
                margins = [round(phase.margin * s / 227) for s in size]
                moves = torch.zeros(size)
                moves[margins[0] : size[0] - margins[0], margins[1] : size[1] - margins[1]] = 1
                of = probability(target) if phase.objective == "probability" else logit
                for i in range(phase.steps):
                    weight, step = (a + (b - a) * i / phase.steps for a, b in (phase.weight, phase.step))
                    top, left = (
                        int((room / 2 + phase.window * room * torch.randn((), generator=generator)).clamp(0, room))
                        for room in (c - s for c, s in zip(canvas.shape[-2:], size, strict=True))
                    )
                    crop = canvas[:, :, top : top + size[0], left : left + size[1]]
                    x = (crop / 255 - self.mean) / self.std
                    value, g = self._ask(runner, network, x, of, gradient=True)
                    dead = g.abs().amax((1, 2, 3)) <= 1e-20
                    if bool(dead.any()) and of is not logit:  # the softmax is flat: the logit is not
                        g = torch.where(dead[:, None, None, None], self._ask(runner, network, x, logit, True)[1], g)
                        dead = g.abs().amax((1, 2, 3)) <= 1e-20
                    if bool(dead.any()):
                        raise GradientError(
                            f"the target has no gradient at pictures {torch.nonzero(dead)[:, 0].tolist()[:10]} "
                            "(a unit that does not fire there?); start from images that excite it"
                        )
                    g = g * moves
                    crop = crop + step * g / g.abs().mean((1, 2, 3), keepdim=True).clamp(min=1e-30)
                    crop = crop.clamp(0, 255)
                    canvas = canvas.clone()
                    canvas[:, :, top : top + size[0], left : left + size[1]] = (
                        denoise(crop, weight) if self.tv else crop
                    )
                    trace.append(value)
                    done()
        images = (canvas / 255 - self.mean) / self.std
        inputs = (
            images
            if canvas.shape[-2:] == start.shape[-2:]
            else F.interpolate(images, size=size, mode="bilinear", antialias=True)
        )
        after = self._ask(runner, network, inputs, logit)[0]
        assert len(trace[0]) == n
        return Synthesis(images, inputs, torch.stack([before, after], 1), torch.stack(trace))

    @staticmethod
    def _ask(runner: Runner, network: Network, x: Tensor, of: Target, gradient: bool = False) -> tuple[Tensor, Tensor]:
        """The target of each picture, and its gradient there."""

        def ask() -> Any:
            answer = yield Pass(x, of=of, wrt=["input"] if gradient else [])
            return answer.scalar.float().cpu(), answer.gradients["input"].float().cpu() if gradient else x

        return runner.collect(network, [ask], "activation maximisation")[0]


def noise(n: int, shape: Sequence[int], mean: Any = 0.0, std: Any = 1.0, seed: int = 0) -> Float[Tensor, "n c h w"]:
    """Starts for CBR: grey levels N(175, 8) for each pixel, as the network takes them."""
    at_least("n", n, 1)
    grey = 175 + 8 * torch.randn(n, *shape, generator=torch.Generator().manual_seed(seed))
    low, spread = (torch.as_tensor(v, dtype=torch.float32).reshape(-1, 1, 1) for v in (mean, std))
    return (grey.clamp(0, 255) / 255 - low) / spread


def total_variation(images: Float[Tensor, "n c h w"]) -> Float[Tensor, " n"]:
    """Mean absolute difference of neighbouring pixels."""
    down, right = images.diff(dim=2).abs().mean((1, 2, 3)), images.diff(dim=3).abs().mean((1, 2, 3))
    return down + right
