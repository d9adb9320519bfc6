"""Neuroformer: a network that writes spikes one after the other, told of those before, of what was seen and of what was done.

The queries are the spikes of the present window. They attend to each other (causally), to the spikes of the window before, and to
the samples of other modalities, so that the cost of a modality grows with its length and not with its square.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

import numpy as np
import torch
import xarray as xr
from torch import Tensor, nn
from torch.nn import functional as F

from nissl.arguments import at_least, flag, instance, is_number, is_whole, items
from nissl.errors import InputError
from nissl.recordings.spikes.tokens import SpikeTokenizer, Windows
from nissl.recordings.transformer import Block, sinusoid

SHARES = 3 / 5, 2 / 5
"""Of the losses of the neuron and of its time."""
CONTRAST = 1 / 4
"""Share of the contrastive loss where there is one."""


def contrastive_loss(a: Tensor, b: Tensor, temperature: float = 0.5) -> Tensor:
    """How badly each row of `a` finds its own row of `b` among all of them.

    Parameters
    ----------
    a, b : Tensor (n, n_features)
        Scaled to unit length here.
    temperature : float, default 0.5

    Returns
    -------
    Tensor ()
        Mean over i of ``logsumexp_j(s_ij / temperature) - s_ii / temperature`` with cosines s. One direction, as in the paper's code.
    """
    s = F.normalize(a, dim=-1) @ F.normalize(b, dim=-1).T / temperature
    return F.cross_entropy(s, torch.arange(len(s), device=s.device))


@dataclass(frozen=True, eq=False)
class Written:
    """What the network says of windows.

    Attributes
    ----------
    ids : Tensor (n, n_tokens, n_ids)
        Logits of the neuron of the next token.
    times : Tensor (n, n_tokens, n_times)
        Logits of its bin. Given what came before, the two are independent.
    behaviour : dict of name and Tensor (n, n_outputs)
    pooled : dict of name and Tensor (n, n_features)
        Means of ``spikes`` and of each stream, before the projection in which they are aligned.
    """

    ids: Tensor
    times: Tensor
    behaviour: dict[str, Tensor]
    pooled: dict[str, Tensor]


class Frames(nn.Module):
    """Frames to tokens: a convolution over time and space without overlap, layer norm, ReLU, and a code of the place in all three."""

    def __init__(self, n_features: int, kernel: Sequence[int], stride: Sequence[int]) -> None:
        super().__init__()
        self.patches = nn.Conv3d(1, n_features, tuple(kernel), tuple(stride))  # pyright: ignore[reportArgumentType]
        self.norm = nn.LayerNorm(n_features)

    def forward(self, frames: Tensor) -> Tensor:
        """(n, n_frames, height, width) to (n, n_tokens, n_features)."""
        found = self.patches(frames[:, None])
        grid = found.shape[2:]
        d = found.shape[1]
        rest = 2 * (d // 6)
        parts = [
            sinusoid(torch.arange(m, device=frames.device), size).reshape([-1 if k == i else 1 for k in range(3)] + [size]).expand(*grid, size)
            for i, (m, size) in enumerate(zip(grid, (d - 2 * rest, rest, rest), strict=True))
        ]  # fmt: skip
        return F.relu(self.norm(found.flatten(2).transpose(1, 2))) + torch.cat(parts, -1).flatten(0, 2)


class Signals(nn.Module):
    """Scalars to tokens, each variable of each sample one: a small network of its value, and codes of its time and variable.

    The first layer is a variable's own. With one for all, means over tokens could not tell which variable has which value.
    """

    def __init__(self, n_features: int, n_variables: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.02 * torch.randn(n_variables, 2 * n_features))
        self.bias = nn.Parameter(torch.zeros(n_variables, 2 * n_features))
        self.value = nn.Sequential(nn.GELU(), nn.Linear(2 * n_features, n_features), nn.LayerNorm(n_features))

    def forward(self, samples: Tensor) -> Tensor:
        """(n, n_samples, n_variables) to (n, n_samples * n_variables, n_features)."""
        _, n, m = samples.shape
        place = torch.arange(n * m, device=samples.device)
        found = self.value(samples[..., None] * self.weight + self.bias).flatten(1, 2)
        return found + sinusoid(place // m, found.shape[-1]) + sinusoid(place % m, found.shape[-1])


class Neuroformer(nn.Module):
    """A decoder-only transformer over spikes, with one stack of cross-attention for each thing that it is told.

    Parameters
    ----------
    tokenizer : SpikeTokenizer
    streams : dict of name and shape, optional
        Other modalities, in the order in which they are attended to: (last, n_variables), or (last, height, width) for frames.
    heads : dict of name and int, optional
        Behaviours that are read out, and the number of outputs of each: values, or logits of classes.
    n_features, n_heads : int, default 256 and 8
    n_state : int, default 6
        Causal self-attention blocks before, and again after, all others.
    n_history : int, default 6
        Blocks that attend to the spikes before. 0: none.
    n_stimulus : int, default 6
        Blocks that attend to frames, and blocks in which frames attend to each other.
    n_frames : int, optional
        Another number of the latter. Their cost grows with the square of the number of frames' tokens; 0 leaves them out.
    n_behaviour : int, default 4
        Blocks that attend to each other stream.
    dropout : float, default 0.2
    kernel, stride : three int, default (3, 5, 5) and as the kernel
        Frames, rows and columns that make one token.
    time_code : {"learnt", "sinusoid"}, default "learnt"
        How the bin of a spike enters.
    align : sequence of str, default ()
        Two or more of ``"spikes"`` and the names of streams, which the contrastive loss brings together.
    align_before : bool, default False
        Take for ``"spikes"`` what is known of them before they attend to anything else. As published (False), the spikes have seen the
        streams that they are to be matched with.
    n_align : int, optional
        Features in which they are aligned; default `n_features`.
    temperature : float, default 0.5
        Of the contrastive loss.

    Notes
    -----
    Deviations from the published code, which are what its paper says: the code of the frames' place is added; padding is neither
    attended to nor averaged over; neuron and time losses are scaled by 3/4 only where there is a contrastive loss; a scalar is not
    layer-normalised by itself, which would leave nothing of it, and each variable has a first layer of its own.

    References
    ----------
    Antoniades, Yu, Canzano, Wang & Smith (2024). Neuroformer: multimodal and multitask generative pretraining for brain data. ICLR.

    See Also
    --------
    NeuroformerDecoder : with training, as a scikit-learn estimator.
    """

    def __init__(
        self, tokenizer: SpikeTokenizer, *, streams: Mapping[str, Sequence[int]] | None = None,
        heads: Mapping[str, int] | None = None, n_features: int = 256, n_heads: int = 8, n_state: int = 6, n_history: int = 6,
        n_stimulus: int = 6, n_frames: int | None = None, n_behaviour: int = 4, dropout: float = 0.2,
        kernel: Sequence[int] = (3, 5, 5), stride: Sequence[int] | None = None,
        time_code: Literal["learnt", "sinusoid"] = "learnt", align: Sequence[str] = (), align_before: bool = False,
        n_align: int | None = None, temperature: float = 0.5,
    ) -> None:  # fmt: skip
        super().__init__()
        instance("tokenizer", tokenizer, SpikeTokenizer)
        for name, value, low in (("n_features", n_features, 6), ("n_state", n_state, 0), ("n_history", n_history, 0),
                                 ("n_stimulus", n_stimulus, 0), ("n_behaviour", n_behaviour, 0)):  # fmt: skip
            at_least(name, value, low)
        if n_features % 2:
            raise InputError(f"n_features must be even, got {n_features}")
        if time_code not in ("learnt", "sinusoid"):
            raise InputError(f"time_code={time_code!r}: choose 'learnt' or 'sinusoid'")
        flag("align_before", align_before)
        if not is_number(temperature) or temperature <= 0:
            raise InputError(f"temperature must be a number above 0, got {temperature!r}")
        self.tokenizer, self.align_before, self.temperature = tokenizer, align_before, float(temperature)
        self.shapes = {name: tuple(shape) for name, shape in (streams or {}).items()}
        self.align = items("align", align)
        taken = {"ids", "times", "past_ids", "past_times", "spikes"} & set(self.shapes)
        if taken:
            raise InputError(f"a stream must not be called {taken.pop()!r}")
        if len(self.align) == 1 or set(self.align) - {"spikes", *self.shapes} or len(set(self.align)) < len(self.align):
            raise InputError(f"align={align!r}: give two or more of 'spikes' and the streams {list(self.shapes)}")
        for name, n in (heads or {}).items():
            at_least(f"heads[{name!r}]", n, 1)

        def blocks(n: int) -> nn.ModuleList:
            return nn.ModuleList(Block(n_features, n_heads, dropout=dropout) for _ in range(n))

        d = n_features
        self.id_code = nn.Embedding(tokenizer.n_ids, d)
        self.time_code = None
        if time_code == "learnt":
            self.time_code = nn.Sequential(nn.Linear(1, d // 2), nn.GELU(), nn.Linear(d // 2, d))
        self.place = nn.Parameter(torch.zeros(tokenizer.block, d))
        self.past_place = nn.Parameter(torch.zeros(tokenizer.past_block, d))
        self.dropout = nn.Dropout(dropout)
        self.encoder, self.history, self.state = blocks(n_state), blocks(n_history), blocks(n_state)
        self.embed, self.between, self.fusion = nn.ModuleDict(), nn.ModuleDict(), nn.ModuleDict()
        for name, shape in self.shapes.items():
            if len(shape) == 3:
                kernel, step = items("kernel", kernel), items("stride", kernel if stride is None else stride)
                if len(kernel) != 3 or len(step) != 3 or not all(is_whole(k) and k >= 1 for k in (*kernel, *step)):
                    raise InputError(f"kernel and stride must be three numbers each, got {kernel} and {step}")
                if any(s < k for s, k in zip(shape, kernel, strict=True)):
                    raise InputError(f"frames of stream {name!r}, {shape}, are smaller than the kernel {kernel}")
                self.embed[name] = Frames(d, kernel, step)
                self.between[name] = blocks(n_stimulus if n_frames is None else n_frames)
                self.fusion[name] = blocks(n_stimulus)
            elif len(shape) == 2:
                self.embed[name], self.fusion[name] = Signals(d, shape[1]), blocks(n_behaviour)
            else:
                raise InputError(f"stream {name!r} must be (last, n_variables) or (last, height, width), got {shape}")
        self.norm = nn.LayerNorm(d)
        self.id_head = nn.Linear(d, tokenizer.n_ids, bias=False)
        self.time_head = nn.Linear(d, tokenizer.n_times, bias=False)
        self.heads = nn.ModuleDict({name: nn.Linear(d, n) for name, n in (heads or {}).items()})
        self.project = nn.Linear(d, n_align or d, bias=False) if self.align else None
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
                if isinstance(module, nn.Linear) and module.bias is not None:
                    nn.init.zeros_(module.bias)

    # ---------------------------------------------------------------- what the network says

    def forward(self, ids: Tensor, times: Tensor, past_ids: Tensor, past_times: Tensor, **streams: Tensor) -> Written:
        """Logits of the token after each, behaviours and means.

        Parameters
        ----------
        ids, times, past_ids, past_times, **streams : Tensor
            As of `Windows.inputs`; streams that are absent are skipped.
        """
        unknown = set(streams) - set(self.shapes)
        if unknown:
            raise InputError(f"there is no stream {unknown.pop()!r}; the network has {list(self.shapes)}")
        contexts, pooled = self._contexts(past_ids, past_times, streams)
        first = self._encoded(ids, times)
        x = self._fused(first, contexts)
        spoken = self.tokenizer.spoken(ids)[..., None]
        means = [(v * spoken).sum(1) / spoken.sum(1) for v in (first, x)]
        pooled["spikes"] = means[0 if self.align_before else 1]
        behaviour = {name: head(means[1]) for name, head in self.heads.items()}
        return Written(self.id_head(x), self.time_head(x), behaviour, pooled)

    def _embedded(self, ids: Tensor, times: Tensor, place: Tensor) -> Tensor:
        if ids.shape[1] > len(place):
            raise InputError(f"{ids.shape[1]} tokens are more than the tokenizer's block of {len(place)}")
        found = self.id_code(ids) + place[: ids.shape[1]]
        if self.time_code is None:
            return self.dropout(found + sinusoid(times, found.shape[-1]))
        return self.dropout(found + self.time_code(times[..., None].to(found.dtype)))

    def _encoded(self, ids: Tensor, times: Tensor) -> Tensor:
        x = self._embedded(ids, times, self.place)
        for block in self.encoder:
            x = block(x, causal=True)
        return x

    def _contexts(
        self, past_ids: Tensor, past_times: Tensor, streams: Mapping[str, Tensor]
    ) -> tuple[list[tuple[nn.ModuleList, Tensor, Tensor | None]], dict[str, Tensor]]:
        """What is attended to: blocks, tokens and which of them are there, in order; and means of the streams."""
        seen = (past_ids != self.tokenizer.pad)[:, None, None]
        past: Tensor = self._embedded(past_ids, past_times, self.past_place)
        contexts: list[tuple[nn.ModuleList, Tensor, Tensor | None]] = [(self.history, past, seen)]
        pooled: dict[str, Tensor] = {}
        for name in self.shapes:
            if name not in streams:
                continue
            tokens = self.embed[name](streams[name])
            if name in self.between:
                start = self.id_code.weight[self.tokenizer.sos].expand(len(tokens), 1, -1)
                tokens = torch.cat([start, tokens], 1)
                for block in self.between[name]:  # pyright: ignore[reportGeneralTypeIssues]
                    tokens = block(tokens)
            pooled[name] = tokens.mean(1)
            contexts.append((self.fusion[name], tokens, None))  # pyright: ignore[reportArgumentType]
        return contexts, pooled

    def _fused(self, x: Tensor, contexts: Sequence[tuple[nn.ModuleList, Tensor, Tensor | None]]) -> Tensor:
        for blocks, tokens, mask in contexts:
            for block in blocks:
                x = block(x, tokens, mask=mask)
        for block in self.state:
            x = block(x, causal=True)
        return self.norm(x)

    # ---------------------------------------------------------------- losses

    def loss(self, inputs: Mapping[str, Tensor], behaviour: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Losses by name; their sum is minimised.

        Parameters
        ----------
        inputs : dict of name and Tensor
            As of `Windows.inputs`.
        behaviour : dict of name and Tensor, optional
            (n, n_outputs) or (n,) of floating point: squared error. Whole numbers (n,): classes, cross-entropy.

        Returns
        -------
        dict
            ``id`` and ``time``, cross-entropies times 3/5 and 2/5 (EOS counts, PAD does not), ``contrast``, and each behaviour. With
            a contrastive loss that takes 1/4 and neuron and time the rest.
        """
        out = self._predicted(inputs)
        share = CONTRAST if self.align else 0.0
        ids, times = inputs["ids"][:, 1:], inputs["times"][:, 1:]
        found = {
            "id": (1 - share) * SHARES[0] * F.cross_entropy(out.ids.flatten(0, 1), ids.flatten(), ignore_index=self.tokenizer.pad),
            "time": (1 - share) * SHARES[1] * F.cross_entropy(out.times.flatten(0, 1), times.flatten(), ignore_index=self.tokenizer.time_pad),
        }  # fmt: skip
        if self.project is not None:
            aligned = [self.project(out.pooled[name]) for name in self.align if name in out.pooled]
            pairs = [contrastive_loss(a, b, self.temperature) for a, b in combinations(aligned, 2)]
            if not pairs:
                raise InputError(f"nothing can be aligned: of {list(self.align)} only {list(out.pooled)} is given")
            found["contrast"] = share * torch.stack(pairs).mean()
        for name, target in (behaviour or {}).items():
            if name not in out.behaviour:
                raise InputError(f"there is no head {name!r}; the network has {list(self.heads)}")
            said = out.behaviour[name]
            if target.is_floating_point():
                found[name] = F.mse_loss(said, target.reshape(said.shape))
            else:
                found[name] = F.cross_entropy(said, target)
        return found

    def _predicted(self, inputs: Mapping[str, Tensor]) -> Written:
        """Of all tokens but the last, which predict all but the first."""
        return self(**{k: v[:, :-1] if k in ("ids", "times") else v for k, v in inputs.items()})

    def _log_probabilities(self, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Of the neuron (or EOS) and of the bin of each token after the first, (n, n_tokens - 1); 0 where there is nothing to say.

        EOS is a word of the neurons, so that the bins of spikes need not say it again: their probabilities sum to 1 over bins.
        """
        out = self._predicted(inputs)
        ids, times = inputs["ids"][:, 1:], inputs["times"][:, 1:]
        said = ids != self.tokenizer.pad
        log_id = out.ids.log_softmax(-1).gather(-1, ids[..., None])[..., 0]
        bins = out.times[..., : self.tokenizer.window].log_softmax(-1)
        log_time = bins.gather(-1, times.clamp(max=self.tokenizer.window - 1)[..., None])[..., 0]
        return log_id.where(said, 0.0), log_time.where(said & (ids < self.tokenizer.n_neurons), 0.0)

    def nats(self, windows: Windows, batch_size: int = 256) -> np.ndarray:
        """Length (n,) of the code of each window's spikes, in nats: minus the log-probability of its tokens, EOS among them.

        Sentences and sets of counts are one to one, so that these are comparable with any other model of counts (where none was cut).
        """
        return np.concatenate([-sum(self._log_probabilities(b)).sum(1).double().cpu().numpy()  # pyright: ignore[reportAttributeAccessIssue]
                               for b in self._batches(windows, batch_size)])  # fmt: skip

    def _batches(self, windows: Windows, batch_size: int) -> Iterator[dict[str, Tensor]]:
        """Tensors of a few windows, on the network's device; the network is in evaluation mode meanwhile."""
        at_least("batch_size", batch_size, 1)
        was, device = self.training, self.place.device
        self.eval()
        try:
            with torch.inference_mode():
                for i in range(0, len(windows), batch_size):
                    yield {k: v.to(device) for k, v in windows[i : i + batch_size].inputs.items()}
        finally:
            self.train(was)

    # ---------------------------------------------------------------- reading

    def decode(self, windows: Windows, batch_size: int = 256) -> dict[str, np.ndarray]:
        """What each head says of each window: (n, n_outputs)."""
        found = [self(**b).behaviour for b in self._batches(windows, batch_size)]
        return {name: np.concatenate([f[name].cpu().numpy() for f in found]) for name in self.heads}

    def latents(self, windows: Windows, batch_size: int = 256) -> dict[str, np.ndarray]:
        """Vectors (n, n_features) of ``spikes`` and of each stream: of unit length where they are aligned, else means of tokens."""
        found = [self(**b).pooled for b in self._batches(windows, batch_size)]

        def vectors(name: str) -> np.ndarray:
            v = torch.cat([f[name] for f in found])
            if self.project is not None and name in self.align:
                with torch.inference_mode():
                    v = F.normalize(self.project(v), dim=-1)
            return v.cpu().numpy()

        return {name: vectors(name) for name in found[0]} if found else {}

    def connectivity(
        self,
        windows: Windows,
        by: Literal["intervention", "attention", "raw attention"] = "intervention",
        batch_size: int = 256,
    ) -> xr.DataArray:
        """A directed map from neurons of the past to neurons of the present.

        Parameters
        ----------
        windows : Windows
        by : {"intervention", "attention", "raw attention"}, default "intervention"
            "intervention": how much less probable (in nats) a spike of the target is when the spikes of the source are taken out of its
            past. "attention": how much attention a spike of the source gets where a spike of the target is written, over what each
            token of that past would get if it were even: 1 is no preference. It is the largest over heads, mixed in equal parts with
            what the blocks before looked at. "raw attention": the same as published, not divided by even attention.
        batch_size : int, default 256

        Returns
        -------
        DataArray ("target", "source")
            Means over the spikes of the target whose past has the source in it; NaN where there are none.

        Notes
        -----
        All are read from the past alone. Attention among spikes of one window follows the order in which they are listed, and would
        make neurons with low numbers look like causes. Raw attention is higher where the past is short, which is no matter of what
        was learnt: even attention, and so an untrained network, finds connections by it.
        """
        if by not in ("intervention", "attention", "raw attention"):
            raise InputError(f"by={by!r}: choose 'intervention', 'attention' or 'raw attention'")
        if by != "intervention" and not len(self.history):
            raise InputError("there is no attention to the past: n_history is 0")
        n = self.tokenizer.n_neurons
        total, count = (torch.zeros(n * n, dtype=torch.float64) for _ in range(2))
        for inputs in self._batches(windows, batch_size):
            pairs = (
                self._dropped(inputs, batch_size)
                if by == "intervention"
                else self._looked_at(inputs, by == "attention")
            )
            for target, source, value in pairs:
                pair = (target * n + source).cpu()
                total += torch.bincount(pair, value.double().cpu(), n * n)
                count += torch.bincount(pair, minlength=n * n)
        return xr.DataArray(
            (total / count).reshape(n, n).numpy(), dims=("target", "source"), name=f"connectivity by {by}",
            attrs={"method": "Neuroformer", "by": by, "windows": len(windows), "units": "nats" if by == "intervention" else "attention over even attention" if by == "attention" else "attention"},
        )  # fmt: skip

    def _looked_at(self, inputs: Mapping[str, Tensor], over_even: bool) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Target, source and attention of each pair of a spike that is written and one of the past."""
        n = self.tokenizer.n_neurons
        contexts, _ = self._contexts(inputs["past_ids"], inputs["past_times"], {})
        _, past, seen = contexts[0]
        x = self._encoded(inputs["ids"][:, :-1], inputs["times"][:, :-1])
        mixed: Tensor | None = None
        for block in self.history:
            weights: Tensor = block.attention(x, past, mask=seen).amax(1)  # pyright: ignore[reportCallIssue]
            weights = weights / weights.sum(-1, keepdim=True)
            mixed = weights if mixed is None else (mixed + weights) / 2
            x = block(x, past, mask=seen)
        assert mixed is not None
        if over_even:
            assert seen is not None
            mixed = mixed * seen[:, 0].sum(-1, keepdim=True)
        targets, sources = inputs["ids"][:, 1:], inputs["past_ids"]
        row, step, place = ((targets < n)[:, :, None] & (sources < n)[:, None]).nonzero(as_tuple=True)
        yield targets[row, step], sources[row, place], mixed[row, step, place]

    def _dropped(self, inputs: Mapping[str, Tensor], batch_size: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Target, source and fall of the log-probability of each spike when a source is taken out of its past."""
        n, pad = self.tokenizer.n_neurons, self.tokenizer.pad
        whole, _ = self._log_probabilities(inputs)
        targets, past = inputs["ids"][:, 1:], inputs["past_ids"]
        there = torch.zeros(len(past), pad + 1, dtype=torch.bool, device=past.device).scatter_(1, past, True)[:, :n]
        for rows in there.nonzero().split(batch_size):
            row, source = rows.unbind(1)
            gone = past[row] == source[:, None]
            order = gone.long().argsort(stable=True, dim=1)  # the others move up, as if the spike had never been
            ids = past[row].masked_fill(gone, pad).gather(1, order)
            times = inputs["past_times"][row].masked_fill(gone, self.tokenizer.time_pad).gather(1, order)
            changed = {k: v[row] for k, v in inputs.items()} | {"past_ids": ids, "past_times": times}
            fall = whole[row] - self._log_probabilities(changed)[0]
            at, step = (targets[row] < n).nonzero(as_tuple=True)
            yield targets[row[at], step], source[at], fall[at, step]

    # ---------------------------------------------------------------- writing

    def generate(
        self, windows: Windows, *, samples: int = 1, top_p: float = 0.95, temperature: float = 1.0, true_past: bool = False,
        seed: int = 0,
    ) -> np.ndarray:  # fmt: skip
        """Write the spikes of windows, token by token.

        Parameters
        ----------
        windows : Windows
            One after the other in each trial. The first of a trial is told of its real past; later ones of what was written. The
            streams are the real ones.
        samples : int, default 1
            Of all windows.
        top_p : float, default 0.95
            Neurons and bins are drawn from the most probable ones that hold this probability together. With 1, samples are of the
            network's own distribution; below it, rare spikes are left out.
        temperature : float, default 1
        true_past : bool, default False
            Tell each window of its real past.
        seed : int, default 0

        Returns
        -------
        array of int (samples, n_windows, window, n_neurons)
            Counts. `spike_table` makes a table of them.
        """
        at_least("samples", samples, 1)
        at_least("seed", seed, 0)
        flag("true_past", true_past)
        if not is_number(top_p) or not 0 < top_p <= 1:
            raise InputError(f"top_p must lie above 0 and at most at 1, got {top_p!r}")
        if not is_number(temperature) or temperature <= 0:
            raise InputError(f"temperature must be a number above 0, got {temperature!r}")
        t = self.tokenizer
        trials, chain = np.unique(windows.trial, return_inverse=True)
        turn = np.arange(len(windows)) - np.searchsorted(chain, np.arange(len(trials)))[chain]
        begin = windows.first[turn == 0][chain] if len(windows) else windows.first
        if (np.diff(chain) < 0).any() or (windows.first != begin + turn * t.window).any():
            raise InputError("windows must follow one another in each trial: take a slice of what the tokenizer gives")
        g = torch.Generator(device="cpu").manual_seed(seed)
        steps = int(turn.max(initial=-1)) + 1
        buffer = np.zeros((samples, len(trials), t.past + steps * t.window, t.n_neurons), dtype=np.int64)
        heads = windows[turn == 0]
        buffer[:, :, : t.past] = t.decode(heads.past_ids, heads.past_times, t.past)
        found = np.zeros((samples, len(windows), t.window, t.n_neurons), dtype=np.int64)
        for k in range(steps):
            now = np.flatnonzero(turn == k)
            for inputs in self._batches(windows[np.tile(now, samples)], len(now) * samples):
                if not true_past:
                    told = buffer[:, chain[now], k * t.window : k * t.window + t.past].reshape(-1, t.past, t.n_neurons)
                    ids, times, _ = t.encode(told, past=True)
                    inputs |= {"past_ids": ids.to(self.place.device), "past_times": times.to(self.place.device)}
                ids, times = self._sampled(inputs, np.tile(windows.length[now], samples), top_p, temperature, g)
                counts = t.decode(ids.cpu(), times.cpu()).reshape(samples, len(now), t.window, t.n_neurons)
                found[:, now] = counts
                start = t.past + k * t.window
                buffer[:, chain[now], start : start + t.window] = counts
        return found

    def _sampled(
        self, inputs: Mapping[str, Tensor], length: np.ndarray, top_p: float, temperature: float, g: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Tokens of one window for each row."""
        t, device = self.tokenizer, self.place.device
        streams = {k: v for k, v in inputs.items() if k in self.shapes}
        contexts, _ = self._contexts(inputs["past_ids"], inputs["past_times"], streams)
        ids = torch.full((len(length), t.block), t.pad, device=device)
        times = torch.full_like(ids, t.time_pad)
        ids[:, 0], times[:, 0] = t.sos, 0
        inside = torch.arange(t.window, device=device) < torch.from_numpy(length).to(device)[:, None]
        open_ = torch.arange(len(length), device=device)
        for s in range(1, t.block - 1):
            some = [(b, tokens[open_], None if m is None else m[open_]) for b, tokens, m in contexts]
            x = self._fused(self._encoded(ids[open_, :s], times[open_, :s]), some)[:, -1]
            logits = self.id_head(x)
            logits[:, [t.sos, t.pad]] = -torch.inf
            ids[open_, s] = nucleus(logits / temperature, top_p, g)
            bins = self.time_head(x)[:, : t.window].masked_fill(~inside[open_], -torch.inf)
            times[open_, s] = nucleus(bins / temperature, top_p, g)
            open_ = open_[ids[open_, s] != t.eos]
            if not len(open_):
                break
        ended = ids == t.eos
        times[ended] = t.time_eos
        return ids, times


def nucleus(logits: Tensor, top_p: float, generator: torch.Generator) -> Tensor:
    """One draw (n,) from each row of `logits` (n, n_words), from the most probable words that hold `top_p` together.

    The word that reaches `top_p` is among them. `generator` is on the CPU.
    """
    values, order = logits.sort(-1, descending=True)
    p = values.softmax(-1, dtype=torch.float64)
    p = p.where(p.cumsum(-1) - p < top_p, 0.0)
    total = p.cumsum(-1)
    drawn = torch.rand(len(p), 1, generator=generator, dtype=torch.float64).to(p.device) * total[:, -1:]
    at = torch.searchsorted(total, drawn, right=True).clamp(max=p.shape[-1] - 1)
    return order.gather(1, at)[:, 0]
