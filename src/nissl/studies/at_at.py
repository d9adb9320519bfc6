"""Removing neural signal artifacts with autoencoder-targeted adversarial transformers, AT-AT (2025): a reconstruction.

The paper's code, layer sizes, threshold and weights of losses are not public, and EEGdenoiseNet is not at hand. Measured on Gaussian
EEG with bursts of muscle noise, where the best possible answer is known, and on real EEG to which such noise is added. Levels are in
EEGdenoiseNet's decibels, 10 log10 of the ratio of amplitudes. The bars of the claims were written down before the
first run of the study; `COMPARABLE`, `TARGETING` and the sizes of the networks after a prototype of one seed.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
import xarray as xr
from rich.console import Console
from rich.table import Table
from scipy.linalg import cho_factor, cho_solve, toeplitz
from scipy.signal import butter, resample_poly, sosfiltfilt
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torch.nn import functional as F

from nissl.errors import MissingExtraError
from nissl.recordings.eeg.artifacts import FALLBACK, EMGFilter, WienerFilter, cc, mix, rrmse_spectrum, rrmse_time
from nissl.recordings.extras import need
from nissl.recordings.io import to_raw
from nissl.recordings.simulate import ELECTRODES, MuscleBursts, muscle_bursts
from nissl.seeds import seeded
from nissl.sources.recordings import p300
from nissl.studies.claims import stated
from nissl.trust.statistics import bootstrap

LEVELS = (-7.0, -2.0, 2.0)
"""Where the claims are; the tables have more."""
TABLE = (-7.0, -4.0, -2.0, 0.0, 2.0, 4.0)
BELOW_WIENER, ABOVE_WIENER, LEAK = 0.03, {-7.0: 0.0, -2.0: 0.02, 2.0: 0.02}, 0.01
AUC = {-7.0: 0.7, -2.0: 0.8, 2.0: 0.8}
SPECTRUM, CLEAN, BUDGET = 0.02, 0.97, 200_000
PAPER = {-7.0: 0.70, 2.0: 0.95}
COMPARABLE, TARGETING = 0.02, 0.01
REAL, EVOKED = {-7.0: 0.25, 2.0: 0.05}, 0.9
SEGMENTS, TEST, EPOCHS = 4400, 300, (6, 6, 3)
QUICK_SEGMENTS, QUICK_TEST, QUICK_EPOCHS = 500, 40, (4, 2, 1)
FIXED = f"threshold {FALLBACK:g}"
"""The network of AT-AT with the threshold that is named where none is chosen. Added after the first quick run, in which the chosen
one let the transformer work everywhere, so that nothing could be said of the gate."""
MUSCLES = ("T7", "T8")
"""Electrodes above the two muscles whose noise reaches all channels."""


def run(quick: bool = False, seed: int = 0, progress: bool = True) -> list[dict[str, Any]]:
    """Measure the paper's claims.

    Parameters
    ----------
    quick : bool, default False
        A short training on few segments, in place of three, and no real EEG.
    seed : int, default 0
    progress : bool, default True
        Show progress and the tables behind the claims (on stderr).

    Returns
    -------
    list of dict
        ``claim``, ``paper`` (what it says), ``ours``, ``interval`` (95 % bootstrap over segments), ``baseline`` and ``holds``.
    """
    console = Console(stderr=True, quiet=not progress)
    claims = on_planted(quick, seed, progress, console)
    if quick:
        return claims
    try:
        claims += on_real(seed, progress, console)
    except MissingExtraError as error:
        warnings.warn(f"the claims on real EEG are not measured: {error}", stacklevel=2)
    return claims


# ---------------------------------------------------------------- planted


class PlainConvolutions(nn.Module):
    """Five convolutions of one resolution, dilated so that a sample sees 121 around it."""

    def __init__(self, width: int = 32, kernel: int = 9) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        n = 1
        for dilation in (1, 2, 4, 8):
            reach = dilation * (kernel // 2)
            layers += [nn.Conv1d(n, width, kernel, padding=reach, dilation=dilation), nn.BatchNorm1d(width), nn.ReLU()]
            n = width
        self.layers = nn.Sequential(*layers, nn.Conv1d(width, 1, 1))

    def forward(self, y: Tensor) -> Tensor:
        """Signals (n, n_times) in and out."""
        return self.layers(y[:, None])[:, 0]


def plain_denoiser(data: MuscleBursts, epochs: int, seed: int, progress: bool) -> PlainConvolutions:
    """The plain network, trained by squared error on mixtures as those of `EMGFilter`."""
    training = need("nissl.recordings.training", "training")
    with seeded(seed):
        model = PlainConvolutions()
    clean, noise = (torch.from_numpy(v).float() for v in (data.clean, data.noise))

    def loss(batch: tuple[Tensor], g: torch.Generator) -> dict[str, Tensor]:
        x = batch[0]
        n = noise[torch.randint(len(noise), (len(x),), generator=g)]
        y = x + n * 10 ** ((7 - 9 * torch.rand(len(x), 1, generator=g)) / 10)  # both have standard deviation 1
        size = y.std(1, keepdim=True)
        return {"squared error": F.mse_loss(model(y / size), x / size)}

    training.train(
        model, (clean,), loss, epochs=epochs, learning_rate=2e-3, final_learning_rate=2e-5, seed=seed, progress=progress
    )
    return model


def posterior_mean(y: np.ndarray, data: MuscleBursts, level: float) -> np.ndarray:
    """E[clean | y] of Gaussian EEG and muscle noise whose spectra, envelope and level are known: nothing correlates better."""
    n = y.shape[1]

    def covariance(power: np.ndarray) -> np.ndarray:
        autocovariance = np.fft.irfft(power, n)
        return toeplitz(autocovariance / autocovariance[0])

    eeg, emg = covariance(data.clean_power), covariance(data.noise_power)
    found = np.empty_like(y)
    for i, row in enumerate(y):
        size = 10 ** (-level / 10) * data.envelope[i] / data.scale[i]
        total = eeg + emg * size[:, None] * size + 1e-9 * np.eye(n)
        found[i] = eeg @ cho_solve(cho_factor(total), row)
    return found


def low_pass(y: np.ndarray, rate: float, high: float = 20.0) -> np.ndarray:
    """Signals (..., n_times) band-passed from 1 Hz to `high`, without delay."""
    return sosfiltfilt(butter(4, (1.0, high), "bandpass", fs=rate, output="sos"), y)


def stages(
    emg_filter: EMGFilter, y: np.ndarray, g: np.random.Generator
) -> tuple[dict[str, np.ndarray], np.ndarray, tuple[float, float]]:
    """What parts of a filter make of segments, how noisy each sample was judged, and the shares that went to the transformer."""
    mean, size = y.mean(1, keepdims=True), y.std(1, keepdims=True)
    z = torch.from_numpy((y - mean) / size).float()
    network = emg_filter.network_
    with torch.inference_mode():
        found = network.clean(z)
        mask = network.mask(found.correlation)
        other = torch.from_numpy(g.permutation(len(mask)))
        fixed = network.mask(found.correlation, torch.tensor(FALLBACK))
        parts = {
            "AT-AT": found.output,
            "autoencoder": found.coarse,
            "transformer everywhere": network.clean(z, torch.ones_like(mask)).output,
            "gate of other segments": network.clean(z, mask[other]).output,
            FIXED: network.clean(z, fixed).output,
            f"{FIXED}, gate of other segments": network.clean(z, fixed[other]).output,
        }
    shares = float(mask.float().mean()), float(fixed.float().mean())
    return (
        {k: v.double().numpy() * size + mean for k, v in parts.items()},
        1 - found.correlation.double().numpy(),
        shares,
    )


def on_planted(quick: bool, seed: int, progress: bool, console: Console) -> list[dict[str, Any]]:
    """Correlations with the clean EEG beside those of the best linear filter, of other gates and of the exact answer."""
    n, n_test, epochs = (QUICK_SEGMENTS, QUICK_TEST, QUICK_EPOCHS) if quick else (SEGMENTS, TEST, EPOCHS)
    levels = LEVELS if quick else TABLE
    measures = {"CC": cc, "RRMSE time": rrmse_time, "RRMSE spectrum": rrmse_spectrum}
    found: dict[tuple[str, str, float], list[np.ndarray]] = {}
    auc: dict[float, list[float]] = {level: [] for level in levels}
    share: dict[float, list[tuple[float, float]]] = {level: [] for level in levels}
    untouched, sizes = [], {}
    for s in range(seed, seed + (1 if quick else 3)):
        first = s == seed
        data, test = muscle_bursts(n, seed=s), muscle_bursts(n_test, seed=1000 + s)
        emg_filter = EMGFilter(epochs=epochs, random_state=s, progress=progress).fit(data.clean, data.noise)
        filters: dict[str, Any] = {}
        if first:
            sizes["AT-AT"] = emg_filter.n_parameters_
            sizes["discriminator, in training only"] = emg_filter.n_discriminator_parameters_
            alone = EMGFilter(
                epochs=(0, epochs[1], epochs[2]), adversarial=0.0, autoencoder=emg_filter.network_.autoencoder,
                threshold=emg_filter.threshold_, random_state=s, progress=progress,
            )  # fmt: skip
            filters["no adversary"] = alone.fit(data.clean, data.noise).transform
            if not quick:
                plain = plain_denoiser(data, epochs[0], s, progress)
                sizes["plain convolutions"] = sum(p.numel() for p in plain.parameters())
                filters["plain convolutions"] = lambda y, plain=plain: _through(plain, y)
        filters["band-pass 1-20 Hz"] = lambda y: low_pass(y, 256.0)
        filters["Wiener, level estimated"] = WienerFilter().fit(data.clean, data.noise).transform
        g = np.random.default_rng(s)
        for level in levels:
            y = mix(test.clean, test.noise, level)
            outputs, noisy, share_now = stages(emg_filter, y, g)
            outputs |= {name: f(y) for name, f in filters.items()}
            outputs["noisy"] = y
            outputs["Wiener"] = WienerFilter(level).fit(data.clean, data.noise).transform(y)
            if first:
                outputs["posterior mean"] = posterior_mean(y, test, level)
            for name, output in outputs.items():
                for measure, function in measures.items():
                    found.setdefault((measure, name, level), []).append(function(output, test.clean))
            burst = test.envelope == 1
            auc[level].append(float(roc_auc_score(burst.ravel(), noisy.ravel())))
            share[level].append(share_now)
        untouched.append(cc(emg_filter.transform(test.clean), test.clean))
        console.print(
            f"seed {s}: threshold {emg_filter.threshold_:g}, curve {emg_filter.threshold_curve_.round(4).tolist()}"
        )
    names = list(dict.fromkeys(name for _, name, _ in found))
    for measure in measures:
        _show(
            console,
            measure,
            names,
            levels,
            lambda name, level, m=measure: float(np.mean(np.concatenate(found[m, name, level]))),
        )
    console.print(
        "AUC",
        {k: np.round(v, 3).tolist() for k, v in auc.items()},
        "share",
        {k: np.round(v, 3).tolist() for k, v in share.items()},
    )
    console.print("parameters", sizes)

    def minus(a: str, b: str, level: float, measure: str = "CC") -> np.ndarray:
        one, other = found[measure, a, level], found[measure, b, level]
        k = min(len(one), len(other))  # some were measured for the first seed only
        return np.concatenate(one[:k]) - np.concatenate(other[:k])

    claims = []
    for level in LEVELS:
        at = f"{level:g} dB"
        wiener = float(np.mean(np.concatenate(found["CC", "Wiener", level])))
        claims += [
            _low(f"{at}: CC of the autoencoder alone minus the Wiener filter's", "(ours)",
                 minus("autoencoder", "Wiener", level), -BELOW_WIENER, 0.0, seed),
            _low(f"{at}: CC minus that of the Wiener filter ({wiener:.3f})", "(ours)", minus("AT-AT", "Wiener", level),
                 ABOVE_WIENER[level], 0.0, seed),
            _high(f"{at}: CC minus that of the exact posterior mean; more would be a leak", "(control)",
                  minus("AT-AT", "posterior mean", level), LEAK, 0.0, seed),
            stated(f"{at}: AUC of the gate for samples of bursts, at least {AUC[level]:g}", "targets noise",
                   float(np.mean(auc[level])), 0.5, float(np.mean(auc[level])) >= AUC[level]),
            _low(f"{at}: CC minus that with a gate of other segments", "targeting helps", minus("AT-AT", "gate of other segments", level),
                 0.0, 0.0, seed, strictly=True),
            _low(f"{at}, {FIXED}: CC minus that with a gate of other segments", "targeting helps",
                 minus(FIXED, f"{FIXED}, gate of other segments", level), 0.0, 0.0, seed, strictly=True),
            _low(f"{at}: CC minus that with the transformer everywhere", "(ours)",
                 minus("AT-AT", "transformer everywhere", level), -TARGETING, 0.0, seed),
            _high(f"{at}: RRMSE of the spectrum minus that without adversary", "(ours)",
                  minus("AT-AT", "no adversary", level, "RRMSE spectrum"), SPECTRUM, 0.0, seed),
        ]  # fmt: skip
        if not quick:
            claims.append(_low(f"{at}: CC minus that of plain convolutions", "comparable",
                               minus("AT-AT", "plain convolutions", level), -COMPARABLE, 0.0, seed))  # fmt: skip
        if level in PAPER:
            noisy = float(np.mean(np.concatenate(found["CC", "noisy", level])))
            claims.append(_low(f"{at}: CC", f"above {PAPER[level]:g} (EEGdenoiseNet)",
                               np.concatenate(found["CC", "AT-AT", level]), PAPER[level], noisy, seed))  # fmt: skip
    claims += [
        _low("EEG without noise: CC of output and input", "(ours)", np.concatenate(untouched), CLEAN, 0.0, seed),
        stated(f"parameters that cleaning needs, at most {BUDGET}", "< 10 % of published ones", sizes["AT-AT"],
               sizes.get("plain convolutions"), sizes["AT-AT"] <= BUDGET),
    ]  # fmt: skip
    return claims


def _through(model: nn.Module, y: np.ndarray) -> np.ndarray:
    """A network's output for segments, in their units."""
    mean, size = y.mean(1, keepdims=True), y.std(1, keepdims=True)
    with torch.inference_mode():
        return model(torch.from_numpy((y - mean) / size).float()).double().numpy() * size + mean


