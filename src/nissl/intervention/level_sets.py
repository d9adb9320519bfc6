"""Blind spots: walks inside a level set of a class, from an image to another one, and what lies between their ends."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nissl.arguments import as_images, at_least, flag, instance, is_number, items
from nissl.errors import GradientError, InputError
from nissl.network import Network, Pass
from nissl.network.target import log_probability, probability
from nissl.runner import Runner
from nissl.runner.runner import progress_bar

DROPS = (0.0, 0.1, 0.2, 0.3)
"""Drops of confidence below the source up to which a point of the triangle counts."""


@dataclass(frozen=True, eq=False)
class Traversal:
    """What walks in level sets led to; rows are the sources that the network classifies right.

    Attributes
    ----------
    images : Tensor (n, channels, y, x)
        End points.
    kept : Tensor (n,), long
        Which of the sources given these are.
    y : Tensor (n,), long
        Class of the source.
    p0 : Tensor (n,)
        Its confidence at the source itself, before the jitter.
    confidence : Tensor (n, n_iter + 1)
        Of the source's class at each point of the walk.
    target_class : Tensor (n,), long
        What the network says to the target.
    target_confidence : Tensor (n,)
        Confidence of that class at the end point.
    accepted : Tensor of bool (n, n_iter)
        False where a row stayed in its place.
    path : Tensor (n, snapshots, channels, y, x) or None
        Points after equal numbers of iterations, the last one the end point.
    forward, backward : int
        Rows.
    """

    images: Tensor
    kept: Tensor
    y: Tensor
    p0: Tensor
    confidence: Tensor
    target_class: Tensor
    target_confidence: Tensor
    accepted: Tensor
    path: Tensor | None
    forward: int
    backward: int


@dataclass(frozen=True)
class LevelSetTraversal:
    """Walk from a source image towards a target, orthogonal to the gradient of the source class: its confidence stays.

    Parameters
    ----------
    step_size : float, default 0.01
        Share of what is left of the way that one iteration goes.
    n_iter : int, default 400
    p_thresh : float, default 0.2
        A step is taken only while the confidence is less than this below that of the source.
    adv_step : float, default 0.002
        Bound, in pixel values, of the correction that pushes the confidence up again; 0 does without.
    jitter : float, default 4/255
        Width of the uniform noise at the start.
    bounds : (float, float) or None, default (0, 1)
        What pixels may be; preprocessing is part of the network.
    seed : int, default 0
    progress : bool, default True

    Notes
    -----
    With g the gradient of the cross-entropy of the source's class, v = target − x: v⊥ = v − g (g·v) / (g·g); δ ← clip(δ +
    adv_step/2 · g, ± adv_step), from 0; the candidate is clip(x + step_size · v⊥ − δ), taken if p0 − p < p_thresh. Clipping
    breaks orthogonality: it is this test that keeps the level. The gradient is asked for at the candidate, so that an
    iteration costs one forward and one backward row, where the published loop runs two forward.

    "Looks like the target" is measured by distances only. Constant networks score highest in all that follows: look at their
    accuracy and at the confidence of the target's class too.

    References
    ----------
    Balasubramanian, Sriramanan, Sadasivan & Feizi (2023). Exploring geometry of blind spots in vision models. NeurIPS.

    Examples
    --------
    >>> import torch
    >>> from nissl import Network
    >>> from nissl.intervention.level_sets import LevelSetTraversal
    >>> net = Network(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 2)))
    >>> x = torch.rand(40, 1, 4, 4)
    >>> classes = net.module(x).argmax(1)
    >>> source, target = x[classes == 0][:1], x[classes == 1][:1]
    >>> found = LevelSetTraversal(n_iter=50).traverse(net, source, target)
    >>> bool((found.confidence[:, -1] > found.p0 - 0.2).all())
    True
    """

    step_size: float = 0.01
    n_iter: int = 400
    p_thresh: float = 0.2
    adv_step: float = 0.002
    jitter: float = 4 / 255
    bounds: tuple[float, float] | None = (0.0, 1.0)
    seed: int = 0
    progress: bool = True

    def __post_init__(self) -> None:
        at_least("n_iter", self.n_iter, 1)
        at_least("seed", self.seed, 0)
        flag("progress", self.progress)
        for name, low, high in (("step_size", 0, 1), ("p_thresh", 0, 1)):
            value = getattr(self, name)
            if not (is_number(value) and low < value <= high):
                raise InputError(f"{name} must be above {low} and at most {high}, got {value!r}")
        for name in ("adv_step", "jitter"):
            value = getattr(self, name)
            if not (is_number(value) and value >= 0):
                raise InputError(f"{name} must be a number, at least 0; got {value!r}")
        if self.bounds is not None:
            ends = items("bounds", self.bounds)
            if len(ends) != 2 or not all(map(is_number, ends)) or ends[0] >= ends[1]:
                raise InputError(f"bounds must be two numbers that rise, or None; got {self.bounds!r}")

    def traverse(
        self,
        network: Network,
        source: Any,
        target: Any,
        y: Any = None,
        *,
        snapshots: int = 0,
        runner: Runner | None = None,
    ) -> Traversal:
        """Walk from each source towards its target.

        Parameters
        ----------
        network : Network
            Gives logits, and gradients.
        source, target : Tensor or ndarray (n, channels, y, x)
            Within `bounds`; targets that the network puts into another class than the source.
        y : class indices, optional
            Classes of the sources, one for all or one each; by default what the network says. Sources that it classifies
            otherwise are left out.
        snapshots : int, default 0
            Points of each walk that are kept.
        runner : Runner, optional

        Raises
        ------
        InputError
            Images of different shapes or out of bounds; one-class networks; targets of the source's class; no source that
            is classified right.
        GradientError
            A network without gradients.
        """
        instance("network", network, Network)
        at_least("snapshots", snapshots, 0)
        if snapshots > self.n_iter:
            raise InputError(f"{snapshots} snapshots cannot be taken of {self.n_iter} iterations")
        if not network.differentiable:
            raise GradientError(f"{network.name} has no gradients: a level set cannot be followed")
        start, goal = (_within(name, x, self.bounds) for name, x in (("source", source), ("target", target)))
        if start.shape != goal.shape:
            raise InputError(f"a target for each source is needed: {tuple(start.shape)} and {tuple(goal.shape)} differ")
        runner = _runner(runner)
        before = [getattr(runner.cost("level sets"), k) for k in ("forward", "backward")]
        outputs = [_answers(network, x, None, runner) for x in (start, goal)]
        if outputs[0].ndim != 2 or outputs[0].shape[1] < 2:
            raise InputError(
                f"{network.name} has outputs of shape {tuple(outputs[0].shape[1:])}; two classes are needed"
            )
        said, other = (o.argmax(1) for o in outputs)
        classes = said if y is None else _classes(y, len(start), outputs[0].shape[1])
        kept = (said == classes).nonzero()[:, 0]
        if not len(kept):
            raise InputError(f"{network.name} puts none of the {len(start)} sources into the class given")
        if same := kept[other[kept] == classes[kept]].tolist():
            raise InputError(f"targets {same[:10]} are of the class of their source: they are no blind spots")
        p0 = outputs[0].double().softmax(1)[kept, classes[kept]]
        noise = torch.rand(start.shape, generator=torch.Generator().manual_seed(self.seed)) - 0.5
        x = self._clip(start + self.jitter * noise)[kept]
        walk = partial(self._walk, x, goal[kept], classes[kept], other[kept], p0, snapshots)
        (found,) = runner.collect(network, [walk], "level set traversal", "level sets")
        spent = [
            getattr(runner.cost("level sets"), k) - b for k, b in zip(("forward", "backward"), before, strict=True)
        ]
        return Traversal(found[0], kept, classes[kept], p0.float(), *found[1:], *spent)

    def _walk(
        self, x: Tensor, goal: Tensor, y: Tensor, other: Tensor, p0: Tensor, snapshots: int
    ) -> Generator[Any, Any, tuple[Any, ...]]:
        """All rows at once; returns the fields of Traversal from images on."""
        of = log_probability(y)
        answer = yield Pass(x, of=of, wrt=["input"])
        log_p, g, output = _read(answer)
        delta = torch.zeros_like(g)
        confidence, accepted, path = [log_p.exp()], [], []
        times = set(np.linspace(0, self.n_iter, snapshots + 1)[1:].round().astype(int).tolist())
        with progress_bar(self.progress, self.n_iter, "level set traversal") as step:
            for i in range(1, self.n_iter + 1):
                move = self.step_size * orthogonal(goal.double() - x, g)
                delta = (delta - self.adv_step / 2 * g).clamp(-self.adv_step, self.adv_step)
                candidate = self._clip((x + move - delta).float())
                answer = yield Pass(candidate, of=of, wrt=["input"])
                there, slope, out = _read(answer)
                taken = p0 - there.exp() < self.p_thresh
                rows = taken.reshape(-1, *[1] * (x.ndim - 1))
                x, g = torch.where(rows, candidate, x), torch.where(rows, slope, g)
                log_p, output = torch.where(taken, there, log_p), torch.where(taken[:, None], out, output)
                confidence.append(log_p.exp())
                accepted.append(taken)
                if i in times:
                    path.append(x)
                step()
        held = torch.stack(path, 1) if path else None
        at_end = output.double().softmax(1).gather(1, other[:, None])[:, 0].float()
        return x, torch.stack(confidence, 1).float(), other, at_end, torch.stack(accepted, 1), held

    def _clip(self, x: Tensor) -> Tensor:
        return x if self.bounds is None else x.clamp(*self.bounds)


def orthogonal(v: Tensor, g: Tensor) -> Tensor:
    """The part of v (n, ...) that is orthogonal to g, row by row, in double precision; v itself where g is 0."""
    flat, direction = v.double().flatten(1), g.double().flatten(1)
    # the size of a gradient vanishes with saturation, its direction does not: the largest entry first, or squares underflow
    direction = direction / direction.abs().amax(1, keepdim=True).clamp(min=1e-300)
    direction = direction / direction.norm(dim=1, keepdim=True).clamp(min=1e-300)
    return (flat - direction * (direction * flat).sum(1, keepdim=True)).reshape(v.shape)


def _read(answer: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Log-confidence, its gradient and the output, on the CPU; the first two in double precision."""
    return answer.scalar.cpu().double(), answer.gradients["input"].cpu().double(), answer.output.cpu().float()


