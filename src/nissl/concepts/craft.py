"""CRAFT: what a network sees in the images of a class, and where: concepts of image crops, their importance, their maps."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import xarray as xr
from sklearn.base import BaseEstimator
from sklearn.utils.validation import check_is_fitted
from torch import Tensor, nn
from torch.nn import functional as F

from nissl.arguments import as_images, at_least, flag, instance, is_number, is_whole, items
from nissl.concepts.nmf import NonnegativeProjection, nmf
from nissl.concepts.sobol import sobol_design, total_indices
from nissl.errors import InputError, SiteError
from nissl.network import Network, Pass
from nissl.network.part import Part, above
from nissl.network.site import parse
from nissl.runner import Asking, Question, Runner
from nissl.runner.runner import make_questions

DECODED = 2**20
"""Numbers of activations that one batch of masked concepts may decode to: 4 MB, which caches hold."""


@dataclass(frozen=True, eq=False)
class ConceptImportance:
    """How much each concept matters for a target.

    Attributes
    ----------
    mean : Tensor (r,)
        Total Sobol index, mean over the images that have one. Indices of interacting concepts sum to more than 1.
    per_image : Tensor (n, r)
        NaN for images whose output does not depend on the masks at all.
    sign : Tensor (r,)
        Mean correlation of a concept's mask with the output: positive raises it. Total indices have no sign themselves.
    skipped : tuple of int
        Images without indices.
    forward : int
        Forward rows asked for.
    """

    mean: Tensor
    per_image: Tensor
    sign: Tensor
    skipped: tuple[int, ...]
    forward: int

    @property
    def order(self) -> Tensor:
        """Concepts, the most important first."""
        return self.mean.argsort(descending=True)


@dataclass(frozen=True, eq=False)
class ConceptCurves:
    """Target while concepts are taken away, or put in, one after the other.

    Attributes
    ----------
    deletion, insertion : Tensor (n, r + 1)
        From all concepts to none, and from none to all.
    """

    deletion: Tensor
    insertion: Tensor

    @property
    def deletion_area(self) -> Tensor:
        """Mean height of each deletion curve (n,), by trapezoids; lower for a better order."""
        return _area(self.deletion)

    @property
    def insertion_area(self) -> Tensor:
        """Mean height of each insertion curve (n,); higher for a better order."""
        return _area(self.insertion)


def _area(y: Tensor) -> Tensor:
    return (y[:, 1:] + y[:, :-1]).mean(1) / 2


class Craft(BaseEstimator):
    """Concepts of a network's activations on image crops: A ≈ U W, crops × channels, by nonnegative factorisation.

    Parameters
    ----------
    site : str
        Where activations are read: nonnegative, (n, d) or (n, d, y, x). The end of the last block with a ReLU is usual.
    n_concepts : int, default 10
    patch_size : int, default 64
        Side of the square crops, in pixels; 64 to 128 for images of 224.
    overlap : float, default 0.2
        Share of a crop that it has in common with the next one.
    n_init, max_iter, tol
        Of the factorisation, see `nissl.concepts.nmf.nmf`.
    random_state : int, default 42
    progress : bool, default True

    Attributes
    ----------
    components_ : ndarray (n_concepts, d)
        W ≥ 0, rows of norm 1.
    crop_coefficients_ : ndarray (n_crops, n_concepts)
        U ≥ 0.
    places_ : ndarray of int (n_crops, 3)
        Image, upper and left pixel of each crop.
    reconstruction_error_ : float
        ‖A − U W‖ / ‖A‖.
    losses_ : list of float
        ‖A − U W‖² of each start.
    dropped_ : tuple of int
        Images left out because the network does not put them into the class given.
    network_ : Network
    positions_ : bool
        Whether activations have positions (y, x).

    Notes
    -----
    A coefficient's scale depends on its concept: compare them, and maps, within one concept only. The factorisation is not
    unique; fit with several seeds to see what stays.

    References
    ----------
    Fel, Picard, Béthune, Boissin, Vigouroux, Colin, Cadène & Serre (2023). CRAFT: Concept recursive activation
    factorization for explainability. CVPR.

    Examples
    --------
    >>> import torch
    >>> from nissl import Network
    >>> from nissl.concepts.craft import Craft
    >>> net = Network(torch.nn.Sequential(
    ...     torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(8, 4)
    ... ))
    >>> images = torch.rand(10, 3, 16, 16)
    >>> craft = Craft("1", n_concepts=3, patch_size=8).fit(net, images)
    >>> craft.components_.shape, craft.transform(images).shape
    ((3, 8), (10, 14, 14, 3))
    >>> craft.importances(images, target=0).mean.shape
    torch.Size([3])
    """

    def __init__(
        self,
        site: str,
        n_concepts: int = 10,
        patch_size: int = 64,
        *,
        overlap: float = 0.2,
        n_init: int = 3,
        max_iter: int = 200,
        tol: float = 1e-4,
        random_state: int = 42,
        progress: bool = True,
    ) -> None:
        self.site = site
        self.n_concepts = n_concepts
        self.patch_size = patch_size
        self.overlap = overlap
        self.n_init = n_init
        self.max_iter = max_iter
        self.tol = tol
        self.random_state = random_state
        self.progress = progress

    # ---------------------------------------------------------------- concepts

    def fit(self, network: Network, images: Any, target: int | None = None, runner: Runner | None = None) -> Craft:
        """Find the concepts of images.

        Parameters
        ----------
        network : Network
            Its rest behind the site must need nothing else than the activation there; this is checked.
        images : Tensor or ndarray (n, channels, y, x)
            As the network takes them; hundreds of one class.
        target : int, optional
            Use only images that the network puts into this class.
        runner : Runner, optional

        Raises
        ------
        InputError
            Images that are none, are smaller than a crop or not of the class; activations that are negative, all zero, the
            same for all crops, or too few for the concepts; a site at which the network cannot be cut.
        """
        self._check()
        instance("network", network, Network)
        x = as_images("images", images)
        if min(x.shape[2:]) < self.patch_size:
            raise InputError(
                f"images of {tuple(x.shape[2:])} pixels hold no crop of {self.patch_size}; lower patch_size="
            )
        runner = self._runner(runner)
        x, kept, dropped = self._of_class(network, x, target, runner)
        above(network, self.site, x[:1])  # raises where the rest of the network is not a function of this site
        y, x0 = (_starts(size, self.patch_size, self.overlap) for size in x.shape[2:])
        grid = torch.cartesian_prod(torch.arange(len(x)), y, x0)
        self._fit_places(network, x, grid, runner)
        self.places_[:, 0] = kept[self.places_[:, 0]]
        self.dropped_ = dropped
        return self

    def subconcepts(self, concept: int, site: str, images: Any, share: float = 0.1, **settings: Any) -> Craft:
        """Split a concept at an earlier site: the crops that use it most are factorised there.

        Parameters
        ----------
        concept : int
        site : str
            Before the site of the concept.
        images : Tensor or ndarray
            The images that were fitted.
        share : float, default 0.1
            Share of the crops that is used.
        **settings
            Other parameters of the new Craft, such as ``n_concepts``.

        Returns
        -------
        Craft
            Fitted at the earlier site.
        """
        self._require(concept)
        if not (is_number(share) and 0 < share <= 1):
            raise InputError(f"share must be above 0 and at most 1, got {share!r}")
        if wrong := sorted(set(settings) - set(self.get_params()) | {"site", "patch_size", "overlap"} & set(settings)):
            raise InputError(f"{wrong} cannot be set here: crops stay what they are")
        x = as_images("images", images)
        if int(self.places_[:, 0].max()) >= len(x) or not np.array_equal(x.shape[2:], self.size_):
            raise InputError(f"{len(x)} images of {tuple(x.shape[2:])} pixels are not those that were fitted")
        if str(parse(site)) == str(parse(self.site)):
            raise InputError(f"sub-concepts are looked for before {self.site!r}, not at it")
        Part(self.network_, site, self.site, x[:1])  # raises where the site does not come before
        below = Craft(**{**self.get_params(), **settings, "site": site})
        below._check()
        above(self.network_, site, x[:1])
        strength = self.crop_coefficients_[:, concept]
        chosen = np.argsort(-strength, kind="stable")[: max(round(share * len(strength)), 1)]
        below._fit_places(self.network_, x, torch.from_numpy(self.places_[chosen]), below._runner(None))
        below.dropped_ = ()
        return below

    def transform(self, images: Any, runner: Runner | None = None) -> np.ndarray:
        """Coefficients of whole images at each position, (n, y, x, n_concepts), or (n, n_concepts) without positions."""
        check_is_fitted(self)
        x = as_images("images", images)

        def ask(i: int) -> Asking[Tensor]:
            u = yield from self._coefficients(Pass(x[i : i + 1], read=[self.site], output=False))
            return u[0].movedim(0, -1)

        return (
            torch.stack(self._each(self.network_, ask, len(x), "concepts of images", self._runner(runner)))
            .cpu()
            .numpy()
        )

    def crops(self, images: Any, concept: int, n: int = 8) -> Tensor:
        """The crops of the fitted images that use a concept most, (n, channels, patch, patch), the strongest first."""
        self._require(concept)
        at_least("n", n, 1)
        x = as_images("images", images)
        chosen = self.places_[np.argsort(-self.crop_coefficients_[:, concept], kind="stable")[:n]]
        if int(chosen[:, 0].max()) >= len(x):
            raise InputError(f"{len(x)} images are not those that were fitted")
        return _cut(x, torch.from_numpy(chosen), self.patch_size)

    # ---------------------------------------------------------------- importance

    def importances(
        self,
        images: Any,
        target: Any = None,
        n_design: int = 32,
        points: str = "sobol",
        runner: Runner | None = None,
    ) -> ConceptImportance:
        """Total Sobol indices of the concepts for a scalar of the output, by masks that scale concepts everywhere alike.

        Parameters
        ----------
        images : Tensor or ndarray (n, channels, y, x)
        target : Target, class indices, callable or None
            A logit rather than a probability, which saturates; None is each image's predicted class.
        n_design : int, default 32
            Points N of the design, a power of 2 for "sobol"; an image costs 1 + N (r + 1) rows.
        points : {"sobol", "halton", "random"}, default "sobol"
            Scrambled Sobol points. "halton" is unscrambled, as first published: wrong for many concepts and few points, kept
            for comparison.
        runner : Runner, optional

        References
        ----------
        Jansen (1999). Analysis of variance designs for model output. Computer Physics Communications 117, 35-43.
        """
        check_is_fitted(self)
        masks = sobol_design(self.n_concepts, n_design, points, self.random_state)
        rows = masks.reshape(-1, self.n_concepts)
        questions = make_questions(self.network_, as_images("images", images), target, self.random_state)
        decoder = self.decoder()
        runner = self._runner(runner)
        before = runner.cost("craft importances").forward

        def ask(i: int) -> Generator[Any, Any, Tensor]:
            return (yield from self._masked(decoder, questions[i], rows))

        y = torch.stack(
            self._each(self.network_, ask, len(questions), "importance of concepts", runner, "craft importances")
        )
        y = y.reshape(len(questions), self.n_concepts + 1, n_design)
        total = total_indices(y)
        a, out = masks[0] - masks[0].mean(0), y[:, 0] - y[:, 0].mean(1, keepdim=True)
        sign = out @ a / (out.norm(dim=1, keepdim=True) * a.norm(dim=0)).clamp(min=1e-300)
        used = ~total.isnan().any(1)
        if not bool(used.any()):
            raise InputError("the target does not depend on the concepts of any of these images; explain a logit")
        skipped = tuple((~used).nonzero()[:, 0].tolist())
        cost = runner.cost("craft importances").forward - before
        return ConceptImportance(total[used].mean(0), total, sign[used].mean(0), skipped, cost)

    def tcav(self, images: Any, target: Any = None, runner: Runner | None = None) -> tuple[Tensor, Tensor]:
        """Directional derivatives along the concepts, the order that importance is compared with.

        Returns
        -------
        score : Tensor (r,)
            Share of images whose target rises along a concept.
        derivative : Tensor (r,)
            Mean derivative, which tells apart concepts of the same score.

        References
        ----------
        Kim, Wattenberg, Gilmer, Cai, Wexler, Viegas & Sayres (2018). Interpretability beyond feature attribution:
        quantitative testing with concept activation vectors (TCAV). ICML.
        """
        check_is_fitted(self)
        questions = make_questions(self.network_, as_images("images", images), target, self.random_state)
        w = torch.from_numpy(self.components_)

        def ask(i: int) -> Asking[Tensor]:
            q = questions[i]
            answer = yield Pass(q.inputs, of=q.target, wrt=[self.site])
            return answer.gradients[self.site].cpu().float().reshape(1, w.shape[1], -1).sum(2)[0] @ w.T

        slopes = torch.stack(
            self._each(self.network_, ask, len(questions), "derivatives along concepts", self._runner(runner))
        )
        return (slopes > 0).double().mean(0), slopes.double().mean(0)

    def curves(
        self, images: Any, orders: Mapping[str, Any], target: Any = None, runner: Runner | None = None
    ) -> dict[str, ConceptCurves]:
        """Concept deletion and insertion: how faithful orders of the concepts are to the network.

        Parameters
        ----------
        images : Tensor or ndarray (n, channels, y, x)
        orders : mapping of name to (r,) or (n, r)
            Concepts, the most important first, for all images or for each.
        target : Target, class indices, callable or None
        runner : Runner, optional
        """
        check_is_fitted(self)
        questions = make_questions(self.network_, as_images("images", images), target, self.random_state)
        n, r = len(questions), self.n_concepts
        if not isinstance(orders, Mapping) or not orders:
            raise InputError("orders must be a mapping of names to orders of the concepts")
        ranks = [_rank(name, order, n, r) for name, order in orders.items()]
        # deletion keeps what comes late, insertion what comes early
        steps = torch.arange(r + 1)[:, None]
        masks = torch.stack([torch.stack([rank[:, None] >= steps, rank[:, None] < steps], 1) for rank in ranks], 1)
        flat = masks.double().reshape(n, -1, r)
        decoder = self.decoder()

        def ask(i: int) -> Generator[Any, Any, Tensor]:
            rows, back = flat[i].unique(dim=0, return_inverse=True)
            return (yield from self._masked(decoder, questions[i], rows))[back]

        y = torch.stack(self._each(self.network_, ask, n, "concept deletion", self._runner(runner))).reshape(
            n, len(ranks), 2, r + 1
        )
        return {name: ConceptCurves(y[:, k, 0], y[:, k, 1]) for k, name in enumerate(orders)}

    # ---------------------------------------------------------------- maps

    def maps(self, images: Any, quantile: float | None = 0.9, each: bool = False) -> xr.DataArray:
        """Where concepts are: coefficients at every position, interpolated to the pixels.

        Parameters
        ----------
        images : Tensor or ndarray (n, channels, y, x)
        quantile : float or None, default 0.9
            Values below this quantile of their concept are set to 0.
        each : bool, default False
            Take the quantile in each image, not over all.

        Returns
        -------
        xarray.DataArray (example, concept, y, x)
        """
        flag("each", each)
        if quantile is not None and not (is_number(quantile) and 0 <= quantile < 1):
            raise InputError(f"quantile must be at least 0 and below 1, got {quantile!r}")
        check_is_fitted(self)
        self._require_positions()
        u = torch.from_numpy(self.transform(images)).movedim(-1, 1)
        u = (
            F.interpolate(u, size=as_images("images", images).shape[2:], mode="bicubic", align_corners=False)
            .clamp(min=0)
            .numpy()
        )
        if quantile is not None:
            least = np.quantile(u, quantile, axis=(2, 3) if each else (0, 2, 3), keepdims=True)
            u = np.where(u >= least, u, 0)
        return xr.DataArray(u, dims=("example", "concept", "y", "x"), name="craft")

    def attribute(
        self,
        images: Any,
        method: Any,
        concepts: Sequence[int] | None = None,
        site: str | None = None,
        runner: Runner | None = None,
    ) -> xr.DataArray:
        """Scores of concept coefficients by any attribution method, by implicit differentiation where it needs gradients.

        Parameters
        ----------
        images : Tensor or ndarray (n, channels, y, x)
        method : Method
            Such as ``Saliency()``, ``GradCAM("activation")`` or ``RISE()``.
        concepts : sequence of int, optional
            By default all.
        site : str, optional
            Of `encoder`.
        runner : Runner, optional

        Returns
        -------
        xarray.DataArray (example, concept, ...)
        """
        check_is_fitted(self)
        chosen = items("concepts", range(self.n_concepts) if concepts is None else concepts)
        for j in chosen:
            self._require(j)
        x, encoder, runner = as_images("images", images), self.encoder(), self._runner(runner)
        found = [runner.attribute({"craft": method}, encoder, x, j, site=site)["craft"] for j in chosen]
        scores = xr.concat(found, xr.DataArray(list(chosen), dims="concept", name="concept"), combine_attrs="override")
        return scores.transpose("example", "concept", ...)

    def encoder(self) -> Network:
        """Images to concepts as a Network: mean coefficient over the positions, (n, n_concepts), differentiable.

        Its site ``activation`` is the one that was factorised; sites before it are called ``below.module.NAME``.
        """
        check_is_fitted(self)
        below = Part(self.network_, "input", self.site, self._example)
        return Network(_Encoder(below, self.components_), name=f"concepts of {self.network_.name}")

    def decoder(self) -> Network:
        """Concepts to the output as a Network: h(u W) of coefficients (n, n_concepts, y, x) or (n, n_concepts)."""
        check_is_fitted(self)
        module = _Decoder(above(self.network_, self.site, self._example), self.components_)
        dims = ("concept", "y", "x") if self.positions_ else ("concept",)
        return _Decoding(module, dims=dims, name=f"{self.network_.name} above its concepts")

    # ---------------------------------------------------------------- how it is asked

    def _check(self) -> None:
        if not isinstance(self.site, str):
            raise InputError(f"site must be the address of an activation, got {self.site!r:.60}")
        for name in ("n_concepts", "patch_size", "n_init", "max_iter"):
            at_least(name, getattr(self, name), 1)
        at_least("random_state", self.random_state, 0)
        flag("progress", self.progress)
        if not (is_number(self.overlap) and 0 <= self.overlap < 1):
            raise InputError(f"overlap must be at least 0 and below 1, got {self.overlap!r}")
        if not (is_number(self.tol) and self.tol >= 0):
            raise InputError(f"tol must be a number, at least 0; got {self.tol!r}")

    def _require(self, concept: object) -> None:
        check_is_fitted(self)
        if not (is_whole(concept) and 0 <= concept < self.n_concepts):  # pyright: ignore[reportOperatorIssue]
            raise InputError(f"the concepts are 0 to {self.n_concepts - 1}, got {concept!r}")

    def _require_positions(self) -> None:
        if not self.positions_:
            raise InputError(f"{self.site!r} has no positions: its concepts have no map; see attribute()")

    def _runner(self, runner: Runner | None) -> Runner:
        if runner is not None:
            instance("runner", runner, Runner)
        # answers are taken up at once: nothing is gained by keeping them
        return runner or Runner(memory=0, progress=self.progress)

    def _each(self, network: Network, ask: Any, n: int, what: str, runner: Runner, name: str = "craft") -> list[Any]:
        """What `ask(i)` returns for each example i."""
        return runner.collect(network, [partial(ask, i) for i in range(n)], what, name)

    def _of_class(
        self, network: Network, x: Tensor, target: int | None, runner: Runner
    ) -> tuple[Tensor, np.ndarray, tuple[int, ...]]:
        """The images that the network puts into the class, their numbers, and those of the others."""
        if target is None:
            return x, np.arange(len(x)), ()
        at_least("target", target, 0)

        def ask(i: int) -> Asking[Tensor]:
            return (yield Pass(x[i : i + 1])).output

        found = self._each(network, ask, len(x), "predicted classes", runner)
        if found[0].ndim != 2 or found[0].shape[1] <= target:
            raise InputError(f"class {target} is not among outputs of shape {tuple(found[0].shape[1:])}")
        inside = np.array([int(found[i].argmax()) == target for i in range(len(x))])
        if not inside.any():
            raise InputError(f"{network.name} puts none of the {len(x)} images into class {target}")
        kept, dropped = np.flatnonzero(inside), np.flatnonzero(~inside)
        return x[torch.from_numpy(kept)], kept, tuple(dropped.tolist())

    def _fit_places(self, network: Network, x: Tensor, places: Tensor, runner: Runner) -> None:
        """Factorise the activations of crops; nothing is kept before all of it has succeeded."""
        parts = places.split(32)

        def ask(i: int) -> Asking[tuple[bool, Tensor]]:
            crops = _cut(x, parts[i], self.patch_size)
            resized = F.interpolate(crops, size=x.shape[2:], mode="bilinear", align_corners=False)
            answer = yield Pass(resized, read=[self.site], output=False)
            a = self._activations(answer.reads[self.site])
            return a.ndim == 4, a.mean((2, 3)) if a.ndim == 4 else a

        read = self._each(network, ask, len(parts), "activations of crops", runner)
        positions, a = read[0][0], torch.cat([part for _, part in read])
        if self.n_concepts > min(a.shape):
            raise InputError(
                f"{self.n_concepts} concepts cannot be found in {a.shape[0]} crops with {a.shape[1]} channels; "
                "give more images or lower n_concepts="
            )
        if float(a.max()) == 0:
            raise InputError(f"{self.site!r} is zero for all crops: there is nothing to factorise")
        if len(a) > 1 and torch.equal(a, a[:1].expand_as(a)):
            raise InputError(f"{self.site!r} is the same for all crops: there is nothing to factorise")
        found = nmf(a, self.n_concepts, n_init=self.n_init, max_iter=self.max_iter, tol=self.tol,
                    seed=self.random_state, progress=self.progress)  # fmt: skip
        self.network_, self.positions_, self._example = network, positions, x[:1].clone()
        self.components_, self.crop_coefficients_ = found.components.numpy(), found.coefficients.numpy()
        self.reconstruction_error_ = (found.loss / found.energy) ** 0.5
        self.losses_, self.n_iter_ = found.losses, found.n_iter
        self.places_, self.size_ = places.numpy().copy(), tuple(x.shape[2:])

    def _activations(self, a: Tensor) -> Tensor:
        """Activations of the site on the CPU, if they can be factorised."""
        a = a.detach().float().cpu()
        if a.ndim not in (2, 4):
            raise SiteError(f"{self.site!r} gives {tuple(a.shape)}; rows × channels, with or without y × x, are needed")
        if float(a.min()) < 0:
            raise InputError(
                f"activations at {self.site!r} are negative (the least is {float(a.min()):.3g}): concepts need a site after a "
                "ReLU; GELU, SiLU, residual streams and linear bottlenecks do not do"
            )
        return a

    def _coefficients(self, question: Pass) -> Asking[Tensor]:
        answer = yield question
        return project(self._activations(answer.reads[self.site]), torch.from_numpy(self.components_))

    def _masked(self, decoder: Network, q: Question, masks: Tensor) -> Generator[Any, Any, Tensor]:
        """The target of h((u ⊙ m) W) for concept masks (m, r): (m,), float64."""
        u = yield from self._coefficients(Pass(q.inputs, read=[self.site], output=False))
        shaped = masks.float().reshape(*masks.shape, *[1] * (u.ndim - 2))
        rows = max(2**20 // u.numel(), 1)
        found = []
        for chunk in shaped.split(rows):
            answer = yield decoder, Pass(u * chunk, of=q.target)
            found.append(answer.scalar.cpu().double())
        return torch.cat(found)


def project(a: Tensor, w: Tensor) -> Tensor:
    """Nonnegative coefficients (n, r, ...) of activations (n, d, ...) on components (r, d), differentiable."""
    rows = a.movedim(1, -1)
    u: Any = NonnegativeProjection.apply(rows.reshape(-1, a.shape[1]), w)
    return u.reshape(*rows.shape[:-1], len(w)).movedim(-1, 1)


class _Encoder(nn.Module):
    """Images to the mean coefficient of each concept."""

    components: Tensor

    def __init__(self, below: Part, components: np.ndarray) -> None:
        super().__init__()
        self.below = below
        self.activation = nn.Identity()
        self.register_buffer("components", torch.from_numpy(components))

    def forward(self, x: Tensor) -> Tensor:
        a = self.activation(self.below(x))
        u = project(a, self.components)
        return u.mean((2, 3)) if u.ndim == 4 else u


class _Decoder(nn.Module):
    """Coefficients to the output of the network."""

    components: Tensor

    def __init__(self, rest: Part, components: np.ndarray) -> None:
        super().__init__()
        self.rest = rest
        self.register_buffer("components", torch.from_numpy(components))

    def forward(self, u: Tensor) -> Tensor:
        return self.rest(torch.einsum("nr...,rd->nd...", u, self.components))


class _Decoding(Network):
    """A network whose rows are small and whose first activation is not."""

    def rows_at_once(self, question: Any) -> int:
        """Rows that one batch may hold, by what coefficients are decoded to."""
        module: Any = self.module
        u = next(v for v in question.inputs.values() if isinstance(v, Tensor))
        row = u[0, 0].numel() * module.components.shape[1]
        return int(np.clip(2 ** round(np.log2(DECODED / max(row, 1))), 4, 1024))


def _rank(name: str, order: Any, n: int, r: int) -> Tensor:
    """Rank of each concept (n, r), 0 for the first."""
    try:
        t = torch.as_tensor(np.asarray(order) if not isinstance(order, Tensor) else order)
    except (TypeError, ValueError) as error:
        raise InputError(f"order {name!r} must hold whole numbers") from error
    t = t[None].expand(n, -1) if t.ndim == 1 else t
    if t.shape != (n, r) or t.is_floating_point() or not bool((t.sort(1).values == torch.arange(r)).all()):
        raise InputError(f"order {name!r} must name each of the {r} concepts once, for all or for each of {n} images")
    return t.argsort(1)


def _starts(size: int, patch: int, overlap: float) -> Tensor:
    return torch.arange(0, size - patch + 1, max(int((1 - overlap) * patch + 1e-9), 1))


def _cut(x: Tensor, places: Tensor, size: int) -> Tensor:
    """Crops (m, channels, size, size) of images at places (m, 3)."""
    span = torch.arange(size)
    image, y, left = places.unbind(1)
    return x[image[:, None, None], :, (y[:, None] + span)[:, :, None], (left[:, None] + span)[:, None]].movedim(-1, 1)


# ---------------------------------------------------------------- pictures


def plot_concepts(
    craft: Craft,
    images: Any,
    importance: ConceptImportance | None = None,
    *,
    display: Any = None,
    n: int = 5,
    n_crops: int = 6,
    n_maps: int = 0,
) -> Any:
    """Concept sheet: a row a concept, the most important first, with the crops that use it most, and where it is.

    Parameters
    ----------
    craft : Craft
    images : Tensor or ndarray
        The images that were fitted.
    importance : ConceptImportance, optional
        Orders the concepts; otherwise they are as they were found.
    display : array (n, y, x, 3) or (n, y, x), optional
        How the images are shown; by default each channel from its least to its largest value.
    n : int, default 5
        Concepts that are shown.
    n_crops : int, default 6
    n_maps : int, default 0
        Whole images beside the crops, those with the best crops, dark where the concept is not. Only where activations have
        positions.

    Returns
    -------
    matplotlib figure
    """
    import matplotlib.pyplot as plt

    instance("craft", craft, Craft)
    check_is_fitted(craft)
    at_least("n", n, 1)
    at_least("n_crops", n_crops, 1)
    at_least("n_maps", n_maps, 0)
    shown, x = _shown(images, display), as_images("images", images)
    order = range(craft.n_concepts) if importance is None else importance.order.tolist()
    concepts, n_crops = list(order)[:n], min(n_crops, len(craft.places_))
    strongest = [_images_of(craft, j)[:n_maps] for j in concepts]
    n_maps = max(map(len, strongest))
    figure, axes = plt.subplots(
        len(concepts), n_crops + n_maps, squeeze=False, layout="constrained",
        figsize=(1.1 * (n_crops + n_maps) + 1.6, 1.15 * len(concepts)),
    )  # fmt: skip
    for ax in axes.flat:
        ax.set_xticks([])
        ax.set_yticks([])
    for row, j, whole in zip(axes, concepts, strongest, strict=True):
        crops = craft.crops(shown, j, n_crops).movedim(1, -1).numpy()
        for ax, crop in zip(row, crops, strict=False):
            ax.imshow(crop, cmap="gray", vmin=0, vmax=1)
        if len(whole):
            maps = craft.maps(x[torch.from_numpy(whole)], None).to_numpy()[:, j]
            light = 0.2 + 0.8 * maps / max(float(maps.max()), 1e-30)
            for ax, image, lit in zip(row[n_crops:], shown[torch.from_numpy(whole)], light, strict=False):
                ax.imshow((image * torch.from_numpy(lit)).movedim(0, -1).numpy(), cmap="gray", vmin=0, vmax=1)
        for ax in row[n_crops + len(whole) :]:
            ax.set_axis_off()
        text = f"concept {j}"
        if importance is not None:
            text += f"\n{float(importance.mean[j]):.2f}, {'raises' if float(importance.sign[j]) > 0 else 'lowers'}"
        row[0].set_ylabel(text, rotation=0, ha="right", va="center")
    return figure


def _images_of(craft: Craft, concept: int) -> np.ndarray:
    """Numbers of the images that were fitted, those with the best crop of a concept first."""
    best = craft.places_[np.argsort(-craft.crop_coefficients_[:, concept], kind="stable"), 0]
    return best[np.sort(np.unique(best, return_index=True)[1])]


def plot_curves(curves: Mapping[str, ConceptCurves]) -> Any:
    """Concept insertion and deletion, mean over images; orders whose names begin with "random" are drawn grey.

    Parameters
    ----------
    curves : mapping of name to ConceptCurves
        From `Craft.curves`.

    Returns
    -------
    matplotlib figure
    """
    import matplotlib.pyplot as plt

    if not curves:
        raise InputError("no curves were given")
    figure, axes = plt.subplots(1, 2, figsize=(7.5, 2.9), sharey=True, layout="constrained")
    colours = iter(("#0072b2", "#d55e00", "#009e73", "#cc79a7"))
    grey = False
    for name, c in sorted(curves.items(), key=lambda item: not item[0].startswith("random")):  # chance lies below
        chance = name.startswith("random")
        style = {"color": "#7f7f7f", "lw": 0.7, "alpha": 0.6} if chance else {"color": next(colours, "black"), "lw": 2}
        label = ("random orders" if chance else name) if not (chance and grey) else None
        grey |= chance
        for ax, y in zip(axes, (c.insertion, c.deletion), strict=True):
            ax.plot(y.mean(0).numpy(), label=label, **style)
    for ax, what in zip(axes, ("put in", "taken away"), strict=True):
        ax.set_xlabel(f"concepts {what}")
    axes[0].set_ylabel("target, mean over images")
    axes[0].legend(frameon=False, fontsize=8)
    return figure


def plot_maps(craft: Craft, images: Any, concepts: Sequence[int], *, display: Any = None, quantile: float = 0.9) -> Any:
    """Images with the places of a few concepts in distinct colours; see `Craft.maps`.

    Returns
    -------
    matplotlib figure
    """
    import matplotlib.pyplot as plt
    from matplotlib.colors import to_rgb

    chosen = list(items("concepts", concepts))
    colours = ("#e69f00", "#56b4e9", "#009e73", "#cc79a7", "#d55e00", "#f0e442", "#0072b2")
    if not 0 < len(chosen) <= len(colours):
        raise InputError(f"1 to {len(colours)} concepts can be told apart by colour, got {len(chosen)}")
    for j in chosen:
        craft._require(j)
    shown, maps = _shown(images, display).movedim(1, -1).numpy(), craft.maps(images, quantile).to_numpy()
    figure, axes = plt.subplots(1, len(shown), squeeze=False, figsize=(2 * len(shown), 2.5), layout="constrained")
    for ax, picture, found in zip(axes[0], shown, maps, strict=True):
        ax.imshow(picture, cmap="gray", vmin=0, vmax=1)
        for j, colour in zip(chosen, colours, strict=False):
            strength = found[j] / max(float(maps[:, j].max()), 1e-30)
            ax.imshow(
                np.concatenate([np.broadcast_to(to_rgb(colour), (*strength.shape, 3)), 0.8 * strength[..., None]], 2)
            )
        ax.set_axis_off()
    for j, colour in zip(chosen, colours, strict=False):
        axes[0, 0].plot([], [], "s", color=colour, label=f"concept {j}")
    figure.legend(loc="outside lower center", ncols=len(chosen), frameon=False)
    return figure


def _shown(images: Any, display: Any) -> Tensor:
    """Pictures (n, 1 or 3, y, x) in [0, 1]."""
    x = as_images("images", images)
    if display is not None:
        d = torch.as_tensor(np.asarray(display))
        d = d[..., None] if d.ndim == 3 else d
        if d.ndim != 4 or d.shape[:3] != (len(x), *x.shape[2:]) or d.shape[3] not in (1, 3):
            raise InputError(
                f"display must hold {len(x)} pictures of {tuple(x.shape[2:])} pixels, got {tuple(d.shape)}"
            )
        return d.movedim(-1, 1).float() / (1 if d.is_floating_point() else 255)
    x = x if x.shape[1] in (1, 3) else x.mean(1, keepdim=True)
    low, high = x.amin((0, 2, 3), keepdim=True), x.amax((0, 2, 3), keepdim=True)
    return (x - low) / (high - low).clamp(min=1e-30)