def _low(
    claim: str, paper: str, values: np.ndarray, least: float, baseline: float, seed: int, strictly: bool = False
) -> dict[str, Any]:
    """A mean that should be at least `least`; with its interval if `strictly`."""
    found = bootstrap(values, seed=seed)
    holds = float(found.low) > least if strictly else float(found.value) >= least
    return stated(
        f"{claim}, at least {least:g}" if not strictly else f"{claim}, above {least:g}", paper, found, baseline, holds
    )


def _high(claim: str, paper: str, values: np.ndarray, most: float, baseline: float, seed: int) -> dict[str, Any]:
    """A mean that should be at most `most`."""
    found = bootstrap(values, seed=seed)
    return stated(f"{claim}, at most {most:g}", paper, found, baseline, float(found.value) <= most)


def _show(console: Console, title: str, names: list[str], levels: Any, value: Any) -> None:
    table = Table("", *(f"{level:g} dB" for level in levels), title=title)
    for name in names:
        table.add_row(name, *(f"{value(name, level):.3f}" for level in levels))
    console.print(table)


# ---------------------------------------------------------------- real EEG


def resampled_bursts(n: int, seed: int) -> np.ndarray:
    """Muscle noise (n, 512) at 128 Hz, of standard deviation 1."""
    noise = resample_poly(muscle_bursts(n, 1024, seed=seed).noise, 1, 2, axis=1)
    noise -= noise.mean(1, keepdims=True)
    return noise / noise.std(1, keepdims=True)