# ---------------------------------------------------------------- what lies between


def segment(network: Network, a: Any, b: Any, y: Any, n: int = 10, runner: Runner | None = None) -> Tensor:
    """Confidence of class y on the straight lines from a to b, both (n_rows, channels, y, x): (n_rows, n + 1)."""
    start, end, classes = _pair(network, a, b, y)
    at_least("n", n, 1)
    t = torch.linspace(0, 1, n + 1)
    weights = torch.stack([1 - t, t], 1)
    return _mixtures(network, [start, end], weights, classes, runner)


def hull_weights(n: int = 10) -> Tensor:
    """Barycentric weights of the triangle's grid with n steps a side, ((n + 1)(n + 2) / 2, 3): source, a, b."""
    at_least("n", n, 1)
    s, t = torch.meshgrid(torch.arange(n + 1), torch.arange(n + 1), indexing="ij")
    inside = s + t <= n
    s, t = s[inside], t[inside]
    return torch.stack([n - s - t, s, t], 1).float() / n


def hull(
    network: Network, source: Any, a: Any, b: Any, y: Any, n: int = 10, runner: Runner | None = None
) -> tuple[Tensor, Tensor]:
    """Confidence of class y on the triangles of a source and two end points.

    Parameters
    ----------
    network : Network
    source, a, b : Tensor or ndarray (n_rows, channels, y, x)
    y : class indices, one for all or one each
    n : int, default 10
        Steps a side: 66 points.
    runner : Runner, optional

    Returns
    -------
    confidence : Tensor (n_rows, n_points)
    weights : Tensor (n_points, 3)
        Of source, a and b.
    """
    start, first, classes = _pair(network, source, a, y)
    second = _pair(network, source, b, y)[1]
    weights = hull_weights(n)
    return _mixtures(network, [start, first, second], weights, classes, runner), weights


def triangle_metrics(confidence: Tensor, weights: Tensor) -> dict[str, Tensor]:
    """What the confidences on triangles say, each (n_rows,).

    Parameters
    ----------
    confidence : Tensor (n_rows, n_points)
    weights : Tensor (n_points, 3)
        Both from `hull`.

    Returns
    -------
    dict
        ``source`` (confidence there), ``mean``, ``share_0``, ``share_0.1``, … (points above that of the source less a drop),
        ``edge_mean`` over the two edges from the source, which is counted on both, and ``edge_drop``, the worst change on them.
    """
    if confidence.ndim != 2 or weights.shape != (confidence.shape[1], 3):
        raise InputError(
            f"confidences {tuple(confidence.shape)} and weights {tuple(weights.shape)} are not those of hull"
        )
    p = confidence.double()
    source = p[:, int(weights[:, 0].argmax())]
    edges = torch.cat([(weights[:, k] == 0).nonzero()[:, 0] for k in (2, 1)])
    shares = {f"share_{d:g}": (p > source[:, None] - d).double().mean(1) for d in DROPS}
    edge = p[:, edges]
    drop = (edge - source[:, None]).amin(1)
    return {"source": source, "mean": p.mean(1), **shares, "edge_mean": edge.mean(1), "edge_drop": drop}