def windows(X: np.ndarray, step: int) -> np.ndarray:
    """Windows (n, n_channels, 512) of a recording (n_channels, n_times), without those of three times the usual deviation."""
    cut = np.lib.stride_tricks.sliding_window_view(X, 512, axis=1)[:, ::step].transpose(1, 0, 2)
    size = cut.std(2)
    return cut[(size <= 3 * np.median(size, axis=0)).all(1)]


def on_real(seed: int, progress: bool, console: Console) -> list[dict[str, Any]]:
    """Muscle noise added to real EEG: to each channel its own, and that of two muscles to all channels."""
    recording, events = p300()
    X = sosfiltfilt(butter(4, (1.0, 40.0), "bandpass", fs=128.0, output="sos"), recording.values)
    half = X.shape[1] // 2
    train, test = windows(X[:, :half], 128), windows(X[:, half:], 512)
    noise = resampled_bursts(2000, seed)
    emg_filter = EMGFilter(sampling_rate=128.0, epochs=EPOCHS, random_state=seed, progress=progress).fit(train, noise)
    wiener = WienerFilter(sampling_rate=128.0).fit(train, noise)
    filters = {
        "noisy": lambda y: y,
        "band-pass 1-20 Hz": lambda y: low_pass(y, 128.0),
        "Wiener, level estimated": wiener.transform,
        "AT-AT": emg_filter.transform,
    }
    rows = test.reshape(-1, 512)
    rows = rows - rows.mean(1, keepdims=True)
    fresh = resampled_bursts(len(rows), seed + 1000)
    found = {(name, level): cc(f(mix(rows, fresh, level)), rows) for level in TABLE for name, f in filters.items()}
    console.print(
        f"real EEG: {len(train)} trials of training, {len(rows)} segments of test, threshold {emg_filter.threshold_:g}"
    )
    _show(console, "real EEG, CC", list(filters), TABLE, lambda name, level: float(np.mean(found[name, level])))
    claims = []
    for level, least in REAL.items():
        at = f"real EEG, {level:g} dB"
        ours = found["AT-AT", level]
        claims.append(
            _low(f"{at}: CC minus that of the noisy signal", "(ours)", ours - found["noisy", level], least, 0.0, seed)
        )
        for rival in ("band-pass 1-20 Hz", "Wiener, level estimated"):
            claims.append(
                _low(
                    f"{at}: CC minus that of {rival}",
                    "(ours)",
                    ours - found[rival, level],
                    0.0,
                    0.0,
                    seed,
                    strictly=True,
                )
            )
    for level in REAL:
        claims.append(_evoked(X, half, events, filters, level, seed, console))
    return claims + _with_ica(recording[:, half:].copy(data=X[:, half:]), filters, seed, console)