def distances(end: Any, target: Any) -> dict[str, Tensor]:
    """How far end points in [0, 1] are from their targets: ``rmse``, ``linf`` and ``ssim`` (over channels), each (n,)."""
    a, b = as_images("end", end), as_images("target", target)
    if a.shape != b.shape:
        raise InputError(f"images of shape {tuple(a.shape)} and {tuple(b.shape)} cannot be compared")
    from skimage.metrics import structural_similarity

    if min(a.shape[2:]) < 3:
        raise InputError(f"SSIM needs images of at least 3 × 3 pixels, got {tuple(a.shape[2:])}")
    gap = (a - b).flatten(1)
    side = min(7, (min(a.shape[2:]) - 1) // 2 * 2 + 1)
    like = [
        structural_similarity(x.numpy(), z.numpy(), win_size=side, data_range=1.0, channel_axis=0)
        for x, z in zip(a, b, strict=True)
    ]
    return {
        "rmse": gap.square().mean(1).sqrt(),
        "linf": gap.abs().amax(1),
        "ssim": torch.tensor(np.array(like, dtype=np.float64)),
    }


def width(
    network: Network,
    x: Any,
    direction: Any,
    y: Any,
    radii: Sequence[float] = (0.5, 1.0, 1.5, 2.0),
    n_directions: int = 256,
    quantiles: Sequence[float] = (0.05, 0.95),
    seed: int = 0,
    runner: Runner | None = None,
) -> Tensor:
    """Confidence around points of a path: quantiles over random directions orthogonal to it.

    Parameters
    ----------
    network : Network
    x, direction : Tensor or ndarray (n, channels, y, x)
        Points, and the direction of the path at each.
    y : class indices
    radii : sequence of float
        Euclidean lengths.
    n_directions : int, default 256
    quantiles : sequence of float, default (0.05, 0.95)
    seed : int, default 0
    runner : Runner, optional

    Returns
    -------
    Tensor (n, n_radii, n_quantiles)
    """
    at_least("n_directions", n_directions, 1)
    at_least("seed", seed, 0)
    lengths, shares = items("radii", radii), items("quantiles", quantiles)
    if not lengths or not all(is_number(r) and r >= 0 for r in lengths):
        raise InputError(f"radii must be lengths, at least 0; got {radii!r}")
    if not shares or not all(is_number(q) and 0 <= q <= 1 for q in shares):
        raise InputError(f"quantiles must lie between 0 and 1, got {quantiles!r}")
    points, along, classes = _pair(network, x, direction, y)
    generator = torch.Generator().manual_seed(seed)
    found = []
    for point, way, c in zip(points, along, classes, strict=True):  # a point has hundreds of rows
        random = torch.randn(n_directions, *point.shape, generator=generator)
        random = orthogonal(random, way.expand_as(random))
        random = (random / random.flatten(1).norm(dim=1).reshape(-1, *[1] * point.ndim)).float()
        around = torch.cat([point + r * random for r in lengths])
        p = _answers(network, around, c.expand(len(around)), runner).reshape(len(lengths), n_directions)
        found.append(p.double().quantile(torch.tensor(shares, dtype=torch.float64), dim=1).T)
    return torch.stack(found)


def _mixtures(
    network: Network, corners: list[Tensor], weights: Tensor, classes: Tensor, runner: Runner | None
) -> Tensor:
    """Confidences of the mixtures of corners, (n_rows, n_points)."""
    runner = _runner(runner)
    stacked = torch.stack(corners, 1)

    def ask(i: int) -> Generator[Any, Any, Tensor]:
        answer = yield Pass(torch.tensordot(weights, stacked[i], 1), of=probability(classes[i]))
        return answer.scalar.cpu().float()

    starts = [partial(ask, i) for i in range(len(stacked))]
    return torch.stack(runner.collect(network, starts, "confidence between images", "level sets"))


def _answers(network: Network, x: Tensor, classes: Tensor | None, runner: Runner | None) -> Tensor:
    """Outputs, or confidences of classes, of images."""

    def ask() -> Generator[Any, Any, Tensor]:
        answer = yield Pass(x, of=None if classes is None else probability(classes))
        return answer.output.cpu() if classes is None else answer.scalar.cpu()

    return _runner(runner).collect(network, [ask], "answers", "level sets")[0]


def _runner(runner: Runner | None) -> Runner:
    if runner is not None:
        instance("runner", runner, Runner)
    return runner or Runner(memory=0)


def _pair(network: Network, a: Any, b: Any, y: Any) -> tuple[Tensor, Tensor, Tensor]:
    instance("network", network, Network)
    first, second = as_images("images", a), as_images("images", b)
    if first.shape != second.shape:
        raise InputError(f"images of shape {tuple(first.shape)} and {tuple(second.shape)} do not go together")
    return first, second, _classes(y, len(first), None)


def _classes(y: Any, n: int, n_classes: int | None) -> Tensor:
    try:
        classes = torch.as_tensor(y)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"classes must be whole numbers, got {y!r:.60}") from error
    if classes.is_floating_point() or classes.dtype == torch.bool or classes.reshape(-1).shape[0] not in (1, n):
        raise InputError(f"classes must be whole numbers, one for all or one for each of {n} images; got {y!r:.60}")
    classes = classes.reshape(-1).long().expand(n)
    if int(classes.min()) < 0 or (n_classes is not None and int(classes.max()) >= n_classes):
        raise InputError(f"classes must be 0 to {n_classes - 1 if n_classes else '...'}, got {y!r:.60}")
    return classes


def _within(name: str, value: Any, bounds: tuple[float, float] | None) -> Tensor:
    x = as_images(name, value)
    if bounds is not None and (float(x.min()) < bounds[0] or float(x.max()) > bounds[1]):
        raise InputError(
            f"{name} has values from {float(x.min()):.3g} to {float(x.max()):.3g}, outside {bounds}: hand over images before "
            "preprocessing, which is part of the network, or set bounds="
        )
    return x


# ---------------------------------------------------------------- pictures


def plot_star(source: Any, ends: Any, confidence: Any, labels: Sequence[str] | None = None) -> Any:
    """The star of connected inputs: a source in the middle, end points around it, rays in the colour of the confidence.

    Parameters
    ----------
    source : Tensor or ndarray (channels, y, x)
    ends : Tensor or ndarray (n, channels, y, x)
    confidence : array (n, n_points)
        Along each ray, from `segment`.
    labels : sequence of str, optional
        Of the end points.

    Returns
    -------
    matplotlib axes
    """
    import matplotlib.pyplot as plt
    from matplotlib.collections import LineCollection
    from matplotlib.offsetbox import AnnotationBbox, OffsetImage

    around, p = as_images("ends", ends), np.asarray(confidence, dtype=float)
    middle = as_images("source", source[None] if getattr(source, "ndim", 0) == 3 else source)
    if (
        p.ndim != 2
        or len(p) != len(around)
        or p.shape[1] < 2
        or middle.shape[1:] != around.shape[1:]
        or len(middle) != 1
    ):
        raise InputError(f"one source, and confidences on a ray for each of {len(around)} end points, are needed")
    figure, ax = plt.subplots(figsize=(5.6, 5.2), layout="constrained")
    angles = np.pi / 2 - 2 * np.pi * np.arange(len(p)) / len(p)
    tips = np.stack([np.cos(angles), np.sin(angles)], 1)
    rays = LineCollection([], cmap="cividis", linewidths=5)
    points = tips[:, None] * np.linspace(0, 1, p.shape[1])[:, None]
    rays.set_segments(list(np.stack([points[:, :-1], points[:, 1:]], 2).reshape(-1, 2, 2)))
    rays.set_array(((p[:, 1:] + p[:, :-1]) / 2).reshape(-1))
    rays.set_clim(0, 1)
    ax.add_collection(rays)
    for place, image in zip([np.zeros(2), *tips], [middle[0], *around], strict=True):
        shown = image.movedim(0, -1).clamp(0, 1).numpy()
        shown = shown if shown.shape[2] == 3 else np.repeat(shown.mean(2, keepdims=True), 3, 2)
        ax.add_artist(
            AnnotationBbox(OffsetImage(shown, zoom=52 / max(shown.shape[:2])), (place[0], place[1]), pad=0.15)
        )
    for tip, text in zip(tips, labels or [], strict=False):
        ax.text(1.3 * tip[0], 1.3 * tip[1], text, ha="center", va="center")
    ax.set_xlim(-1.45, 1.45)
    ax.set_ylim(-1.45, 1.45)
    ax.set_aspect("equal")
    ax.set_axis_off()
    figure.colorbar(rays, ax=ax, label="confidence of the source's class", shrink=0.7)
    return ax