def _evoked(
    X: np.ndarray, half: int, events: np.ndarray, filters: Any, level: float, seed: int, console: Console
) -> dict[str, Any]:
    """Correlation at Pz of the mean response to targets of the second half, cleaned, with the clean one."""
    pz = X[11, half:]
    noise = _continuous(1, len(pz), seed + 2000)[0]
    y = mix(pz, noise, level)
    at = events[(events[:, 1] == 2) & (events[:, 0] >= half) & (events[:, 0] + 128 <= X.shape[1]), 0] - half

    def mean(x: np.ndarray) -> np.ndarray:
        return x[at[:, None] + np.arange(128)].mean(0)

    found = {name: float(cc(mean(f(y)), mean(pz))) for name, f in filters.items()}
    console.print(f"P300 at Pz, {len(at)} targets, {level:g} dB:", {k: round(v, 3) for k, v in found.items()})
    return stated(f"real EEG, {level:g} dB: correlation of the mean P300 at Pz with the clean one, at least {EVOKED:g}", "(ours)",
                  found["AT-AT"], found["noisy"], found["AT-AT"] >= EVOKED)  # fmt: skip


def _continuous(n: int, n_times: int, seed: int) -> np.ndarray:
    """Muscle noise (n, n_times) at 128 Hz, segments end to end."""
    k = -(-n_times // 512)
    return resampled_bursts(n * k, seed).reshape(n, -1)[:, :n_times]


def _with_ica(recording: xr.DataArray, filters: Any, seed: int, console: Console) -> list[dict[str, Any]]:
    """Two muscles that reach all channels: what independent components can use, and filters of single channels cannot."""
    mne = need("mne")
    X, channels = recording.values, [str(c) for c in recording.channel.values]
    places = np.array([ELECTRODES[c] for c in channels])
    muscle = np.array([ELECTRODES[c] for c in MUSCLES])
    pattern = np.exp(-((places[:, None] - muscle) ** 2).sum(-1) / (2 * 0.45**2))
    sources = _continuous(2, X.shape[1], seed + 3000)
    spread = pattern @ sources
    rows = np.arange(X.shape[1] // 512) * 512
    found: dict[tuple[str, float], np.ndarray] = {}
    temporal = [channels.index(c) for c in MUSCLES]
    for level in LEVELS:
        scale = np.sqrt((X[temporal] ** 2).mean() / (spread[temporal] ** 2).mean()) / 10 ** (level / 10)
        y = X + scale * spread
        outputs = {name: f(y) for name, f in filters.items()}
        raw = to_raw(recording.copy(data=y))
        ica = mne.preprocessing.ICA(method="fastica", max_iter=500, random_state=seed, verbose="error")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of MNE: that 1 Hz was no high-pass of its own
            ica.fit(raw, verbose="error")
            marked = ica.find_bads_muscle(raw, verbose="error")[0]
        components = ica.get_sources(raw).get_data()
        likeness = np.abs(np.corrcoef(components, sources)[: len(components), len(components) :])
        for name, exclude in (
            ("ICA, components by find_bads_muscle", marked),
            ("ICA, the two likest the muscles", list(set(likeness.argmax(0).tolist()))),
        ):
            outputs[name] = ica.apply(raw.copy(), exclude=exclude, verbose="error").get_data() * 1e6
        console.print(
            f"ICA, {level:g} dB: find_bads_muscle marks {len(marked)} of {len(components)}; likeness {likeness.max(0).round(2)}"
        )
        for name, output in outputs.items():
            cut = [cc(output[:, at : at + 512], X[:, at : at + 512]) for at in rows]
            found[name, level] = np.concatenate(cut)
    names = list(dict.fromkeys(name for name, _ in found))
    _show(
        console, "two muscles, 16 channels, CC", names, LEVELS, lambda name, level: float(np.mean(found[name, level]))
    )
    return [
        _low(f"two muscles on 16 channels, {level:g} dB at the muscles: CC minus that of {rival}", "(ours)",
             found["AT-AT", level] - found[rival, level], 0.0, 0.0, seed, strictly=True)
        for level in (-7.0, 2.0) for rival in names if rival.startswith("ICA")
    ]  # fmt: skip