def plot_triangle(confidence: Any, weights: Any, title: str = "", ax: Any = None) -> Any:
    """Confidence on the triangle of a source (top) and two end points, (n_points,), from one row of `hull`.

    Returns
    -------
    matplotlib axes
    """
    import matplotlib.pyplot as plt

    p, w = np.asarray(confidence, dtype=float), np.asarray(weights, dtype=float)
    if p.ndim != 1 or w.shape != (len(p), 3):
        raise InputError(f"confidences {p.shape} and weights {w.shape} are not those of one triangle of hull")
    if ax is None:
        _, ax = plt.subplots(figsize=(3.6, 3), layout="constrained")
    x, y = w @ np.array([0.5, 0, 1]), w[:, 0] * 3**0.5 / 2
    shown = ax.tripcolor(x, y, p, shading="gouraud", cmap="cividis", vmin=0, vmax=1)
    ax.text(0.5, 0.92, "source", ha="center")
    ax.text(0, -0.08, "end a", ha="center")
    ax.text(1, -0.08, "end b", ha="center")
    ax.set_xlim(-0.15, 1.15)
    ax.set_ylim(-0.15, 1.02)
    ax.set_aspect("equal")
    ax.set_axis_off()
    ax.set_title(title)
    ax.figure.colorbar(shown, ax=ax, label="confidence")
    return ax
